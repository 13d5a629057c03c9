"""bitsandbytes tensors from their parts, and the methods that make them: `NF4`, `FP4`, `Int8`. None needs data.

Codes and block maxima are those of bitsandbytes' CPU code on the same weights; see `jq.algorithms.codebook4` and
`jq.algorithms.int8` for where its CUDA code differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from jq import bits as _bits
from jq.activations import Activation
from jq.algorithms import blocks, codebook4, int8
from jq.errors import UnsupportedError
from jq.qtensor import Affine, Codebook, Grouping, Source

_STORAGES = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")
_COMPUTE = ("float32", "bfloat16", "float16")


def int8_tensor(codes: np.ndarray, scb: np.ndarray, threshold: float, pairs: tuple = (("kind", "int8"),)) -> Affine:
    """LLM.int8 weight of codes int8[N, K] and row maxima [N]."""
    return Affine(
        _bits.as_words(codes),
        scb.reshape(-1, 1),
        code_bits=8,
        signed=True,
        grouping=Grouping("block", 1, 0),
        formula="bnb_int8",
        dtype="float32",
        activation=Activation("bnb_int8", (), (("threshold", threshold),)),
        source=Source("bitsandbytes", pairs),
    )


def nested_absmax(codes: np.ndarray, absmax: np.ndarray, table: np.ndarray, offset: Any, size: int) -> Codebook:
    """Double-quantized block maxima from codes uint8[rows, blocks of a row]."""
    return Codebook.make(
        codes,
        table,
        absmax,
        code_bits=8,
        offset=np.asarray(offset, np.float32),
        grouping=Grouping("flat", 0, size),
        dtype="float32",
    )


def tensor_4bit(
    codes: np.ndarray,
    table: np.ndarray,
    absmax: Any,
    *,
    kind: str,
    block_size: int,
    dtype: str,
    storage: str = "uint8",
    extras: Mapping[str, np.ndarray] | None = None,
    row: bool = False,
) -> Codebook:
    """A 4-bit tensor from codes uint8[N, K] and absmax ([N, K/B], or [blocks] where blocks cross rows)."""
    pairs: list[tuple[str, Any]] = [("quant_type", kind), ("storage", storage)]
    if row:
        pairs.append(("row", True))
    return Codebook.make(
        codes,
        table,
        absmax,
        code_bits=4,
        extras=dict(extras or {}),
        grouping=Grouping("block", 1, block_size)
        if codes.shape[-1] % block_size == 0
        else Grouping("flat", 0, block_size),
        dtype=dtype,
        source=Source("bitsandbytes", tuple(pairs)),
    )


def _config(skip: Iterable[str], **given: Any) -> dict[str, Any]:
    """quantization_config with the keys of transformers' BitsAndBytesConfig."""
    four = given.get("load_in_4bit", False)
    return {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": given.get("compute_dtype", "float32"),
        "bnb_4bit_quant_storage": given.get("quant_storage", "uint8"),
        "bnb_4bit_quant_type": given.get("quant_type", "fp4"),
        "bnb_4bit_use_double_quant": given.get("double_quant", False),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skip),
        "llm_int8_threshold": given.get("threshold", 6.0),
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": "bitsandbytes",
    }


