"""Queries, keys and values rounded as a checkpoint says, in torch: `jq.models.kv_cache`'s arithmetic, operation for operation.

The numbers are those of `jq.activation_schemes`; the operators are written twice, since JAX's need `jq.exact` to round as
torch's do by themselves. Written in torch's own operators, so that a layer between two projections costs no crossing to JAX and torch.compile sees
through it. Each operator rounds to its tensor's dtype, as in compressed-tensors 0.20.0, whose bits the tests hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from jq.activation_schemes.elements import BY_BITS, ELEMENTS
from jq.algorithms.minmax import EPS, MANTISSA, MX_SCALE
from jq.formats.compressed_tensors_config import Args
from jq.models.kv_cache import DTYPES, LEAST, Form

Static = Mapping[str, torch.Tensor]  # the layer's stored "scale", "zero_point", "global_scale"


class _Straight(torch.autograd.Function):
    """A rounded value whose gradient is that of the value itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad[0], None


def rounded(x: torch.Tensor, form: Form, static: Static) -> torch.Tensor:
    """x [B, heads, T, head_dim] as it comes back from a cache of this form, in its dtype.

    Its gradient is that of x: where adapters are trained, the projections before the cache learn too.

    Raises:
      ValueError: head_dim is no multiple of the group size.
    """
    with torch.no_grad():
        y = _scheme(x, form, static) if isinstance(form, Args) else _named(x, form, static)
    return _Straight.apply(x, y) if torch.is_grad_enabled() and x.requires_grad else y


def _named(x: torch.Tensor, name: str, static: Static) -> torch.Tensor:
    """8 bits in float32, by the stored scale or one for each token and head."""
    limit = DTYPES[name][1]
    assert limit is not None
    wide = x.float()
    if "scale" in static:
        scale = static["scale"].to(x.device).float()
    else:
        scale = wide.abs().amax(-1, keepdim=True).clamp_min(LEAST) / limit
    scaled = (wide / scale).clamp(-128.0 if name == "int8" else -limit, limit)
    codes = scaled.round() if name == "int8" else scaled.to(torch.float8_e4m3fn).float()
    return (codes * scale).to(x.dtype)


def _scheme(x: torch.Tensor, args: Args, static: Static) -> torch.Tensor:
    static = {name: value.to(x.device) for name, value in static.items()}
    if args.dynamic is False:
        shape = static["scale"].shape if args.strategy == "attn_head" else (-1,)
        zero = None if args.symmetric else static["zero_point"].reshape(shape).to(x.dtype)
        return _apply(x, static["scale"].to(x.dtype).reshape(shape), zero, args)
    if x.shape[-1] % args.group_size:
        raise ValueError(f"groups of {args.group_size} do not divide heads of {x.shape[-1]}")
    groups = x.unflatten(-1, (-1, args.group_size))
    if args.strategy == "tensor_group":
        y = _nvfp4(groups, static, args)
    elif args.is_mx:
        y = _mx(groups, args)
    else:
        y = _apply(groups, *_qparams(groups, args), args)
    return y.flatten(-2)


def _qparams(x: torch.Tensor, args: Args) -> tuple[torch.Tensor, torch.Tensor | None]:
    low, high = args.limits
    smallest, largest = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    if args.symmetric:
        scale, zero = torch.maximum(-smallest, largest) / ((high - low) / 2), None
    else:
        scale = (largest - smallest) / (high - low)
        zero = torch.nan_to_num(low - smallest / scale).clamp(low, high).round() + 0.0  # integers, so no -0; 0 / 0 is 0
        zero = torch.where(scale == 0, torch.zeros_like(zero), zero)
    return torch.where(scale == 0, torch.full_like(scale, EPS[_name(x)]), scale), zero


def _apply(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, args: Args) -> torch.Tensor:
    scaled = x / scale
    values = _round(scaled if zero is None else scaled + zero, args)
    return (values if zero is None else values - zero) * scale


def _mx(x: torch.Tensor, args: Args) -> torch.Tensor:
    mantissa = MANTISSA[_name(x)]
    peak = x.abs().amax(-1, keepdim=True)
    pattern = peak.view(torch.int32 if mantissa == 23 else torch.int16).int()
    kept, largest = MX_SCALE[args.num_bits]
    field = (pattern + (1 << (mantissa - kept - 1))) >> mantissa
    exponent = field - (15 if mantissa == 10 else 127) - largest
    exponent = torch.where(field == 0, torch.full_like(exponent, -127), exponent).clamp(-127, 128)
    if mantissa == 10:  # 2**exponent underflows in the library's float16, and a scale of zero becomes one
        exponent = torch.where(exponent < -24, torch.zeros_like(exponent), exponent)
    values = _round(torch.ldexp(x.float(), -exponent).to(x.dtype), args)
    return torch.ldexp(values.float(), exponent).to(x.dtype)


def _nvfp4(x: torch.Tensor, static: Static, args: Args) -> torch.Tensor:
    whole = static["global_scale"].float().reshape(-1)
    local = (x.abs().amax(-1, keepdim=True) / args.limits[1]).float() * whole
    scale = local.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    step = torch.where(scale == 0, torch.full_like(scale, EPS["float8_e4m3fn"]), scale) / whole
    return (_round(x.float() / step, args) * step).to(x.dtype)


def _round(x: torch.Tensor, args: Args) -> torch.Tensor:
    """Clamped and rounded half to even onto the numbers that `args` can hold; same dtype."""
    x = x.clamp(*args.limits)
    if args.type == "int":
        return x.round()
    if args.num_bits == 8:
        return x.to(torch.float8_e4m3fn).to(x.dtype)
    mantissa, smallest, *_ = ELEMENTS[BY_BITS[args.num_bits]]
    wide = x.float()
    place = (torch.frexp(wide).exponent - 1).clamp_min(smallest) - mantissa
    return torch.ldexp(torch.ldexp(wide, -place).round(), place).to(x.dtype)


def _name(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
