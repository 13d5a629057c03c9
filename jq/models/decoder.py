"""The decoder that all families share, as NNX modules whose paths are the checkpoint's tensor names.

Layers hold their own arrays (nothing is stacked): on XLA's CPU backend a loop over stacked weights copies each slice
(46 ms a token against 33 for SmolLM2-135M), and on a GPU XLA's own dots do the same. Equal layers are traced and lowered
once, through one inner `jax.jit`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jq.models import attention, kv_cache, rope
from jq.models.experts import ExpertMLP, StackedExpertMLP
from jq.models.reader import Reader
from jq.models.spec import DecoderSpec, LayerSpec
from jq.nn import Embedding, Linear

# Computed in float32 and rounded once: XLA rounds every step inside a 16-bit silu, PyTorch does not.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}

Tables = tuple[tuple[jax.Array, jax.Array], ...]  # cos and sin of each rope of the spec
Cache = tuple[tuple[kv_cache.Buffer, kv_cache.Buffer], ...]  # keys and values of each layer


class Attention(nnx.Module):
    """Self-attention of one layer; `k_scale` and `v_scale` are the checkpoint's cache scales."""

    def __init__(self, read: Reader, path: str, spec: DecoderSpec, layer: LayerSpec, cache_dtype: str) -> None:
        self.spec, self.layer, self.cache_dtype = spec, layer, cache_dtype
        hidden, wide = spec.hidden_size, spec.num_heads * spec.head_dim
        narrow = spec.num_kv_heads * spec.head_dim
        parts = {"q_proj": wide, "k_proj": narrow, "v_proj": narrow}
        fused = None if spec.fused else read.fused(path, parts, hidden, spec.attention_bias)
        self.fused = spec.fused or fused is not None
        if spec.fused:
            self.qkv_proj = read.linear(f"{path}.qkv_proj", (wide + 2 * narrow, hidden), spec.attention_bias)
        elif fused is not None:
            self.qkv_proj = fused
        else:
            self.q_proj = read.linear(f"{path}.q_proj", (wide, hidden), spec.attention_bias)
            self.k_proj = read.linear(f"{path}.k_proj", (narrow, hidden), spec.attention_bias)
            self.v_proj = read.linear(f"{path}.v_proj", (narrow, hidden), spec.attention_bias)
        self.o_proj = read.linear(f"{path}.o_proj", (hidden, wide), spec.output_bias)
        if spec.qk_norm:
            one_head = spec.qk_norm == "head"
            self.q_norm = read.norm(f"{path}.q_norm", spec.head_dim if one_head else wide)
            self.k_norm = read.norm(f"{path}.k_norm", spec.head_dim if one_head else narrow)
        self.sinks = read.optional(f"{path}.sinks", (spec.num_heads,)) if spec.sinks else None
        narrow_cache = kv_cache.DTYPES[cache_dtype][1] is not None
        self.k_scale = _cache_scale(read, path, "k", spec) if narrow_cache else None
        self.v_scale = _cache_scale(read, path, "v", spec) if narrow_cache else None

    def empty_cache(self, batch: int, slots: int) -> tuple[kv_cache.Buffer, kv_cache.Buffer]:
        shape = (batch, self.spec.num_kv_heads, slots, self.spec.head_dim)
        k, v = self._scales()
        return (
            kv_cache.empty(self.cache_dtype, shape, k is not None),
            kv_cache.empty(self.cache_dtype, shape, v is not None),
        )

    def __call__(
        self,
        x: jax.Array,
        tables: Tables,
        starts: jax.Array | None,
        cache: tuple[kv_cache.Buffer, kv_cache.Buffer] | None = None,
        slot: Any = None,
    ) -> tuple[jax.Array, Any]:
        """x [B, T, hidden] -> ([B, T, hidden], new cache).

        Without a slot the T tokens are a whole sequence (written to slots 0..T-1 of a cache, where there is one). With
        a slot they follow what the cache holds before it.
        """
        spec = self.spec
        q, k, v = self._project(x)
        if self.layer.rope is not None:
            cos, sin = tables[self.layer.rope]
            q, k = rope.rotate(q, cos, sin).astype(x.dtype), rope.rotate(k, cos, sin).astype(x.dtype)
        k_scale, v_scale = self._scales()
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # [B, kv_heads, T, head_dim]
        new = kv_cache.encode(self.cache_dtype, k, k_scale), kv_cache.encode(self.cache_dtype, v, v_scale)
        length = x.shape[1]
        if slot is None:
            keys, values = new
            queries = jnp.arange(length)
            if cache is not None:
                cache = kv_cache.write(cache[0], keys, 0), kv_cache.write(cache[1], values, 0)
        else:
            assert cache is not None
            cache = keys, values = kv_cache.write(cache[0], new[0], slot), kv_cache.write(cache[1], new[1], slot)
            queries = slot + jnp.arange(length)
        slots = keys.codes.shape[2]
        mask = attention.causal_mask(queries, jnp.arange(slots), starts, self.layer.window)
        out = attention.attend(
            q,
            kv_cache.decode(keys, k_scale, x.dtype),
            kv_cache.decode(values, v_scale, x.dtype),
            mask,
            scale=spec.attention_scale or spec.head_dim**-0.5,
            softcap=spec.attention_softcap,
            sinks=None if self.sinks is None else self.sinks.get_value(),
        )
        return self.o_proj(out.reshape(*x.shape[:-1], -1)), cache

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, T, heads, head_dim], k and v [B, T, kv_heads, head_dim], normed where the family does."""
        spec = self.spec
        wide, narrow = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        if self.fused:
            q, k, v = jnp.split(self.qkv_proj(x), [wide, wide + narrow], axis=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if spec.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (a.reshape(*a.shape[:-1], -1, spec.head_dim) for a in (q, k, v))
        if spec.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _scales(self) -> tuple[jax.Array | None, jax.Array | None]:
        return (
            None if self.k_scale is None else self.k_scale.get_value(),
            None if self.v_scale is None else self.v_scale.get_value(),
        )


def _cache_scale(read: Reader, path: str, which: str, spec: DecoderSpec) -> Any:
    """The stored scale of keys ("k") or values ("v"), one or one a head: compressed-tensors' name or ModelOpt's."""
    for name in (f"{path}.{which}_scale", f"{path}.{which}_proj.{which}_scale"):
        found = read.optional(name, (1,), (spec.num_kv_heads, 1, 1))
        if found is not None:
            return found
    return None


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(
        self,
        read: Reader,
        path: str,
        spec: DecoderSpec,
        width: int | None = None,
        names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
    ) -> None:
        hidden, width = spec.hidden_size, width or spec.intermediate_size
        self.activation, self.names = spec.activation, names
        gate, up, down = names
        joined = None if spec.fused else read.fused(path, {gate: width, up: width}, hidden, spec.mlp_bias)
        self.fused = spec.fused or joined is not None
        if spec.fused:
            self.gate_up_proj = read.linear(f"{path}.gate_up_proj", (2 * width, hidden), spec.mlp_bias)
        elif joined is not None:
            self.gate_up_proj = joined
        else:
            setattr(self, gate, read.linear(f"{path}.{gate}", (width, hidden), spec.mlp_bias))
            setattr(self, up, read.linear(f"{path}.{up}", (width, hidden), spec.mlp_bias))
        setattr(self, down, read.linear(f"{path}.{down}", (hidden, width), spec.mlp_bias))

    def __call__(self, x: jax.Array) -> jax.Array:
        gate_name, up_name, down_name = self.names
        if self.fused:
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = getattr(self, gate_name)(x), getattr(self, up_name)(x)
        gate = ACTIVATIONS[self.activation](gate.astype(jnp.float32)).astype(x.dtype)
        return getattr(self, down_name)(gate * up)


class DecoderLayer(nnx.Module):
    """Attention and MLP with their norms and residuals."""

    def __init__(self, read: Reader, path: str, spec: DecoderSpec, layer: LayerSpec, cache_dtype: str) -> None:
        self.spec = spec
        self.self_attn = Attention(read, f"{path}.self_attn", spec, layer, cache_dtype)
        if layer.experts:
            assert spec.experts is not None
            container = spec.experts.names[0]
            place = f"{path}.{container}"
            stacked = spec.experts.stacked
            mlp = StackedExpertMLP(read, place, spec) if stacked else ExpertMLP(read, place, spec, MLP)
            setattr(self, container, mlp)
            self.mlp_name = container
        else:
            self.mlp = MLP(read, f"{path}.mlp", spec)
            self.mlp_name = "mlp"
        if not spec.post_norm:
            self.input_layernorm = read.norm(f"{path}.input_layernorm", spec.hidden_size)
        self.post_attention_layernorm = read.norm(f"{path}.post_attention_layernorm", spec.hidden_size)
        if spec.sandwich:
            self.pre_feedforward_layernorm = read.norm(f"{path}.pre_feedforward_layernorm", spec.hidden_size)
        if spec.sandwich or spec.post_norm:
            self.post_feedforward_layernorm = read.norm(f"{path}.post_feedforward_layernorm", spec.hidden_size)

    def __call__(self, x: jax.Array, *context: Any) -> tuple[jax.Array, Any]:
        """x [B, T, hidden] and the arguments of `Attention` -> ([B, T, hidden], new cache)."""
        spec = self.spec
        h, cache = self.self_attn(x if spec.post_norm else self.input_layernorm(x), *context)
        if spec.sandwich or spec.post_norm:
            h = self.post_attention_layernorm(h)
        x = x + _scaled(h, spec.residual_scale)
        h = x
        if spec.sandwich:
            h = self.pre_feedforward_layernorm(x)
        elif not spec.post_norm:
            h = self.post_attention_layernorm(x)
        h = getattr(self, self.mlp_name)(h)
        if spec.sandwich or spec.post_norm:
            h = self.post_feedforward_layernorm(h)
        return x + _scaled(h, spec.residual_scale), cache


class Decoder(nnx.Module):
    """Embedding, layers and final norm."""

    def __init__(self, read: Reader, path: str, spec: DecoderSpec, cache_dtype: str) -> None:
        self.spec = spec
        self.embed_tokens = read.embedding(f"{path}.embed_tokens", (spec.vocab_size, spec.hidden_size))
        self.layers = nnx.List(
            [DecoderLayer(read, f"{path}.layers.{i}", spec, layer, cache_dtype) for i, layer in enumerate(spec.layers)]
        )
        self.norm = read.norm(f"{path}.norm", spec.hidden_size)

    def __call__(
        self,
        ids: jax.Array,
        positions: jax.Array,
        starts: jax.Array | None,
        cache: Cache | None = None,
        slot: Any = None,
    ) -> tuple[jax.Array, Cache | None]:
        """ids and positions int32[B, T] -> ([B, T, hidden], new cache); see `Attention` for the rest."""
        x = _scaled(self.embed_tokens(ids), self.spec.embedding_scale)
        tables = tuple(rope.tables(r, positions) for r in self.spec.ropes)
        new = []
        for i, layer in enumerate(self.layers):
            x, buffers = _run_layer(*split(layer), x, tables, starts, None if cache is None else cache[i], slot)
            new.append(buffers)
        return self.norm(x), None if cache is None else tuple(new)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        return tuple(layer.self_attn.empty_cache(batch, slots) for layer in self.layers)


def head(decoder: Decoder, lm_head: Linear | None, hidden: jax.Array) -> jax.Array:
    """Logits float32[..., V] of the decoder's output; `lm_head` None: tied to the embedding."""
    spec = decoder.spec
    table: Embedding = decoder.embed_tokens
    logits = table.attend(hidden) if lm_head is None else lm_head(hidden)
    logits = logits.astype(jnp.float32)
    if spec.logits_divisor != 1.0:
        logits = logits / spec.logits_divisor
    if spec.final_softcap is not None:
        logits = spec.final_softcap * jnp.tanh(logits / spec.final_softcap)
    return logits


def split(module: nnx.Module) -> tuple[Any, Any]:
    """(graph definition, state) of a module without what is kept for saving only; `join` is the inverse."""
    from jq.nn import Packed

    graph, packed, rest = nnx.split(module, Packed, ...)
    hollow = jax.tree.map(lambda _: None, packed)
    return graph, (hollow, rest)


def join(graph: Any, state: Any) -> Any:
    return nnx.merge(graph, *state)


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(graph: Any, state: Any, x: jax.Array, *context: Any) -> tuple[jax.Array, Any]:
    return join(graph, state)(x, *context)


def _scaled(x: jax.Array, factor: float) -> jax.Array:
    # Gemma and Granite round the factor to the compute dtype first.
    return x if factor == 1.0 else x * jnp.asarray(factor, x.dtype)
