"""QTensors in the kernels' order: `prepare`, its inverse `restore`, and `packed`, the kernel's view of a prepared one.

A prepared tensor is of the same class and shape as the original; its `layout` names the order and what `restore` must
know beside the arrays: "mma16" followed by ";key=value" items.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq import bits as _bits
from jq.qtensor import Affine, Codebook, NarrowFloat, QTensor
from pallas_kernels import layout
from pallas_kernels.decode import DECODES, codebook
from pallas_kernels.form import CHUNK, NESTED_BLOCK, ROWS, SMALL, Form, Packed

NAME = "mma16"
SCALES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
ZERO_FORMS = {
    **dict.fromkeys(("sub_mul", "cast_sub_mul", "f32"), "code"),
    "mul_sub": "minus",
    **dict.fromkeys(("mul_add", "fma", "f32_mul_add"), "plus"),
}
# Largest constant zero point by width of the codes: with the decode's constant it is a bf16 number.
MOST_ZERO = {4: 111, 8: 255}
# Kinds of narrow floats -> decode function; e2m1 is a table of 16 values.
FLOATS = {"e2m1": ("codebook", 4), "e4m3fn": ("e4m3", 8), "e5m2": ("e5m2", 8)}
FLOAT_FORMULAS = ("f32", "own", "cast", "gguf")  # code * scale; they differ in where they round
LOW = "kernel.absmax_low"  # key in extras: lower halves of a split float32 absmax
BEHIND = {
    "scales": "kernel.scales_behind",
    "zeros": "kernel.zeros_behind",
}  # groups that are stored beyond the last used


def refusal(w: Any) -> str | None:
    """Why no kernel takes this QTensor, or None. Looks at static properties, and at `g_idx` where it is concrete."""
    if not isinstance(w, (Affine, Codebook, NarrowFloat)):
        return f"{type(w).__name__} has no kernel"
    if w.layout:
        return None if w.layout.startswith(NAME) else f"unknown layout {w.layout!r}"
    if isinstance(w.codes, QTensor):
        return "sparse codes; kernels take packed ones"
    if isinstance(w, NarrowFloat):
        return _float_refusal(w)
    if (w.kind_name, w.bits) not in DECODES:
        return f"{w.bits}-bit codes; kernels take {' and '.join(str(b) for kind, b in DECODES if kind == w.kind_name)}"
    return _affine_refusal(w) if isinstance(w, Affine) else _codebook_refusal(w)


def _affine_refusal(w: Affine) -> str | None:
    n, k = w.shape[-2:]
    cols = w.grouping.cols or k
    if w.grouping.kind != "block" or w.grouping.rows != 1:
        return f"scales by {w.grouping}; kernels take groups along K"
    if cols % 32 and cols < k:
        return f"groups of {cols}; kernels take multiples of 32"
    if not hasattr(w.scales, "dtype") or str(w.scales.dtype) not in SCALES:
        return "scales that are themselves quantized"
    if w.scales.shape[-2] != n or w.scales.shape[-1] < -(-k // cols):
        return f"scales of shape {tuple(w.scales.shape)} for a weight of {w.shape} in groups of {cols}"
    if w.formula not in ZERO_FORMS:
        return f"formula {w.formula!r}"
    if w.zeros is None:
        point = w.zero_point + _half(w)
        if not 0 <= point <= MOST_ZERO[w.bits] or (ZERO_FORMS[w.formula] != "code" and w.zero_point):
            return f"zero point {w.zero_point} with formula {w.formula!r}"
    elif not hasattr(w.zeros, "dtype"):
        return "zeros that are themselves quantized"
    elif w.zeros_bits:
        if w.zeros_bits > {4: 6, 8: 8}[w.bits] or ZERO_FORMS[w.formula] != "code" or w.signed:
            return f"{w.zeros_bits}-bit zeros with formula {w.formula!r}"
    elif w.zeros.shape != w.scales.shape:
        return f"zeros of {w.zeros.dtype} {tuple(w.zeros.shape)}"
    elif np.dtype(w.zeros.dtype).kind in "iu":
        if ZERO_FORMS[w.formula] != "code":
            return f"zeros of {w.zeros.dtype} with formula {w.formula!r}"
        if isinstance(w.zeros, jax.core.Tracer) or not _all_within(
            w.zeros, -_half(w), 56 if w.bits == 4 else 256 - _half(w)
        ):
            return f"zeros of {w.zeros.dtype} that are not known to lie near the codes"
    elif str(w.zeros.dtype) not in SCALES or w.signed:
        return f"zeros of {w.zeros.dtype} for {'signed' if w.signed else 'unsigned'} codes"
    if w.g_idx is not None and not isinstance(w.g_idx, jax.core.Tracer):
        counts = np.apply_along_axis(np.bincount, -1, np.asarray(w.g_idx), minlength=k // cols)
        if k % cols or np.any(counts != cols):
            return "an act-order g_idx whose groups differ in size"
    return None


def _half(w: Affine) -> int:
    """What makes two's complement codes (and their zeros) offset binary."""
    return 1 << (w.bits - 1) if w.signed else 0


