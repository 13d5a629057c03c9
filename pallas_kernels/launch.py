"""From a function that emits PTX to a launch on JAX arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl  # noqa: F401  (registers the lowering)
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.form import Packed
from pallas_kernels.ptx import Int


def launch(
    emit: Callable[[Any, dict[str, ir.Value], Int], None],
    name: str,
    arrays: Mapping[str, Any],
    out: Mapping[str, jax.ShapeDtypeStruct],
    *,
    clusters: int,
    warps: int,
    shared_bytes: int,
    cluster: int = 1,
) -> tuple[jax.Array, ...]:
    """Runs a kernel.

    Args:
      emit: traces the kernel of one thread; takes Mosaic's context, the memory references of arguments and results by
        name (see `pointers`), and the address of the block's shared memory.
      arrays: arguments by name: arrays, or `jax.Ref`s that the kernel writes.
      out: shapes and types of the results by name.
      clusters, cluster, warps: size of the launch: clusters, blocks of each, warps of a block (a multiple of 4).

    Returns:
      The results, in order.
    """
    names = [*arrays, *out]

    def body(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in refs))
        def kernel(ctx: Any, *refs: ir.Value) -> None:
            ptx.fix_name(name)
            emit(ctx, dict(zip(names, refs[:-1], strict=True)), ptx.shared_pointer(refs[-1]))

        kernel(*refs)

    return plgpu.kernel(
        body,
        out_type=tuple(out.values()),
        grid=(clusters,),
        grid_names=("cluster",),
        cluster=(cluster,),
        cluster_names=("rank",),
        num_threads=warps // 4,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        scratch_types=[plgpu.SMEM((shared_bytes // 4,), jnp.int32)],
        kernel_name=name,
    )(*arrays.values())


def arguments(x: jax.Array, w: Packed, bias: jax.Array | None, layer: jax.Array | None) -> dict[str, jax.Array]:
    """The arrays of a product by name, scalars as one element."""
    named = {"x": x, "codes": w.codes, "scales": w.scales, "zeros": w.zeros, "perm": w.perm, "bias": bias}
    named |= {**w.tables, "layer": layer}
    return {name: a.reshape(1) if a.ndim == 0 else a for name, a in named.items() if a is not None}


def pointers(refs: Mapping[str, ir.Value], arrays: Mapping[str, Any] | None = None) -> dict[str, ir.Value]:
    """64-bit addresses of arguments and results.

    Args:
      arrays: what `arguments` gives; with a layer among them the addresses are those of its slice of the weight.
    """
    at = {name: ptx.global_pointer(ref) for name, ref in refs.items()}
    if arrays and "layer" in arrays:
        index = Int(ptx.load_global(at["layer"], "u32"))
        for name, array in arrays.items():
            if name not in ("x", "bias", "layer"):
                nbytes = math.prod(array.shape[1:]) * array.dtype.itemsize
                at[name] = ptx.slice_address(at[name], index, nbytes)
    return at
