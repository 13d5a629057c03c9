"""HQQ: random modules packed by slow, obvious numpy; every width, axis and form; the solver; every error."""

from __future__ import annotations

import dataclasses
import importlib.util
import math

import ml_dtypes
import numpy as np
import pytest
from format_reading import TURNS, assert_same, context_of, dense, held_bytes, read
from hypothesis import given, settings
from hypothesis import strategies as st

import jq
from jq.algorithms.hqq import hqq_codes, max_code
from jq.algorithms.torch_sum import mean_all, mean_axis
from jq.errors import FormatError
from jq.formats import hqq

NAME = "model.layers.0.mlp.up_proj"
CONFIG = {"quant_method": "hqq"}
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
# nbits -> (packing, bits, codes a word, word)
WIDTHS = {
    8: ("8bit_u8", 8, 1, np.uint8), 6: ("8bit_u8", 8, 1, np.uint8), 5: ("8bit_u8", 8, 1, np.uint8),
    4: ("4bit_u8", 4, 2, np.uint8), 3: ("3bit_32", 3, 10, np.int32), 2: ("2bit_u8", 2, 4, np.uint8),
    1.58: ("2bit_u8", 2, 4, np.uint8), 1: ("1bit_u8", 1, 8, np.uint8),
}  # fmt: skip


