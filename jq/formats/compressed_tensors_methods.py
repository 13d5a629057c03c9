"""Quantization to compressed-tensors without data: the presets of llm-compressor with its min/max observer."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jq import bits as _bits
from jq import exact
from jq.algorithms import blocks, minmax, narrow
from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Parts
from jq.formats.compressed_tensors_config import Args, Group, preset
from jq.formats.compressed_tensors_parts import NAME, grouping_of, pack_dense

WRITES = "0.20.0"  # the version whose layout is written
DTYPES = ("bfloat16", "float16", "float32")
# Layers that inference engines fuse into one matrix, so that NVFP4's global scale has to be common.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("w1", "w3"),
)


@dataclasses.dataclass(frozen=True)
class CompressedTensors:
    """A preset of llm-compressor, e.g. "W4A16", "W8A8", "FP8_DYNAMIC", "NVFP4A16", "MXFP4A16".

    Codes and scales are those of compressed-tensors 0.20.0 on the CPU. Presets with static activations (FP8, NVFP4) need
    calibration.

    Fields:
      preset: name, any case.
      group_size: weights per scale in place of the preset's, -1 for one scale a channel (integer presets).
      symmetric: in place of the preset's (integer presets).
      targets: what config_groups names.
    """

    preset: str = "W4A16"
    group_size: int | None = None
    symmetric: bool | None = None
    targets: tuple[str, ...] = ("Linear",)
    format: str = NAME

    @property
    def shares(self) -> tuple[tuple[str, ...], ...]:
        """Last names of layers of one parent that share a global scale."""
        weights = self.scheme().weights
        return FUSED if weights is not None and weights.strategy == "tensor_group" else ()

    def scheme(self) -> Group:
        """The preset with the overrides."""
        group = preset(self.preset, self.targets)
        if group.weights is None:
            raise UnsupportedError(f"preset {self.preset}: has no quantized weights")
        changes: dict[str, Any] = {}
        if self.group_size is not None:
            whole = self.group_size == -1
            changes = {"group_size": 0 if whole else self.group_size, "strategy": "channel" if whole else "group"}
        if self.symmetric is not None:
            changes["symmetric"] = self.symmetric
        if changes and group.weights.type != "int":
            raise FormatError(f"preset {self.preset}: group_size and symmetric can be changed for integer weights only")
        return dataclasses.replace(group, weights=dataclasses.replace(group.weights, **changes))

    def quantize(self, w: Any, name: str = "weight", peak: float | None = None) -> Any:
        """w [N, K] (bfloat16, float16 or float32: scales get its dtype) -> codes and scales.

        Args:
          peak: NVFP4: largest magnitude of the layers that share a global scale (q, k, v; gate, up).

        Raises:
          FormatError: a shape that the groups do not divide.
          UnsupportedError: a preset with static activations.
          ValueError: weights that are not finite.
        """
        from jq.formats import compressed_tensors

        group = self.scheme()
        if group.inputs is not None and group.inputs.dynamic is not True:
            raise UnsupportedError(
                f"preset {self.preset}: its activation scales come from calibration data; FP8_DYNAMIC and NVFP4A16 need none"
            )
        w = blocks.weight(w, name)
        assert group.weights is not None
        parts = weight_parts(w, group.weights, layout_of(group), name, peak)
        options = compressed_tensors.Options(groups=(group,), version=WRITES)
        return compressed_tensors.load(name, parts, options, compressed_tensors.Context())

    def config(self, skip: list[str] | None = None) -> dict[str, Any]:
        """The quantization_config of a checkpoint made with these options, as llm-compressor writes it."""
        group = self.scheme()
        layout = layout_of(group)
        scheme = {
            "format": layout,
            "input_activations": None if group.inputs is None else args_dict(group.inputs),
            "output_activations": None,
            "targets": list(self.targets),
            "weights": None if group.weights is None else {**args_dict(group.weights), "observer": "memoryless_minmax"},
        }
        return {
            "config_groups": {"group_0": scheme},
            "format": layout,
            "global_compression_ratio": None,
            "ignore": list(skip or []),
            "kv_cache_scheme": None,
            "quant_method": NAME,
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": WRITES,
        }


def args_dict(args: Args) -> dict[str, Any]:
    """`Args` as the library's JSON: absent keys take its defaults."""
    found: dict[str, Any] = {
        "dynamic": args.dynamic,
        "group_size": args.group_size or None,
        "num_bits": args.num_bits,
        "strategy": args.strategy,
        "symmetric": args.symmetric,
        "type": args.type,
    }
    if args.block_structure:
        found["block_structure"] = list(args.block_structure)
    if args.scale_dtype:
        found["scale_dtype"] = f"torch.{args.scale_dtype}"
    return found