def _decode(w: Any) -> tuple[str, int]:
    """Key of the decode function."""
    return FLOATS[w.kind] if isinstance(w, NarrowFloat) else (w.kind_name, w.bits)


def _small(scales: Any) -> bool:
    """Whether all scales are known to be below `SMALL` in absolute value."""
    return not isinstance(scales, jax.core.Tracer) and bool(jnp.all(jnp.abs(scales) < SMALL))


def _all_within(values: Any, low: int, end: int) -> bool:
    values = np.asarray(values)
    return bool(values.size) and low <= values.min() and values.max() < end


def _float_refusal(w: NarrowFloat) -> str | None:
    n, k = w.shape[-2:]
    rows, cols = w.grouping.rows or n, w.grouping.cols or k
    if w.kind not in FLOATS:
        return f"{w.kind} codes; kernels take {', '.join(FLOATS)}"
    if w.formula not in FLOAT_FORMULAS or w.global_scale is not None:
        return f"formula {w.formula!r}" + (" with a scale of the whole tensor" if w.global_scale is not None else "")
    one = tuple(w.scales.shape[-2:]) == (1, 1)
    if w.grouping.kind != "block" or not (rows == 1 or one) or isinstance(w.scales, QTensor):
        return f"scales by {w.grouping}; kernels take groups along K"
    if cols % 32 and cols < k:
        return f"groups of {cols}; kernels take multiples of 32"
    if w.scale_kind not in ("float", "e8m0") or (w.scale_kind == "float" and str(w.scales.dtype) not in SCALES):
        return f"scales of {w.scale_kind}"
    return None


def _codebook_refusal(w: Codebook) -> str | None:
    k = w.in_features
    block = w.grouping.cols or k
    if w.offset is not None:
        return "an offset after the product"
    group = _common_group(w)
    if group % 32 and group < k:
        return f"blocks of {block} in rows of {k}, which share runs of {group}; kernels take multiples of 32"
    nested = w.absmax
    if not isinstance(nested, Codebook):
        return None if str(nested.dtype) == "float32" else f"absmax of {nested.dtype}"
    if (
        nested.bits != 8
        or nested.grouping.cols != NESTED_BLOCK
        or isinstance(nested.absmax, Codebook)
        or block != group
    ):
        return f"a nested absmax {nested!r}"
    return None


