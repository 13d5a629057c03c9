"""The torch operator `jq::embedding`: rows of a packed table by their numbers, dequantized by one compiled JAX program.

The numbers are padded to a power of two, so that few programs are compiled.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jq_torch import bridge, ops


@functools.lru_cache(maxsize=1024)
def _program(spec: str, dtype: str, apart: bool) -> Any:
    tree = ops.static_of(spec).tree

    def run(leaves: Any, ids: jax.Array) -> jax.Array:
        table = jax.tree.unflatten(tree, leaves)
        inside = (ids >= 0) & (ids < table.shape[-2])
        ids = jnp.where(inside, ids, 0)
        rows = table[ids].dequantize(dtype) if apart else table.dequantize(dtype)[ids]
        return jnp.where(inside[:, None], rows, jnp.nan)

    return jax.jit(run)


@functools.cache
def _apart(spec: str, shapes: tuple[tuple[int, ...], ...]) -> bool:
    structs = [
        jax.ShapeDtypeStruct(() if kind.scalar else shape, np.dtype(kind.dtype))
        for shape, kind in zip(shapes, ops.static_of(spec).kinds, strict=True)
    ]
    try:
        jax.eval_shape(_program(spec, "float32", True), structs, jax.ShapeDtypeStruct((1,), np.dtype(np.int32)))
    except ValueError:  # jq.qtensor: blocks do not end with rows
        return False
    return True


def apart(packed: list[torch.Tensor], spec: str) -> bool:
    """Whether a row can be dequantized without the others; if not, each look-up dequantizes the whole table."""
    return _apart(spec, tuple(tuple(t.shape) for t in packed))


def _embedding(
    ids: torch.Tensor, packed: list[torch.Tensor], spec: str, rows: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """[*ids.shape, columns]. A number outside the table is torch's error on a CPU; on a GPU, which nobody waits for, NaN."""
    flat = ids.reshape(-1)
    count = flat.shape[0]
    if count == 0:
        return torch.empty((*ids.shape, columns), dtype=dtype, device=ids.device)
    if ids.device != packed[0].device:
        raise RuntimeError(f"embedding: token numbers on {ids.device}, the packed table on {packed[0].device}")
    if not ids.is_cuda and not (int(flat.min()) >= 0 and int(flat.max()) < rows):
        raise IndexError("index out of range in self")
    padded = torch.nn.functional.pad(flat.to(torch.int32), (0, ops.bucket(count) - count))
    name = bridge.dtype_name(torch.float32 if dtype is torch.float64 else dtype)
    program = _program(spec, name, apart(packed, spec))
    with bridge.device_kept(packed[0]):
        found = bridge.from_jax(program(ops.leaves_of(packed, spec), bridge.to_jax(padded)))
    return found[:count].to(dtype).reshape(*ids.shape, columns)


# XLA's programs cannot be captured in a CUDA graph: torch.compile cuts its graphs here, where torch knows the tag
_TAGS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)
ops.library.define(
    "embedding(Tensor ids, Tensor[] packed, str spec, int rows, int columns, ScalarType dtype) -> Tensor", tags=_TAGS
)
for _key in ("CPU", "CUDA"):
    ops.library.impl("embedding", _embedding, _key)


@torch.library.register_fake("jq::embedding", lib=ops.library)
def _(
    ids: torch.Tensor, packed: list[torch.Tensor], spec: str, rows: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty((*ids.shape, columns), dtype=dtype, device=ids.device)


embedding = torch.ops.jq.embedding.default
