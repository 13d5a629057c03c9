"""From a packed weight to a compiled kernel that torch launches: the parts of `torch` that JAX is needed for.

What JAX traces and lowers is compiled by Mosaic's own function in the CUDA plugin; that and the finder of the kernel in a
lowered program are private parts of jax 0.11.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import jax
import jax.numpy as jnp
import torch

from pallas_kernels import select
from pallas_kernels.form import Packed


def arrays_of(w: Packed) -> dict[str, Any]:
    """The arrays that a kernel takes beside x, by name, scalars as one element."""
    named = {"codes": w.codes, "scales": w.scales, "zeros": w.zeros, "perm": w.perm, **w.tables}
    return {n: _one_axis(a) for n, a in named.items() if a is not None}


def _one_axis(a: Any) -> Any:
    if a.shape:
        return a
    return jax.ShapeDtypeStruct((1,), a.dtype) if isinstance(a, jax.ShapeDtypeStruct) else a.reshape(1)


def with_arrays(w: Packed, arrays: dict[str, Any]) -> Packed:
    """A packed weight with other arrays under the same names."""
    fields = {n: arrays.get(n) for n in ("codes", "scales", "zeros", "perm")}
    return w.replace(**fields, tables={n: arrays[n] for n in w.tables})


def lower(w: Packed, rows: int, dtype: str, choice: select.Choice) -> Any:
    """The lowered program of one kernel for x [rows, K] of a 16-bit dtype: a single Mosaic call.

    Its arguments: x, the arrays of `w`, and where `w` is a stack an int32[1], which of it.
    """
    structs = arrays_of(skeleton_of(w))
    x = jax.ShapeDtypeStruct((rows, w.shape[1]), dtype)
    which = [jax.ShapeDtypeStruct((1,), jnp.int32)] if w.stacked else []

    def run(x: jax.Array, *values: jax.Array) -> jax.Array:
        packed = with_arrays(w, dict(zip(structs, values)))
        return select.KERNELS[choice.kernel].matmul(x, packed, choice.config, None, *values[len(structs) :])

    return jax.jit(run).trace(x, *structs.values(), *which).lower(lowering_platforms=("cuda",))


def private() -> tuple[Any, Any]:
    """JAX's finder of the kernel in a lowered program, and the library with Mosaic's compiler."""
    from jax._src.pallas.mosaic_gpu.torch import _find_mgpu_call_in_module

    try:
        import jax_plugins.xla_cuda13 as plugin
    except ImportError:
        import jax_plugins.xla_cuda12 as plugin
    return _find_mgpu_call_in_module, ctypes.CDLL(plugin._get_library_path())


pointer = ctypes.c_void_p.from_param  # address -> an argument: a c_void_p would be made into one at each call


class Launcher:
    """A compiled kernel: device pointers in, work on a stream out."""

    def __init__(self, lowered: Any) -> None:
        import jax.experimental.mosaic.gpu as mgpu
        from jax._src.lib.mlir import passmanager

        find, library = private()
        module = lowered.compiler_ir()
        with module.context:
            mgpu.dialect.register_inliner_extensions(module.context)
            passmanager.PassManager.parse("builtin.module(inline{default-pipeline=})").run(module.operation)
            call, _, _, _ = find(module)
            code = call.attributes["mhlo.backend_config"]["module"].value_bytes
        torch.cuda.init()
        library.MosaicGpuCompile.argtypes = [ctypes.c_char_p, ctypes.c_int]
        library.MosaicGpuCompile.restype = ctypes.POINTER(ctypes.c_void_p)
        compiled = library.MosaicGpuCompile(code, len(code))
        if not compiled:
            raise RuntimeError("Mosaic could not compile the kernel")
        self._context = pointer(compiled[0])
        # PYFUNCTYPE keeps the interpreter's lock: the call only enqueues, giving the lock away would cost more.
        # Without argument types, which would cost a conversion each, it takes ctypes' own objects alone.
        self._launch = ctypes.PYFUNCTYPE(None)(compiled[1])

    @property
    def parts(self) -> tuple[Any, Any]:
        """(C function (context, stream, array of pointers) that takes what `pointer` and ctypes.byref make, context)."""
        return self._launch, self._context


def skeleton_of(w: Packed) -> Packed:
    """A packed weight with shapes in place of arrays."""
    return with_arrays(w, {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in arrays_of(w).items()})


class Key:
    """A packed skeleton by value: two layers of equal shapes, dtypes and form are one key."""

    def __init__(self, skeleton: Packed) -> None:
        self.skeleton = skeleton
        shapes = tuple((n, tuple(a.shape), str(a.dtype)) for n, a in arrays_of(skeleton).items())
        self.value = (skeleton.form, skeleton.shape, shapes)

    def __hash__(self) -> int:
        return hash(self.value)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Key) and self.value == other.value


@functools.lru_cache(maxsize=512)
def launcher_of(key: Key, rows: int, dtype: str, choice: select.Choice, device: int) -> Launcher:
    lowered = lower(key.skeleton, rows, dtype, choice)
    with torch.cuda.device(device):  # XLA may have left another one current
        return Launcher(lowered)
