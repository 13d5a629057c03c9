"""`jq.quantize`: the linear layers of a checkpoint, a loaded model or any NNX module, by any method."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jq.errors import CalibrationError, JqError, UnsupportedError
from jq.formats import stored_config
from jq.formats.base import warn_once
from jq.qtensor import QTensor
from jq.state import State, load_state, module_of

Skip = Iterable[str] | Callable[[str], bool] | None
Advance = Callable[[int, int, str], None]

# A checkpoint holds tensors, not classes. Tables that are looked up, not multiplied, by the last part of their name:
_EMBEDDINGS = re.compile(
    r"(embed|wte|wpe|embd|embedding|lookup|relative_attention_bias|^shared$|rotary_emb|pos_emb|position_ids)",
    re.IGNORECASE,
)
_NORMS = re.compile(r"(norm|^ln_|layer_scale|conv)", re.IGNORECASE)
# The output matrix and MoE routers, left in float unless `skip` says otherwise: they are small and decide much.
_OUTPUTS = ("lm_head", "embed_out", "output_projection")
_ROUTERS = ("gate", "router", "shared_expert_gate")
# Conv1D layers of GPT-2 hold [in, out]; quantized checkpoints of them hold [out, in].
_TRANSPOSED = {"gpt2": ("c_attn", "c_proj", "c_fc", "q_attn"), "openai-gpt": ("c_attn", "c_proj", "c_fc")}


def quantize(
    model_or_state: Any,
    method: Any,
    data: Any = None,
    skip: Skip = None,
    *,
    advance: Advance | None = None,
) -> Any:
    """Quantizes every linear layer.

    Args:
      model_or_state: what `jq.load` returns or any NNX module (changed in place and returned), or a State, or a path or
        hub id (a new State is returned).
      method: `jq.NF4()`, `jq.FP4()`, `jq.Int8()`, `jq.RTN(...)`, ...; an object with `.quantize(weight, name)`.
      data: calibration data. No method here calibrates yet, so anything but None is an error.
      skip: modules that stay float: names, ends of names, prefixes, shell patterns, or a function name -> bool. None:
        the output matrix (`lm_head`) and MoE routers. A list replaces that default.
      advance: called as advance(done, total, name) for each layer.

    Returns:
      The quantized model or State; `jq.save` writes it, `jq.quantized` lists it.

    Raises:
      UnsupportedError: already quantized, weights that the method's storage cannot hold, or `data` given.
      CalibrationError: the method needs a calibration.
      TypeError: a method's name or class in place of an object, or nothing that can be quantized.
      ValueError: a pattern of `skip` that matches nothing, weights that are not finite.
    """
    if isinstance(method, str | type):
        name = method if isinstance(method, str) else f"the class {method.__name__}"
        raise TypeError(f"jq.quantize: method is {name}, expected an object such as jq.NF4() or jq.RTN(bits=4)")
    if data is not None or not hasattr(method, "quantize"):
        raise _needs_calibration(method, data)
    if isinstance(model_or_state, State):
        return _quantize_state(model_or_state, method, skip, advance)
    if isinstance(model_or_state, Mapping):
        return _quantize_state(State(model_or_state), method, skip, advance)
    if hasattr(model_or_state, "to_state"):
        return _quantize_model(model_or_state, method, skip, advance)
    if isinstance(model_or_state, str) or hasattr(model_or_state, "__fspath__"):
        return _quantize_state(load_state(model_or_state, lazy=True), method, skip, advance)
    return _quantize_module(model_or_state, method, skip)


def _needs_calibration(method: Any, data: Any) -> JqError:
    """The error for a method or a call that asks for a calibration."""
    name = type(method).__name__
    instead = "Without data: jq.NF4(), jq.RTN(bits=4, group_size=64), jq.Int8()"
    if data is not None:
        return UnsupportedError(
            f"quantizing with data ({name}) is not done here, the calibration is missing. {instead}"
        )
    return CalibrationError(
        f"{name} needs calibration data, and jaxq does not calibrate: make the checkpoint with the method's own library "
        f"and load it here, or jq.convert integer weights to it. {instead}"
    )


def linears(state: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> list[str]:
    """Module names of the linear layers of a State: dense or quantized matrices that are no embedding tables."""
    names = []
    for key in state:
        if not key.endswith(".weight"):
            continue
        module = module_of(key)
        last = module.rpartition(".")[2]
        if _EMBEDDINGS.search(last) or (_NORMS.search(last) and not last.endswith("proj")):
            continue
        value = state[key]
        if len(value.shape) == 2 and (isinstance(value, QTensor) or str(value.dtype) in _FLOATS):
            names.append(module)
    return names


_FLOATS = ("float16", "bfloat16", "float32", "float64")


def matcher(skip: Iterable[str]) -> Callable[[str], bool]:
    """Whether a module name is one of `skip`: equal, below it, ending with it, or matching it as a shell pattern."""
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)

    def matches(name: str) -> bool:
        return any(
            name == p or name.startswith(p + ".") or name.endswith("." + p) or fnmatch.fnmatchcase(name, p)
            for p in patterns
        )

    return matches


def default_skip(names: Iterable[str]) -> Callable[[str], bool]:
    """The output matrix and MoE routers of a model with tensors or modules `names`."""
    experts = any(".experts." in name for name in names)

    def skipped(name: str) -> bool:
        last = name.rpartition(".")[2]
        return last in _OUTPUTS or (experts and last in _ROUTERS)

    return skipped


def chosen(names: list[str], skip: Skip, beside: Iterable[str] = ()) -> Callable[[str], bool]:
    """Which of the linear layers `names` a `skip` means; `ValueError` for a pattern that matches none.

    Args:
      beside: names of the model's other tensors.
    """
    if skip is None:
        return default_skip((*names, *beside))
    if callable(skip):
        return skip
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    for pattern in patterns:
        one = matcher((pattern,))
        if pattern not in _OUTPUTS and not any(one(name) for name in names):
            raise ValueError(f"skip: {pattern!r} matches no linear layer; layers are named like {', '.join(names[:3])}")
    return matcher(patterns)


def _quantize_state(state: State, method: Any, skip: Skip, advance: Advance | None) -> State:
    from jq.models import expert_names

    if state.container == "gguf":
        from jq.formats import gguf

        state = gguf.model_state(state)
    label = str(state.path or "state")
    if stored_config(state.config, label) is not None:
        raise UnsupportedError(
            f"{label}: is quantized already; jq.convert changes the format of quantized weights, and quantizing again "
            "would add the errors of both. Start from the float model"
        )
    state, left = expert_names.apart(state, label)
    if left:  # most of such a model
        warn_once(
            label, f"{left[0]} and {len(left) - 1} more stacks of experts stay float: no decoder takes them apart"
        )
    names = linears(state)
    skipped = chosen(names, skip, state)
    todo = [name for name in names if not skipped(name)]
    if not todo:
        raise ValueError(f"{label}: no linear layer to quantize ({len(names)} found, all skipped)")
    tensors: dict[str, Any] = {}
    peaks = _shared_peaks(state, method, todo)
    dtype = _common_dtype(state, todo)
    wanted, done = set(todo), 0
    for key in state:
        name = module_of(key)
        value = state[key]
        if isinstance(value, QTensor):
            value = _dense(value, state.config)
        if key.endswith(".weight") and name in wanted:
            if advance is not None:
                advance(done, len(todo), name)
            more = {"peak": peaks[name]} if name in peaks else {}
            w = _oriented(value, name, state.config).astype(dtype)
            value = method.quantize(w, name=name, **more).to_jax()
            done += 1
        tensors[key] = value
    config = {
        **state.config,
        _dtype_key(state.config): str(dtype),
        "quantization_config": _config(method, todo, [n for n in names if n not in wanted], tensors),
    }
    return state.replace(tensors, config)


def _common_dtype(state: State, todo: list[str]) -> np.dtype:
    """The one dtype of the weights to quantize, the widest where they differ; float32 for float64.

    Formats that store no dtype read it from config.json. It becomes config.json's, as where transformers saves a model
    in another dtype than it was loaded in, so that the weights are the same before saving and after loading.
    """
    dtypes = {_float_dtype(state[f"{name}.weight"], state.config) for name in todo}
    return np.dtype(functools.reduce(jnp.promote_types, dtypes))


def _float_dtype(value: Any, config: Mapping[str, Any]) -> np.dtype:
    if isinstance(value, QTensor):
        return np.dtype(jnp.dtype(_config_dtype(config)))
    return np.dtype(np.float32) if value.dtype == np.float64 else np.dtype(value.dtype)


def _dtype_key(config: Mapping[str, Any]) -> str:
    return "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"


def _config_dtype(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


def _shared_peaks(state: State, method: Any, todo: list[str]) -> dict[str, float]:
    """Largest magnitude over the layers that share a global scale (NVFP4: q, k, v), where the method names such sets."""
    peaks: dict[str, float] = {}
    for last_names in getattr(method, "shares", ()):
        for name in todo:
            parent, _, last = name.rpartition(".")
            members = [m for n in last_names if (m := f"{parent}.{n}") in todo]
            if last in last_names and name not in peaks and len(members) > 1:
                dense = (np.asarray(state[f"{m}.weight"]).astype(np.float32) for m in members)
                peaks.update(dict.fromkeys(members, max(float(np.abs(w).max()) for w in dense)))
    return peaks


def _dense(value: QTensor, config: Mapping[str, Any]) -> np.ndarray:
    """A GGUF block tensor as a dense one, in the dtype that its config gives the model."""
    source = getattr(value, "source", None)
    if source is not None and source.format != "gguf":
        raise UnsupportedError(f"{value!r} is quantized already; start from the float model")
    return np.asarray(value.dequantize(_config_dtype(config)))


def _oriented(value: Any, name: str, config: Mapping[str, Any]) -> np.ndarray:
    """The weight as [out_features, in_features]."""
    transposed = name.rpartition(".")[2] in _TRANSPOSED.get(str(config.get("model_type")), ())
    w = np.asarray(value)
    w = w.astype(np.float32) if w.dtype == np.float64 else w
    return np.ascontiguousarray(w.T) if transposed else w


def _config(method: Any, quantized: list[str], dense: list[str], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The method's quantization_config; linear layers that stay float are named in it.

    A tied output matrix has no tensor, but loaders see a linear layer: it is named too.
    """
    skip = list(dense)
    if "lm_head" not in quantized and "lm_head" not in skip:
        skip.append("lm_head")
    config = method.config(skip)
    refine = getattr(method, "refine_config", None)
    return config if refine is None else refine(config, quantized, skip, tensors)


def _quantize_model(model: Any, method: Any, skip: Skip, advance: Advance | None) -> Any:
    """A loaded model, in place: its State is quantized and its modules are built anew from that, as it was loaded."""
    from jq.load import build

    dtype = model.model.embed_tokens.weight.get_value().dtype
    state = _quantize_state(model.origin.state_of(model), method, skip, advance)
    made = build(state, dtype=dtype, **model.origin.settings)
    model.model, model.lm_head, model.spec, model.origin = made.model, made.lm_head, made.spec, made.origin
    return model


def _quantize_module(module: Any, method: Any, skip: Skip) -> Any:
    """Any NNX module, in place."""
    from flax import nnx

    from jq.nn import replace_linears

    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"jq.quantize takes a loaded model, an NNX module, a State or a path, got {type(module).__name__}"
        )
    if not replace_linears(module, method, skip=skip):
        raise ValueError(f"{type(module).__name__}: no linear layer to quantize")
    return module
