"""The settings of VPTQ's layers in a quantization_config (see `jq.formats.vptq`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context, Parts, true_or_false, warn_once, warn_unknown

KNOWN = ("quant_method", "config_for_layers", "shared_layer_config", "enable_proxy_error", "modules_to_not_convert")
LAYER_KEYS = (
    "in_features",
    "out_features",
    "bias",
    "vector_lens",
    "num_centroids",
    "num_res_centroids",
    "group_num",
    "group_size",
    "outlier_size",
    "enable_norm",
    "enable_perm",
    "indices_as_float",
    "is_indice_packed",
    "vector_quant_dim",
    "norm_dim",
    "enable_proxy_error",
    "enable_abs",
    "enable_sphere",
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One module's settings; -1 or 0 centroids, lengths and sizes mean that they are not there or not said.

    `norm`, `perm` and `packed` are None where the settings leave them out: the stored tensors tell.
    """

    vector: int
    entries: int
    residual_entries: int
    groups: int
    group_size: int
    outlier_vector: int
    outlier_entries: int
    outliers: int
    norm: bool | None
    norm_rows: bool
    perm: bool | None
    packed: bool | None
    in_features: int
    out_features: int

    def told_by(self, parts: Parts) -> Layer:
        """The settings with what they leave out taken from a module's tensors."""
        indices = parts.get("indices")
        return dataclasses.replace(
            self,
            norm="weight_scale" in parts if self.norm is None else self.norm,
            perm="perm" in parts if self.perm is None else self.perm,
            packed=indices is not None and indices.dtype == np.int32 if self.packed is None else self.packed,
        )


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings by module path and by the last part of it."""

    layers: Mapping[str, Layer]
    shared: Mapping[str, Layer]

    def of(self, prefix: str) -> Layer | None:
        return self.layers.get(prefix) or self.shared.get(prefix.rpartition(".")[2])


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads a quantization_config.

    Raises:
      FormatError: a setting that is missing or of the wrong kind.
      UnsupportedError: vectors along inputs, outliers with a residual.
    """
    warn_unknown(config, KNOWN, context.label)
    tables = []
    for key in ("config_for_layers", "shared_layer_config"):
        table = config.get(key) or {}
        if not isinstance(table, Mapping):
            raise FormatError(f"{context.label}: quantization_config.{key} must map names to settings")
        tables.append({name: _layer(f"{context.label}: {key}[{name!r}]", conf) for name, conf in table.items()})
    true_or_false(config, "enable_proxy_error", f"{context.label}: quantization_config")
    if not tables[0] and not tables[1]:
        raise FormatError(
            f"{context.label}: quantization_config has neither config_for_layers nor shared_layer_config; a VPTQ "
            "checkpoint names the settings of its layers there"
        )
    return Options(*tables)


def _layer(label: str, conf: Any) -> Layer:
    if not isinstance(conf, Mapping):
        raise FormatError(f"{label}: must be an object of settings, found {type(conf).__name__}")
    for key in conf.keys() - set(LAYER_KEYS):
        warn_once(label, f"{key} is not known to VPTQ; ignored")
    if conf.get("vector_quant_dim", "out") != "out":
        raise UnsupportedError(f"{label}: vector_quant_dim {conf['vector_quant_dim']!r}; only 'out' was ever written")

    def pair(key: str, default: tuple[int, int]) -> tuple[int, int]:
        value = conf.get(key, default)
        if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(v) is int for v in value):
            raise FormatError(f"{label}: {key} is {value!r}, expected two integers [outliers, main]")
        return value[0], value[1]

    def number(key: str, default: int) -> int:
        value = conf.get(key, default)
        if type(value) is not int or value < default:
            raise FormatError(f"{label}: {key} is {value!r}, expected an integer of at least {default}")
        return value

    def flag(key: str) -> bool | None:
        value = conf.get(key)
        if value is not None and type(value) is not bool:
            raise FormatError(f"{label}: {key} is {value!r}, expected true or false")
        return value

    norm_dim = conf.get("norm_dim")
    if norm_dim not in (None, 0, 1) or isinstance(norm_dim, bool):
        raise FormatError(f"{label}: norm_dim is {norm_dim!r}, expected 0 (inputs) or 1 (outputs)")
    for key in ("enable_abs", "enable_sphere"):
        if flag(key):
            raise UnsupportedError(
                f"{label}: {key} is set; signs and scales of vectors are not read, nor packed by VPTQ"
            )
    for key in ("indices_as_float", "enable_proxy_error"):  # how a layer is tuned; the dtype of indices tells the first
        flag(key)

    outlier_vector, vector = pair("vector_lens", (-1, -1))
    outlier_entries, entries = pair("num_centroids", (-1, -1))
    outlier_residual, residual = pair("num_res_centroids", (-1, -1))
    outliers = number("outlier_size", 0)
    if vector < 1 or not 1 <= entries <= 1 << 16 or residual > 1 << 16:
        raise FormatError(
            f"{label}: vectors of {vector} with {entries} main and {residual} residual centroids; expected vectors of "
            "1 or more and 1..65536 centroids (indices have 16 bits)"
        )
    has_outliers = outlier_vector > 1 and outlier_entries > 0
    if outliers and not has_outliers:
        raise FormatError(f"{label}: outlier_size {outliers}, but no outlier vectors in vector_lens and num_centroids")
    if has_outliers and outlier_residual > 0:
        raise UnsupportedError(f"{label}: outliers with a residual codebook; VPTQ has no decoder for them either")
    return Layer(
        vector=vector,
        entries=entries,
        residual_entries=max(residual, 0),
        groups=number("group_num", 1),
        group_size=number("group_size", -1),
        outlier_vector=outlier_vector if has_outliers else 0,
        outlier_entries=outlier_entries if has_outliers else 0,
        outliers=outliers,
        norm=flag("enable_norm"),
        norm_rows=norm_dim == 1,
        perm=flag("enable_perm"),
        packed=flag("is_indice_packed"),
        in_features=number("in_features", -1),
        out_features=number("out_features", -1),
    )
