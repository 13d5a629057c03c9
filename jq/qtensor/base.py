"""What the four quantized tensors have in common: pytree behaviour, shape, size, slicing, stacking."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jq import bits as _bits
from jq import exact
from jq.bits import namespace

Array = Any  # numpy.ndarray | jax.Array
Rows = Any  # slice | integer array [M]: which rows of [N, K]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a tensor came from: what its format's `dump` must know beside the arrays. Static, equal over layers."""

    format: str
    options: tuple[tuple[str, Any], ...] = ()

    def get(self, key: str, default: Any = None) -> Any:
        return dict(self.options).get(key, default)


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Which scale belongs to element (n, k) of an [N, K] weight.

    kind "block": scales[n // rows, k // cols]; 0 stands for the whole axis, so (1, G) is "groups of G along K",
        (1, 0) per output channel, (0, 0) per tensor, (128, 128) blocks.
    kind "flat": scales[(n*K + k) // cols]: blocks of the flattened weight that need not end with rows.
    kind "strided": scales[(n*K + k) % (N*K / cols)]: the members of a group are N*K/cols elements apart.
    """

    kind: str = "block"
    rows: int = 1
    cols: int = 0

    def __str__(self) -> str:
        if self.kind != "block":
            return f"{self.kind} {self.cols}"
        rows, cols = self.rows or "N", self.cols or "K"
        return f"group {cols}" if self.rows == 1 else f"block {rows}x{cols}"


class _Common:
    """Fields that every subclass declares (annotations alone: no dataclass fields of the base)."""

    codes: Array
    extras: dict[str, Array]
    dtype: str
    pad: int
    activation: Any
    source: Source | None
    layout: str


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QTensor(_Common):
    """A quantized weight [*stack, N, K] = [*stack, out_features, in_features].

    Subclasses are frozen dataclasses registered as pytrees by `register`. Data fields hold arrays (numpy or JAX) or
    nested QTensors; all other fields are static and hashable. Shapes are computed from the arrays, so a sliced,
    vmapped, scanned or sharded tensor tells its own shape. The constructor does not validate (JAX calls it with
    placeholders); `make` does.
    """

    kind_name: ClassVar[str] = ""
    data_fields: ClassVar[tuple[str, ...]] = ()

    @property
    def bits(self) -> int:
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def out_features(self) -> int:
        return self.shape[-2]

    @property
    def in_features(self) -> int:
        return self.shape[-1]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, carried ones (`extras`) included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight: codes, scales, zeros and tables; carried tensors not counted."""
        extras = sum(leaf.nbytes for leaf in jax.tree.leaves(getattr(self, "extras", {})))
        return 8.0 * (self.nbytes - extras) / max(self.size, 1)

    def replace(self, **fields: Any) -> Self:
        return dataclasses.replace(self, **fields)

    def unpack(self) -> Array:
        """Integer codes, one per weight: int32[*stack, N, K]."""
        raise NotImplementedError

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The dense weight [*stack, N, K], rounded exactly as the library that wrote it rounds, then cast.

        Args:
          dtype: result dtype; None for the tensor's own (`self.dtype`). Rounding to the own dtype comes first.
        """
        if getattr(self, "layout", ""):
            from pallas_kernels import tensors

            return tensors.restore(self).dequantize(dtype)
        slim = self.replace(extras={}, activation=None, source=None) if hasattr(self, "extras") else self
        return _dequantize_jit(slim, str(np.dtype(dtype or self.dtype)))

    def _dense(self) -> Array:
        """Dequantized weight of an unstacked tensor in the own dtype."""
        raise NotImplementedError

    def arrays(self, convert: Any) -> Self:
        """The same tensor with `convert` applied to each array."""
        return jax.tree.map(convert, self)

    def to_jax(self) -> Self:
        """The same tensor with JAX arrays (on the default device); 64-bit ones, which JAX would narrow, in numpy."""
        return self.arrays(jax_array)

    def to_numpy(self) -> Self:
        """The same tensor with numpy arrays."""
        return self.arrays(np.asarray)

    def without_extras(self) -> Self:
        """The same numbers without the tensors that are carried only for saving (activation parameters stay)."""
        extras = getattr(self, "extras", {})
        activation = getattr(self, "activation", None)
        kept = {k: v for k, v in extras.items() if activation is not None and k in activation.parameters}
        return self.replace(extras=kept)

    def __getitem__(self, index: Any) -> Self:
        """Slices leading stack axes; on an unstacked [N, K] tensor rows where blocks end with rows.

        Rows are taken by a slice or by an integer array of their numbers [M], which gives a tensor [M, K].

        Raises:
          IndexError: numbers outside the stack or the rows (not for traced arrays, which JAX clamps).
          ValueError: rows of a tensor whose blocks do not end with rows.
        """
        stack = self.ndim - 2
        if stack > 0:
            self._check_index(index if isinstance(index, tuple) else (index,))
            return jax.tree.map(lambda a: a[index], self)
        if not isinstance(index, slice):
            self._check_rows(index)
            index = namespace(index).where(index < 0, index + self.shape[-2], index)
        return self.without_extras()._rows(index)

    def _check_rows(self, index: Any) -> None:
        """Raises `TypeError` and `IndexError` for what are no numbers of rows."""
        numbers = isinstance(index, np.ndarray | jax.Array) and index.ndim == 1 and np.dtype(index.dtype).kind in "iu"
        if not numbers:
            raise TypeError(
                f"{type(self).__name__}: of [N, K] rows can be taken by a slice or an integer array [M], got {index!r}"
            )
        if not isinstance(index, jax.core.Tracer) and index.size:
            low, high, n = int(index.min()), int(index.max()), self.shape[-2]
            if low < -n or high >= n:
                raise IndexError(f"{type(self).__name__}: rows {low} to {high} of a tensor of {n}")

    def _check_index(self, index: tuple[Any, ...]) -> None:
        """Raises `IndexError` for integers outside the stack, which JAX would clamp, and for more axes than it has."""
        stack = self.shape[:-2]
        if len(index) > len(stack):
            raise IndexError(f"{type(self).__name__}: {len(index)} indices into {len(stack)} leading axes")
        for size, i in zip(stack, index, strict=False):
            if i is None or i is Ellipsis:
                raise IndexError(
                    f"{type(self).__name__}: leading axes are taken by integers, slices and arrays, not {i}"
                )
            if isinstance(i, int | np.integer) and not -size <= i < size:
                raise IndexError(f"{type(self).__name__}: index {i} of a stack of {size}")

    def _rows(self, index: Rows) -> Self:
        raise ValueError(
            f"{type(self).__name__} of {self.shape}: blocks do not end with rows, so rows cannot be sliced"
        )

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        try:
            shape = "x".join(map(str, self.shape))
            return f"{type(self).__name__}({shape}, {self.describe()}, {self.dtype})"  # type: ignore[attr-defined]
        except Exception:  # placeholders of jax.tree transformations have no shape
            return f"{type(self).__name__}(...)"

    def describe(self) -> str:
        return f"{self.bits}-bit"


class OnBase(QTensor):
    """A tensor of the shape and codes of another one, `base`, whose weight it changes."""

    base: QTensor

    @property
    def bits(self) -> int:
        return self.base.bits

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def unpack(self) -> Array:
        """Codes of `base`, columns in stored order."""
        return self.base.unpack()


def jax_array(array: Array) -> Array:
    """A JAX array; of 64-bit values a numpy array, since JAX would silently drop their upper half."""
    return np.asarray(array) if np.dtype(array.dtype).itemsize == 8 else jnp.asarray(array)


def register(cls: type) -> type:
    """Registers a QTensor dataclass as a pytree: `data_fields` are children, the rest is static."""
    data = list(cls.data_fields)  # type: ignore[attr-defined]
    meta = [f.name for f in dataclasses.fields(cls) if f.name not in data]
    return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)


@functools.partial(jax.jit, static_argnums=1)
def _dequantize_jit(tensor: QTensor, dtype: str) -> jax.Array:
    return exact.cast(_over_stack(tensor, lambda t: t._dense()), np.dtype(dtype))


def _over_stack(tensor: QTensor, function: Any) -> Any:
    """Applies a function of an unstacked tensor over the leading stack axes."""
    for _ in range(tensor.ndim - 2):
        function = jax.vmap(function)
    return function(tensor)


def stack(tensors: list[Any] | tuple[Any, ...]) -> Any:
    """Stacks QTensors (or arrays) of equal static fields and shapes along a new leading axis."""
    return jax.tree.map(lambda *leaves: namespace(*leaves).stack(leaves), *tensors)


def expand(params: Array, grouping: Grouping, shape: tuple[int, ...], g_idx: Array | None = None) -> Array:
    """Brings one parameter per group to one per weight, [N, K] (or a shape that broadcasts to it).

    Args:
      params: [rows, groups] for block grouping (more groups than used are fine), else [groups].
      grouping: see `Grouping`.
      shape: (N, K).
      g_idx: int32[K], the group of each input, in place of k // cols.
    """
    n, k = shape
    xp = namespace(params)
    if grouping.kind == "flat":
        blocks, size = params.shape[0], grouping.cols
        if n * k == blocks * size:
            return xp.repeat(params, size).reshape(n, k)
        return xp.repeat(params, size)[: n * k].reshape(n, k)
    if grouping.kind == "strided":
        return xp.broadcast_to(params[None, :], (n * k // params.shape[0], params.shape[0])).reshape(n, k)
    if g_idx is not None:
        return params[:, g_idx]
    if grouping.cols and params.shape[1] > 1:
        groups = -(-k // grouping.cols)
        params = params[:, :groups]
        wide = xp.broadcast_to(params[:, :, None], (params.shape[0], groups, grouping.cols))
        params = wide.reshape(params.shape[0], groups * grouping.cols)[:, :k]
    elif params.shape[1] > 1:
        params = params[:, :1]
    if grouping.rows != 1 and params.shape[0] > 1:
        rows = params.shape[0]
        wide = xp.broadcast_to(params[:, None, :], (rows, grouping.rows, params.shape[1]))
        params = wide.reshape(rows * grouping.rows, params.shape[1])[:n]
    return params


def groups_of(length: int, size: int) -> int:
    """Number of groups of `size` (0 = the whole axis) along an axis of `length`."""
    return 1 if not size else -(-length // size)


def dense_value(param: Any) -> Array:
    """A parameter as an array: itself, or the dequantized nested QTensor."""
    return param._dense() if isinstance(param, QTensor) else param


def row_codes(codes: Any, bits: int, pad: int, *, signed: bool = False) -> Array:
    """Integer codes of packed rows, or of a nested `Sparse` (whose integers are what they mean, sign included)."""
    if isinstance(codes, QTensor):
        return codes.unpack()
    return _bits.unpack(codes, bits, _bits.capacity(codes, bits) - pad, signed=signed)


def codes_shape(codes: Any, bits: int, pad: int, layout: str = "") -> tuple[int, ...]:
    """Shape [*stack, N, K] of packed rows or of a nested `Sparse`."""
    if isinstance(codes, QTensor):
        return codes.shape
    *stack, rows = codes.shape[:-1]
    if layout:  # a kernel's order may hold rows of padding; then it says how many are the weight's
        rows = next((int(item[2:]) for item in layout.split(";") if item.startswith("n=")), rows)
    return (*stack, rows, _bits.capacity(codes, bits) - pad)


def padding(codes: Array, bits: int, in_features: int) -> int:
    """`pad` of a packed row: codes that fit minus codes that are there."""
    return _bits.capacity(codes, bits) - in_features


def look_up(table: Array, index: Array) -> Array:
    """`table[index]` along the first axis, for indices that packing keeps inside it: no bounds check, no wrap-around.

    The checks of `jnp.take` use each index several times, and XLA on a GPU then writes the indices to memory.
    """
    if namespace(table, index) is np:
        return np.take(table, index, axis=0)
    return jnp.asarray(table).at[index.astype(np.uint32)].get(mode="promise_in_bounds")


def from_bits(codes: Array, name: str) -> Array:
    """uint8 bit patterns viewed as an 8-bit float dtype, e.g. "float8_e4m3fn"."""
    dtype = np.dtype(getattr(ml_dtypes, name))
    return codes.view(dtype) if isinstance(codes, np.ndarray) else jax.lax.bitcast_convert_type(codes, dtype)