def prepare(w: Any) -> Any:
    """The same QTensor with its arrays in the kernels' order and `layout` set; `restore` is the inverse.

    Shape, dtypes of codes and scales, and size stay (N is padded to a multiple of 16, K of 64). Integer zeros become one
    byte each. A float32 absmax is split: the kernel reads its upper half, rounded to bfloat16; the rest goes to `extras`. An
    act-order `g_idx` is replaced by the permutation of K that sorts it. `layout` also says whether all scales are small
    (`Form.small`): restore a tensor before its scales are changed.

    Args:
      w: `jq.qtensor.Affine`, `Codebook` or `NarrowFloat` with concrete arrays; stack axes allowed.

    Raises:
      ValueError: no kernel takes this tensor; the message ends with `refusal(w)`.
    """
    if reason := refusal(w):
        raise ValueError(f"prepare: {w!r}: {reason}")
    if w.layout:
        return w
    k = w.in_features
    notes = {"n": w.out_features, "k": k, "pad": w.pad, "word": str(w.codes.dtype)}
    perm = None
    if isinstance(w, Affine) and w.g_idx is not None:
        g_idx = np.asarray(w.g_idx)
        cols = w.grouping.cols or k
        if np.array_equal(g_idx, np.broadcast_to(np.arange(k, dtype=g_idx.dtype) // cols, g_idx.shape)):
            notes["order"] = "plain"
        else:
            notes["order"] = "perm"
            perm = jnp.asarray(np.argsort(g_idx, axis=-1, kind="stable").astype(np.int32))
    order = DECODES[_decode(w)].order
    flip = _half(w) if isinstance(w, Affine) else 0
    codes = _over_stack(w.ndim, _pack_codes, w.codes, perm, k=k, order=order, flip=flip)
    fields: dict[str, Any] = {"codes": codes, "pad": -k % CHUNK}
    if isinstance(w, Affine):
        params = {"scales": jnp.asarray(w.scales)}
        if w.zeros is not None:
            zeros: Any = w.group_zeros()
            notes |= {"zeros": w.zeros_bits, "zeros_type": str(w.zeros.dtype)}
            integer = np.dtype(zeros.dtype).kind in "iu"
            params["zeros"] = (zeros.astype(jnp.int32) + flip).astype(jnp.uint8) if integer else jnp.asarray(zeros)
        fields |= {"g_idx": perm, "zeros_bits": 0, "extras": dict(w.extras)}
        for name, values in params.items():
            groups = -(-k // (w.grouping.cols or k))
            fields[name] = _rows(w.ndim, values[..., :groups])
            if values.shape[-1] > groups:
                fields["extras"][BEHIND[name]] = values[..., groups:]
        if w.bits == 4 and w.zeros is None and _small(fields["scales"]):
            notes["most"] = f"{SMALL:g}"
    elif isinstance(w, NarrowFloat):
        scales = jnp.asarray(w.scales)
        if scales.shape[-2:] == (1, 1):
            notes["scales"] = "one"
            scales = jnp.broadcast_to(scales, (*scales.shape[:-2], w.out_features, 1))
        fields["scales"] = _rows(w.ndim, scales)
    else:
        fields |= _pack_absmax(w, notes)
        if known := codebook.name_of(w.table):
            notes["table"] = known
    return w.replace(layout=";".join([NAME, *(f"{key}={value}" for key, value in notes.items())]), **fields)


def restore(w: Any) -> Any:
    """The QTensor that `prepare` was given, bit for bit."""
    if not w.layout:
        return w
    notes = dict(item.split("=", 1) for item in w.layout.split(";")[1:])
    n, k = w.out_features, int(notes["k"])
    perm = w.g_idx if notes.get("order") == "perm" else None
    order = DECODES[_decode(w)].order
    flip = _half(w) if isinstance(w, Affine) else 0
    pad = int(notes["pad"])
    codes = _over_stack(w.ndim, _unpack_codes, w.codes, perm, shape=(n, k), order=order, flip=flip, pad=pad)
    if str(codes.dtype) != notes["word"]:  # bit patterns of 8 bits, one by one
        codes = jax.lax.bitcast_convert_type(codes, notes["word"]).reshape(*codes.shape[:-1], -1)
    fields: dict[str, Any] = {"codes": codes, "pad": pad}
    if isinstance(w, Affine):
        fields["scales"] = _with_behind(w, "scales", n)
        fields["extras"] = {key: value for key, value in w.extras.items() if key not in BEHIND.values()}
        if "zeros" in notes:
            zeros, width = _with_behind(w, "zeros", n), int(notes["zeros"])
            if width:
                zeros = _pack_zeros(zeros, width)
            elif np.dtype(zeros.dtype).kind in "iu":
                zeros = (zeros.astype(jnp.int32) - flip).astype(notes["zeros_type"])
            fields |= {"zeros": zeros, "zeros_bits": width}
        if "order" in notes:
            fields["g_idx"] = _group_index(w, perm, k)
    elif isinstance(w, NarrowFloat):
        scales = _rows(w.ndim, w.scales, back=n)
        fields["scales"] = scales[..., :1, :1] if notes.get("scales") == "one" else scales
    else:
        fields |= _unpack_absmax(w, notes)
    return w.replace(layout="", **fields)


def packed(w: Any) -> Packed:
    """The kernel's view of a prepared tensor with at most one stack axis; reshapes only."""
    notes = dict(item.split("=", 1) for item in w.layout.split(";")[1:])
    n, k = w.shape[-2:]
    cols = w.grouping.cols or k
    stack = w.codes.shape[:-2]

    def tiles(a: jax.Array) -> jax.Array:
        return a.reshape(*stack, -(-n // ROWS), -1, ROWS)

    codes = w.codes if w.codes.dtype == jnp.int32 else jax.lax.bitcast_convert_type(w.codes, jnp.int32)
    codes = codes.reshape(*stack, -(-n // ROWS), -1, w.bits * 32)
    group = _common_group(w) if isinstance(w, Codebook) else cols
    group = group if group < k else 0
    if isinstance(w, NarrowFloat):
        kind, bits = FLOATS[w.kind]
        table = w.kind if kind == "codebook" else ""
        scale = "e8m0" if w.scale_kind == "e8m0" else SCALES[str(w.scales.dtype)]
        return Packed(codes, tiles(w.scales), None, {}, None, Form(kind, bits, group, scale, table=table), (n, k))  # type: ignore[arg-type]
    if isinstance(w, Affine):
        zero = ""
        if w.zeros is not None:
            zero = "u8" if w.zeros.dtype == jnp.uint8 else SCALES[str(w.zeros.dtype)]
        point = 1 << (w.bits - 1) if zero else w.zero_point + _half(w)
        scale, zero_form = SCALES[str(w.scales.dtype)], ZERO_FORMS[w.formula]
        form = Form("affine", w.bits, group, scale, zero, zero_form, point, small="most" in notes)  # type: ignore[arg-type]
        zeros = None if w.zeros is None else tiles(w.zeros)
        perm = w.g_idx if notes.get("order") == "perm" else None
        return Packed(codes, tiles(w.scales), zeros, {}, perm, form, (n, k))
    known = notes.get("table", "")
    tables = {} if known else {"table": w.table}
    if isinstance(w.absmax, Codebook):
        tables |= {"table2": w.absmax.table, "absmax2": w.absmax.absmax}
        offset = w.absmax.offset
        tables["offset"] = jnp.zeros(stack, jnp.float32) if offset is None else offset
        scales, kind = tiles(w.absmax.codes), "u8"
    else:
        scales, kind = tiles(w.absmax), "bf16"
    return Packed(codes, scales, None, tables, None, Form("codebook", w.bits, group, kind, table=known), (n, k))  # type: ignore[arg-type]


def _over_stack(ndim: int, function: Any, *arrays: Any, **static: Any) -> Any:
    """function over the leading stack axes of arrays (None stays None); `static` are its keyword arguments."""
    axes = tuple(None if a is None else 0 for a in arrays)
    return _program(ndim - 2, function, axes, tuple(static.items()))(*arrays)


@functools.lru_cache(256)
def _program(stacked: int, function: Any, axes: tuple[int | None, ...], static: tuple[tuple[str, Any], ...]) -> Any:
    """Compiled once for the layers of a model, which differ in nothing but numbers."""
    made = functools.partial(function, **dict(static))
    for _ in range(stacked):
        made = jax.vmap(made, in_axes=axes)
    return jax.jit(made)


def _pack_codes(words: jax.Array, perm: jax.Array | None, *, k: int, order: str, flip: int) -> jax.Array:
    codes = _bits.unpack(words, layout.BITS[order], k).astype(jnp.uint8)
    codes = codes ^ flip  # two's complement to offset binary
    codes = codes if perm is None else codes[:, perm]
    out = layout.pack_codes(codes, order)
    return jax.lax.bitcast_convert_type(out, jnp.uint32).reshape(out.shape[0] * ROWS, -1)


def _unpack_codes(
    words: jax.Array, perm: jax.Array | None, *, shape: tuple[int, int], order: str, flip: int, pad: int
) -> jax.Array:
    tiles = jax.lax.bitcast_convert_type(words, jnp.int32).reshape(-(-shape[0] // ROWS), -1, 32 * layout.BITS[order])
    codes = layout.unpack_codes(tiles, order, shape)
    codes = codes if perm is None else codes[:, jnp.argsort(perm)]
    codes = codes ^ flip
    return _bits.pack(jnp.pad(codes, ((0, 0), (0, pad))) if pad > 1 else codes, layout.BITS[order])


def _rows(ndim: int, params: jax.Array, back: int = 0) -> jax.Array:
    """[N, G] parameters into the order of `layout.pack_rows`, N padded to whole tiles; or the first `back` rows again."""
    return _over_stack(ndim, _reorder, jnp.asarray(params), back=back)


def _reorder(params: jax.Array, *, back: int) -> jax.Array:
    groups = params.shape[-1]
    if back:
        return layout.unpack_rows(params.reshape(-1, groups, ROWS), back)
    return layout.pack_rows(params).reshape(-1, groups)


def _with_behind(w: Affine, name: str, n: int) -> jax.Array:
    """Scales or zeros [N, stored groups] of a prepared tensor, those beyond the last used one too."""
    used, behind = _rows(w.ndim, getattr(w, name), back=n), w.extras.get(BEHIND[name])
    return used if behind is None else jnp.concatenate([used, behind], -1)


def _pack_zeros(zeros: jax.Array, width: int) -> jax.Array:
    from jq.qtensor.affine import pack_zeros

    return pack_zeros(zeros, width)


def _group_index(w: Affine, perm: jax.Array | None, k: int) -> jax.Array:
    groups = (jnp.arange(k, dtype=jnp.int32) // (w.grouping.cols or k)).astype(jnp.int32)
    if perm is None:
        return jnp.broadcast_to(groups, (*w.shape[:-2], k))
    back = jnp.argsort(perm, axis=-1)
    return groups[back]


def _common_group(w: Codebook) -> int:
    """Weights along K that share a scale in every row: all of a block, or what blocks across rows leave in common."""
    k = w.in_features
    return math.gcd(w.grouping.cols or k, k)


def _pack_absmax(w: Codebook, notes: dict[str, Any]) -> dict[str, Any]:
    """absmax in tiles; a float32 one as bfloat16 (nearest) and the lower halves of its bits."""
    n, k = w.shape[-2:]
    stack, group = w.shape[:-2], _common_group(w)
    if isinstance(w.absmax, Codebook):
        nested = w.absmax
        notes["nested"] = "x".join(map(str, nested.codes.shape[len(stack) :]))
        notes["nested_word"] = str(nested.codes.dtype)
        codes = jnp.asarray(nested.unpack()).astype(jnp.uint8).reshape(*stack, n, k // group)
        return {"absmax": nested.replace(codes=_rows(w.ndim, codes), pad=0)}
    notes["absmax"] = "x".join(map(str, w.absmax.shape[len(stack) :]))
    bits = jax.lax.bitcast_convert_type(jnp.asarray(w.absmax).reshape(*stack, -1), jnp.uint32)
    high = ((bits + 0x8000) >> 16).astype(jnp.uint16)
    low = (bits & 0xFFFF).astype(jnp.uint16)
    high = jnp.repeat(high, (w.grouping.cols or k) // group, axis=-1)[..., : n * k // group]
    high = jax.lax.bitcast_convert_type(high.reshape(*stack, n, -1), jnp.bfloat16)
    return {"absmax": _rows(w.ndim, high), "extras": {**w.extras, LOW: low}}


def _unpack_absmax(w: Codebook, notes: dict[str, str]) -> dict[str, Any]:
    k, stack = w.in_features, w.shape[:-2]
    if isinstance(w.absmax, Codebook):
        nested = w.absmax
        shape = tuple(int(d) for d in notes["nested"].split("x"))
        codes = _rows(w.ndim, nested.codes, back=w.out_features)
        if notes["nested_word"] != "uint8":
            codes = _bits.pack(codes.reshape(*stack, *shape[:-1], -1), 8)
        return {"absmax": nested.replace(codes=codes.reshape(*stack, *shape))}
    high = jax.lax.bitcast_convert_type(_rows(w.ndim, w.absmax, back=w.out_features), jnp.uint16).astype(jnp.uint32)
    high = high.reshape(*stack, -1)[..., :: (w.grouping.cols or k) // _common_group(w)]
    low = w.extras[LOW].astype(jnp.uint32)
    bits = ((high - (low >> 15)) << 16) | low
    absmax = jax.lax.bitcast_convert_type(bits, jnp.float32)
    shape = tuple(int(d) for d in notes["absmax"].split("x"))
    extras = {key: value for key, value in w.extras.items() if key != LOW}
    return {"absmax": absmax.reshape(*stack, *shape), "extras": extras}
