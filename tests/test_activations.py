"""Activation quantization: codes and scales equal to the libraries', outputs within their tolerance, plain numpy rules."""

from __future__ import annotations

import contextlib
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference_dirs
from hypothesis import given, settings
from hypothesis import strategies as st

import jq
from jq import activations, safetensors_file
from jq.activation_schemes import compressed_tensors as ct
from jq.activation_schemes import elements, fp8, products
from jq.activations import Activation
from jq.errors import JqWarning, UnsupportedError
from jq.formats import base
from jq.formats.compressed_tensors_config import Args
from jq.qtensor import Affine

FORMATS = ("compressed-tensors", "fp8", "fbgemm_fp8")
FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32)


def oracles():
    """Reference directories of these formats that record single modules."""
    found = []
    for folder in reference_dirs.directories().values():
        info = folder / "reference.json"
        if (folder / "activations.safetensors").exists() and json.loads(info.read_text()).get("method") in FORMATS:
            found.append(folder)
    return found


def quantized(x, w):
    """(codes, scales, zeros) as the scheme of w makes them."""
    a = w.activation
    if a.scheme == "compressed_tensors":
        got = ct.quantize(x, a.get("input"), ct.parameters_of(w.extras, "input"))
        return got.values, got.scales, got.zeros
    if a.scheme == "fp8_block":
        return *fp8.quantize_blocks(x, a.get("cols"), pow2=a.get("pow2", False)), None
    if a.scheme == "fp8_static":
        scale = fp8.static_scale(w)
        return fp8.quantize_static(x, scale), jnp.broadcast_to(scale, (x.shape[0], 1)), None
    return *fp8.quantize_rows(x, a.get("upper")), None


EAGER_TOO = ("ct-w8a8-static", "ct-mxfp4", "fp8-block128")  # operation by operation costs seconds a directory
CASES = [(f, True) for f in oracles()] + [(f, False) for f in oracles() if f.name in EAGER_TOO]


@pytest.mark.parametrize(("folder", "jit"), CASES, ids=[f"{f.name}-{'jit' if jit else 'eager'}" for f, jit in CASES])
def test_codes_and_scales_equal_the_librarys(folder, jit):
    entries, _ = safetensors_file.read_header(folder / "activations.safetensors")
    state = jq.load_state(folder)
    weights = jq.quantized(state)
    for key in entries:
        if not key.endswith(".input"):
            continue
        name = key.removesuffix(".input")
        w, x = weights[name], jnp.asarray(entries[key].read())
        if f"{name}.input_codes" not in entries:
            assert w.activation is None
            continue
        run = jax.jit(quantized) if jit else quantized
        found = run(x, w.without_extras().replace(source=None))
        for suffix, got in zip(("input_codes", "input_scales", "input_zeros"), found, strict=True):
            if f"{name}.{suffix}" in entries:
                want = entries[f"{name}.{suffix}"].read().astype(np.float32)
                np.testing.assert_array_equal(
                    np.asarray(got, np.float32).reshape(-1), want.reshape(-1), f"{name} {suffix}"
                )
        want = entries[f"{name}.output"].read().astype(np.float32)
        y = np.asarray(jq.matmul(x, w), np.float32)
        if f"{name}.bias" in state:
            y = y + np.asarray(state[f"{name}.bias"], np.float32)
        assert np.linalg.norm(y - want) < 3e-4 * np.linalg.norm(want)
        plain = np.asarray(jq.matmul(x, w, quantize_activations=False), np.float32)
        assert np.linalg.norm(plain - y) > 1e-3 * np.linalg.norm(want)


