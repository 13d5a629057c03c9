"""Activation quantization: what a weight says about it (`Activation`) and its execution with the original's roundings.

A quantized weight that wants quantized inputs carries an `Activation`: the name of a scheme, the carried tensors that
the scheme reads (static scales, keys of `w.extras`) and static options. A scheme is a function (x [M, K], w) -> y
[M, N] that quantizes x, multiplies, and rounds as the library that wrote the checkpoint does. The schemes live in
`jq/activation_schemes/`, a module per family of libraries, and register themselves here.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from jq import exact, rotation
from jq.errors import UnsupportedError

Array = Any  # numpy.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class Activation:
    """Static description of how the inputs of a weight are quantized. Hashable, equal over layers whenever possible.

    Fields:
      scheme: key of `SCHEMES`.
      parameters: keys of `w.extras` that the scheme reads, e.g. ("input_scale",). Numbers of a layer are arrays.
      options: (name, value) pairs that the scheme reads, hashable. "prepare" names a function of `PREPARATIONS`, "finish"
        one of `FINISHES`; both belong to the layer and run even where activations stay float.
    """

    scheme: str
    parameters: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def get(self, key: str, default: Any = None) -> Any:
        return dict(self.options).get(key, default)

    def __str__(self) -> str:
        shown = ", ".join(f"{k}={v}" for k, v in self.options)
        return f"{self.scheme}({shown})" if shown else self.scheme


# (x [M, K] of any float dtype, w) -> y [M, N] in x's dtype. M is every token of the call: some schemes look at all rows.
Scheme = Callable[[jax.Array, Any], jax.Array]
SCHEMES: dict[str, Scheme] = {}
# Schemes (x, w, bias or None) -> y that add the bias themselves, where their library does.
ADDS_BIAS: set[str] = set()


# Changes of the input that belong to a quantized layer itself: (x [M, K], w) -> [M, K].
PREPARATIONS: dict[str, Callable[[jax.Array, Any], jax.Array]] = {}
# Changes of the output that belong to a quantized layer itself: (y [M, N], w) -> [M, N].
FINISHES: dict[str, Callable[[jax.Array, Any], jax.Array]] = {}
FLOAT = "float"  # scheme of a layer that prepares its input and does not quantize it


def register(name: str, *, adds_bias: bool = False) -> Callable[[Any], Any]:
    """Decorator that enters a scheme into `SCHEMES`, with `adds_bias` into `ADDS_BIAS` too."""

    def enter(scheme: Any) -> Any:
        SCHEMES[name] = scheme
        if adds_bias:
            ADDS_BIAS.add(name)
        return scheme

    return enter


@cache
def _load_schemes() -> None:
    """Imports every module of `jq.activation_schemes`, which fills `SCHEMES`."""
    package = importlib.import_module("jq.activation_schemes")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def prepares(w: Any) -> bool:
    """Whether a weight changes its input before the product, or its output, quantized or not."""
    activation = getattr(w, "activation", None)
    return activation is not None and not {"prepare", "finish"}.isdisjoint(dict(activation.options))


def without_quantization(w: Any) -> Any:
    """The same weight with float inputs; what "prepare" and "finish" name stays."""
    if not prepares(w):
        return w.replace(activation=None)
    return w.replace(activation=dataclasses.replace(w.activation, scheme=FLOAT))


def scheme_of(activation: Activation) -> Scheme:
    """The function of a description.

    Raises:
      UnsupportedError: no such scheme.
    """
    _load_schemes()
    if activation.scheme == FLOAT:
        return _float_matmul
    if activation.scheme not in SCHEMES:
        raise UnsupportedError(
            f"activation quantization {activation.scheme!r} is not known here; known: {', '.join(sorted(SCHEMES))}. "
            "quantize_activations=False computes with float activations"
        )
    return SCHEMES[activation.scheme]


def matmul(x: Array, w: Any, bias: Array | None = None) -> jax.Array:
    """`x @ w.T + bias` with the inputs quantized as `w.activation` says.

    Args:
      x: float[..., K]; all leading axes together are the tokens of one call.
      w: QTensor [N, K] (no stack axes) with an `activation`.
      bias: float[N] or None. A scheme of `ADDS_BIAS` adds it where its library does (before an output is quantized,
        or scaled); elsewhere it is added in x's dtype at the end.

    Returns:
      [..., N] in x's dtype.
    """
    x = jnp.asarray(x)
    scheme_of(w.activation)  # an unknown scheme is an error of the caller, not of the trace
    y = _matmul_jit(x.reshape(-1, x.shape[-1]), w.without_extras().replace(source=None), bias)
    return y.reshape(*x.shape[:-1], y.shape[-1]).astype(x.dtype)


@jax.jit
def _matmul_jit(x: jax.Array, w: Any, bias: jax.Array | None) -> jax.Array:
    prepare, finish = w.activation.get("prepare"), w.activation.get("finish")
    if prepare is not None:
        x = PREPARATIONS[prepare](x, w)
    y = _straight_through(x, w, bias)
    return y if finish is None else FINISHES[finish](y, w)


@jax.custom_vjp
def _straight_through(x: jax.Array, w: Any, bias: jax.Array | None) -> jax.Array:
    """The scheme; its gradient is that of the product with the dequantized weight, as if nothing were rounded."""
    scheme: Any = scheme_of(w.activation)
    if bias is None:
        return scheme(x, w)
    if w.activation.scheme in ADDS_BIAS:
        return scheme(x, w, bias)
    y = scheme(x, w)
    return y + bias.astype(y.dtype)


def _forward(x: jax.Array, w: Any, bias: jax.Array | None) -> tuple[jax.Array, tuple[Any, jax.Array | None]]:
    return _straight_through(x, w, bias), (w, bias)


def _backward(saved: tuple[Any, jax.Array | None], g: jax.Array) -> tuple[jax.Array, None, jax.Array | None]:
    w, bias = saved
    contract = (((1,), (0,)), ((), ()))
    dx = jax.lax.dot_general(g, w.dequantize(g.dtype), contract, preferred_element_type=jnp.float32).astype(g.dtype)
    return dx, None, None if bias is None else jnp.sum(g, axis=0, dtype=jnp.float32).astype(bias.dtype)


_straight_through.defvjp(_forward, _backward)


def _float_matmul(x: jax.Array, w: Any) -> jax.Array:
    from jq.matmul import matmul as product

    return product(x, w.replace(activation=None))


def _rms_norm(x: jax.Array, w: Any) -> jax.Array:
    """RMS norm before the product (BitNet): weight "rms_norm.weight", option "eps"."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + w.activation.get("eps"))
    return (jnp.asarray(w.extras["rms_norm.weight"]) * normed.astype(x.dtype)).astype(x.dtype)


