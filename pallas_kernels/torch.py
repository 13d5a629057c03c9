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

from pallas_kernels import select, tensors
from pallas_kernels.form import Packed
from pallas_kernels.torch_launch import (
    Key,
    Launcher,
    arrays_of,
    launcher_of,
    pointer,
    private,
    skeleton_of,
)

_TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int32": torch.int32}
_TORCH |= {"uint8": torch.uint8, "int8": torch.int8}
_SHAPES = 64  # of x whose calls a weight remembers
_ALIGNED = 16  # bytes: what the kernels copy at a time
_streams: dict[int, Any] = {}  # by handle, as ctypes takes them at once
Call = Callable[[torch.Tensor], Any]


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
        private()
    except (ImportError, AttributeError, OSError) as e:
        return f"this jax has other private parts than 0.11: {e}"
    return None


def refusal(w: Any) -> str | None:
    """Why no kernel takes a QTensor, or None; the device is `available`'s business."""
    if reason := tensors.refusal(w):
        return reason
    if w.ndim > 3 or w.in_features % 8 or w.out_features % 8:
        return f"a weight of {tuple(w.shape)}; from torch kernels take [N, K] and [E, N, K] in multiples of 8"
    g_idx = getattr(w, "g_idx", None)
    if w.ndim == 3 and g_idx is not None and np.any(np.asarray(g_idx) != np.arange(w.in_features) // w.group_size):
        return "an act-order stack; from torch kernels take the given order"
    return None


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
        made = prepare(q.replace(activation=None, source=None), torch.device(device)).replace(extras={})
        structs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), made)
        self._take(structs, jax.tree.map(lambda a: _tensor(np.asarray(a)).to(device), made))

    @classmethod
    def over(cls, structs: Any, held: Any) -> TorchWeight:
        """Kernels on memory that somebody else holds; nothing is copied.

        Args:
          structs: a prepared QTensor [N, K] with shapes and types in place of arrays.
          held: the same with torch tensors of these bits (whatever their own dtype, scalars as one element) on a GPU.
        """
        made = cls.__new__(cls)
        made._take(structs, held)
        return made

    def _take(self, structs: Any, held: Any) -> None:
        self.shape = structs.shape[-2:]
        self._skeleton = _skeleton(structs)
        self.tensors: dict[str, torch.Tensor] = _named(held)
        self._device = self.tensors["codes"].device
        if "offset" in self._skeleton.tables and "offset" not in self.tensors:
            self.tensors["offset"] = torch.zeros(self._skeleton.tables["offset"].shape, device=self._device)
        self._index: int = self.tensors["codes"].get_device()
        self._ready: dict[tuple[int, torch.dtype], _Call] = {}
        self._direct: dict[tuple[Any, torch.dtype], Call] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] bfloat16 or float16 on the weight's device -> [..., N], summed in float32.

        Raises:
          ValueError: another last axis, dtype or device.
        """
        direct = self._direct.get((x.shape, x.dtype))
        if direct is not None and x.is_contiguous() and x.get_device() == self._index:
            return direct(x)
        self._check(x)
        n, k = self.shape
        rows = x.numel() // k
        if rows == 0:
            return x.new_empty((*x.shape[:-1], n))
        padded = bucket(rows)
        call = self.ready(padded, x.dtype)
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

    def of(self, dtype: torch.dtype, takes: Callable[[torch.Tensor], bool] = lambda x: True) -> Call:
        """The same for x of one dtype, to be kept by the caller; None for x of another, and for what `takes` refuses.

        This is the path of decoding, every line of it counts: most calls are with a tensor like that of the call before.

        Args:
          takes: asked once for tensors that are alike (`_like`), so that each call has one look at its x.
        """
        known: dict[Any, tuple[Callable[[Any], bool], Call]] = {}  # by shape: for which x, and their call
        last: tuple[Callable[[Any], bool], Call] = _nothing, self

        def call(x: torch.Tensor) -> torch.Tensor | None:
            nonlocal last
            like, direct = last
            if like(x):
                return direct(x)
            if (found := known.get(x.shape)) is not None and found[0](x):
                last = found
                return found[1](x)
            if x.dtype is not dtype or not takes(x):
                return None
            y = self(x)
            if x.is_contiguous() and (made := self._direct.get((x.shape, dtype))) is not None:
                if len(known) >= _SHAPES:
                    known.clear()
                last = known[x.shape] = _like(x), made
            return y

        return call

    def _check(self, x: torch.Tensor) -> None:
        if x.shape[-1] != self.shape[1]:
            raise ValueError(f"x of shape {tuple(x.shape)} does not fit a weight of {tuple(self.shape)}")
        if x.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"x of {x.dtype}; kernels take bfloat16 and float16")
        if x.device != self._device:
            raise ValueError(f"x is on {x.device}, the weight on {self._device}")

    def ready(self, rows: int, dtype: torch.dtype) -> _Call:
        """The kernel for so many rows, one of the numbers that `bucket` gives."""
        return self._ready.get((rows, dtype)) or self._prepare(rows, dtype)

    def _prepare(self, rows: int, dtype: torch.dtype) -> _Call:
        """What a call with so many rows needs; equal weights of a model share the compiled kernel.

        Raises:
          RuntimeError: the stream is being captured; compiling is not possible then.
        """
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"a kernel for {rows} rows is not compiled yet: call the layer once before capturing")
        (n, k), index = self.shape, self._index
        name = str(dtype).removeprefix("torch.")
        skeleton = self._skeleton
        gathered = skeleton.perm is not None and rows == 1  # one row is permuted by the kernel, more are before it
        choice = select.choose(rows, n, k, skeleton.form, *_device(index), gathered)
        permute = skeleton.perm is not None and not (choice.kernel == "stream" and rows == 1)
        if permute:
            skeleton = skeleton.replace(perm=None)
        found = [self.tensors[name] for name in arrays_of(skeleton)]
        with torch.cuda.device(index):
            launcher = launcher_of(Key(skeleton), rows, name, choice, index)
        call = _Call(launcher, found, self.tensors["perm"] if permute else None)
        self._ready[rows, dtype] = call
        return call


class _Call:
    """A compiled kernel with the pointers of one weight.

    Attributes:
      perm: order of the columns of x that the kernel takes, None for the given one.
    """

    def __init__(self, launcher: Launcher, weight: list[torch.Tensor], perm: torch.Tensor | None) -> None:
        self.perm = perm
        self._launcher, self._index = launcher, weight[0].get_device()
        self._weight = [t.data_ptr() for t in weight]

    def at(self, x: int, which: int, y: int) -> None:
        """The call for one weight of a stack, by the addresses of x, of an int32 that says which weight, and of the result."""
        (start, context), weight = self._launcher.parts, self._weight
        pointers = (ctypes.c_void_p * (len(weight) + 3))(x, *weight, which, y)
        start(context, ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(self._index)), pointers)

    def direct(self, shape: tuple[int, ...], dtype: torch.dtype) -> Call:
        """The call for contiguous tensors of one shape -> a new tensor of `shape`; everything else is made beforehand.

        Arrays of pointers are used again, one for each call that is under way (threads).
        """
        (start, context), index, weight = self._launcher.parts, self._index, self._weight
        kind, last = ctypes.c_void_p * (len(weight) + 2), len(weight) + 1
        free: list[tuple[Any, Any]] = []  # an array, and an argument that points at it
        empty, strides, stream = _empty(index), _strides(shape), torch._C._cuda_getCurrentRawStream

        def launch(x: torch.Tensor) -> torch.Tensor:
            y = empty(shape, strides, dtype)
            try:
                held = free.pop()
            except IndexError:
                array = kind(0, *weight)
                held = array, ctypes.byref(array)
            array, argument = held
            source = x.data_ptr()
            if source % _ALIGNED:
                source = (x := x.clone()).data_ptr()
            array[0] = source
            array[last] = y.data_ptr()
            number = stream(index)
            try:
                on = _streams[number]
            except KeyError:
                on = _streams[number] = pointer(number)
            start(context, on, argument)
            free.append(held)
            return y

        if torch.cuda.device_count() == 1:
            return launch

        def guarded(x: torch.Tensor) -> torch.Tensor:
            if torch._C._cuda_getDevice() == index:
                return launch(x)
            with torch.cuda.device(index):
                return launch(x)

        return guarded


def aligned(x: torch.Tensor) -> torch.Tensor:
    """A dense tensor that begins where the kernels can copy from: itself, or where it is a part of another a copy."""
    return x.clone() if x.data_ptr() % _ALIGNED else x


def _empty(index: int) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]:
    """`torch.empty_strided` on this device, which is the current one; what torch.compile's code calls takes a third."""
    found = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
    if found is not None:
        return found
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=index)