def layout_of(group: Group) -> str:
    """The format that the library writes for a scheme (`infer_module_format`)."""
    w = group.weights
    assert w is not None
    if w.type == "float" and w.group_size == 32 and w.num_bits in (4, 6):
        return f"mxfp{w.num_bits}-pack-quantized"
    if w.type == "float" and w.is_mx:
        return "mxfp8-quantized"
    if w.type == "float" and w.num_bits == 4:
        return "nvfp4-pack-quantized"
    if w.type == "int" and group.inputs is not None:
        return "int-quantized"
    if w.type == "int":
        return "pack-quantized"
    return "naive-quantized" if group.inputs is None else "float-quantized"


def weight_parts(w: np.ndarray, args: Args, layout: str, name: str, peak: float | None = None) -> Parts:
    """The stored tensors of a quantized weight [N, K]."""
    n, k = w.shape
    grouping = grouping_of(args)
    rows, cols = grouping.rows or n, grouping.cols or k
    if k % cols and args.strategy != "block":
        raise FormatError(
            f"{name}: in_features {k} is no multiple of group_size {cols}; skip this layer or choose another"
        )
    tiles = narrow.tiles(w, (rows, cols))  # [groups of rows, rows, groups of columns, cols]

    def flat(t: np.ndarray) -> np.ndarray:
        return narrow.untile(t, (n, k))

    if args.strategy == "tensor_group":
        codes, scale, whole = minmax.nvfp4(w.reshape(n, -1, cols), peak)
        packed = _bits.pack(codes.reshape(n, k), 4).view(np.uint8)
        return {"weight_packed": packed, "weight_scale": scale.view(narrow.E4M3), "weight_global_scale": whole}
    low, high = minmax.ranges(tiles, (1, 3))
    if args.type == "int":
        return _integer_parts(w, args, layout, tiles, low, high)
    if args.is_mx:
        exponent = minmax.mx_exponents(np.maximum(-low, high), args.num_bits)
        scale = exact.pow2(exponent).astype(w.dtype)
        stored = (exponent + 127).astype(np.uint8)
    else:
        scale = minmax.symmetric_scale(low, high, 2 * args.limits[1])
        stored = scale.reshape(1) if args.strategy == "tensor" else scale
    codes = flat(minmax.float_codes(tiles / scale[:, None, :, None], args.num_bits))
    if args.num_bits == 8:
        return {"weight": codes.view(narrow.E4M3), "weight_scale": stored}
    return {"weight_packed": _bits.pack(codes, args.num_bits).view(np.uint8), "weight_scale": stored}


def _integer_parts(
    w: np.ndarray, args: Args, layout: str, tiles: np.ndarray, low: np.ndarray, high: np.ndarray
) -> Parts:
    least, most = (int(v) for v in args.limits)
    zero = None
    if args.symmetric:
        scale = minmax.symmetric_scale(low, high, most - least)
    else:
        scale, zero = minmax.asymmetric(low, high, least, most)
    spread = None if zero is None else zero[:, None, :, None]
    codes = narrow.untile(minmax.integer_codes(tiles, scale[:, None, :, None], spread, least, most), w.shape)
    tensor = args.strategy == "tensor"
    parts: Parts = {"weight_scale": scale.reshape(1) if tensor else scale}
    if layout != "pack-quantized":
        zeros = {} if zero is None else {"weight_zero_point": zero.reshape(parts["weight_scale"].shape)}
        return {"weight": codes, **parts, **zeros}
    offset = 1 << (args.num_bits - 1)
    parts["weight_packed"] = pack_dense(codes.astype(np.int32) + offset, args.num_bits)
    parts["weight_shape"] = np.array(w.shape, np.int64)
    if zero is not None and tensor:
        parts["weight_zero_point"] = zero.reshape(1)
    elif zero is not None:
        packed = pack_dense(np.ascontiguousarray(zero.astype(np.int32).T) + offset, args.num_bits)
        parts["weight_zero_point"] = np.ascontiguousarray(packed.T)
    return parts


def _named(name: str) -> type:
    """A class for a preset: jq.W4A16() is CompressedTensors("W4A16")."""
    fields = [("preset", str, dataclasses.field(default=name))]
    made = dataclasses.make_dataclass(name, fields, bases=(CompressedTensors,), frozen=True)
    made.__doc__ = f'CompressedTensors("{name}").'
    made.__module__ = __name__
    return made


METHODS: dict[str, type] = {
    "CompressedTensors": CompressedTensors,
    **{name: _named(name) for name in ("W4A16", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16")},
}
