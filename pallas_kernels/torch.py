"""The kernels on torch tensors: launched on torch's current stream, a few microseconds of host time, capturable.

    layer = TorchWeight(q, device="cuda")      # once: the kernels' order of the bits of a QTensor, as torch tensors
    y = layer(x)                               # x [..., K] bfloat16 or float16

JAX traces and lowers a kernel (one for each number of rows up to 16, then for powers of two); what runs is its compiled
host function, called with torch's stream and plain pointers. No DLPack, no XLA executable, no second stream, so that
order is torch's own and a CUDA graph captures it. JAX's public `as_torch_kernel` launches on the default stream and
takes 120 us a call (KERNELS: jax 0.11, H100); its private parts do the compiling here, behind `available`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import torch

from pallas_kernels import api, select, tensors
from pallas_kernels.form import Packed

_TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int32": torch.int32}
_TORCH |= {"uint8": torch.uint8, "int8": torch.int8}


def available() -> str | None:
    """None where torch tensors can run the kernels, else the reason why not."""
    if jax.__version_info__ < (0, 11):
        return f"jax {jax.__version__}: the kernels need 0.11"
    if not torch.cuda.is_available():
        return "torch has no CUDA device"
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    if capability not in select.ARCHITECTURES:
        return f"compute capability {capability}: kernels are there for {', '.join(select.ARCHITECTURES)}"
    try:
        _private()
    except (ImportError, AttributeError, OSError) as e:
        return f"this jax has other private parts than 0.11: {e}"
    return None


def refusal(w: Any) -> str | None:
    """Why no kernel takes a QTensor, or None; the device is `available`'s business."""
    return tensors.refusal(w)


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
    """The lowered program of one kernel for x [rows, K] of a 16-bit dtype: a single Mosaic call."""
    structs = arrays_of(skeleton_of(w))
    x = jax.ShapeDtypeStruct((rows, w.shape[1]), dtype)

    def run(x: jax.Array, *values: jax.Array) -> jax.Array:
        packed = with_arrays(w, dict(zip(structs, values, strict=True)))
        return select.KERNELS[choice.kernel].matmul(x, packed, choice.config)

    return jax.jit(run).trace(x, *structs.values()).lower(lowering_platforms=("cuda",))


def _private() -> tuple[Any, Any]:
    """JAX's finder of the kernel in a lowered program, and the library with Mosaic's compiler."""
    from jax._src.pallas.mosaic_gpu.torch import _find_mgpu_call_in_module

    try:
        import jax_plugins.xla_cuda13 as plugin
    except ImportError:
        import jax_plugins.xla_cuda12 as plugin
    return _find_mgpu_call_in_module, ctypes.CDLL(plugin._get_library_path())


class _Launcher:
    """A compiled kernel: device pointers in, work on torch's current stream out."""

    def __init__(self, lowered: Any) -> None:
        import jax.experimental.mosaic.gpu as mgpu
        from jax._src.lib.mlir import passmanager

        find, library = _private()
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
        self._context = compiled[0]
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
        self._launch = kind(compiled[1])

    def __call__(self, pointers: Any, stream: int) -> None:
        self._launch(self._context, stream, pointers)


