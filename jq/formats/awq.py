"""AWQ: AutoAWQ 0.2.9 (gemm, gemv, gemv_fast), GPT-QModel 7.7.0 and llm-awq d6e797a checkpoints.

Stored tensors of a linear layer [N, K] with groups of G inputs:

    gemm       qweight int32 [K, N*b/32]  qzeros int32 [K/G, N*b/32]  scales [K/G, N]
    gemv       qweight int32 [N, K/8]     qzeros int32 [N, Z]         scales [N, 8*Z]
    gemv_fast  qweight int16 [N/4, K]     qzeros float [8*Z, N]       scales [8*Z, N]
    llm-awq    the same with `scaled_zeros` in place of `qzeros`
    marlin     `jq.formats.marlin`, without zeros

gemm, 4 bits: nibble i of a word holds column [0, 2, 4, 6, 1, 3, 5, 7][i] of its eight; other widths (GPT-QModel) are a
plain bit stream along n. gemv: plain order along k; Z pads the group count (zeros, carried). gemv_fast and llm-awq:
nibbles interleaved over blocks of 4 rows and 64 inputs (`awq_words.fast_codes`), and zeros stored as -(scale * zero).

The weight is `(code - zero) * scale` with one rounding in the dtype of scales; for gemv_fast and llm-awq it is
`fma(code, scale, scaled_zero)`, also rounded once, which differs in more than half of the elements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from jq.errors import FormatError, UnsupportedError
from jq.formats import marlin
from jq.formats.awq_words import fast_codes, fast_words, gemm_codes, gemm_words
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_shape, take, true_or_false, warn_unknown
from jq.formats.gptq_config import Rules, apply_rules, checked_group, first, rules_of, whole_number
from jq.qtensor import Affine, Grouping, Source
from jq.qtensor.affine import check_finite

FLOATS = (np.float16, "bfloat16", np.float32)
MARLIN = ("qweight", "scales")
VERSIONS = {
    "gemm": "gemm",
    "gemv": "gemv",
    "gemv_fast": "gemv_fast",
    "gemvfast": "gemv_fast",
    "llm-awq": "llm-awq",
    "llm_awq": "llm-awq",
    "exllama": "gemm",  # kernels of old AutoAWQ over gemm storage
    "ipex": "gemm",
    "marlin": "marlin",
}

_HARMLESS = (
    "quant_method method bits w_bit group_size q_group_size zero_point version format checkpoint_format backend "
    "modules_to_not_convert do_fuse modules_to_fuse fuse_max_seq_len exllama_config desc_act sym damp_percent lm_head "
    "pack_dtype meta true_sequential dynamic act_group_aware batch_size block_name_to_quantize cache_block_outputs dataset "
    "max_input_length model_seqlen module_name_preceding_first_block modules_in_block_to_quantize pad_token_id tokenizer "
    "damp_auto_increment mse static_groups data_type autoround_version iters packing_format "
    "nsamples seqlen lr minmax_lr scale_dtype provider to_quant_block_names enable_quanted_input"  # AutoRound in AWQ's format
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What a quantization_config says: code width, group (-1 = all of K), storage, whether
    every zero point is 2**(b-1) (`zero_point: false`), and GPT-QModel's `dynamic` rules."""

    bits: int = 4
    group_size: int = 128
    version: str = "gemm"
    sym: bool = False
    rules: Rules = ()


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads quantization_config.

    Raises:
      FormatError: impossible bits or group_size.
      UnsupportedError: a storage that is not one of the four.
    """
    label = context.label
    version = str(first(config, "version", "checkpoint_format", "format", default="gemm")).lower()
    if str(config.get("backend", "")).lower() in ("llm-awq", "llm_awq"):
        version = "llm-awq"  # such files say "gemv" or nothing for the version
    if version not in VERSIONS:
        raise UnsupportedError(
            f"{label}: AWQ version {version!r} is a kernel's own order; versions read here: {', '.join(VERSIONS)}"
        )
    warn_unknown(config, _HARMLESS.split(), label)

    def checked_bits(value: Any, where: str) -> int:
        number = whole_number(value, "bits", where)
        if not 2 <= number <= 8 or (number != 4 and VERSIONS[version] != "gemm"):
            raise UnsupportedError(f"{where}: AWQ {version} with {number} bits; gemm has 2 to 8, the others 4")
        return number

    return Options(
        bits=checked_bits(first(config, "bits", "w_bit", default=4), label),
        group_size=checked_group(first(config, "group_size", "q_group_size", default=128), label),
        version=VERSIONS[version],
        sym=not true_or_false(config, "zero_point", f"{label}: quantization_config"),
        rules=rules_of(config.get("dynamic"), checked_bits, label),
    )


def detect(checkpoint: Any) -> dict | None:
    """The config of files without one in config.json: GPT-QModel's quantize_config.json, or llm-awq's state_dict."""
    for name in ("quantize_config.json", "quant_config.json"):
        found = checkpoint.side_json(name)
        if found is not None:
            method = str(first(found, "quant_method", "method", default=""))
            return dict(found) if method == "awq" else None
    lone = [n.removesuffix(".scaled_zeros") for n in checkpoint.entries if n.endswith(".scaled_zeros")]
    return _llm_awq(checkpoint, lone) if lone else None


def _llm_awq(checkpoint: Any, prefixes: list[str]) -> dict:
    """llm-awq saves no config: the rows of scales that are not padding (all zero) tell the number of groups."""
    sizes = []
    for prefix in prefixes[:16]:
        if {f"{prefix}.qweight", f"{prefix}.scales"} <= set(checkpoint.entries):
            groups = int((checkpoint.read(f"{prefix}.scales") != 0).any(axis=1).sum())
            sizes.append(checkpoint.entry(f"{prefix}.qweight").shape[1] // max(groups, 1))
    return {"quant_method": "awq", "version": "llm-awq", "bits": 4, "group_size": min(sizes, default=128)}


def load(prefix: str, parts: Parts, options: Options, context: Context) -> Affine:
    """One module's tensors as an `Affine`; int16 words mean the interleaved storage whatever the config says.

    Raises:
      FormatError: missing tensors; shapes or dtypes that disagree with the config or with each other.
    """
    qweight, scales = take(parts, "qweight", prefix), take(parts, "scales", prefix)
    for name, array in (("qweight", qweight), ("scales", scales)):
        if array.ndim != 2 or 0 in array.shape:
            raise FormatError(
                f"{prefix}.{name}: found shape {tuple(array.shape)}, expected two axes that are not empty"
            )
    expect_dtype(qweight, (np.int32, np.int16), f"{prefix}.qweight")
    expect_dtype(scales, FLOATS, f"{prefix}.scales")
    check_finite(scales, f"{prefix}.scales")
    version = options.version
    if qweight.dtype == np.int16:
        version = "llm-awq" if "scaled_zeros" in parts else "gemv_fast"
    elif version in ("gemv_fast", "llm-awq"):
        raise FormatError(
            f"{prefix}.qweight: found int32 {list(qweight.shape)}, expected int16 [out_features / 4, in_features] for "
            f"version {version!r}; check quantization_config.version in {context.label}"
        )
    o = dataclasses.replace(apply_rules(options, options.rules, prefix), version=version)
    return _LOADERS[version](prefix, parts, o)


def _sizes_of_group(prefix: str, k: int, o: Options) -> tuple[int, int]:
    """(group size, number of groups) for in_features k."""
    group = k if o.group_size == -1 else o.group_size
    if k % group:
        raise FormatError(
            f"{prefix}: in_features {k} is not a multiple of quantization_config.group_size {group}; AWQ has whole groups only"
        )
    return group, k // group


def _load_gemm(prefix: str, parts: Parts, o: Options) -> Affine:
    qweight, scales = parts["qweight"], parts["scales"]
    qzeros = take(parts, "qzeros", prefix, why="AWQ stores zero points of symmetric layers too.")
    expect_dtype(qzeros, (np.int32,), f"{prefix}.qzeros")
    k, n = qweight.shape[0], scales.shape[1]
    group, groups = _sizes_of_group(prefix, k, o)
    words = -(-n * o.bits // 32)
    check = f"check quantization_config.bits ({o.bits}), group_size ({o.group_size}) and version ({o.version})"
    expect_shape(scales, (groups, n), f"{prefix}.scales", f"in_features {k} in groups of {group}; {check}")
    expect_shape(qweight, (k, words), f"{prefix}.qweight", f"in_features {k}, {n} * {o.bits} / 32 words; {check}")
    expect_shape(qzeros, (groups, words), f"{prefix}.qzeros", f"{groups} groups, {n} * {o.bits} / 32 words; {check}")
    codes, zeros = gemm_codes(qweight, n, o.bits), gemm_codes(qzeros, n, o.bits)
    tensor = build(codes.T, scales.T, zeros.T, o, name=prefix)
    if n * o.bits % 32:  # the last word of a row has bits that no code uses: carried where they are not zero
        stored = dump(tensor)
        odd = {s: parts[s] for s in ("qweight", "qzeros") if not np.array_equal(stored[s], parts[s])}
        tensor = tensor.replace(extras=odd)
    return tensor


def _load_gemv(prefix: str, parts: Parts, o: Options) -> Affine:
    qweight, scales = parts["qweight"], parts["scales"]
    qzeros = take(parts, "qzeros", prefix)
    expect_dtype(qzeros, (np.int32,), f"{prefix}.qzeros")
    n, k = qweight.shape[0], qweight.shape[1] * 8
    group, groups = _sizes_of_group(prefix, k, o)
    padded = max(scales.shape[1] // 8, -(-groups // 8))
    check = f"in_features {k} in {groups} groups of {group}, padded to words of 8; check quantization_config.group_size"
    expect_shape(scales, (n, padded * 8), f"{prefix}.scales", check)
    expect_shape(qzeros, (n, padded), f"{prefix}.qzeros", check)
    return Affine(
        np.ascontiguousarray(qweight).view(np.uint32),
        scales,
        np.ascontiguousarray(qzeros).view(np.uint8),
        code_bits=4,
        zeros_bits=4,
        grouping=Grouping("block", 1, 0 if group == k else group),
        dtype=str(scales.dtype),
        source=Source("awq", (("version", "gemv"),)),
    )


def _load_fast(prefix: str, parts: Parts, o: Options) -> Affine:
    qweight, scales = parts["qweight"], parts["scales"]
    name = zeros_name(o.version)
    zeros = take(parts, name, prefix, why=f"Version {o.version!r} stores -(scale * zero) there.")
    expect_dtype(zeros, (scales.dtype,), f"{prefix}.{name}")
    n, k = qweight.shape[0] * 4, qweight.shape[1]
    if k % 64:
        raise FormatError(
            f"{prefix}.qweight: found shape {tuple(qweight.shape)}, expected in_features in multiples of 64"
        )
    group, groups = _sizes_of_group(prefix, k, o)
    check = f"in_features {k} in {groups} groups of {group}, out_features {n}; check quantization_config.group_size"
    expect_shape(scales, (max(scales.shape[0], groups), n), f"{prefix}.scales", check)
    expect_shape(zeros, scales.shape, f"{prefix}.{name}", "the shape of scales")
    check_finite(zeros, f"{prefix}.{name}")
    return Affine.make(
        fast_codes(qweight),
        np.ascontiguousarray(scales.T),
        code_bits=4,
        name=prefix,
        zeros=np.ascontiguousarray(zeros.T),
        grouping=Grouping("block", 1, 0 if group == k else group),
        formula="fma",
        source=Source("awq", (("version", o.version),)),
    )


_FAST = ("gemv_fast", "llm-awq")


def _load_marlin(prefix: str, parts: Parts, o: Options) -> Affine:
    return marlin.load(prefix, parts, o.group_size, MARLIN, Source("awq", (("version", "marlin"),)))


_LOADERS = {"gemm": _load_gemm, "gemv": _load_gemv, "gemv_fast": _load_fast, "llm-awq": _load_fast}
_LOADERS["marlin"] = _load_marlin


def zeros_name(version: str) -> str:
    return "scaled_zeros" if version == "llm-awq" else "qzeros"


def padded_words(groups: int, group_size: int) -> int:
    """Z: words of 8 group slots that gemv and gemv_fast reserve for a row of zeros (multiples grow for small groups)."""
    multiple = 1 if group_size >= 128 else 2 if group_size >= 64 else 4
    words = -(-groups // 8)
    return -(-words // multiple) * multiple


def build(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, o: Options, name: str = "weight") -> Affine:
    """A tensor in gemm or gemv storage from codes [N, K], scales and integer zeros [N, groups].

    Raises:
      FormatError: parts that do not fit together.
    """
    k = codes.shape[1]
    group, groups = _sizes_of_group(name, k, o)
    grouping = Grouping("block", 1, 0 if group == k else group)
    if o.version == "gemv":
        extra = ((0, 0), (0, 8 * padded_words(groups, group) - groups))
        scales, zeros = np.pad(scales, extra), np.pad(zeros, extra)
    mid = 1 << (o.bits - 1)
    symmetric = o.version == "gemm" and o.sym and bool((zeros == mid).all())
    return Affine.make(
        codes,
        np.ascontiguousarray(scales),
        code_bits=o.bits,
        name=name,
        zeros=None if symmetric else np.ascontiguousarray(zeros),
        zero_point=mid if symmetric else 0,
        zeros_bits=0 if symmetric else o.bits,
        grouping=grouping,
        source=Source("awq", (("version", o.version),)),
    )


def config_of(o: Options, skip: list[str]) -> dict[str, Any]:
    """A quantization_config that AutoAWQ, GPT-QModel and transformers read; `skip`: linear layers that stay float."""
    return {
        "quant_method": "awq",
        "bits": o.bits,
        "group_size": o.group_size,
        "version": o.version,
        "zero_point": not o.sym,
        "modules_to_not_convert": list(skip) or None,
    }


def version_keys(version: str) -> dict[str, Any]:
    """What a quantization_config says of a version: llm-awq's files call themselves gemv with a backend."""
    return (
        {"version": "gemv", "backend": "llm-awq"}
        if version == "llm-awq"
        else {"version": version, "backend": "autoawq"}
    )


