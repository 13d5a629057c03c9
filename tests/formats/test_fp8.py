"""Fine-grained FP8: block grids of every kind against plain numpy; scales that belong to nothing; quantization; errors."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import mutations
import numpy as np
import pytest
from format_reading import TURNS, assert_same, dense, held_bytes, read
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_dirs import directories

import jq
from jq.errors import FormatError
from jq.formats.base import Context
from jq.formats.fp8 import FORMAT, parse
from jq.models import experts
from jq.state import State

NAME = "model.layers.0.self_attn.q_proj"
E4M3, E8M0, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def config(block=(128, 128), scheme="dynamic", **more):
    return {"quant_method": "fp8", "activation_scheme": scheme, "weight_block_size": block and list(block), **more}


def random_codes(rng, *shape):
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[(codes & 127) == 127] = 0x80  # NaN has no arithmetic to compare; -0 stays
    return codes.view(E4M3)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_blocks(data):
    """Ragged edges included; float32, bfloat16, e8m0 and bytes of e8m0; each of the names that files use."""
    n, k = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 40))
    block = data.draw(st.sampled_from([(4, 8), (8, 8), (16, 64), (1, 32)]))
    name = data.draw(st.sampled_from(["weight_scale_inv", "scale", "qscale_weight"]))
    kind = data.draw(st.sampled_from(["float32", "bfloat16", "e8m0", "uint8"]))
    dtype = data.draw(st.sampled_from(["bfloat16", "float16", "float32"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    weight = random_codes(rng, n, k)
    grid = (-(-n // block[0]), -(-k // block[1]))
    if kind in ("e8m0", "uint8"):
        exponents = rng.integers(100, 133, grid).astype(np.uint8)
        scale = exponents.view(E8M0) if kind == "e8m0" else exponents
        factor = 2.0 ** (exponents.astype(np.float32) - 127)
    else:
        scale = rng.standard_normal(grid).astype(BF16 if kind == "bfloat16" else np.float32)
        factor = scale.astype(np.float32)
    tensors = {f"{NAME}.weight": weight, f"{NAME}.{name}": scale}
    q = read(FORMAT, tensors, config(block, fmt="e4m3"), dtype)[NAME]
    full = np.repeat(np.repeat(factor, block[0], 0), block[1], 1)[:n, :k]
    want = (weight.astype(np.float32) * full).astype(np.dtype(dtype) if dtype != "bfloat16" else BF16)
    assert_same(dense(q, data.draw(TURNS)), want)
    assert held_bytes(q) == weight.nbytes + scale.nbytes
    assert q.activation.get("cols") == block[1] or grid == (1, 1)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_per_tensor_static(shape):
    weight = random_codes(np.random.default_rng(0), 3, 5)
    scale, act = np.full(shape, 0.25, BF16), np.full((), 0.5, BF16)
    tensors = {f"{NAME}.weight": weight, f"{NAME}.weight_scale_inv": scale, f"{NAME}.activation_scale": act}
    q = read(FORMAT, tensors, config(None, "static"))[NAME]
    assert_same(q.dequantize(), (weight.astype(np.float32) * 0.25).astype(BF16))
    assert q.activation.parameters == ("activation_scale",)


def test_a_scale_beside_a_float_weight_is_left_alone():
    """transformers saves uninitialised memory as the scale of layers that it did not quantize."""
    tensors = {
        f"{NAME}.weight": np.ones((64, 128), BF16),
        f"{NAME}.weight_scale_inv": np.full((1, 1), -1e20, np.float32),
    }
    assert read(FORMAT, tensors, config()) == {}


def test_a_model_runs_beside_such_scales(tmp_path):
    state = jq.load_state(directories()["fp8-block128"])
    added = {
        f"model.layers.{i}.self_attn.k_proj.weight_scale_inv": np.full((1, 1), -1e20, np.float32) for i in range(2)
    }
    jq.save(State({**state, **added}, state.config), tmp_path / "more")
    ids = np.arange(7)[None]
    want = jq.load(directories()["fp8-block128"], dtype="float32")(ids)
    model = jq.load(tmp_path / "more", dtype="float32")
    np.testing.assert_array_equal(np.asarray(model(ids)), np.asarray(want))
    jq.save(model, tmp_path / "again")
    kept = jq.load_state(tmp_path / "again")
    assert all(np.asarray(kept[name]) == np.float32(-1e20) for name in added)


def test_blocks_of_the_grid_where_the_config_does_not_fit():
    """One file mixes 128x128 linears and experts of 1x32 blocks in two e2m1 codes a byte."""
    rng = np.random.default_rng(1)
    packed = rng.integers(-128, 128, (4, 32)).astype(np.int8)
    scale = rng.integers(120, 130, (4, 2)).astype(np.uint8).view(E8M0)
    tensors = {"m.experts.0.w1.weight": packed, "m.experts.0.w1.scale": scale}
    q = read(FORMAT, tensors, config(expert_dtype="fp4", scale_fmt="ue8m0"))["m.experts.0.w1"]
    codes = packed.view(np.uint8)
    values = FP4[np.stack([codes & 15, codes >> 4], -1).reshape(4, 64)]
    factor = 2.0 ** (scale.view(np.uint8).astype(np.float32) - 127)
    assert_same(q.dequantize(), (values * np.repeat(factor, 32, 1)).astype(BF16))
    assert q.activation.get("pow2")


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_fused_experts_quantize_their_tokens(scheme):
    """An expert's product with its tokens is that of a Linear with the same tensors, in the model's own function."""
    rng = np.random.default_rng(8)
    codes, scale = random_codes(rng, 3, 16, 32), rng.random((3, 2, 4)).astype(np.float32) * 0.1
    inputs = (rng.random(3) * 0.01 + 0.01).astype(np.float32)
    prefix = "model.layers.0.mlp.experts.gate_up_proj"
    static = {f"{prefix}_activation_scale": inputs} if scheme == "static" else {}
    stack = read(FORMAT, {prefix: codes, f"{prefix}_scale_inv": scale, **static}, config((8, 8), scheme))[prefix]
    x = jnp.asarray(rng.standard_normal((5, 32)).astype(np.float32))
    for i in range(3):
        one = {"m.weight": codes[i], "m.weight_scale_inv": scale[i]}
        one |= {"m.activation_scale": inputs[i]} if scheme == "static" else {}
        linear = read(FORMAT, one, config((8, 8), scheme))["m"]
        want = jq.matmul(x, linear)
        np.testing.assert_allclose(experts.stacked_product(x, stack.to_jax(), i), want, rtol=1e-5, atol=1e-5)
        assert float(jnp.abs(want - x @ linear.dequantize("float32").T).max()) > 1e-3


def test_fused_experts_and_embedding():
    rng = np.random.default_rng(2)
    weight, scale = random_codes(rng, 3, 8, 16), rng.standard_normal((3, 2, 2)).astype(np.float32)
    table, one = random_codes(rng, 10, 16), np.full(1, 0.5, np.float32)
    prefix = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {prefix: weight, f"{prefix}_scale_inv": scale, f"{prefix}_activation_scale": np.ones(3, np.float32)}
    tensors |= {"embed_tokens.weight": table, "embed_tokens.weight_scale": one}
    found = read(FORMAT, tensors, config((4, 8), modules_to_convert=["embed_tokens"]))
    full = np.repeat(np.repeat(scale, 4, 1), 8, 2)
    assert_same(found[prefix].dequantize(), (weight.astype(np.float32) * full).astype(BF16))
    assert_same(found["embed_tokens"].dequantize(), (table.astype(np.float32) * 0.5).astype(BF16))
    assert FORMAT.parameter(prefix) and not FORMAT.parameter("model.layers.0.mlp.experts.0.up_proj")


def test_mxfp8_has_its_own_block():
    assert parse({"quant_method": "mxfp8"}, Context()).block == (1, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_scheme": "lazy"}, "activation_scheme 'lazy', expected dynamic or static"),
        ({"weight_block_size": [128]}, r"weight_block_size \[128\]"),
        ({"weight_block_size": [0, 128]}, r"weight_block_size \[0, 128\]"),
        ({"scale_fmt": "log"}, "scale_fmt 'log'"),
        ({"expert_dtype": "int4"}, "expert_dtype 'int4'"),
        ({"fmt": "e5m2"}, "fmt 'e5m2'"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(FormatError, match=message):
        parse({**config(), **change}, Context())


def test_damaged_modules():
    weight = random_codes(np.random.default_rng(0), 8, 16)

    def tensors(**parts):
        return {f"{NAME}.{k}": v for k, v in {"weight": weight, **parts}.items()}

    with pytest.raises(FormatError, match=r"q_proj.weight: float8 without a scale"):
        read(FORMAT, tensors(), config())
    with pytest.raises(FormatError, match=r"weight_scale_inv: found shape \(3, 2\), expected \(2, 2\) blocks"):
        read(FORMAT, tensors(weight_scale_inv=np.ones((3, 2), np.float32)), config((4, 8)))
    with pytest.raises(FormatError, match=r"weight_scale_inv: found shape \(1, 2\), expected \(2, 2\) blocks"):
        read(FORMAT, tensors(weight_scale_inv=np.ones((1, 2), np.float32)), config((4, 8)))
    with pytest.raises(FormatError, match="weight_scale_inv: found dtype int32"):
        read(FORMAT, tensors(weight_scale_inv=np.ones((2, 2), np.int32)), config((4, 8)))
    with pytest.raises(FormatError, match="4 of 4 values are not finite"):
        read(FORMAT, tensors(weight_scale_inv=np.full((2, 2), np.inf, np.float32)), config((4, 8)))
    with pytest.raises(FormatError, match="activation_scale: missing"):
        read(FORMAT, tensors(weight_scale_inv=np.ones((), np.float32)), config(None, "static"))
    with pytest.raises(FormatError, match=r"experts.down_proj: float8 without"):
        read(FORMAT, {"m.experts.down_proj": weight[None]}, config())


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["float", "ue8m0"]), st.sampled_from([(4, 8), (8, 16), None]), st.integers(0, 2**32))
def test_quantize(fmt, block, seed):
    """torch's 448 / m is (1 / m) * 448: with a division some scales are one unit off, and their codes with them."""
    w = np.random.default_rng(seed).standard_normal((8, 32)).astype(BF16)
    w[0, 0] = -0.0
    q = jq.FP8(block, scale_fmt=fmt).quantize(w, NAME)
    size = block or (8, 32)
    for i in range(0, 8, size[0]):
        for j in range(0, 32, size[1]):
            part = w[i : i + size[0], j : j + size[1]].astype(np.float32)
            scale = np.float32(1) / np.abs(part).max() * np.float32(448)
            inverse = np.float32(1) / scale
            if fmt == "ue8m0":
                inverse = np.float32(2.0 ** np.ceil(np.log2(inverse)))
                scale = np.float32(1) / inverse
            codes = np.clip(part * scale, -448, 448).astype(E4M3)
            got = np.asarray(q.codes)[i : i + size[0], j : j + size[1]]
            np.testing.assert_array_equal(got, codes.view(np.uint8))
            stored = np.asarray(q.block_scales(), np.float32)[i // size[0], j // size[1]]
            assert stored == inverse
    method = jq.FP8(block, scale_fmt=fmt)
    parts = {f"{NAME}.{k}": v for k, v in FORMAT.dump(q).items()}
    assert_same(read(FORMAT, parts, method.config(["lm_head"]))[NAME].dequantize(), q.dequantize())


def test_quantize_refuses_what_blocks_do_not_tile():
    with pytest.raises(FormatError, match=r"shape \(64, 128\) is not tiled by blocks of \(128, 128\)"):
        jq.FP8().quantize(np.ones((64, 128), np.float32), NAME)


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_single_experts_with_the_scales_of_fused_ones(names, tmp_path):
    """How transformers 5.23 saves a mixture of experts: weights one by one, scales [E, ., .] of gate and up together."""
    rng = np.random.default_rng(9)
    at, inputs = "model.layers.0.mlp.experts", np.full(2, 0.5, np.float32)
    weights = {i: [random_codes(rng, *shape) for shape in ((16, 32), (16, 32), (32, 16))] for i in range(2)}
    both, down = rng.random((2, 4, 4)).astype(np.float32), rng.random((2, 4, 2)).astype(np.float32)
    tensors = {f"{at}.{i}.{n}.weight": w for i, ws in weights.items() for n, w in zip(names, ws, strict=True)}
    tensors |= {f"{at}.gate_up_proj_scale_inv": both, f"{at}.down_proj_scale_inv": down}
    tensors |= {f"{at}.gate_up_proj_activation_scale": inputs, f"{at}.down_proj_activation_scale": inputs}
    state = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": config((8, 8), "static")}
    mutations.write(tmp_path, tensors, state, {}, {})
    loaded = jq.load_state(tmp_path)
    found = jq.quantized(loaded)
    assert len(found) == 6
    for i, ws in weights.items():
        scales = (both[i, :2], both[i, 2:], down[i])
        for name, w, scale in zip(names, ws, scales, strict=True):
            want = w.astype(np.float32) * np.repeat(np.repeat(scale, 8, 0), 8, 1)
            assert_same(found[f"{at}.{i}.{name}"].dequantize(), want.astype(BF16))
            assert np.isfinite(
                np.asarray(jq.matmul(np.ones((2, w.shape[1]), np.float32), found[f"{at}.{i}.{name}"]))
            ).all()
    assert {name: np.asarray(a).tobytes() for name, a in loaded.stored()} == {
        k: v.tobytes() for k, v in tensors.items()
    }