def token_scale(row, args, dtype):
    """compressed-tensors' dynamic scale and zero of a row, one operation and one rounding after the other."""
    low, high = args.limits
    smallest, largest = min(row.astype(np.float32).min(), 0), max(row.astype(np.float32).max(), 0)
    one = np.ones((), dtype)
    if args.symmetric:
        scale, zero = np.asarray(max(-smallest, largest), dtype) / np.asarray((high - low) / 2, dtype), None
    else:
        spread = np.asarray(largest, dtype) - np.asarray(smallest, dtype)
        scale = spread / np.asarray(high - low, dtype)
        shift = np.asarray(low, dtype) - np.asarray(smallest, dtype) / np.where(scale == 0, one, scale)
        zero = np.rint(np.clip(shift.astype(np.float32), low, high)).astype(dtype)
        zero = np.where(scale == 0, np.zeros((), dtype), zero)
    eps = np.asarray({2: 2.0**-10, 4: 2.0**-23}[np.dtype(dtype).itemsize], dtype)
    eps = np.asarray(2.0**-7, dtype) if dtype == ml_dtypes.bfloat16 else eps
    return np.where(scale == 0, eps, scale), zero


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(FLOATS),
    st.booleans(),
    st.sampled_from([4, 8]),
    st.sampled_from(["int", "float"]),
    st.integers(0, 2**32),
)
def test_tokens_by_plain_numpy(dtype, symmetric, bits, kind, seed):
    if kind == "float":
        symmetric, bits = True, 8
    args = Args(bits, kind, symmetric, "token", dynamic=True)
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((5, 33)) * np.array([1, 30, 1e-4, 0, 1])[:, None]).astype(dtype)
    x[4] = np.abs(x[4])
    got = jax.jit(lambda v: ct.quantize(v, args, {}))(jnp.asarray(x))
    low, high = args.limits
    for i, row in enumerate(x):
        scale, zero = token_scale(row, args, dtype)
        scaled = row / scale if zero is None else row / scale + zero
        clipped = np.clip(scaled.astype(np.float32), low, high)
        codes = np.rint(clipped) if kind == "int" else clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(got.values[i], np.float32), codes)
        np.testing.assert_array_equal(np.asarray(got.scales[i], np.float32), scale.astype(np.float32))
        moved = codes.astype(dtype) if zero is None else codes.astype(dtype) - zero
        np.testing.assert_array_equal(np.asarray(got.dequantized[i], np.float32), (moved * scale).astype(np.float32))


def test_tensor_wise_takes_every_row_of_the_call():
    args = Args(8, "int", True, "tensor", dynamic=True)
    x = jnp.asarray([[1.0, 2.0], [300.0, 4.0]])
    assert ct.quantize(x, args, {}).scales.shape == (1,)
    np.testing.assert_allclose(ct.quantize(x, args, {}).scales, 300 / 127.5, rtol=1e-6)


def test_fp8_zero_block_is_zero():
    """The scale of a zero block is zero, its codes are zero (an older kernel gave 0/0)."""
    codes, scale = jax.jit(fp8.quantize_blocks, static_argnums=1)(jnp.zeros((2, 130)), 128)
    assert scale.shape == (2, 2) and not np.asarray(scale).any() and not np.asarray(codes).any()


def test_fp8_ragged_block_and_powers_of_two():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 40)), jnp.float32)
    _, scale = jax.jit(lambda x: fp8.quantize_blocks(x, 32, pow2=True))(x)
    blocks = [np.abs(np.asarray(x[:, :32])).max(1), np.abs(np.asarray(x[:, 32:])).max(1)]
    want = 2.0 ** np.ceil(np.log2(np.stack(blocks, 1) / 448))
    np.testing.assert_array_equal(np.asarray(scale), want.astype(np.float32))


def test_fbgemm_upper_bound_saturates():
    x = jnp.asarray([[5000.0, 100.0, -20.0], [0.0, 0.0, 0.0]])
    codes, scale = jax.jit(fp8.quantize_rows, static_argnums=1)(x, 1200.0)
    np.testing.assert_array_equal(np.asarray(scale[0]), np.float32(1200) / np.float32(448))
    assert codes[0, 0] == 448 and scale[1, 0] == np.float32(1 / (448 * 512)) and not np.asarray(codes[1]).any()


@pytest.mark.parametrize("value", [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.1, 1e9])
def test_e2m1_ties_go_to_even_codes(value):
    want = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5.0: 4, 6.1: 6, 1e9: 6}[value]
    np.testing.assert_array_equal(np.asarray(elements.round_e2m1(jnp.asarray([value, -value]))), [want, -want])


def weight(activation):
    codes = np.random.default_rng(0).integers(-8, 8, (6, 32))
    return Affine.make(codes, np.ones((6, 1), np.float32), code_bits=4, signed=True).replace(activation=activation)


def test_leading_axes_and_grad():
    w = weight(Activation("compressed_tensors", (), (("input", Args(8, "int", True, "token", dynamic=True)),)))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 32)), jnp.float32)
    flat = activations.matmul(x.reshape(6, 32), w)
    np.testing.assert_array_equal(np.asarray(activations.matmul(x, w)), np.asarray(flat).reshape(2, 3, 6))
    np.testing.assert_array_equal(np.asarray(jax.jit(jq.matmul)(x, w)), np.asarray(flat).reshape(2, 3, 6))