def renamed(to: Any, weights: list[Any]) -> str | None:
    """The version that `to` asks for where the weights are those of gemv_fast or llm-awq and so is the target.

    The two store the same arrays under two names (qzeros, scaled_zeros). None: this is not the case.
    """
    version = VERSIONS.get(str(getattr(to, "version", "")).lower())
    sources = [getattr(w, "source", None) for w in weights]
    fast = all(s is not None and s.format == "awq" and s.get("version") in _FAST for s in sources)
    return version if fast and version in _FAST and getattr(to, "format", None) == "awq" else None


def dump(q: Affine) -> Parts:
    """The stored tensors of an AWQ module, from the arrays of `q`."""
    q = q.to_numpy()
    assert q.source is not None
    version = q.source.get("version")
    if version == "marlin":
        return marlin.dump(q, MARLIN)
    if version == "gemm":
        zeros = q.group_zeros()
        zeros = np.full(q.scales.shape, q.zero_point, np.int32) if zeros is None else zeros
        return {
            "qweight": gemm_words(q.unpack().T, q.code_bits),
            "qzeros": gemm_words(zeros.T, q.code_bits),
            "scales": np.ascontiguousarray(q.scales.T),
            **q.extras,
        }
    if version == "gemv":
        words = np.ascontiguousarray(q.zeros)
        return {"qweight": q.codes.view(np.int32), "qzeros": words.view(np.int32), "scales": q.scales}
    return {
        "qweight": fast_words(q.unpack()),
        zeros_name(version): np.ascontiguousarray(q.zeros.T),
        "scales": np.ascontiguousarray(q.scales.T),
    }


