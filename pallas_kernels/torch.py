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
    if reason := tensors.refusal(w):
        return reason
    if w.ndim != 2 or w.in_features % 8:
        return f"a weight of {tuple(w.shape)}; from torch kernels take [N, K] with K a multiple of 8"
    return None


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
    """A compiled kernel: device pointers in, work on a stream out."""

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
        # PYFUNCTYPE keeps the interpreter's lock: the call only enqueues, giving the lock away would cost more
        kind = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
        self._launch = kind(compiled[1])

    def __call__(self, pointers: Any, stream: int) -> None:
        self._launch(self._context, stream, pointers)


class TorchWeight:
    """A QTensor in the kernels' order, held by torch; called like `torch.nn.functional.linear` without a bias.

    The first call with a number of rows (above 16: with a power of two) compiles, which a CUDA graph cannot capture.

    Attributes:
      shape: (N, K).
      tensors: the arrays by name, on the device.
    """

    def __init__(self, q: Any, device: Any = "cuda") -> None:
        """q: QTensor [N, K] that `refusal` finds nothing against.

        Raises:
          ValueError: no kernel takes the tensor.
        """
        if reason := refusal(q):
            raise ValueError(f"TorchWeight: {q!r}: {reason}")
        self.shape = q.shape
        plain = q.replace(extras={}, activation=None, source=None)
        with jax.default_device(_workplace()):
            packed = tensors.packed(tensors.prepare(plain.to_jax()))
            many = api.expand_scales(packed) if packed.form.scale == "u8" else packed
        self.tensors = {name: _tensor(np.asarray(a)).to(device) for name, a in arrays_of(packed).items()}
        self._few, self._many = skeleton_of(packed), skeleton_of(many)
        if many is not packed:  # nested scales, expanded for the kernel of many rows
            self.tensors["scales many"] = _tensor(np.asarray(many.scales)).to(device)
        self._device = self.tensors["codes"].device
        self._ready: dict[tuple[int, torch.dtype], _Call] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] bfloat16 or float16 on the weight's device -> [..., N], summed in float32.

        Raises:
          ValueError: another last axis, dtype or device.
        """
        n, k = self.shape
        size = x.numel()
        rows = size // k
        call = self._ready.get((rows if rows <= 16 else bucket(rows), x.dtype))
        if call is None:
            self._check(x)
            if rows == 0:
                return x.new_empty((*x.shape[:-1], n))
            call = self._prepare(bucket(rows), x.dtype)
        if x.shape[-1] != k or x.get_device() != self._device.index:
            self._check(x)
        if call.rows == rows and call.perm is None and x.is_contiguous():  # nothing to lay out: the path of decoding
            y = x.new_empty((*x.shape[:-1], n))
            call(x.data_ptr(), y.data_ptr())
            return y
        flat = x.reshape(-1, k)
        if call.perm is not None:
            flat = flat.index_select(1, call.perm)
        if call.rows != rows:
            flat = torch.nn.functional.pad(flat, (0, 0, 0, call.rows - rows))
        flat = flat.contiguous()
        y = flat.new_empty((call.rows, n))
        call(flat.data_ptr(), y.data_ptr())
        return y[:rows].reshape(*x.shape[:-1], n)

    def _check(self, x: torch.Tensor) -> None:
        if x.shape[-1] != self.shape[1]:
            raise ValueError(f"x of shape {tuple(x.shape)} does not fit a weight of {tuple(self.shape)}")
        if x.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"x of {x.dtype}; kernels take bfloat16 and float16")
        if x.device != self._device:
            raise ValueError(f"x is on {x.device}, the weight on {self._device}")

    def _prepare(self, rows: int, dtype: torch.dtype) -> _Call:
        """What a call with so many rows needs; equal weights of a model share the compiled kernel.

        Raises:
          RuntimeError: the stream is being captured; compiling is not possible then.
        """
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"a kernel for {rows} rows is not compiled yet: call the layer once before capturing")
        (n, k), index = self.shape, self._device.index
        name = str(dtype).removeprefix("torch.")
        gathered = self._few.perm is not None and rows == 1  # one row is permuted by the kernel, more are before it
        choice = select.choose(rows, n, k, self._few.form, *_device(index), gathered)
        skeleton = self._few if choice.kernel == "stream" else self._many
        permute = skeleton.perm is not None and not (choice.kernel == "stream" and rows == 1)
        if permute:
            skeleton = skeleton.replace(perm=None)
        expanded = skeleton.form != self._few.form
        found = [self.tensors["scales many" if n == "scales" and expanded else n] for n in arrays_of(skeleton)]
        with torch.cuda.device(index):
            launcher = _launcher(_Key(skeleton), rows, name, choice, index)
        call = _Call(launcher, found, rows, self.tensors["perm"] if permute else None)
        self._ready[rows, dtype] = call
        return call


class _Call:
    """A compiled kernel with the pointers of one weight.

    Attributes:
      rows: of x, as compiled.
      perm: order of the columns of x that the kernel takes, None for the given one.
    """

    def __init__(self, launcher: _Launcher, weight: list[torch.Tensor], rows: int, perm: torch.Tensor | None) -> None:
        self.rows, self.perm = rows, perm
        self._launcher, self._index = launcher, weight[0].device.index
        self._weight = [t.data_ptr() for t in weight]
        self._pointers = ctypes.c_void_p * (len(weight) + 2)
        self._guard = torch.cuda.device_count() > 1

    def __call__(self, x: int, y: int) -> None:
        pointers = self._pointers(x, *self._weight, y)
        if self._guard:
            with torch.cuda.device(self._index):
                self._launcher(pointers, torch._C._cuda_getCurrentRawStream(self._index))
        else:
            self._launcher(pointers, torch._C._cuda_getCurrentRawStream(self._index))


def _workplace() -> Any:
    """Where weights are brought into the kernels' order: JAX's GPU, tens of times faster, where it has one."""
    return jax.local_devices()[0] if jax.default_backend() == "gpu" else jax.local_devices(backend="cpu")[0]


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
def _device(index: int) -> tuple[str, int]:
    found = torch.cuda.get_device_properties(index)
    return select.device_key(found.name), found.multi_processor_count


@functools.lru_cache(maxsize=512)
def _launcher(key: _Key, rows: int, dtype: str, choice: select.Choice, device: int) -> _Launcher:
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
