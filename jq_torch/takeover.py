"""Taking over transformers' tables of quantization methods, and giving them back."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from types import ModuleType
from typing import Any

import transformers
import transformers.processing_utils  # runs transformers' __init__ again, for a second module of that name
from transformers import modeling_utils
from transformers.quantizers import auto
from transformers.utils import quantization_config as hf

from jq.errors import UnsupportedError
from jq.formats import by_method, table
from jq_torch import configs, lora, settings, sources
from jq_torch.embedding import JqEmbedding
from jq_torch.packed import Packed
from jq_torch.quantizer import JqQuantizer, refuse_sharding

_MISSING = object()
# Where config classes are looked up: programs may hold either `transformers`, of which sys.modules knows the second.
_NAMESPACES = [m for m in gc.get_referrers(type(transformers)) if isinstance(m, ModuleType)]
_NAMESPACES = [hf, *(m for m in _NAMESPACES if m.__name__ == "transformers")]


def methods() -> list[str]:
    """Methods that can be taken over: transformers' mapping keys and those that only jq reads.

    Not GGUF: `from_pretrained(gguf_file=...)` dequantizes by itself, without a foreign library.
    """
    known = {m for fmt in table().values() for m in fmt.methods} - {"gguf"}
    found = set()
    for name in known:
        found |= {"bitsandbytes_4bit", "bitsandbytes_8bit"} if name == "bitsandbytes" else {name}
    return sorted(found)


class Enabled:
    """The state between `enable` and `disable`; as a context manager it disables on leaving."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def close(self) -> None:
        """Puts back everything that this `enable` changed; a second call does nothing."""
        while self._undo:
            self._undo.pop()()
        if self in _stack:
            _stack.remove(self)

    def put(self, table: dict, key: Any, value: Any) -> None:
        """table[key] = value, undone by `close`."""
        before = table.get(key, _MISSING)
        table[key] = value
        self._undo.append(lambda: table.pop(key, None) if before is _MISSING else table.__setitem__(key, before))

    def patch(self, owner: Any, name: str, value: Any) -> None:
        """owner.name = value, undone by `close`."""
        before = vars(owner).get(name, _MISSING)
        setattr(owner, name, value)

        def undo() -> None:
            if before is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._undo.append(undo)

    def after(self, action: Callable[[], None]) -> None:
        self._undo.append(action)


_stack: list[Enabled] = []


def enable(*names: str, quantize_activations: bool = True, packed: bool = True, kernels: bool = True) -> Enabled:
    """Lets jq load, run and save quantized models behind `transformers`.

    Args:
      names: methods to take over, as `methods()` lists them ("bitsandbytes" means both of its kinds); none: all.
      quantize_activations: False computes with float activations where a checkpoint quantizes them (weight-only).
      packed: False keeps a dequantized copy of each weight from its first use on, at the memory of the float model.
      kernels: on a GPU of compute capability 9.0, hold 4- and 8-bit layers in the order of the project's kernels and multiply
        by these; False dequantizes at each call.

    Returns:
      An object to use in a `with` statement, which ends the takeover; without one it lasts until `disable()`.

    Raises:
      UnsupportedError: a name that is no method of jq.
    """
    wanted = _expand(names)
    state = Enabled()
    try:
        _take_over(state, wanted, settings.Settings(quantize_activations, packed, kernels), everything=not names)
    except BaseException:  # half of it would be no state that anybody asked for
        state.close()
        raise
    _stack.append(state)
    return state


def _take_over(state: Enabled, wanted: list[str], chosen: settings.Settings, *, everything: bool) -> None:
    before = settings.use(chosen)
    state.after(lambda: _restore(before))
    for key in wanted:
        original = auto.AUTO_QUANTIZATION_CONFIG_MAPPING.get(key)
        config = configs.StoredConfig if original is None else configs.replacement(original)
        state.put(auto.AUTO_QUANTIZER_MAPPING, key, JqQuantizer)
        state.put(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, key, config)
        if original is not None and config is not original:
            for module in _NAMESPACES:
                state.patch(module, config.__name__, config)
            configs.lead(original)
            state.put(configs.LED, original, config)
    if everything:
        state.put(auto.AUTO_QUANTIZER_MAPPING, "jq", JqQuantizer)
        state.put(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "jq", configs.JqConfig)
        state.patch(auto.AutoHfQuantizer, "supports_quant_method", staticmethod(_supports(auto.AutoHfQuantizer)))
    _patch_models(state)
    sources.patch(state)
    lora.install()


def disable() -> None:
    """Ends every takeover; models that are loaded stay usable."""
    while _stack:
        _stack[-1].close()