class TorchWeight:
    """A QTensor in the kernels' order, held by torch; called like `torch.nn.functional.linear` without a bias.

    Attributes:
      shape: (N, K).
      tensors: the arrays by name, on the device.
    """

    def __init__(self, q: Any, device: Any = "cuda") -> None:
        """q: QTensor [N, K] that `refusal` finds nothing against, N and K multiples of 8.

        Raises:
          ValueError: no kernel takes the tensor.
        """
        if reason := refusal(q):
            raise ValueError(f"TorchWeight: {q!r}: {reason}")
        n, k = q.shape
        if n % 8 or k % 8:
            raise ValueError(f"TorchWeight: {q!r}: N and K must be multiples of 8")
        plain = q.replace(extras={}, activation=None, source=None)
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            packed = tensors.packed(tensors.prepare(plain.to_jax()))
            many = api.expand_scales(packed) if packed.form.scale == "u8" else packed
        self.shape = (n, k)
        self.tensors = {name: _tensor(np.asarray(a)).to(device) for name, a in arrays_of(packed).items()}
        self._few, self._many = skeleton_of(packed), skeleton_of(many.replace(perm=None))
        if many is not packed:  # nested scales, expanded for the kernel of many rows
            self.tensors["scales many"] = _tensor(np.asarray(many.scales)).to(device)
        self._ready: dict[tuple[int, torch.dtype], _Call] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, self.shape[1])
        rows = flat.shape[0]
        if rows == 0:
            return x.new_empty((*x.shape[:-1], self.shape[0]))
        call = self._ready.get((rows, x.dtype)) or self._prepare(rows, x.dtype)
        if call.permute:
            flat = flat.index_select(1, self.tensors["perm"])
        if call.rows != rows:
            flat = torch.nn.functional.pad(flat, (0, 0, 0, call.rows - rows))
        elif not flat.is_contiguous():
            flat = flat.contiguous()
        y = flat.new_empty((call.rows, self.shape[0]))
        call.pointers[0], call.pointers[call.last] = flat.data_ptr(), y.data_ptr()
        call.launcher(call.pointers, torch.cuda.current_stream(x.device).cuda_stream)
        return y[:rows].reshape(*x.shape[:-1], self.shape[0])

    def _prepare(self, rows: int, dtype: torch.dtype) -> _Call:
        """What a call with so many rows needs; equal weights of a model share the compiled kernel."""
        n, k = self.shape
        wanted, name = bucket(rows), str(dtype).removeprefix("torch.")
        choice = select.choose(wanted, n, k, self._few.form, *_device(self.tensors["codes"].device))
        skeleton = self._few if choice.kernel == "stream" else self._many
        names = list(arrays_of(skeleton))
        pointers = (ctypes.c_void_p * (len(names) + 2))()
        expanded = skeleton is self._many and "scales many" in self.tensors
        for i, key in enumerate(names, 1):
            pointers[i] = self.tensors["scales many" if key == "scales" and expanded else key].data_ptr()
        permute = skeleton is self._many and "perm" in self.tensors
        call = _Call(_launcher(_Key(skeleton), wanted, name, choice), pointers, len(names) + 1, wanted, permute)
        self._ready[rows, dtype] = call
        return call


@dataclasses.dataclass
class _Call:
    """A compiled kernel with the pointers of one weight; x goes first into `pointers`, y at `last`."""

    launcher: _Launcher
    pointers: Any
    last: int
    rows: int
    permute: bool


def skeleton_of(w: Packed) -> Packed:
    """A packed weight with shapes in place of arrays."""
    return with_arrays(w, {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in arrays_of(w).items()})


class _Key:
    """A packed skeleton by value: two layers of equal shapes, dtypes and form are one key."""

    def __init__(self, skeleton: Packed) -> None:
        self.skeleton = skeleton
        shapes = tuple((n, tuple(a.shape), str(a.dtype)) for n, a in arrays_of(skeleton).items())
        self.value = (skeleton.form, skeleton.shape, shapes)

    def __hash__(self) -> int:
        return hash(self.value)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Key) and self.value == other.value


@functools.cache
def _device(device: torch.device) -> tuple[str, int]:
    found = torch.cuda.get_device_properties(device)
    return select.device_key(found.name), found.multi_processor_count


@functools.lru_cache(maxsize=512)
def _launcher(key: _Key, rows: int, dtype: str, choice: select.Choice) -> _Launcher:
    return _Launcher(lower(key.skeleton, rows, dtype, choice))


def bucket(rows: int) -> int:
    """Rows that a kernel is compiled for: each number up to 16, then powers of two, above 4096 multiples of it."""
    if rows <= 16:
        return rows
    if rows > 4096:
        return -(-rows // 4096) * 4096
    return 1 << (rows - 1).bit_length()


def _tensor(array: np.ndarray) -> torch.Tensor:
    name = array.dtype.name
    if name == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array).copy()).to(_TORCH[name])