@dataclasses.dataclass(frozen=True)
class _FourBit:
    """4-bit codes of a fixed table with the absolute maximum of each block of the flattened weight.

    Fields:
      block_size: weights per maximum: 32, 64, ... 4096; blocks may cross rows.
      double_quant: quantize the maxima to 8 bits, in blocks of 256 around their mean.
      quant_storage: dtype under which the packed bytes are stored ("uint8"; others for FSDP-QLoRA).
      compute_dtype: what bitsandbytes multiplies in; recorded in the config.
    """

    block_size: int = 64
    double_quant: bool = False
    quant_storage: str = "uint8"
    compute_dtype: str = "bfloat16"

    format: ClassVar[str] = "bitsandbytes"
    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        title = type(self).__name__
        for field, allowed in (
            ("block_size", codebook4.BLOCK_SIZES),
            ("quant_storage", _STORAGES),
            ("compute_dtype", _COMPUTE),
        ):
            if getattr(self, field) not in allowed:
                shown = ", ".join(map(str, allowed))
                raise ValueError(f"{title}: {field} must be one of {shown}; got {getattr(self, field)!r}")

    def quantize(self, w: Any, name: str = "weight") -> Codebook:
        """Quantizes float[N, K].

        Raises:
          ValueError: weights of another kind or not finite.
          UnsupportedError: bytes that do not fill whole elements of `quant_storage`.
        """
        w = blocks.weight(w, name)
        (n, k), size = w.shape, self.block_size
        width = np.dtype(self.quant_storage).itemsize
        if -(-n * k // 2) % width:
            raise UnsupportedError(
                f"{name}: {n} x {k} 4-bit codes are {-(-n * k // 2)} bytes, which do not fill {self.quant_storage} elements; "
                "use quant_storage='uint8'"
            )
        codes, flat = codebook4.quantize(w, kind=self.kind, block_size=size)
        rows = k % size == 0
        absmax: Any = flat.reshape(n, k // size) if rows else flat
        if self.double_quant:
            nested = codebook4.quantize_absmax(flat)
            shape = (n, k // size) if rows else (1, flat.size)
            absmax = nested_absmax(
                nested.codes.reshape(shape), nested.absmax, nested.table, nested.offset, codebook4.NESTED_BLOCK
            )
        # bitsandbytes quantizes a 0 after an odd number of weights: code 7 of NF4, 0 of FP4.
        extras = {"padding": np.array([7], np.uint8)} if n * k % 2 and self.kind == "nf4" else {}
        return tensor_4bit(
            codes,
            codebook4.TABLES[self.kind],
            absmax,
            kind=self.kind,
            block_size=size,
            dtype=str(w.dtype),
            storage=self.quant_storage,
            extras=extras,
        )

    def config(self, skip: Iterable[str] = ()) -> dict[str, Any]:
        """quantization_config of a model quantized so; `skip` names the linear modules that stay float."""
        return _config(
            skip,
            load_in_4bit=True,
            quant_type=self.kind,
            double_quant=self.double_quant,
            quant_storage=self.quant_storage,
            compute_dtype=self.compute_dtype,
        )


@dataclasses.dataclass(frozen=True)
class NF4(_FourBit):
    """NormalFloat4 (QLoRA): 16 quantiles of a normal distribution per block of weights."""

    __doc__ = f"{__doc__}\n{_FourBit.__doc__}"
    kind: ClassVar[str] = "nf4"


@dataclasses.dataclass(frozen=True)
class FP4(_FourBit):
    """4-bit floats (1 sign, 2 exponent, 1 mantissa bit) per block of weights."""

    __doc__ = f"{__doc__}\n{_FourBit.__doc__}"
    kind: ClassVar[str] = "fp4"


@dataclasses.dataclass(frozen=True)
class Int8:
    """LLM.int8: one scale per output; at run time activations are int8 too, but for outlier columns.

    Fields:
      threshold: activations from this magnitude on are computed in floating point; 0 for none.
    """

    threshold: float = 6.0

    format: ClassVar[str] = "bitsandbytes"

    def quantize(self, w: Any, name: str = "weight") -> Affine:
        """Quantizes float[N, K].

        Raises:
          ValueError: weights of another kind, not finite, or beyond float16 (the method rounds to it first).
        """
        w = blocks.weight(w, name)
        codes, scb = int8.quantize_rows(w)
        if not np.isfinite(scb).all():
            raise ValueError(f"{name}: weights beyond float16's 65504, to which LLM.int8 rounds first")
        pairs = (("kind", "int8"), ("weight_format", ("uint8", ())))
        return int8_tensor(codes, scb, self.threshold, pairs)

    def config(self, skip: Iterable[str] = ()) -> dict[str, Any]:
        """quantization_config of a model quantized so; `skip` names the linear modules that stay float."""
        return _config(skip, threshold=self.threshold)