def pack_slowly(codes, bits, per, word):
    """Slabs of rows, the first in the highest bits; code by code."""
    rows = math.ceil(len(codes) / per)
    packed = np.zeros((rows, codes.shape[1]), np.uint32)
    for r in range(len(codes)):
        for c in range(codes.shape[1]):
            packed[r % rows, c] |= int(codes[r, c]) << (bits * (per - 1 - r // rows))
    return packed.astype(np.uint32).view(np.int32) if word is np.int32 else packed.astype(np.uint8)


def chars(text):
    return np.array([ord(c) for c in text], np.uint8)


def encoded(prefix, packed, scale, zero, shape, nbits, group, axis, dtype, view):
    """The safetensors form: every attribute a tensor."""
    packing = WIDTHS[nbits][0]
    values = {
        "W_q": packed.view(DTYPES[dtype]) if view else packed, "scale": scale, "zero": zero,
        "shape": np.array(shape, np.int64), "packing": chars(packing),
        "nbits": np.array(nbits, np.float32 if isinstance(nbits, float) else np.int32),
        "group_size": np.array(group, np.int32), "axis": np.array(axis, np.int32),
        "compute_dtype": chars(f"torch.{dtype}"),
        "unpack_view_dtype": chars("torch.int32" if nbits == 3 else "torch.uint8"),
        "view_as_float": np.array(view, np.uint8), "quant_scale": np.array(0, np.uint8),
        "quant_zero": np.array(0, np.uint8), "channel_wise": np.array(1, np.uint8), "optimize": np.array(1, np.uint8),
        "round_zero": np.array(nbits == 4, np.uint8), "offload_meta": np.array(0, np.uint8),
        "encoded_state_dict": np.array(1, np.uint8), "stores_quant_config": np.array(1, np.uint8),
    }  # fmt: skip
    return {f"{prefix}.{k}": v for k, v in values.items()}


@dataclasses.dataclass
class Module:
    tensors: dict
    codes: np.ndarray  # [N, K]
    want: np.ndarray


@st.composite
def modules(draw):
    nbits = draw(st.sampled_from(list(WIDTHS)))
    _, bits, per, word = WIDTHS[nbits]
    axis = draw(st.integers(0, 1))
    n, k = draw(st.integers(1, 12)), 2 * draw(st.integers(1, 24))
    sizes = [
        g for g in range(1, n * k + 1)
        if n * k % g == 0 and (nbits == 3 or (n * k // g if axis == 1 else g) % per == 0)
    ]  # fmt: skip
    if not sizes:
        sizes, nbits, (_, bits, per, word) = [k], 3, WIDTHS[3]
    group = draw(st.sampled_from(sizes))
    dtype = draw(st.sampled_from(list(DTYPES)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    matrix = (n * k // group, group) if axis == 1 else (group, n * k // group)
    codes = rng.integers(0, max_code(nbits) + 1, matrix)
    side = (matrix[0], 1) if axis == 1 else (1, matrix[1])
    scale, zero = (rng.normal(size=side).astype(DTYPES[dtype]) for _ in range(2))
    packed = pack_slowly(codes, bits, per, word)
    fits = packed.shape[1] * packed.dtype.itemsize % np.dtype(DTYPES[dtype]).itemsize == 0
    view = draw(st.booleans()) and fits
    tensors = encoded(NAME, packed, scale, zero, (n, k), nbits, group, axis, dtype, view)
    dt = DTYPES[dtype]
    want = ((codes.astype(dt) - zero).astype(dt) * scale).astype(dt).reshape(n, k)
    return Module(tensors, codes.reshape(n, k), want)


@settings(max_examples=60, deadline=None)
@given(modules(), TURNS)
def test_reads_and_writes_what_slow_numpy_packs(module, turn):
    q = read(hqq.FORMAT, module.tensors, CONFIG)[NAME]
    np.testing.assert_array_equal(np.asarray(q.unpack()), module.codes)
    assert_same(dense(q, turn), module.want)
    assert held_bytes(q) <= 1.02 * sum(t.nbytes for t in module.tensors.values()) + 16


def test_groups_along_rows_are_block_scales():
    made = jq.HQQ(group_size=8).quantize(np.ones((4, 32), np.float16))
    assert made.scales.shape == (4, 4) and made.grouping.kind == "block"
    assert jq.HQQ(group_size=8, axis=0).quantize(np.ones((4, 32), np.float16)).grouping.kind == "strided"


def test_padding_rows_of_three_bits_are_carried():
    """64 rows make 7 words of 10; a writer may leave anything in the six codes that are too many."""
    codes = np.arange(64 * 4).reshape(64, 4) % 8
    packed = pack_slowly(codes, 3, 10, np.int32)
    packed[6, 2] |= 5
    side = np.ones((1, 4), np.float16)
    tensors = encoded(NAME, packed, side, side, (16, 16), 3, 64, 0, "float16", False)
    q = read(hqq.FORMAT, tensors, CONFIG)[NAME]
    np.testing.assert_array_equal(np.asarray(q.unpack()).reshape(64, 4), codes)


def test_width_comes_from_the_packing_not_from_nbits():
    """nbits 1.58 is stored as a float, which hqq itself decodes to 1."""
    q = jq.HQQ(1.58, group_size=8).quantize(np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32))
    assert q.code_bits == 2 and np.asarray(q.unpack()).max() == 2
    assert_same(hqq.dump(q)["nbits"], np.array(1.58, np.float32))


def nested(rng, n, k, group, quant_scale, offload):
    """hqq 0.1's state of one module: (tensors, objects, dense weight)."""
    groups = n * k // group
    codes = rng.integers(0, 16, (group, groups))
    parts, objects = {"W_q": pack_slowly(codes, 4, 2, np.uint8)}, {}
    meta = {"nbits": 4, "group_size": group, "shape": (n, k), "axis": 0, "packing": "4bit_u8", "view_as_float": False}
    meta |= {"quant_zero": True, "quant_scale": quant_scale, "compute_dtype": "torch.float16"}
    f16 = np.float16

    def eight(which, shape, side):
        q = rng.integers(0, 256, shape).astype(np.uint8)
        s, z = (rng.normal(size=side).astype(f16) for _ in range(2))
        parts.update({f"meta.meta_{which}.scale": s, f"meta.meta_{which}.zero": z})
        inner = {"nbits": 8, "group_size": None if side == () else 128, "shape": (1, groups), "axis": 0}
        inner |= {"packing": "8bit_u8", "view_as_float": False, "compute_dtype": "torch.float16"}
        objects.update({f"meta.meta_{which}.{a}": b for a, b in inner.items()})
        return q, ((q.astype(f16) - z).astype(f16) * s).astype(f16).reshape(1, groups)

    if offload:
        zero_q, zero = eight("zero", (128, groups // 128), (1, groups // 128))
        scale_q, scale = eight("scale", (128, groups // 128), (1, groups // 128))
        parts["meta.zero_scale"] = np.stack([zero_q, scale_q])
    else:
        parts["meta.zero_q"], zero = eight("zero", (1, groups), ())
        if quant_scale:
            parts["meta.scale_q"], scale = eight("scale", (128, groups // 128), (1, groups // 128))
        else:
            scale = parts["meta.scale"] = rng.normal(size=(1, groups)).astype(f16)
    objects.update({f"meta.{a}": b for a, b in meta.items()})
    want = ((codes.astype(f16) - zero).astype(f16) * scale).astype(f16).reshape(n, k)
    return {f"{NAME}.{a}": b for a, b in parts.items()}, {f"{NAME}.{a}": b for a, b in objects.items()}, want


@pytest.mark.parametrize("offload", (False, True))
@pytest.mark.parametrize("quant_scale", (False, True))
def test_reads_quantized_zeros_and_scales_of_old_files(quant_scale, offload):
    if offload and not quant_scale:
        pytest.skip("hqq quantizes both or none where it stacks them")
    tensors, objects, want = nested(np.random.default_rng(1), 32, 128, 16, quant_scale, offload)
    context = dataclasses.replace(context_of(tensors), objects=objects)
    stored = hqq.group(list(tensors), None, context)[NAME]
    q = hqq.load(NAME, {s: tensors[n] for s, n in stored.items()}, None, context)
    assert_same(q.to_numpy().dequantize(), want)
    assert held_bytes(q) <= 1.02 * sum(t.nbytes for t in tensors.values())
    again = read(hqq.FORMAT, {f"{NAME}.{s}": a for s, a in hqq.dump(q).items()}, CONFIG)[NAME]
    assert_same(again.to_numpy().dequantize(), want)  # the safetensors form keeps every bit of the weight


@pytest.mark.parametrize("bits", list(WIDTHS))
@pytest.mark.parametrize("axis", (0, 1))
def test_quantizes_within_half_a_step(bits, axis):
    w = np.random.default_rng(3).normal(size=(48, 64)).astype(np.float32)
    made = jq.HQQ(bits, group_size=16, axis=axis, optimize=False, round_zero=False).quantize(w)
    steps = np.abs(np.asarray(made.dequantize()) - w)
    limit = np.asarray(made.scales).max() * 0.5001
    assert steps.max() <= limit
    assert_same(np.asarray(made.unpack()).max(), np.asarray(max_code(bits), np.int32))


def test_the_solver_lowers_the_error_that_it_minimizes():
    w = (np.random.default_rng(4).standard_t(3, size=(64, 256)) * 0.02).astype(np.float32)
    errors = []
    for optimize in (False, True):
        made = jq.HQQ(2, group_size=64, optimize=optimize).quantize(w)
        errors.append(np.mean(np.abs(np.asarray(made.dequantize()) - w) ** 0.7))
    assert errors[1] < 0.97 * errors[0]


def test_sums_in_the_order_of_torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    rng = np.random.default_rng(5)
    for shape in ((64, 2048), (8, 512), (24, 256), (100, 17), (7, 200), (1000, 64), (2000, 5), (1, 7)):
        x = rng.normal(size=shape).astype(np.float32)
        for axis in (0, 1):
            assert_same(mean_axis(x, axis), torch.tensor(x).mean(axis, keepdim=True).numpy())
        assert mean_all(x) == torch.tensor(x).mean().item()


@pytest.mark.skipif(importlib.util.find_spec("hqq") is None, reason="needs hqq (extra `peers`)")
@pytest.mark.parametrize("bits", list(WIDTHS))
def test_codes_are_those_of_hqq_on_the_cpu(bits):
    torch = pytest.importorskip("torch")
    from hqq.core.quantize import Quantizer

    torch.set_num_threads(1)
    for axis in (0, 1):
        for shape, group in (((128, 256), 64), ((64, 96), 24), ((256, 64), 8)):
            w = (np.random.default_rng(6).normal(size=shape) * 0.05).astype(np.float32)
            options = {"group_size": group, "axis": axis, "round_zero": bits == 4, "device": "cpu", "bitpack": False}
            want, meta = Quantizer.quantize(torch.tensor(w), nbits=bits, **options)
            matrix = w.reshape((-1, group) if axis == 1 else (group, -1))
            codes, scale, zero = hqq_codes(matrix, top=max_code(bits), axis=axis, round_zero=bits == 4)
            np.testing.assert_array_equal(codes, want.numpy())
            assert_same(scale, meta["scale"].numpy())
            assert_same(zero, meta["zero"].numpy())


def good():
    side = np.ones((8, 1), np.float16)
    packed = np.zeros((4, 16), np.uint8)
    return encoded(NAME, packed, side, side, (4, 32), 4, 16, 1, "float16", False)


def test_numbers_with_axes_are_kept_as_they_are():
    """`read` also compares what `dump` writes with what was read."""
    change = {f"{NAME}.{k}": good()[f"{NAME}.{k}"].reshape(1, 1) for k in ("axis", "nbits", "group_size")}
    assert read(hqq.FORMAT, good() | change, CONFIG)[NAME].shape == (4, 32)


@pytest.mark.parametrize(
    "change, message",
    (
        ({"packing": chars("5bit_u8")}, r"up_proj.packing: found '5bit_u8', expected 8bit_u8"),
        ({"shape": np.array([4, 48], np.int64)}, r"up_proj.W_q: found 4 x 16 words .* the weight has 192"),
        ({"scale": np.ones((7, 1), np.float16)}, r"up_proj.scale: 7 values .* expected 8 groups of 16"),
        ({"zero": np.ones((7, 1), np.float16)}, r"up_proj.zero: 7 values, but scale has 8"),
        ({"group_size": np.array(32, np.int32)}, r"up_proj.scale: .* group_size 32; expected 8 groups of 16"),
        ({"scale": np.full((8, 1), np.nan, np.float16)}, r"up_proj: scales: 8 of 8 values are not finite"),
        ({"compute_dtype": chars("torch.int8")}, r"up_proj.compute_dtype: found 'int8'"),
        ({"W_q": np.zeros((4, 16), np.int64)}, r"up_proj.W_q: found dtype int64, expected uint8"),
        ({"shape": None}, r"up_proj.shape: missing"),
        ({"zero": None}, r"up_proj.zero_q: missing; .* A module has zero, zero_q or zero_scale"),
    ),
)
def test_errors_name_the_tensor(change, message):
    tensors = good() | {f"{NAME}.{k}": v for k, v in change.items()}
    with pytest.raises(FormatError, match=message):
        read(hqq.FORMAT, {k: v for k, v in tensors.items() if v is not None}, CONFIG)


def test_config_errors_and_warnings():
    def parse(**config):
        return hqq.parse({"quant_method": "hqq", **config}, context_of({}))

    with pytest.raises(FormatError, match=r"quant_config\['self_attn.q_proj'\].nbits: found 7, hqq has 8, 6"):
        parse(quant_config={"self_attn.q_proj": {"weight_quant_params": {"nbits": 7}}})
    with pytest.raises(FormatError, match=r"quant_config.axis: found 2, expected 0 or 1"):
        parse(quant_config={"weight_quant_params": {"nbits": 4, "axis": 2}})
    with pytest.warns(jq.errors.JqWarning, match="quantization_config.surprise is not known and ignored"):
        parse(surprise=1)
    with pytest.raises(FormatError, match=r"groups of 24 of a \(4, 32\) weight"):
        jq.HQQ(group_size=24).quantize(np.ones((4, 32), np.float32))
