"""`jq.load`: a checkpoint as a model that runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq.errors import CheckpointError, UnsupportedError
from jq.formats import gguf, stored_config, table, torchao
from jq.formats.compressed_tensors_attention import Attentions
from jq.models import expert_names, kv_cache, spec_of
from jq.models.causal_lm import CausalLM
from jq.models.decoder import Decoder
from jq.models.origin import Origin
from jq.models.reader import Reader
from jq.models.spec import DecoderSpec
from jq.nn import Linear
from jq.state import State, load_state

# Parameters of the quantization inside attention, which a model may run without.
ATTENTION = (
    ".prob_scale",
    *(f".{which}_{part}" for which in "qkv" for part in ("scale", "zero_point", "global_scale")),
)

COMPUTE = ("float32", "bfloat16", "float16")  # dtypes that models compute in


def load(
    path_or_id: str | os.PathLike | State,
    *,
    dtype: Any = None,
    packed: bool | None = None,
    quantize_activations: bool = True,
    kv_cache: str | None = None,
    revision: str | None = None,
) -> CausalLM:
    """Loads a checkpoint as a model.

    Args:
      path_or_id: directory, weight file, Hugging Face hub id, or a State.
      dtype: compute dtype. None: float32 on the CPU (16-bit products are slower there), else the checkpoint's.
      packed: compute from packed weights. None: as is fastest. On the CPU each quantized weight is dequantized once and
        computes as a dense array; the packed tensor stays beside it for saving, so memory is the dense model in `dtype`
        plus the quantized checkpoint (SmolLM2-135M NF4: 538 MB + 76 MB). `packed=True` holds the packed weights and the
        dense embedding, and dequantizes in each product, several times slower. On a GPU packed is the default.
      quantize_activations: execute the activation quantization that the checkpoint asks for (also that of its cache);
        False: weights only, activations stay float.
      kv_cache: how keys and values are held while generating. None: as the checkpoint says (its `kv_cache_scheme`, packed
        in its own width), else in the compute dtype. "float32", "bfloat16", "float16"; "int8", "float8_e4m3" with the
        checkpoint's scales where they are for that, else one for each token and head; "int4" (groups of 32 with a
        scale and a zero point), "mxfp4".
      revision: of the hub repository.

    Returns:
      The model; `model(ids)`, `model.generate(...)`, `model.stream(...)`, `model.tokenizer`, `jq.save(model, path)`.

    Raises:
      ValueError: a dtype that models do not compute in.
      UnsupportedError: a model family that has no decoder here (`jq.load_state` reads any architecture), an unknown
        cache, or one whose groups do not divide the model's heads.
      CheckpointError: tensors missing, left over, or of a wrong shape. No weight is ever made up.
      FormatError: quantized tensors that do not fit their config.
    """
    state = path_or_id if isinstance(path_or_id, State) else load_state(path_or_id, lazy=True, revision=revision)
    if state.container == "gguf":
        state = gguf.model_state(state)  # Hugging Face's names, config and tokenizer
    return build(state, dtype=dtype, packed=packed, quantize_activations=quantize_activations, kv_cache_dtype=kv_cache)


def build(
    state: State,
    *,
    dtype: Any = None,
    packed: bool | None = None,
    quantize_activations: bool = True,
    kv_cache_dtype: str | None = None,
    spec: DecoderSpec | None = None,
) -> CausalLM:
    """The model of a State; see `load`. Tensors are taken one after the other, so a lazy State is never whole in memory.

    Args:
      spec: in place of what config.json describes.
    """
    label = str(state.path or "state")
    spec = spec or spec_of(state.config, label)
    state, spec, fused = expert_names.as_stored(state, spec, label)
    if spec.fused and any(name.endswith(".self_attn.q_proj.weight") for name in state):
        spec = spec.replace(fused=False)  # EXL3 takes the joined matrices of a family apart
    on_cpu = jax.default_backend() == "cpu"
    compute = _compute_dtype(dtype) if dtype is not None else np.dtype(np.float32)
    if dtype is None and not on_cpu:
        compute = _own_dtype(state.config, label)
    cache, own_cache = _cache_form(state, spec, kv_cache_dtype, compute, quantize_activations)
    read = Reader(
        state,
        spec,
        dtype=compute,
        packed=(not on_cpu) if packed is None else packed,
        quantize_activations=quantize_activations,
        label=label,
        fuse=not on_cpu,
        join=on_cpu,
        cache_scales=own_cache,
        attentions=Attentions(
            state, state.config, quantize=quantize_activations, cache=kv_cache_dtype is None, label=label
        ),
    )
    body = Decoder(read, "model", spec, cache)
    lm_head = _output(read, spec)
    settings = {"packed": packed, "quantize_activations": quantize_activations, "kv_cache_dtype": kv_cache_dtype}
    return CausalLM(body, lm_head, spec, Origin(state, read.stored, read.kept, _extra(read), settings, fused))


def _output(read: Reader, spec: DecoderSpec) -> Linear | None:
    """The output matrix; None where it is tied to the embedding.

    A stored lm_head is used even where config.json says tied: quantized checkpoints of tied models store one of their
    own, and transformers does not tie either where both are in the file.
    """
    if "lm_head.weight" not in read.state:
        metadata = {k: v for part in read.state.metadata.values() for k, v in part.items()}
        if spec.tied or torchao.head_is_embedding(read.state.config, metadata, read.state):
            return None
    return read.linear("lm_head", (spec.vocab_size, spec.hidden_size))


def _extra(read: Reader) -> dict[str, Any]:
    """Tensors beside the modules' that saving needs.

    Raises:
      CheckpointError: tensors that the family does not know: running without them would be another model.
    """
    known = [n for n in read.state if n.endswith(ATTENTION)]
    inside = read.attentions.names if read.attentions is not None else ()
    left = read.leftovers((*known, *read.state.shared, *inside, *_beside_dense(read)))
    if left:
        shown = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
        raise CheckpointError(
            f"{read.label}: {shown}: stored, but no part of a {read.spec.family} decoder. The file and config.json "
            "disagree; jq.load_state reads the tensors as they are"
        )
    return {n: read.state[n] for n in read.state if n not in read.used}


def _beside_dense(read: Reader) -> list[str]:
    """Tensors that the format left beside weights that it did not quantize, e.g. scales of skipped FP8 layers."""
    stored = stored_config(read.state.config, read.label)
    method = None if stored is None else stored[1].get("quant_method")
    suffixes = next((f.beside for f in table().values() if method in f.methods), ())
    return [
        name
        for name in read.state
        for module, _, suffix in [name.rpartition(".")]
        if suffix in suffixes
        and (f"{module}.weight" in read.used or (module == "lm_head" and read.spec.tied))  # transformers saves them
    ]


def _cache_form(
    state: State, spec: DecoderSpec, asked: str | None, compute: np.dtype, quantize_activations: bool
) -> tuple[kv_cache.Form, bool]:
    """(how keys and values are held, whether the file's scales are for that)."""
    form = None if asked is None else kv_cache.form_of(asked, spec.head_dim)
    label = str(state.path or "state")
    stored = stored_config(state.config, label)
    config = {} if stored is None else stored[1]
    try:
        own = kv_cache.scheme_of(config, label) if quantize_activations or form is not None else None
    except UnsupportedError:
        if form is None:
            raise
        own = None
    form = form or own or compute.name
    return form, form == own


def _compute_dtype(dtype: Any) -> np.dtype:
    try:
        found = np.dtype(jnp.dtype(dtype))
    except TypeError:
        found = None
    if found is None or found.name not in COMPUTE:
        raise ValueError(f"jq.load: dtype is {dtype if found is None else found}, expected {', '.join(COMPUTE)}")
    return found


def _own_dtype(config: Mapping[str, Any], label: str) -> np.dtype:
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if name not in (*COMPUTE, "float64"):
        raise CheckpointError(f"{label}: config.json: dtype is {name!r:.80}, expected {', '.join(COMPUTE)}")
    return np.dtype(jnp.dtype("float32" if name == "float64" else name))