def _nothing(x: Any) -> bool:
    return False


def _like(x: torch.Tensor) -> Callable[[Any], bool]:
    """Whether an object is a tensor like x, in one call, as torch.compile's code asks it of its inputs.

    That is: type, dtype, device, shape, strides, whether it requires a gradient, and what torch would do with it now:
    inference mode, autocast, transforms, torch.jit.trace; not the modes of Python (`TorchDispatchMode`).
    """
    strides = [None if n == 1 else stride for n, stride in zip(x.shape, x.stride())]
    try:
        found = torch._C._dynamo.guards.TensorGuards
        return found(x, dynamic_dims_sizes=[list(x.shape)], dynamic_dims_strides=[strides]).check
    except (AttributeError, TypeError, SystemError):  # another torch: each tensor is looked at anew
        return _nothing


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def prepare(q: Any, device: torch.device) -> Any:
    """A QTensor [N, K] in the kernels' order, its arrays JAX's; `pallas_kernels.restore` is the inverse.

    Args:
      q: with numpy arrays, or JAX arrays on the device that JAX works on for `device`.

    Raises:
      ValueError: no kernel takes the tensor.
    """
    if reason := refusal(q):
        raise ValueError(f"{q!r}: {reason}")
    with jax.default_device(_workplace(device)):
        return tensors.prepare(q.to_jax())