def test_unknown_scheme():
    with pytest.raises(UnsupportedError, match=r"'nonsense' is not known here.*quantize_activations=False"):
        activations.matmul(jnp.ones((1, 32)), weight(Activation("nonsense")))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (Args(8, "int", True, "group", 24, dynamic=True), "group 24 dynamic of 32 inputs"),
        (Args(8, "int", True, "channel", dynamic=True), "channel dynamic"),
    ],
)
def test_strategies_that_no_library_runs(args, message):
    with pytest.raises(UnsupportedError, match=message):
        jq.matmul(jnp.ones((1, 32)), weight(Activation("compressed_tensors", (), (("input", args),))))


def test_outputs_are_quantized_with_the_bias_in_them():
    args = Args(8, "int", True, "token", dynamic=True)
    rng = np.random.default_rng(1)
    x, bias = jnp.asarray(rng.standard_normal((3, 32)), jnp.float32), jnp.asarray(rng.standard_normal(6), jnp.float32)
    w = weight(Activation("compressed_tensors", (), (("output", args),)))
    plain = jq.matmul(x, w, quantize_activations=False)
    want = ct.quantize(plain, args, {}).dequantized
    np.testing.assert_allclose(np.asarray(jq.matmul(x, w)), np.asarray(want), rtol=1e-6)
    want = ct.quantize(plain + bias, args, {}).dequantized
    np.testing.assert_allclose(np.asarray(activations.matmul(x, w, bias)), np.asarray(want), rtol=1e-6)


def test_gradient_is_straight_through():
    """Training in front of a quantized layer sees the dequantized weight, not the zero slope of rounding."""
    w = weight(Activation("compressed_tensors", (), (("input", Args(8, "int", True, "token", dynamic=True)),)))
    x, bias = jnp.ones((3, 32)), jnp.zeros(6)
    dx, db = jax.jit(jax.grad(lambda x, b: activations.matmul(x, w, b).sum(), argnums=(0, 1)))(x, bias)
    np.testing.assert_allclose(np.asarray(dx), np.broadcast_to(np.asarray(w.dequantize()).sum(0), (3, 32)), rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(db), 3)


@pytest.mark.parametrize("name", ["ct-fp8-static", "ct-nvfp4", "quark-int8-dyn"])
def test_rows_of_a_weight_keep_the_scales_of_its_inputs(name: str) -> None:
    weights = jq.quantized(jq.load_state(reference_dirs.directories()[name]))
    w = next(w for w in weights.values() if w.activation is not None)
    x = np.random.default_rng(0).standard_normal((3, w.in_features), np.float32)
    np.testing.assert_allclose(jq.matmul(x, w[16:32]), jq.matmul(x, w)[:, 16:32], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "trusted"),
    [
        ("", True),
        ("--xla_gpu_autotune_level=4 --xla_gpu_deterministic_ops=false", True),
        ("--xla_gpu_deterministic_ops=true --xla_gpu_enable_triton_gemm=false", True),
        ("--xla_dump_to=x --xla_gpu_autotune_level=0", False),
        ("--xla_gpu_deterministic_ops=true --xla_dump_to=x", False),
        ("--xla_gpu_deterministic_ops", False),
        ("--xla_gpu_autotune_level=2", False),
        ("--xla_gpu_exclude_nondeterministic_ops=1", False),
    ],
)
def test_int8_products_on_a_gpu_that_xla_does_not_check(monkeypatch, flags, trusted):
    """XLA:GPU's first tiling doubles int8 products: where no check drops it, they are made of exact bfloat16 ones."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(base, "_warned", set())
    codes = np.random.default_rng(0).integers(-128, 128, (5, 2500)).astype(np.int8)
    codes[:2] = -128
    with contextlib.nullcontext() if trusted else pytest.warns(JqWarning, match="int8 products on a GPU are wrong"):
        text = jax.jit(lambda x, w: products.integer_matmul(x, w)).lower(codes, codes).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == (1 if trusted else 3)
    assert all(("xi8>" in line) == trusted and ("xbf16>" in line) != trusted for line in dots)
    assert all(line.rstrip().endswith("xi32>" if trusted else "xf32>") for line in dots)


def test_int8_products_are_exact():
    codes = np.random.default_rng(0).integers(-128, 128, (5, 2500)).astype(np.int8)
    codes[:2] = -128
    want = codes.astype(np.int64) @ codes.astype(np.int64).T
    assert np.array_equal(jax.jit(products.integer_matmul)(codes, codes), want)
