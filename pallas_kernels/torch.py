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
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from pallas_kernels import api, select, tensors
from pallas_kernels.form import Packed

_TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int32": torch.int32}
_TORCH |= {"uint8": torch.uint8, "int8": torch.int8}
_SHAPES = 64  # of x whose calls a weight remembers


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
    if w.ndim != 2 or w.in_features % 8 or w.out_features % 8:
        return f"a weight of {tuple(w.shape)}; from torch kernels take [N, K] in multiples of 8"
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

    @property
    def parts(self) -> tuple[Any, int]:
        """(C function (context, stream, pointers), context)."""
        return self._launch, self._context


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
        with jax.default_device(_workplace(torch.device(device))):
            packed = tensors.packed(tensors.prepare(plain.to_jax()))
            many = api.expand_scales(packed) if packed.form.scale == "u8" else packed
        self.tensors = {name: _tensor(np.asarray(a)).to(device) for name, a in arrays_of(packed).items()}
        self._few, self._many = skeleton_of(packed), skeleton_of(many)
        if many is not packed:  # nested scales, expanded for the kernel of many rows
            self.tensors["scales many"] = _tensor(np.asarray(many.scales)).to(device)
        self._device = self.tensors["codes"].device
        self._index: int = self.tensors["codes"].get_device()
        self._ready: dict[tuple[int, torch.dtype], _Call] = {}
        self._direct: dict[tuple[Any, torch.dtype], Callable[[torch.Tensor], torch.Tensor]] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] bfloat16 or float16 on the weight's device -> [..., N], summed in float32.

        Raises:
          ValueError: another last axis, dtype or device.
        """
        direct = self._direct.get((x.shape, x.dtype))  # the path of decoding: every line of it counts
        if direct is not None and x.is_contiguous() and x.get_device() == self._index:
            return direct(x)
        self._check(x)
        n, k = self.shape
        rows = x.numel() // k
        if rows == 0:
            return x.new_empty((*x.shape[:-1], n))
        padded = bucket(rows)
        call = self._ready.get((padded, x.dtype)) or self._prepare(padded, x.dtype)
        if padded == rows and call.perm is None:  # nothing to lay out
            if len(self._direct) >= _SHAPES:
                self._direct.clear()
            self._direct[x.shape, x.dtype] = call.direct((*x.shape[:-1], n), x.dtype)
        flat = x.reshape(-1, k)
        if call.perm is not None:
            flat = flat.index_select(1, call.perm)
        if padded != rows:
            flat = torch.nn.functional.pad(flat, (0, 0, 0, padded - rows))
        return call.direct((padded, n), x.dtype)(flat.contiguous())[:rows].reshape(*x.shape[:-1], n)

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
        (n, k), index = self.shape, self._index
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
        call = _Call(launcher, found, self.tensors["perm"] if permute else None)
        self._ready[rows, dtype] = call
        return call


class _Call:
    """A compiled kernel with the pointers of one weight.

    Attributes:
      perm: order of the columns of x that the kernel takes, None for the given one.
    """

    def __init__(self, launcher: _Launcher, weight: list[torch.Tensor], perm: torch.Tensor | None) -> None:
        self.perm = perm
        self._launcher, self._index = launcher, weight[0].get_device()
        self._weight = [t.data_ptr() for t in weight]

    def direct(self, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        """The call for contiguous tensors of one shape -> a new tensor of `shape`; everything else is made beforehand.

        Arrays of pointers are used again, one for each call that is under way (threads).
        """
        (start, context), index, weight = self._launcher.parts, self._index, self._weight
        kind, last = ctypes.c_void_p * (len(weight) + 2), len(weight) + 1
        free: list[Any] = []
        empty, strides, stream = _empty(index), _strides(shape), torch._C._cuda_getCurrentRawStream

        def launch(x: torch.Tensor) -> torch.Tensor:
            y = empty(shape, strides, dtype)
            try:
                pointers = free.pop()
            except IndexError:
                pointers = kind(0, *weight)
            pointers[0], pointers[last] = x.data_ptr(), y.data_ptr()
            start(context, stream(index), pointers)
            free.append(pointers)
            return y

        if torch.cuda.device_count() == 1:
            return launch

        def guarded(x: torch.Tensor) -> torch.Tensor:
            if torch._C._cuda_getDevice() == index:
                return launch(x)
            with torch.cuda.device(index):
                return launch(x)

        return guarded


def _empty(index: int) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]:
    """`torch.empty_strided` on this device, which is the current one; what torch.compile's code calls takes a third."""
    found = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
    if found is not None:
        return found
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=index)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _workplace(device: torch.device) -> Any:
    """Where weights are brought into the kernels' order: the GPU they are for, tens of times faster, where JAX has it."""
    found = jax.local_devices()
    if found[0].platform != "gpu":
        return jax.local_devices(backend="cpu")[0]
    return found[min(device.index or 0, len(found) - 1)]


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
    lowered = lower(key.skeleton, rows, dtype, choice)
    with torch.cuda.device(device):  # XLA may have left another one current
        return _Launcher(lowered)


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
