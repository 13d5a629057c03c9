"""compressed-tensors checkpoints (llm-compressor, vLLM): every compressed format, mixed schemes, old headers.

K = in_features, N = out_features, b = num_bits, dt = dtype of `weight_scale`. Stored tensors of a module:

  pack-quantized   weight_packed int32 [N, ceil(K*b/32)]: row n is one little-endian bit stream of codes q + 2**(b-1).
                   Before 0.13: 32 // b codes a word, code i at bit i*b, the word's upper bits unused.
                   weight_shape int64 [2]; weight_scale dt [N, K/G], [N, 1] or [1];
                   weight_zero_point int32 [ceil(N*b/32), groups], the same packing along N (int8 where per tensor);
                   weight_g_idx int32 [K] (actorder "group", before 0.20)
  int-quantized    weight int8 [N, K] (also where b < 8), weight_scale, weight_zero_point int8 like the scale
  float-quantized  weight float8_e4m3fn [N, K], weight_scale dt [1], [N, 1], [N, K/G] or [ceil(N/r), ceil(K/c)]
  naive-quantized  one of the two above
  mxfp8-quantized  weight float8_e4m3fn, weight_scale uint8 [N, K/32] = 127 + exponent
  nvfp4-pack, mxfp4-pack, mxfp6-pack   weight_packed uint8 [N, K*b/8], low bits first; weight_scale float8_e4m3fn
                   [N, K/16] with weight_global_scale float32 [1] (a divisor), or uint8 [N, K/32]
  sparse-*, marlin-24   see `compressed_tensors_sparse`
  any              input_scale, input_zero_point, input_global_scale (static activations), output_*; rotations of inputs and
                   outputs: see `compressed_tensors_transforms`

Dequantize: dt(q - zero) * scale, one rounding to dt; NVFP4 and MX: to bfloat16 whatever the model's dtype is.

Source: compressed-tensors 0.20.0 (compressors/, quantization/lifecycle/forward_helpers.py), 0.10.2 for what it dropped.
Files with quantization_status "frozen" hold float weights with scales beside them; they stay plain arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jq.activations import Activation
from jq.errors import FormatError, UnsupportedError
from jq.formats import compressed_tensors_float as floats
from jq.formats import compressed_tensors_int as ints
from jq.formats import compressed_tensors_sparse as sparse
from jq.formats.base import Context, Format, Parts, expect_one, take
from jq.formats.compressed_tensors_config import Args, Group, Options, is_embedding, parse
from jq.formats.compressed_tensors_methods import METHODS
from jq.formats.compressed_tensors_parts import FLOATS, NAME, carried_of
from jq.formats.compressed_tensors_transforms import Apply, Transform, Transforms
from jq.qtensor import Plain, QTensor, Source
from jq.qtensor.affine import check_inputs

# Tensors that arithmetic on weights does not need: carried, and read where activations are quantized.
ACTIVATION_SUFFIXES = (
    *("input_scale", "input_zero_point", "input_global_scale"),
    *("output_scale", "output_zero_point", "output_global_scale"),
)
WEIGHT_SUFFIXES = (
    *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    *("weight_global_scale", *sparse.SUFFIXES),
)
SUFFIXES = WEIGHT_SUFFIXES + ACTIVATION_SUFFIXES
# A module with one of these is compressed for sure; with `weight_scale` alone the dtype of the weight decides.
MARKERS = ("weight_packed", "compressed", "weight.compressed")


def group(names: list[str], options: Options, context: Context) -> dict[str, dict[str, str]]:
    """Compressed modules: {prefix: {suffix: stored name}}.

    Raises:
      FormatError: a weight_scale without the weight it belongs to.
    """
    found: dict[str, dict[str, str]] = {}
    ordered = sorted(SUFFIXES, key=len, reverse=True)
    for name in names:
        suffix = next((s for s in ordered if name.endswith("." + s)), None)
        if suffix is not None:
            found.setdefault(name[: -len(suffix) - 1], {})[suffix] = name
    modules = {}
    for prefix, parts in found.items():
        if any(m in parts for m in MARKERS):
            modules[prefix] = parts
        elif "weight_scale" in parts:
            if "weight" not in parts:
                raise FormatError(
                    f"{parts['weight_scale']}: no weight, weight_packed or compressed beside it; the file is incomplete"
                )
            dtype = np.dtype(context.dtypes[parts["weight"]])
            if dtype.itemsize == 1:  # a float weight with scales is a frozen (fake-quantized) one
                modules[prefix] = parts
        elif _inputs_alone(options.group_of(prefix)) and _is_dense(parts, options.transforms, context):
            modules[prefix] = parts
    if options.transforms is not None and options.transforms.schemes:
        _add_transforms(modules, found, options.transforms, context)
    return modules


def _add_transforms(
    modules: dict[str, dict[str, str]], found: dict[str, dict[str, str]], transforms: Transforms, context: Context
) -> None:
    """Lets modules borrow the matrices that rotate around them; dense layers become modules where there are any."""
    met: set[tuple[Transform, Apply]] = set()
    for prefix, parts in found.items():
        around = transforms.around(prefix)
        if not around or (prefix not in modules and not _is_dense(parts, transforms, context)):
            continue
        if is_embedding(prefix):
            raise UnsupportedError(
                f"{prefix}: transform_config rotates an embedding at run time, which is not done here"
            )
        met.update(around)
        modules.setdefault(prefix, {"weight": parts.get("weight", "")}).update(transforms.borrowed(prefix))
    for scheme, apply in transforms.everywhere():
        if (scheme, apply) not in met:
            raise UnsupportedError(
                f"{context.label}: transform_config.{scheme.name} rotates the {apply.location} of {list(apply.targets)}, "
                "which means no linear layer here; other modules are not rotated"
            )


def _is_dense(parts: dict[str, str], transforms: Transforms | None, context: Context) -> bool:
    name = parts.get("weight")
    if name is None or (transforms is not None and name in transforms.tensors):
        return False
    return len(context.shapes[name]) == 2 and np.dtype(context.dtypes[name]) in FLOATS


def _inputs_alone(scheme: Group | None) -> bool:
    """Whether a layer's inputs or outputs are quantized and its weight is not."""
    return scheme is not None and scheme.weights is None and (scheme.inputs or scheme.outputs) is not None


