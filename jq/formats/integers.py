"""Integer weights apart from any storage: what `jq.convert` works with.

Every affine integer format stores `(code - zero) * scale` with an integer zero point per group and one rounding in the
dtype of scales. `integers_of` brings a tensor to that form; a `Target` (`jq.formats.integer_targets`) brings it to a
storage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jq.errors import UnsupportedError
from jq.qtensor import Affine, QTensor
from jq.qtensor.base import groups_of


@dataclasses.dataclass(frozen=True)
class Integers:
    """One weight: `(codes - zeros) * scales`, group `g_idx[k]` or `k // group_size`.

    Fields:
      codes: int32[N, K] in [0, 2**bits).
      zeros: int32[N, groups] in [0, 2**bits).
      scales: [N, groups]; their dtype is that of the weight.
      group_size: inputs of a group, K where one group covers all.
      g_idx: int32[K] or None.
    """

    name: str
    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    bits: int
    group_size: int
    g_idx: np.ndarray | None

    @property
    def summary(self) -> Summary:
        n, k = self.codes.shape
        return Summary(
            self.name,
            n,
            k,
            self.bits,
            self.group_size,
            bool((self.zeros == 1 << (self.bits - 1)).all()),
            int(self.zeros.min()),
            self.g_idx is not None,
            str(self.scales.dtype),
        )


@dataclasses.dataclass(frozen=True)
class Summary:
    """What decides whether a storage can hold a weight."""

    name: str
    out_features: int
    in_features: int
    bits: int
    group_size: int
    symmetric: bool
    least_zero: int
    ordered: bool
    dtype: str

    @property
    def whole(self) -> bool:
        """One group covers all inputs."""
        return self.group_size >= self.in_features


def integers_of(q: QTensor, name: str) -> Integers:
    """The integers of a tensor.

    Raises:
      UnsupportedError: not codes with an integer zero point and one rounding; the message says what it is.
    """
    if not isinstance(q, Affine):
        raise UnsupportedError(f"{name}: {q!r} is no integer weight (its codes index a table or are floats)")
    if q.activation is not None:
        raise UnsupportedError(
            f"{name}: its inputs are quantized too ({q.activation}); a weight-only format would compute something else"
        )
    if q.grouping.kind != "block" or q.grouping.rows not in (0, 1):
        raise UnsupportedError(f"{name}: scales cover {q.grouping}; integer formats have groups along in_features")
    q = q.to_numpy()
    if q.formula == "cast_sub_mul" and not isinstance(q.scales, QTensor):  # its casts, done once: HQQ, Gemma
        q = q.replace(scales=q.scales.astype(q.dtype), formula="sub_mul")
    if q.formula == "f32" and q.dtype == "float32" and not isinstance(q.scales, QTensor):  # GGUF
        q = q.replace(scales=q.scales.astype(np.float32))
    zeros = q.group_zeros()
    if zeros is not None and zeros.dtype.kind not in "iu":
        zeros = zeros.astype(q.dtype)
    if zeros is not None and zeros.dtype.kind not in "iu":
        wide = np.asarray(zeros, np.float32)
        if q.formula != "sub_mul" or not np.array_equal(wide, np.rint(wide)):  # HQQ rounds them to integers on request
            raise UnsupportedError(
                f"{name}: zero points are floats, weights {_FORMULAS.get(q.formula, '(code - zero) * scale')}; no integer zero "
                "point gives the same weights"
            )
    if q.formula not in ("sub_mul", "f32") or isinstance(q.scales, QTensor) or str(q.scales.dtype) != q.dtype:
        raise UnsupportedError(
            f"{name}: weights are rounded as {_FORMULAS.get(q.formula, q.formula)} to {q.dtype}, integer formats as "
            "(code - zero) * scale in the dtype of scales; the weights would differ"
        )
    n, k = q.shape
    size = q.grouping.cols or k
    groups = q.scales.shape[1] if q.g_idx is not None else groups_of(k, size)
    scales = np.broadcast_to(q.scales[:, :groups], (n, groups))
    zeros = np.full((n, groups), q.zero_point, np.int32) if zeros is None else zeros[:, :groups].astype(np.int32)
    codes, zeros = q.unpack(), np.broadcast_to(zeros, (n, groups))
    if q.signed:
        codes, zeros = codes + (1 << (q.code_bits - 1)), zeros + (1 << (q.code_bits - 1))
    if zeros.min() < 0 or zeros.max() >= 1 << q.code_bits:
        raise UnsupportedError(
            f"{name}: zero points {zeros.min()}..{zeros.max()} are beyond {q.code_bits} bits, and no integer format stores such"
        )
    return Integers(name, codes, zeros, scales, q.code_bits, size, q.g_idx)


_FORMULAS = {
    "fma": "code * scale - scaled_zero in one step",
    "mul_add": "code * scale + zero",
    "mul_sub": "code * scale - zero",
    "bnb_int8": "code * SCB / 127",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A storage that was found to hold every weight.

    Fields:
      tensor: the weight in that storage.
      config: (names of linear layers that stay float) -> quantization_config.
    """

    tensor: Callable[[Integers], QTensor]
    config: Callable[[list[str]], dict[str, Any]]


def need(good: bool, text: str) -> None:
    """Raises `UnsupportedError` with the text unless `good`."""
    if not good:
        raise UnsupportedError(text)
