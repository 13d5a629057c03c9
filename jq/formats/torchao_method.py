"""torchao's data-free quantization methods, and the config objects that name them (quantization/quant_api.py)."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import ml_dtypes
import numpy as np

from jq.algorithms import blocks
from jq.algorithms.torchao import INT8_EPS, affine_codes, float8_codes, plain_int4_codes, tinygemm_codes
from jq.errors import FormatError
from jq.formats.base import Context, Parts, expect_dtype
from jq.formats.torchao_tensors import pack_tiles
from jq.qtensor import QTensor

Scheme = Literal[
    "int8_weight_only",
    "int8_dynamic_activation_int8_weight",
    "intx_weight_only",
    "int8_dynamic_activation_intx_weight",
    "int4_weight_only",
    "float8_weight_only",
    "float8_dynamic_activation_float8_weight",
]
_SCHEMES: tuple[str, ...] = Scheme.__args__  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class TorchAO:
    """A torchao scheme with the library's defaults.

    Fields:
      scheme: the function's old name, e.g. "int8_weight_only".
      bits: width of intx codes, 1..8.
      group_size: weights along K that share a scale; None: intx one a row, int4 128.
      granularity: "row" or "tensor" (int8 and float8 weights, and their activations).
      asymmetric: zero points for intx weights, or for int8 activations.
      packing: of int4: "plain" (Int4Tensor) or "tile_packed_to_4d" (tinygemm; bfloat16 only).
    """

    scheme: Scheme = "int8_weight_only"
    bits: int = 4
    group_size: int | None = None
    granularity: Literal["row", "tensor"] = "row"
    asymmetric: bool = False
    packing: Literal["plain", "tile_packed_to_4d"] = "plain"
    format = "torchao"

    def quantize(self, w: Any, name: str = "weight") -> QTensor:
        """w: float[N, K] in the model's dtype.

        Raises:
          FormatError: a scheme or group size that torchao does not take for this weight.
        """
        from jq.formats.torchao import load

        w = blocks.weight(w, name)
        if self.scheme not in _SCHEMES:
            raise FormatError(f"TorchAO: scheme {self.scheme!r}; known: {', '.join(_SCHEMES)}")
        kind, parts, attributes = self._parts(w, name)
        parameter = name if name.endswith(".weight") else f"{name}.weight"
        entry = {"_type": kind, "_data": attributes, "_tensor_data_names": list(parts)}
        return load(parameter, parts, {parameter: entry}, Context())

    def _parts(self, w: np.ndarray, name: str) -> tuple[str, Parts, dict[str, Any]]:
        dtype = _torch(str(w.dtype))
        if "int8_weight" in self.scheme:
            return self._int8(w, dtype)
        if "intx" in self.scheme:
            return self._intx(w, dtype, name)
        if "float8" in self.scheme:
            return self._float8(w, dtype)
        return self._int4(w, name)

    def _block(self, w: np.ndarray) -> tuple[int, int]:
        return (w.shape[0] if self.granularity == "tensor" else 1), w.shape[1]

    def _int8(self, w: np.ndarray, dtype: Any) -> tuple[str, Parts, dict[str, Any]]:
        block = self._block(w)
        codes, scale, zero = affine_codes(w, block, -128, 127, eps=INT8_EPS, wide_scale=True)
        kwargs = None
        if self.scheme.startswith("int8_dynamic"):
            mapping = "ASYMMETRIC" if self.asymmetric else "SYMMETRIC"
            kwargs = _object(
                "QuantizeTensorToInt8Kwargs",
                granularity=self._granularity(),
                mapping_type=_enum("MappingType", mapping),
                reduce_range=False,
            )
        attributes = {"act_quant_kwargs": kwargs, "reduce_range": False, "block_size": list(block), "dtype": dtype}
        return "Int8Tensor", {"zero_point": zero, "qdata": codes, "scale": scale}, attributes

    def _intx(self, w: np.ndarray, dtype: Any, name: str) -> tuple[str, Parts, dict[str, Any]]:
        if not 1 <= self.bits <= 8:
            raise FormatError(f"TorchAO: bits {self.bits}, expected 1..8")
        group = self._group(w, name, w.shape[1])
        half = 1 << (self.bits - 1)
        codes, scale, zero = affine_codes(w, (1, group), -half, half - 1, asymmetric=self.asymmetric)
        attributes = {
            "target_dtype": _torch(f"int{self.bits}"),
            "block_size": [1, group],
            "dtype": dtype,
            "activation_quantization": "int8_asym_per_token" if self.scheme.startswith("int8_dynamic") else None,
        }
        return "IntxUnpackedToInt8Tensor", {"qdata": codes, "scale": scale, "zero_point": zero}, attributes

    def _float8(self, w: np.ndarray, dtype: Any) -> tuple[str, Parts, dict[str, Any]]:
        block = self._block(w)
        codes, scale = float8_codes(w, block, np.dtype(ml_dtypes.float8_e4m3fn))
        kwargs = config = None
        if self.scheme.startswith("float8_dynamic"):
            config = _MM_CONFIG
            kwargs = _object(
                "QuantizeTensorToFloat8Kwargs",
                float8_dtype=_torch("float8_e4m3fn"),
                granularity=self._granularity(),
                mm_config=None,
                hp_value_lb=None,
                hp_value_ub=None,
                kernel_preference=_enum("KernelPreference", "AUTO"),
            )
        attributes = {
            "block_size": list(block),
            "mm_config": config,
            "act_quant_kwargs": kwargs,
            "kernel_preference": _enum("KernelPreference", "AUTO"),
            "dtype": dtype,
        }
        return "Float8Tensor", {"qdata": codes, "scale": scale}, attributes

    def _int4(self, w: np.ndarray, name: str) -> tuple[str, Parts, dict[str, Any]]:
        group = self._group(w, name, 128)
        if self.packing == "plain":
            codes, scale, zero = plain_int4_codes(w, group)
            packed = (codes[:, 0::2] & 15) | (codes[:, 1::2] << 4)
            parts = {"qdata": packed.astype(np.int8), "scale": _transposed(scale), "zero_point": _transposed(zero)}
            attributes = {"activation_dtype": _torch("bfloat16"), "block_size": [1, group], "shape": list(w.shape)}
            return "Int4Tensor", parts, attributes
        expect_dtype(w, (ml_dtypes.bfloat16,), f"{name} (tile-packed int4)")
        padded = np.pad(w, [(0, -w.shape[0] % 8), (0, -w.shape[1] % 1024)])
        codes, scale, zero = tinygemm_codes(padded, group)
        both = np.ascontiguousarray(np.stack([scale.T, zero.T], axis=-1))
        attributes = {"block_size": [1, group], "shape": list(w.shape)}
        return "Int4TilePackedTo4dTensor", {"qdata": pack_tiles(codes), "scale_and_zero": both}, attributes

    def _group(self, w: np.ndarray, name: str, default: int) -> int:
        group = self.group_size or default
        if w.shape[1] % group:
            raise FormatError(
                f"{name}: groups of {group} do not divide in_features {w.shape[1]}; torchao leaves such a weight in "
                "float. Name it in `skip` or choose another group_size"
            )
        return group

    def _granularity(self) -> dict[str, Any]:
        return _object("PerTensor") if self.granularity == "tensor" else _object("PerRow", dim=-1)

    def config(self, skip: Any = ()) -> dict[str, Any]:
        """quantization_config of transformers."""
        return {
            "quant_method": "torchao",
            "quant_type": {"default": self._config()},
            "modules_to_not_convert": list(skip) or None,
            "include_input_output_embeddings": False,
            "untie_embedding_weights": False,
        }

    def _config(self) -> dict[str, Any]:
        row, group = self._versioned(self._granularity()), self.group_size
        mapping = _enum("MappingType", "ASYMMETRIC" if self.asymmetric else "SYMMETRIC")
        intx = {
            "intx_packing_format": _enum("IntxPackingFormat", "UNPACKED_TO_INT8"),
            "intx_choose_qparams_algorithm": _enum("IntxChooseQParamsAlgorithm", "AFFINE"),
        }
        part = _object("PerGroup", group_size=group) if group else _object("PerAxis", axis=0)
        fields: dict[str, tuple[str, dict[str, Any]]] = {
            "int8_weight_only": ("Int8WeightOnlyConfig", {"group_size": None, "granularity": row}),
            "int8_dynamic_activation_int8_weight": (
                "Int8DynamicActivationInt8WeightConfig",
                {"act_mapping_type": mapping, "weight_only_decode": False, "granularity": row, "reduce_range": False},
            ),
            "intx_weight_only": (
                "IntxWeightOnlyConfig",
                {
                    "weight_dtype": _torch(f"int{self.bits}"),
                    "granularity": self._versioned(part),
                    "mapping_type": mapping,
                    "scale_dtype": None,
                    **intx,
                },
            ),
            "int8_dynamic_activation_intx_weight": (
                "Int8DynamicActivationIntxWeightConfig",
                {
                    "weight_dtype": _torch(f"int{self.bits}"),
                    "weight_granularity": self._versioned(part),
                    "weight_mapping_type": mapping,
                    "weight_scale_dtype": None,
                    "act_mapping_type": _enum("MappingType", "ASYMMETRIC"),
                    **intx,
                },
            ),
            "int4_weight_only": (
                "Int4WeightOnlyConfig",
                {
                    "group_size": group or 128,
                    "int4_packing_format": _enum("Int4PackingFormat", self.packing.upper()),
                    "int4_choose_qparams_algorithm": _enum("Int4ChooseQParamsAlgorithm", "TINYGEMM"),
                    "int4_tile_packed_ntile": 8,
                },
            ),
            "float8_weight_only": (
                "Float8WeightOnlyConfig",
                {"weight_dtype": _torch("float8_e4m3fn"), "granularity": row},
            ),
            "float8_dynamic_activation_float8_weight": (
                "Float8DynamicActivationFloat8WeightConfig",
                {
                    "activation_dtype": _torch("float8_e4m3fn"),
                    "weight_dtype": _torch("float8_e4m3fn"),
                    "granularity": [row, row],
                    "packing_format": _enum("Float8PackingFormat", "PLAIN"),
                    "mm_config": self._versioned(_MM_CONFIG),
                    "activation_value_lb": None,
                    "activation_value_ub": None,
                    "kernel_preference": _enum("KernelPreference", "AUTO"),
                    "alg_id": 0,
                },
            ),
        }
        name, data = fields[self.scheme]
        if not name.endswith("IntxWeightConfig") and name != "IntxWeightOnlyConfig":
            data = {**data, "set_inductor_config": True}
        return {"_type": name, "_version": 2, "_data": data}

    @staticmethod
    def _versioned(value: dict[str, Any]) -> dict[str, Any]:
        return {**value, "_version": 1}


def _torch(dtype: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": dtype}


def _enum(kind: str, member: str) -> dict[str, str]:
    return {"_type": kind, "_data": member}


def _object(kind: str, **fields: Any) -> dict[str, Any]:
    return json.loads(json.dumps({"_type": kind, "_data": fields}))


_MM_CONFIG = _object("Float8MMConfig", emulate=False, use_fast_accum=True, pad_inner_dim=False)


def _transposed(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T)