def _pre_scale(x: jax.Array, w: Any) -> jax.Array:
    """Product with a stored scale of the inputs (torchao): "act_pre_scale"."""
    return x * jnp.asarray(w.extras["act_pre_scale"]).reshape(1, -1).astype(x.dtype)


def _pre_quant_scale(x: jax.Array, w: Any) -> jax.Array:
    """Product with a stored scale of the inputs (ModelOpt's AWQ): "pre_quant_scale"."""
    return x * jnp.asarray(w.extras["pre_quant_scale"]).reshape(1, -1).astype(x.dtype)


def _rotate(option: str) -> Callable[[jax.Array, Any], jax.Array]:
    """Rotations by stored matrices (compressed-tensors), one after the other; their arrays are extras of the weight."""

    def turned(x: jax.Array, w: Any) -> jax.Array:
        for one in w.activation.get(option):
            x = rotation.rotate(x, one, w.extras)
        return x

    return turned


def _prescale_rotate(x: jax.Array, w: Any) -> jax.Array:
    """Product with a stored scale of the inputs (Quark): "input_prescale", rounded; then the rotations."""
    scale = jnp.asarray(w.extras["input_prescale"]).astype(x.dtype)
    return _rotate("rotate_input")(exact.rounded(x * scale), w)


PREPARATIONS["rms_norm"] = _rms_norm
PREPARATIONS["prescale_rotate"] = _prescale_rotate
PREPARATIONS["rotate"] = _rotate("rotate_input")
FINISHES["rotate"] = _rotate("rotate_output")
PREPARATIONS["pre_quant_scale"] = _pre_quant_scale
PREPARATIONS["pre_scale"] = _pre_scale
