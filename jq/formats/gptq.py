"""GPTQ: AutoGPTQ, GPT-QModel (7.7.0) and Optimum checkpoints.

Stored tensors of a linear layer [N, K] with b-bit codes and groups of G inputs (words int32, or `pack_dtype`):

    qweight  [K*b/32, N]          codes of output n: one little-endian bit stream along k over the words of column n
    qzeros   [ceil(K/G), N*b/32]  zero points, the same stream along n; format "gptq" (v1) stores them minus one
    scales   [ceil(K/G), N]       float16, bfloat16 or float32
    g_idx    int32[K]             group of each input; may be missing where desc_act is not set (then k // G)

A quantized embedding (GPT-QModel) is stored as a layer from the vocabulary to the embedding: its table is the transpose.

Format "marlin" is `jq.formats.marlin`. Format "gptq_p" is planar: per 32 codes b words, low bits of all codes first
(`gptq_config.PLANES`). The weight is `scales[g, n] * (code - zero)` with one rounding in the dtype of scales (GPT-QModel
nn_modules/qlinear/torch.py).

The "minus one" of v1: GPT-QModel adds and subtracts it on whole words, so a zero point of 0 borrows from the next
field; AutoGPTQ works per field. `meta.quantizer` tells which wrote a file. 3-bit fields are always separate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from jq import bits as _bits
from jq.algorithms import blocks, rtn
from jq.errors import FormatError, UnsupportedError
from jq.formats import marlin
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_shape, group_by_prefix, take
from jq.formats.gptq_config import Options, config_of, detect, index_mode, parse, with_block_list
from jq.qtensor import Affine, Grouping, Source, Transposed
from jq.qtensor.affine import check_finite, pack_zeros

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
MARLIN = ("B", "s")  # and a workspace, in some files
FLOATS = (np.float16, "bfloat16", np.float32)
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in")


def load(prefix: str, parts: Parts, options: Options, context: Context) -> Affine | Transposed:
    """One module's tensors as an `Affine`; of an embedding, whose codes run along the vocabulary, transposed.

    Raises:
      FormatError: missing tensors; shapes, dtypes or g_idx that disagree with the config or with each other.
    """
    made = _load(prefix, parts, options, context)
    if prefix.rpartition(".")[2] not in EMBEDDINGS:
        return made
    return Transposed(made, dtype=made.dtype, source=made.source)


def _load(prefix: str, parts: Parts, options: Options, context: Context) -> Affine:
    o = options.of(prefix)
    if o.marlin:
        return marlin.load(prefix, parts, o.group_size, MARLIN, Source("gptq", (("marlin", True),)))
    qweight = take(parts, "qweight", prefix)
    qzeros = take(parts, "qzeros", prefix, why="GPTQ stores zero points of symmetric layers too.")
    scales = take(parts, "scales", prefix)
    g_idx = parts.get("g_idx")
    expect_dtype(qweight, (o.word,), f"{prefix}.qweight")
    expect_dtype(qzeros, (o.word,), f"{prefix}.qzeros")
    expect_dtype(scales, FLOATS, f"{prefix}.scales")
    in_features, out_features = _sizes(prefix, qweight, scales, g_idx, o, context)
    group = in_features if o.group_size == -1 else o.group_size
    groups = -(-in_features // group)
    expect_shape(
        scales,
        (groups, out_features),
        f"{prefix}.scales",
        f"in_features {in_features} in groups of {group}, out_features {out_features}; "
        f"check quantization_config.group_size ({o.group_size})",
    )
    check_finite(scales, f"{prefix}.scales")
    if g_idx is None and o.ordered and groups > 1:
        raise FormatError(
            f"{prefix}.g_idx: missing; by quantization_config.desc_act it says which inputs each of {groups} groups has"
        )
    width = 8 * qzeros.dtype.itemsize
    expect_shape(
        qzeros,
        (groups, -(-out_features * o.bits // width)),
        f"{prefix}.qzeros",
        f"{groups} groups, {out_features} * {o.bits} / {width} words; check quantization_config.bits ({o.bits})",
    )
    mode, stored_index = index_mode(prefix, g_idx, in_features, group, groups)
    codes = codes_of(qweight, o)
    zeros = zeros_of(qzeros, out_features, o)
    zero_point = 1 << (o.bits - 1)
    symmetric = o.sym and bool((zeros == zero_point).all())
    tensor = Affine(
        codes,
        np.ascontiguousarray(scales.T),
        None if symmetric else pack_zeros(zeros.T, o.bits),
        stored_index,
        code_bits=o.bits,
        zero_point=zero_point if symmetric else 0,
        zeros_bits=0 if symmetric else o.bits,
        grouping=Grouping("block", 1, 0 if group == in_features else group),
        dtype=str(scales.dtype),
        pad=_bits.capacity(codes, o.bits) - in_features,
        source=source(o, mode, g_idx),
    )
    if not np.array_equal(dump(tensor)["qzeros"], qzeros):  # bits of the last word that no zero point uses
        tensor = tensor.replace(extras={"qzeros": qzeros})
    return tensor


def source(options: Options, g_idx_mode: str, g_idx: np.ndarray | None = None) -> Source:
    """What `dump` needs beside the arrays; equal for all layers of most checkpoints."""
    pairs: list[tuple[str, Any]] = [("planar", options.planar), ("zeros", options.zeros), ("g_idx", g_idx_mode)]
    if options.word != "int32":
        pairs.append(("word", options.word))
    if g_idx is not None and g_idx.dtype != np.int32:
        pairs.append(("g_idx_dtype", str(g_idx.dtype)))
    return Source("gptq", tuple(pairs))


def _sizes(
    prefix: str, qweight: np.ndarray, scales: np.ndarray, g_idx: np.ndarray | None, o: Options, context: Context
) -> tuple[int, int]:
    """(in_features, out_features), after a check that words, scales and g_idx agree on them."""
    for name, array in (("qweight", qweight), ("scales", scales)):
        if array.ndim != 2 or 0 in array.shape:
            raise FormatError(
                f"{prefix}.{name}: found shape {tuple(array.shape)}, expected two axes that are not empty"
            )
    rows, out_features = qweight.shape
    if scales.shape[1] != out_features:
        raise FormatError(
            f"{prefix}.scales: found shape {tuple(scales.shape)}, expected (groups, {out_features}): "
            f"qweight has {out_features} columns = out_features"
        )
    width = 8 * qweight.dtype.itemsize
    if g_idx is None:
        if o.planes and rows % o.bits:
            raise FormatError(f"{prefix}.qweight: found {rows} rows, expected a multiple of bits ({o.bits}, planar)")
        return rows * width // o.bits, out_features
    if g_idx.ndim != 1 or g_idx.dtype.kind not in "iu" or not g_idx.size:
        raise FormatError(f"{prefix}.g_idx: found {g_idx.dtype}{list(g_idx.shape)}, expected int32[in_features]")
    in_features = g_idx.shape[0]
    blocks = -(-in_features // 32) * o.bits if o.planes else -(-in_features * o.bits // width)
    expect_shape(
        qweight,
        (blocks, out_features),
        f"{prefix}.qweight",
        f"in_features {in_features} (length of g_idx), bits {o.bits}: {in_features} * {o.bits} / {width} rows. The file "
        f"and its config disagree; check quantization_config.bits and dynamic in {context.label}",
    )
    return in_features, out_features


def codes_of(qweight: np.ndarray, o: Options) -> np.ndarray:
    """qweight [K*b/32, N] as canonical rows [N, W] (uint32, or uint8 where a narrow `pack_dtype` does not fill words).

    The continuous layout along k is the canonical bit stream already: only the axes change places.
    """
    columns = np.ascontiguousarray(qweight.T)
    if o.planes:
        return _bits.pack(_bits.unpack_planar(columns, o.planes, o.bits), o.bits)
    return _bits.as_words(columns)


def zeros_of(qzeros: np.ndarray, out_features: int, o: Options) -> np.ndarray:
    """Zero points int32[groups, N] of qzeros [groups, N*b/32]."""
    if o.planes:
        return _bits.unpack_planar(qzeros, o.planes, o.bits)[:, :out_features]
    words = qzeros.view(f"u{qzeros.dtype.itemsize}")
    if o.zeros == "v1-word" and o.bits != 3:
        words = words + _ones(words.dtype, o.bits)  # carries run from field to field
    zeros = _bits.unpack(np.ascontiguousarray(words).view(np.uint8), o.bits, out_features)
    return (zeros + 1) & ((1 << o.bits) - 1) if _by_field(o.zeros, o.bits) else zeros


def _by_field(rule: str, bits: int) -> bool:
    return rule == "v1-field" or (rule == "v1-word" and bits == 3)


def _ones(dtype: np.dtype, bits: int) -> np.ndarray:
    """A word with 1 in each field."""
    return np.array(sum(1 << i for i in range(0, 8 * dtype.itemsize, bits)), dtype)


def dump(q: Affine | Transposed) -> Parts:
    """The stored tensors of a GPTQ module, from the arrays of `q`."""
    if isinstance(q, Transposed):
        return dump(q.base)
    q = q.to_numpy()
    assert q.source is not None
    src = dict(q.source.options)
    if src.get("marlin"):
        return marlin.dump(q, MARLIN)
    word = np.dtype(src.get("word", "int32"))
    options = Options(q.code_bits, -1, False, planar=src["planar"], zeros=src["zeros"], word=str(word))
    parts = {
        "qweight": _store_codes(q, options),
        "qzeros": q.extras["qzeros"] if "qzeros" in q.extras else _store_zeros(q, options),
        "scales": np.ascontiguousarray(q.scales.T),
    }
    if src["g_idx"] != "none":
        trivial = np.arange(q.in_features) // q.group_size
        parts["g_idx"] = np.asarray(trivial if q.g_idx is None else q.g_idx).astype(src.get("g_idx_dtype", "int32"))
    return parts


def _store_codes(q: Affine, o: Options) -> np.ndarray:
    word = np.dtype(o.word)
    if o.planes:
        codes = _bits.unpack(q.codes, o.bits)[:, : q.in_features]
        codes = np.pad(codes, ((0, 0), (0, -q.in_features % 32)))
        return np.ascontiguousarray(_bits.pack_planar(codes, o.planes, o.bits).view(word).T)
    rows = np.ascontiguousarray(q.codes).view(np.uint8)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % word.itemsize)))
    return np.ascontiguousarray(rows.view(word).T)


def _store_zeros(q: Affine, o: Options) -> np.ndarray:
    zeros = q.group_zeros()
    if zeros is None:
        zeros = np.full(q.scales.shape, q.zero_point, np.int32)
    zeros = np.ascontiguousarray(zeros.T)
    word = np.dtype(o.word)
    if o.planes:
        zeros = np.pad(zeros, ((0, 0), (0, -zeros.shape[1] % 32)))
        return _bits.pack_planar(zeros, o.planes, o.bits).view(word)
    if _by_field(o.zeros, o.bits):
        zeros = zeros - 1
    rows = pack_zeros(zeros, o.bits)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % word.itemsize)))
    words = np.ascontiguousarray(rows).view(f"u{word.itemsize}")
    if o.zeros == "v1-word" and o.bits != 3:
        words = words - _ones(words.dtype, o.bits)
    return words.view(word)


def build(
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | int,
    *,
    bits: int,
    group_size: int,
    g_idx: np.ndarray | None = None,
    storage: str = "gptq_v2",
    zeros_rule: str | None = None,
    name: str = "weight",
) -> Affine:
    """A GPTQ tensor from unpacked parts.

    Args:
      codes: integer[N, K] in [0, 2**bits).
      scales: float[N, groups], in the dtype that is stored.
      zeros: integer[N, groups], or the one zero point of all groups.
      group_size: -1 for all of K.
      g_idx: int32[K], or None for k // group_size.
      storage: "gptq", "gptq_v2" or "gptq_p".
      zeros_rule: of `Options.zeros`; None for what other readers of `storage` agree on.

    Raises:
      FormatError: parts that do not fit together.
    """
    in_features = codes.shape[-1]
    group = in_features if group_size == -1 else group_size
    rule = zeros_rule or ("v1-field" if storage == "gptq" else "v2")
    options = Options(bits, group_size, isinstance(zeros, int), planar=storage == "gptq_p", zeros=rule)
    mode, index = index_mode(
        name, np.arange(in_features) // group if g_idx is None else g_idx, in_features, group, scales.shape[-1]
    )
    return Affine.make(
        codes,
        scales,
        code_bits=bits,
        name=name,
        zeros=None if isinstance(zeros, int) else zeros,
        zero_point=zeros if isinstance(zeros, int) else 0,
        zeros_bits=0 if isinstance(zeros, int) else bits,
        g_idx=index,
        grouping=Grouping("block", 1, 0 if group >= in_features else group),
        source=source(options, mode),
    )


@dataclasses.dataclass(frozen=True)
class RTN:
    """Rounding to nearest, stored as GPTQ: no data needed.

    Fields:
      bits: 2, 3, 4 or 8.
      group_size: inputs per scale, -1 for all; K need not be a multiple (the last group is then short).
      sym: one zero point for all groups (2**(bits-1)); else a zero point per group.
      scale_dtype: dtype of the stored scales.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    scale_dtype: str = "float16"

    format: ClassVar[str] = "gptq"

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise UnsupportedError(f"RTN: GPTQ storage has 2, 3, 4 or 8 bits, got {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"RTN: group_size must be -1 or positive, got {self.group_size}")
        if self.scale_dtype not in ("float16", "bfloat16", "float32"):
            raise ValueError(f"RTN: scale_dtype must be float16, bfloat16 or float32, got {self.scale_dtype!r}")

    @property
    def storage(self) -> str:
        """v1 where every reader agrees on it (one zero point for all), else v2."""
        return "gptq" if self.sym else "gptq_v2"

    def quantize(self, w: Any, name: str = "weight") -> Affine:
        """Quantizes float[N, K].

        Raises:
          ValueError: weights that are not finite, or scales that `scale_dtype` cannot hold.
        """
        w = blocks.weight(w, name)
        scales, zeros = rtn.parameters(
            w, bits=self.bits, group_size=self.group_size, sym=self.sym, scale_dtype=self.scale_dtype, name=name
        )
        codes = rtn.codes(w, scales, zeros, bits=self.bits, group_size=self.group_size)
        group = -1 if self.group_size == -1 or self.group_size >= w.shape[1] else self.group_size
        return build(codes, scales, zeros, bits=self.bits, group_size=group, storage=self.storage, name=name)

    def config(self, skip: Any = ()) -> dict[str, Any]:
        """quantization_config of a model quantized so, with the linear modules that stay float."""
        return config_of(
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
            storage=self.storage,
            skip=skip,
            lm_head="lm_head" not in skip,
        )

    def refine_config(
        self, config: dict[str, Any], quantized: list[str], skip: list[str], tensors: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Adds Optimum's list of what is quantized in a block, which transformers reads in place of `dynamic`."""
        return with_block_list(config, quantized, skip)


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """GPTQ as the target of `jq.convert`; options that are None are those of the source.

    Fields:
      bits, group_size: what the source must have.
      checkpoint_format: "gptq" (v1), "gptq_v2" or "gptq_p"; None: v1 for symmetric weights, planar for 5 to 7 bits,
        else v2.
    """

    bits: int | None = None
    group_size: int | None = None
    checkpoint_format: str | None = None

    format: ClassVar[str] = "gptq"

    def __post_init__(self) -> None:
        if self.checkpoint_format not in (None, "gptq", "gptq_v2", "gptq_p"):
            raise ValueError(f"GPTQ: checkpoint_format is gptq, gptq_v2 or gptq_p; got {self.checkpoint_format!r}")


def group(names: list[str], options: Options, context: Context) -> dict[str, dict[str, str]]:
    """Quantized modules: {prefix: {suffix: stored name}}."""
    if options.marlin:
        return group_by_prefix(names, ("B",), (*MARLIN, "workspace"))
    return group_by_prefix(names, ("qweight",), SUFFIXES)


FORMAT = Format(
    name="gptq",
    methods=("gptq", "marlin"),
    title="GPTQ (AutoGPTQ, GPT-QModel, Optimum): 2-8 bit integers, groups, act order",
    parse=parse,
    markers=("qweight",),
    suffixes=SUFFIXES,
    load=load,
    dump=dump,
    detect=detect,
    group=group,
    methods_table={"RTN": RTN, "GPTQ": GPTQ},
)