def load(prefix: str, parts: Parts, options: Options, context: Context) -> QTensor:
    """One module's tensors as a QTensor; see the module docstring for what they are."""
    carried = {k: parts[k] for k in ACTIVATION_SUFFIXES if k in parts}
    if _is_plain(parts):
        dense, found = parts["weight"], options.group_of(prefix)
        tensor: QTensor = Plain(dense, carried, dtype=str(dense.dtype), source=Source(NAME, (("kind", "plain"),)))
        if _inputs_alone(found):
            tensor = tensor.replace(activation=activation_of(prefix, found, carried))
            check_inputs(tensor, prefix)
        return _with_transforms(prefix, tensor, parts, options)
    scheme = scheme_of(prefix, parts, options, context)
    if sparse.is_marlin(parts):
        tensor = sparse.load_marlin(prefix, parts, need_weights(scheme, prefix))
    elif sparse.is_bitmask(parts):
        tensor = sparse.load_bitmask(prefix, parts, scheme)
    else:
        args = need_weights(scheme, prefix)
        tensor = LOADERS[kind_of(prefix, parts, args)](prefix, parts, args, options)
    tensor = tensor.replace(extras={**tensor.extras, **carried}, activation=activation_of(prefix, scheme, carried))
    check_inputs(tensor, prefix)
    return _with_transforms(prefix, tensor, parts, options)


def _is_plain(parts: Parts) -> bool:
    """A dense layer that is a module for its transforms alone."""
    return "weight_scale" not in parts and "weight" in parts and parts["weight"].dtype in [np.dtype(d) for d in FLOATS]


def _with_transforms(prefix: str, tensor: QTensor, parts: Parts, options: Options) -> QTensor:
    return tensor if options.transforms is None else options.transforms.attach(prefix, tensor, parts)


def scheme_of(prefix: str, parts: Parts, options: Options, context: Context) -> Group | None:
    """The config group of a module whose tensors are compressed; None for one that is only sparse.

    Ignored names and targets of another naming (a vision model's prefix) do not undo what the file holds: where one
    scheme is left that could have written it, that is it.
    """
    found = options.group_of(prefix) or options.group_of(prefix, respect_ignore=False)
    if found is not None:
        return found
    if sparse.is_bitmask(parts) and "weight_scale" not in parts:
        return None
    schemes = {(g.weights, g.inputs, g.outputs): g for g in options.groups if g.weights is not None}
    if len(schemes) == 1:
        return next(iter(schemes.values()))
    targets = [t for g in options.groups for t in g.targets]
    raise FormatError(
        f"{prefix}: has quantized tensors ({', '.join(sorted(parts))}), but no target of config_groups matches it "
        f"(targets: {targets[:8]}); the config does not belong to this file"
    )


