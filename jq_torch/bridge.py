"""Arrays between numpy, JAX and torch, without copies where memory allows it.

Three facts decide the code (measured on CPU, torch 2.13, jax 0.10):
- XLA aliases only memory that is 64-byte aligned and dense; anything else it copies on every call. Tensors read from
  a safetensors file are not aligned, so packed tensors are brought into aligned memory once, when they are stored.
- `jax.dlpack.from_dlpack` takes 30-50 us a tensor, the call underneath it 4 us: packed tensors are converted once and
  the result is remembered for as long as the torch tensor lives.
- A packed tensor is an integer to torch, whatever it means (a float16 scale is an int16 parameter): nothing in torch,
  transformers or peft then casts it, asks for its gradient or initialises it. `Kind` keeps the meaning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from jq.errors import UnsupportedError

try:  # what jax.dlpack.from_dlpack ends in, without its checks
    from jax._src.lib import _jax

    _import_capsule = _jax.dlpack_managed_tensor_to_buffer
except (ImportError, AttributeError):  # another jax: the public function is slower, not different
    _import_capsule = None

ALIGNMENT = 64

_FLOATS = {
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2fnuz": torch.float8_e5m2fnuz,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
}
_NUMPY = {dtype: np.dtype(getattr(ml_dtypes, name)) for name, dtype in _FLOATS.items()}
_CARRIER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def torch_dtype(dtype: Any) -> torch.dtype:
    """The torch dtype of a numpy dtype or of its name, the ml_dtypes ones included."""
    name = np.dtype(dtype).name
    return _FLOATS.get(name) or torch.from_numpy(np.empty(0, np.dtype(dtype))).dtype


@functools.cache
def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """The numpy dtype of a torch dtype."""
    return _NUMPY.get(dtype) or torch.empty(0, dtype=dtype).numpy().dtype


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """Name of the numpy dtype of a torch dtype; numpy itself takes 3 us to say it."""
    return numpy_dtype(dtype).name


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """A numpy view of a dense CPU tensor (a copy of any other)."""
    tensor = tensor.detach().cpu().contiguous()
    special = _NUMPY.get(tensor.dtype)
    if special is None:
        return tensor.numpy()
    return tensor.view(_CARRIER[tensor.element_size()]).numpy().view(special)


def tensor_of(array: Any) -> torch.Tensor:
    """A torch tensor in aligned memory with the values and the dtype of a numpy or JAX array, on a JAX array's GPU.

    Aligned, dense, writable memory of the host is shared, anything else is copied.
    """
    if isinstance(array, jax.Array):
        if array.size and next(iter(array.devices())).platform == "gpu":
            return from_jax(array)
        array = np.asarray(array)
    dtype = torch_dtype(array.dtype)
    if array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % ALIGNMENT == 0:
        flat = array.reshape(-1).view(np.uint8)
        return torch.from_numpy(flat).view(dtype).reshape(array.shape)
    out = torch.empty(array.shape, dtype=dtype)
    if array.size:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        out.reshape(-1).view(torch.uint8).numpy()[:] = raw
    return out


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a packed tensor stands for: an array of this dtype, or a scalar, held as one element since FSDP has no scalars."""

    dtype: str
    scalar: bool = False


def carrier_of(array: Any) -> tuple[torch.Tensor, Kind]:
    """The bits of an array as an integer tensor (see the module docstring), and what it stands for."""
    kind = Kind(np.dtype(array.dtype).name, array.ndim == 0)
    tensor = tensor_of(array)
    tensor = tensor.reshape(1) if kind.scalar else tensor
    if tensor.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        return tensor, kind
    return tensor.view(_CARRIER[tensor.element_size()]), kind


def numpy_leaf(tensor: torch.Tensor, kind: Kind) -> np.ndarray:
    """A packed tensor as the numpy array that `carrier_of` was given."""
    array = array_of(tensor).view(np.dtype(kind.dtype))
    return array.reshape(()) if kind.scalar else array


def jax_leaf(tensor: torch.Tensor, kind: Kind) -> Any:
    """A packed tensor as a JAX array (numpy for 64-bit types, which JAX would narrow), converted once."""
    hit, state = _converted.get(tensor), state_of(tensor)
    if hit is None or hit[0] != state:
        hit = _converted[tensor] = (state, _convert(tensor.detach(), kind))
    return hit[1]


def state_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Changes when a tensor's numbers may have: an edit in place bumps the version, set_data moves the pointer."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version  # inference mode counts no versions


_converted: Any = WeakTensorKeyDictionary()


def _convert(tensor: torch.Tensor, kind: Kind) -> Any:
    if np.dtype(kind.dtype).itemsize == 8:
        return numpy_leaf(tensor, kind)
    tensor = tensor.view(torch_dtype(kind.dtype))
    return to_jax(tensor.reshape(()) if kind.scalar else tensor)


@contextlib.contextmanager
def device_kept(tensor: torch.Tensor | None = None) -> Iterator[None]:
    """Where there are several GPUs: JAX computes inside, with the tensor's device current, and torch's is so afterwards.

    XLA leaves the device current that it used last, which is torch's current one too; torch refuses to export tensors of
    others.
    """
    if torch.cuda.device_count() < 2:
        yield
        return
    index = tensor.get_device() if tensor is not None and tensor.is_cuda else torch.cuda.current_device()
    with torch.cuda.device(index):
        yield


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if XLA can use its memory as it is, else a dense, aligned copy."""
    tensor = tensor.detach()
    if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tensor.contiguous().clone()


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """A JAX array on the tensor's memory; the caller keeps the tensor unchanged while the array is in use."""
    tensor = aligned(tensor)
    if tensor.device.type == "cpu" and _import_capsule is not None:
        return _import_capsule(torch._C._to_dlpack(tensor), _cpu(), None)
    if tensor.device.type == "cuda" and jax.default_backend() != "gpu":
        raise UnsupportedError(
            f"a packed layer on {tensor.device}, but this JAX computes on {jax.default_backend()}: install JAX with CUDA "
            "(pip install jaxq[cuda13]), or load with device_map='cpu'"
        )
    with device_kept(tensor):
        return jax.dlpack.from_dlpack(tensor)


@contextlib.contextmanager
def borrowed(array: jax.Array) -> Iterator[torch.Tensor]:
    """A torch tensor on a JAX array's memory, for torch operations within a `with` block; waits until it is computed.

    XLA gives memory that Python has let go of to its next program at once, while torch's stream may still read it (seen
    on an H100: nearly every call of a chain of large layers read the next one's weight). So on a GPU the array is held
    until torch has passed the end of the block.
    """
    tensor = torch.utils.dlpack.from_dlpack(array)
    yield tensor
    if tensor.is_cuda:
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(tensor.device))
        _lent.append((done, tensor))
        while len(_lent) > _UNDER_WAY:
            _lent.popleft()[0].synchronize()


_lent: deque[tuple[Any, torch.Tensor]] = deque()  # of XLA's memory, with when torch has read it
_UNDER_WAY = 2


def from_jax(array: jax.Array) -> torch.Tensor:
    """A torch tensor with a JAX array's numbers: on the CPU on its memory, on a GPU a copy (see `borrowed`)."""
    with borrowed(array) as tensor:
        return tensor.clone() if tensor.is_cuda else tensor


@functools.cache
def _cpu() -> Any:
    return jax.devices("cpu")[0]
