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
import numpy as np
from flax import nnx

from jq.activation_schemes.compressed_tensors import parameters_of
from jq.formats.compressed_tensors_attention import check_scale
from jq.models import attention, functional, kernels, kv_cache, rope
from jq.models.experts import ExpertMLP, StackedExpertMLP
from jq.models.reader import Reader
from jq.models.spec import DecoderSpec, LayerSpec
from jq.nn import Embedding, Linear, RMSNorm
from jq.qtensor import QTensor

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
    """Self-attention of one layer; `k_scale` and `v_scale` are the checkpoint's scales of an 8-bit cache."""

    joint = "qkv_proj", ("q_proj", "k_proj", "v_proj")  # name of the product of several weights, and of each

    def __init__(self, read: Reader, path: str, spec: DecoderSpec, layer: LayerSpec, cache: kv_cache.Form) -> None:
        self.spec, self.layer, self.dtype = spec, layer, read.dtype
        hidden, wide = spec.hidden_size, spec.num_heads * spec.head_dim
        narrow = spec.num_kv_heads * spec.head_dim
        parts = dict(zip(self.joint[1], (wide, narrow, narrow), strict=True))
        fused = None if spec.fused else read.fused(path, parts, hidden, spec.attention_bias)
        self.fused = spec.fused or fused is not None
        if spec.fused:
            self.qkv_proj = read.linear(f"{path}.qkv_proj", (wide + 2 * narrow, hidden), spec.attention_bias)
        elif fused is not None:
            self.qkv_proj = fused
        else:
            self.q_proj, self.k_proj, self.v_proj = read.linears(path, parts, hidden, spec.attention_bias)
        self.o_proj = read.linear(f"{path}.o_proj", (hidden, wide), spec.output_bias)
        if spec.qk_norm:
            one_head = spec.qk_norm == "head"
            self.q_norm = read.norm(f"{path}.q_norm", spec.head_dim if one_head else wide)
            self.k_norm = read.norm(f"{path}.k_norm", spec.head_dim if one_head else narrow)
        self.sinks = read.optional(f"{path}.sinks", (spec.num_heads,)) if spec.sinks else None
        found = read.inside(path)
        self.inside = None if found is None else found[0]
        self.inside_arrays = None if found is None else found[1]
        self.form = cache if self.inside is None or self.inside.cache is None else self.inside.cache
        own = read.cache_scales and kv_cache.takes_scale(self.form)
        self.k_scale = _cache_scale(read, path, "k", spec) if own else None
        self.v_scale = _cache_scale(read, path, "v", spec) if own else None

    def empty_cache(self, batch: int, slots: int) -> tuple[kv_cache.Buffer, kv_cache.Buffer]:
        shape = (batch, self.spec.num_kv_heads, slots, self.spec.head_dim)
        k, v = (kv_cache.empty(self.form, shape, self._static(which), self.dtype) for which in "kv")
        return k, v

    def __call__(
        self,
        norm: RMSNorm | None,
        x: jax.Array,
        delta: jax.Array | None,
        tables: Tables,
        starts: jax.Array | None,
        cache: tuple[kv_cache.Buffer, kv_cache.Buffer] | None = None,
        slot: Any = None,
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Attention of norm(x + delta).

        Args:
          norm: of the input; None: none.
          x: [B, T, hidden], the residual.
          delta: what the layer before adds to it, None for nothing.
          tables: cos and sin of each rope of the spec.
          starts: int32[B], first slot of each row that is no padding; None: all.
          cache: keys and values of the slots before, or None.
          slot: None: the T tokens are a whole sequence, written to slots 0..T-1 of a cache, where there is one. Else the
            slot of the first of them; they follow what the cache holds before it.

        Returns:
          (output [B, T, hidden], x + delta, new cache).
        """
        spec, length = self.spec, x.shape[1]
        step = slot is not None and length == 1
        parts, total = self._project(norm, x, delta, step)
        if step and self.inside is None:
            assert cache is not None
            done = self._step(parts, tables, starts, cache, slot)
            if done is not None:
                return kernels.product(self.o_proj, done[0], step), total, done[1]
        q, k, v = self._heads(parts)
        if self.layer.rope is not None:
            cos, sin = tables[self.layer.rope]
            q, k = rope.rotate(q, cos, sin).astype(x.dtype), rope.rotate(k, cos, sin).astype(x.dtype)
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # [B, kv_heads, T, head_dim]
        if self.inside is not None and self.inside_arrays is not None:
            q, k = self.inside(jnp.swapaxes(q, 1, 2), k, self.inside_arrays.get_value())
            q = jnp.swapaxes(q, 1, 2)
        of_keys, of_values = self._static("k"), self._static("v")
        new = kv_cache.encode(self.form, k, of_keys), kv_cache.encode(self.form, v, of_values)
        if slot is None:
            keys, values = new
            queries = jnp.arange(length)
            if cache is not None:
                cache = kv_cache.write(cache[0], keys, 0), kv_cache.write(cache[1], values, 0)
        else:
            assert cache is not None
            cache = keys, values = kv_cache.write(cache[0], new[0], slot), kv_cache.write(cache[1], new[1], slot)
            queries = slot + jnp.arange(length)
        slots = keys.codes.shape[-2]
        mask = attention.causal_mask(queries, jnp.arange(slots), starts, self.layer.window)
        out = attention.attend(
            q,
            kv_cache.decode(self.form, keys, of_keys, spec.head_dim, x.dtype),
            kv_cache.decode(self.form, values, of_values, spec.head_dim, x.dtype),
            mask,
            scale=self._scale,
            softcap=spec.attention_softcap,
            sinks=None if self.sinks is None else self.sinks.get_value(),
        )
        return self.o_proj(out.reshape(*x.shape[:-1], -1)), total, cache

    @property
    def _scale(self) -> float:
        return self.spec.attention_scale or self.spec.head_dim**-0.5

    def _step(
        self,
        parts: tuple[jax.Array, ...],
        tables: Tables,
        starts: jax.Array | None,
        cache: tuple[kv_cache.Buffer, kv_cache.Buffer],
        slot: Any,
    ) -> tuple[jax.Array, Any] | None:
        """One token a row by the GPU kernel: (output before o_proj, new cache), None where it does not apply."""
        spec, layer = self.spec, self.layer
        return kernels.attention(
            parts,
            cache,
            None if layer.rope is None else tables[layer.rope],
            slot,
            starts,
            None if self.sinks is None else self.sinks.get_value(),
            packed=_is_packed(self.o_proj),
            heads=spec.num_heads,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            scale=self._scale,
            window=layer.window,
            softcap=spec.attention_softcap,
        )

    def _project(
        self, norm: RMSNorm | None, x: jax.Array, delta: jax.Array | None, step: bool
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """(q, k and v of norm(x + delta), normed where the family does, as three arrays or one of all; x + delta)."""
        spec = self.spec
        if self.fused:
            y, x = kernels.norm_product(norm, self.qkv_proj, x, delta, step)
            if not spec.qk_norm:
                return (y,), x
            q, k, v = self._split(y)
        else:
            h, x = kernels.normed(norm, x, delta, step, _is_packed(self.q_proj))
            q, k, v = (kernels.product(part, h, step) for part in (self.q_proj, self.k_proj, self.v_proj))
        if spec.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        if spec.qk_norm == "head":
            shapes = q.shape, k.shape
            q, k = (a.reshape(*a.shape[:-1], -1, spec.head_dim) for a in (q, k))
            q, k = self.q_norm(q).reshape(shapes[0]), self.k_norm(k).reshape(shapes[1])
        return (q, k, v), x

    def _split(self, y: jax.Array) -> list[jax.Array]:
        wide, narrow = self.spec.num_heads * self.spec.head_dim, self.spec.num_kv_heads * self.spec.head_dim
        return jnp.split(y, [wide, wide + narrow], axis=-1)

    def _heads(self, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """q [B, T, heads, head_dim], k and v [B, T, kv_heads, head_dim]."""
        three = parts if len(parts) == 3 else self._split(parts[0])
        return tuple(a.reshape(*a.shape[:-1], -1, self.spec.head_dim) for a in three)

    def _static(self, which: str) -> dict[str, Any]:
        """Stored parameters of the cache of keys ("k") or values ("v")."""
        scale = self.k_scale if which == "k" else self.v_scale
        if scale is not None:
            return {"scale": scale.get_value()}
        return {} if self.inside_arrays is None else parameters_of(self.inside_arrays.get_value(), which)


def _cache_scale(read: Reader, path: str, which: str, spec: DecoderSpec) -> Any:
    """The stored scale of keys ("k") or values ("v"), one or one a head: compressed-tensors' name or ModelOpt's."""
    for name in (f"{path}.{which}_scale", f"{path}.{which}_proj.{which}_scale"):
        found = read.optional(name, (1,), (spec.num_kv_heads, 1, 1))
        if found is not None:
            check_scale(np.asarray(found.get_value()), f"{read.label}: {name}")
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
            two = read.linears(path, {gate: width, up: width}, hidden, spec.mlp_bias)
            for name, layer in zip(names, two, strict=False):
                setattr(self, name, layer)
        setattr(self, down, read.linear(f"{path}.{down}", (hidden, width), spec.mlp_bias))

    @property
    def joint(self) -> tuple[str, tuple[str, ...]]:
        return "gate_up_proj", self.names[:2]

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.normed(None, x, None)[0]

    def normed(
        self, norm: RMSNorm | None, x: jax.Array, delta: jax.Array | None, step: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """(the MLP of norm(x + delta), x + delta); `step`: one token a row is decoded."""
        gate_name, up_name, down_name = self.names
        down, activation = getattr(self, down_name), ACTIVATIONS[self.activation]
        if self.fused:
            made = kernels.norm_gate(norm, self.gate_up_proj, x, delta, self.activation, step)
            if made is not None:
                return kernels.product(down, made[0], step), made[1]
            gate_up, x = kernels.norm_product(norm, self.gate_up_proj, x, delta, step)
            return kernels.gated_product(down, gate_up, self.activation, activation, step), x
        h, x = kernels.normed(norm, x, delta, step, _is_packed(down))
        gate, up = (kernels.product(getattr(self, name), h, step) for name in (gate_name, up_name))
        return kernels.product(down, activation(gate.astype(jnp.float32)).astype(x.dtype) * up, step), x


class DecoderLayer(nnx.Module):
    """Attention and MLP with their norms and residuals."""

    def __init__(self, read: Reader, path: str, spec: DecoderSpec, layer: LayerSpec, cache: kv_cache.Form) -> None:
        self.spec = spec
        self.self_attn = Attention(read, f"{path}.self_attn", spec, layer, cache)
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

    def __call__(self, x: jax.Array, delta: jax.Array | None, *context: Any) -> tuple[jax.Array, jax.Array, Any]:
        """One layer on the residual x + delta.

        Args:
          x: [B, T, hidden].
          delta: what the layer before adds to it (the sum belongs to the norm that follows), None before the first.
          context: the other arguments of `Attention`.

        Returns:
          (x, delta, new cache): the residual behind this layer is x + delta.
        """
        spec = self.spec
        step = len(context) == 4 and context[-1] is not None and x.shape[1] == 1
        h, x, cache = self.self_attn(None if spec.post_norm else self.input_layernorm, x, delta, *context)
        if spec.sandwich or spec.post_norm:
            h = self.post_attention_layernorm(h)
        delta = _scaled(h, spec.residual_scale)
        norm = None if spec.post_norm else self.post_attention_layernorm
        if spec.sandwich:
            norm = self.pre_feedforward_layernorm
        mlp = getattr(self, self.mlp_name)
        if isinstance(mlp, MLP):
            h, x = mlp.normed(norm, x, delta, step)
        else:
            h, x = kernels.normed(norm, x, delta, step, _is_packed(self.self_attn.o_proj))
            h = mlp(h)
        if spec.sandwich or spec.post_norm:
            h = self.post_feedforward_layernorm(h)
        return x, _scaled(h, spec.residual_scale), cache


class Decoder(nnx.Module):
    """Embedding, layers and final norm."""

    def __init__(self, read: Reader, path: str, spec: DecoderSpec, cache: kv_cache.Form) -> None:
        self.spec = spec
        self.embed_tokens = read.embedding(f"{path}.embed_tokens", (spec.vocab_size, spec.hidden_size))
        self.layers = nnx.List(
            [DecoderLayer(read, f"{path}.layers.{i}", spec, layer, cache) for i, layer in enumerate(spec.layers)]
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
        x = _scaled(self.embed_tokens(ids), self.spec.embedding_scale, wide=self.embed_tokens.scale_in_float32)
        tables = tuple(rope.tables(r, positions) for r in self.spec.ropes)
        new, delta = [], None
        for i, layer in enumerate(self.layers):
            buffers = None if cache is None else cache[i]
            x, delta, buffers = _run_layer(*functional.light(layer), x, delta, tables, starts, buffers, slot)
            new.append(buffers)
        step, packed = slot is not None and x.shape[1] == 1, _is_packed(self.layers[0].self_attn.o_proj)
        return kernels.normed(self.norm, x, delta, step, packed)[0], None if cache is None else tuple(new)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        return tuple(layer.self_attn.empty_cache(batch, slots) for layer in self.layers)


def head(decoder: Decoder, lm_head: Linear | None, hidden: jax.Array, step: bool = False) -> jax.Array:
    """Logits float32[..., V] of the decoder's output.

    Args:
      lm_head: None: tied to the embedding.
      step: one token a row is decoded.
    """
    spec = decoder.spec
    table: Embedding = decoder.embed_tokens
    if lm_head is None:
        logits = kernels.tied_product(table, hidden, step)
    else:
        logits = kernels.product(lm_head, hidden, step)
    logits = logits.astype(jnp.float32)
    if spec.logits_divisor != 1.0:
        logits = logits / spec.logits_divisor
    if spec.final_softcap is not None:
        logits = spec.final_softcap * jnp.tanh(logits / spec.final_softcap)
    return logits


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(graph: Any, state: Any, x: jax.Array, *context: Any) -> tuple[jax.Array, jax.Array, Any]:
    return nnx.merge(graph, *state)(x, *context)


def _is_packed(linear: Linear) -> bool:
    return isinstance(linear.weight.get_value(), QTensor)


def _scaled(x: jax.Array, factor: float, *, wide: bool = False) -> jax.Array:
    # Gemma and Granite round the factor to the compute dtype first, Gemma's quantized tables do not.
    if wide:
        return (x.astype(jnp.float32) * jnp.float32(factor)).astype(x.dtype)
    return x if factor == 1.0 else x * jnp.asarray(factor, x.dtype)