SUFFIXES = ("qweight", "qzeros", "scaled_zeros", "scales")
# Modules that AutoAWQ wraps in a ScaledActivation, by the last part of their name.
SCALED_ACTIVATIONS = ("act", "gelu_impl", "activation")


def group(names: list[str], options: Any, context: Context) -> dict[str, dict[str, str]]:
    """Quantized modules by name. The `scales` of a ScaledActivation (`mlp.act.scales`) stay an array."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        prefix, _, suffix = name.rpartition(".")
        if suffix in SUFFIXES and prefix:
            found.setdefault(prefix, {})[suffix] = name
    return {
        prefix: parts
        for prefix, parts in found.items()
        if set(parts) != {"scales"} or prefix.rpartition(".")[2] not in SCALED_ACTIVATIONS
    }


@dataclasses.dataclass(frozen=True)
class AWQ:
    """AWQ as the target of `jq.convert`; options that are None are those of the source.

    Fields:
      bits, group_size: what the source must have.
      version: "gemm" or "gemv"; "gemv_fast" and "llm-awq" into each other (they round their weights in their own way).
      zero_point: False says in the config that all zero points are 2**(bits-1).
    """

    bits: int | None = None
    group_size: int | None = None
    version: str = "gemm"
    zero_point: bool | None = None

    format: ClassVar[str] = "awq"

    def __post_init__(self) -> None:
        if str(self.version).lower() not in VERSIONS:
            raise ValueError(f"AWQ: version must be one of {', '.join(VERSIONS)}; got {self.version!r}")


FORMAT = Format(
    name="awq",
    methods=("awq",),
    title="AWQ (AutoAWQ, GPT-QModel, llm-awq): 4-bit integers with group scales and zeros",
    parse=parse,
    markers=("qweight",),
    suffixes=("qweight", "qzeros", "scaled_zeros"),
    load=load,
    dump=dump,
    detect=detect,
    group=group,
    methods_table={"AWQ": AWQ},
)