def need_weights(scheme: Group | None, prefix: str) -> Args:
    if scheme is None or scheme.weights is None:
        raise FormatError(f"{prefix}: has quantized tensors, but its scheme in config_groups has no `weights`")
    return scheme.weights


def kind_of(prefix: str, parts: Parts, args: Args) -> str:
    """Which loader reads a module: the stored tensors decide, and have to agree with the scheme."""
    if "weight_packed" in parts:
        found = "float" if parts["weight_packed"].dtype == np.uint8 else "int"
        kind = "small-float" if found == "float" else "packed-int"
    else:
        weight = take(parts, "weight", prefix)
        found = "int" if weight.dtype == np.int8 else "float"
        kind = "int8" if found == "int" else "float8"
    if found != args.type:
        stored = parts.get("weight_packed", parts.get("weight"))
        raise FormatError(
            f"{prefix}: stored as {None if stored is None else stored.dtype}, which is the {found} layout, but config_groups "
            f"says {args}; the config does not belong to this file"
        )
    return kind


def activation_of(prefix: str, scheme: Group | None, stored: Parts) -> Activation | None:
    """The description of input and output quantization, None where the scheme has neither."""
    if scheme is None or (scheme.inputs is None and scheme.outputs is None):
        return None
    needed = []
    for name, args in (("input", scheme.inputs), ("output", scheme.outputs)):
        if args is None or args.dynamic is True:
            continue
        if args.dynamic == "local" or args.strategy == "tensor_group":
            needed.append(f"{name}_global_scale")
        if args.dynamic is False:
            needed.append(f"{name}_scale")
            if not args.symmetric:
                needed.append(f"{name}_zero_point")
    for key in needed:
        if key not in stored:
            raise FormatError(f"{prefix}.{key}: missing; config_groups asks for static activations ({scheme.inputs})")
        args = scheme.inputs if key.startswith("input") else scheme.outputs
        if args is not None and args.strategy in ("tensor", "tensor_group"):
            expect_one(stored[key], f"{prefix}.{key}", f"for {args}")
    pairs: list[tuple[str, Any]] = [("input", scheme.inputs)] if scheme.inputs else []
    if scheme.outputs:
        pairs.append(("output", scheme.outputs))
    return Activation("compressed_tensors", tuple(needed), tuple(pairs))


LOADERS: dict[str, Callable[..., Any]] = {
    "packed-int": ints.load_packed,
    "int8": ints.load_int8,
    "float8": floats.load_float8,
    "small-float": floats.load_small_float,
}
DUMPERS: dict[str, Callable[[Any], Parts]] = {
    "packed-int": ints.dump_packed,
    "int8": ints.dump_int8,
    "float8": floats.dump_float8,
    "small-float": floats.dump_small_float,
    "bitmask": sparse.dump_bitmask,
    "marlin": sparse.dump_marlin,
    "plain": lambda q: {"weight": np.asarray(q.values)} | carried_of(q),
}


def dump(q: Any) -> Parts:
    """Stored tensors of a module, identical to those that were loaded."""
    parts = DUMPERS[q.source.get("kind")](q)
    if isinstance(getattr(q, "codes", None), QTensor) and q.source.get("kind") in ("int8", "float8"):
        parts.update(sparse.dump_bitmask(q.codes))
    return parts


FORMAT = Format(
    name=NAME,
    methods=("compressed-tensors", "compressed_tensors", "sparseml"),
    title="compressed-tensors (llm-compressor): int, FP8, NVFP4, MX, sparse, mixed schemes",
    parse=parse,
    markers=MARKERS,
    suffixes=("weight_packed", "compressed", "bitmask", "row_offsets", "scale_packed"),
    load=load,
    dump=dump,
    group=group,
    beside=("weight_scale", "weight_zero_point", "weight_global_scale", "weight_g_idx", *ACTIVATION_SUFFIXES),
    methods_table=METHODS,
)