def _named(w: Any) -> dict[str, Any]:
    """The arrays of a prepared QTensor by the names that `arrays_of` gives those of its `Packed`."""
    if hasattr(w, "table"):
        nested = hasattr(w.absmax, "codes")
        found = {"codes": w.codes, "scales": w.absmax.codes if nested else w.absmax, "table": w.table}
        if nested:
            found |= {"table2": w.absmax.table, "absmax2": w.absmax.absmax, "offset": w.absmax.offset}
    else:
        found = {"codes": w.codes, "scales": w.scales}
        found |= {"zeros": getattr(w, "zeros", None), "perm": getattr(w, "g_idx", None)}
    return {name: a for name, a in found.items() if a is not None}


def _skeleton(structs: Any) -> Packed:
    """The kernels' view of a prepared QTensor of shape structs."""
    leaves, tree = jax.tree.flatten(structs)
    return _skeleton_of(tree, tuple((tuple(a.shape), np.dtype(a.dtype)) for a in leaves))


@functools.lru_cache(maxsize=512)
def _skeleton_of(tree: Any, shapes: tuple[tuple[tuple[int, ...], np.dtype], ...]) -> Packed:
    structs = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*s) for s in shapes])
    return skeleton_of(jax.eval_shape(tensors.packed, structs))


def _workplace(device: torch.device) -> Any:
    """Where weights are brought into the kernels' order: the GPU they are for, tens of times faster, where JAX has it."""
    found = jax.local_devices()
    if found[0].platform != "gpu":
        return jax.local_devices(backend="cpu")[0]
    return found[min(device.index or 0, len(found) - 1)]


@functools.cache
def _device(index: int) -> tuple[str, int]:
    found = torch.cuda.get_device_properties(index)
    return select.device_key(found.name), found.multi_processor_count


def bucket(rows: int) -> int:
    """Rows that a kernel is compiled for: each number up to 16, then powers of two, above 4096 multiples of it."""
    if rows <= 16:
        return rows
    if rows > 4096:
        return -(-rows // 4096) * 4096
    return 1 << (rows - 1).bit_length()


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == np.uint32:  # codes: the kernels take words of either sign
        array = array.view(np.int32)
    name = array.dtype.name
    if name == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array).copy()).to(_TORCH[name])