def _expand(names: tuple[str, ...]) -> list[str]:
    known = methods()
    if not names:
        return known
    wanted: list[str] = []
    for name in names:
        found = [k for k in known if k == name or (name == "bitsandbytes" and k.startswith("bitsandbytes_"))]
        if not found:
            raise UnsupportedError(f"enable: {name!r} is not a method of jq; known: {', '.join(known)}")
        wanted += found
    return wanted


def _restore(before: settings.Settings) -> None:
    settings.use(before)


def _supports(owner: Any) -> Callable[[dict], bool]:
    """`supports_quant_method` that raises for an unknown method: the original warns and loads random weights."""
    original = owner.supports_quant_method

    @functools.wraps(original)
    def supports(quantization_config_dict: dict) -> bool:
        if not isinstance(quantization_config_dict, dict):
            quantization_config_dict = quantization_config_dict.to_dict()
        if not original(quantization_config_dict):
            if quantization_config_dict.get("quant_method") == "bitsandbytes":
                raise UnsupportedError("quantization_config: neither load_in_4bit nor load_in_8bit is set")
            by_method(str(quantization_config_dict.get("quant_method")), "config.json: quantization_config")
            raise UnsupportedError(
                f"config.json: quant_method {quantization_config_dict.get('quant_method')!r} is not enabled"
            )
        return True

    return supports


def _count_weights() -> None:
    """`num_parameters` counts the weights that packed parameters stand for; stays after `disable`, as models do."""
    owner = next(c for c in modeling_utils.PreTrainedModel.__mro__ if "num_parameters" in vars(c))
    if getattr(owner.num_parameters, "_jq", False):
        return
    original = owner.num_parameters

    @functools.wraps(original)
    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        total = original(self, only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        if only_trainable:
            return total
        seen: set[int] = set()
        for module in self.modules():
            if isinstance(module, Packed):
                held = {id(p): p.numel() for p in (getattr(module, name) for name in module.packed_names())}
                total -= sum(count for p, count in held.items() if p not in seen)
                seen |= held.keys()
                if not (exclude_embeddings and isinstance(module, JqEmbedding)):
                    total += module.num_weights()
        return total

    num_parameters._jq = True  # type: ignore[attr-defined]
    owner.num_parameters = num_parameters


def _keep_sizes() -> None:
    """A packed table has no rows to add: transformers would take the new ones for it and compute with the old; stays."""
    owner = next(c for c in modeling_utils.PreTrainedModel.__mro__ if "resize_token_embeddings" in vars(c))
    original = owner.resize_token_embeddings
    if getattr(original, "_jq", False):
        return

    @functools.wraps(original)
    def resize_token_embeddings(
        self: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        table = self.get_input_embeddings()
        if isinstance(table, JqEmbedding):
            size = table.num_embeddings if new_num_tokens is None else new_num_tokens
            size += -size % (pad_to_multiple_of or 1)
            if size != table.num_embeddings:
                raise UnsupportedError(
                    f"resize_token_embeddings to {size}: the embedding is packed with {table.num_embeddings} rows; call "
                    "model.dequantize() first"
                )
        return original(self, new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    resize_token_embeddings._jq = True  # type: ignore[attr-defined]
    owner.resize_token_embeddings = resize_token_embeddings


def _patch_models(state: Enabled) -> None:
    """Layers are packed before transformers attaches offload hooks, which take note of each parameter; not sharded."""
    _count_weights()
    _keep_sizes()
    sources.patch_saving(JqQuantizer)
    distribute = modeling_utils.PreTrainedModel.maybe_distribute_model

    def whole_or_refused(cls: Any, model: Any, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        sizes = [getattr(distributed_config, name, None) for name in ("fsdp_size", "dp_replicate_size")]
        if any((size or 1) > 1 for size in sizes):
            refuse_sharding(model)
        return distribute.__func__(cls, model, distributed_config, *args, **kwargs)

    state.patch(modeling_utils.PreTrainedModel, "maybe_distribute_model", classmethod(whole_or_refused))
    dispatch = getattr(modeling_utils, "accelerate_dispatch", None)
    if dispatch is not None:

        @functools.wraps(dispatch)
        def packed_dispatch(model: Any, hf_quantizer: Any, device_map: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(hf_quantizer, JqQuantizer):
                hf_quantizer.pack(model, device_map)  # before the hooks take note of each parameter
            return dispatch(model, hf_quantizer, device_map, *args, **kwargs)

        state.patch(modeling_utils, "accelerate_dispatch", packed_dispatch)
