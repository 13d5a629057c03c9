"""Formats that rotate inputs (HIGGS, FP-Quant): packing, dequantization and the product against plain numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import jq
from jq.errors import FormatError
from jq.formats import fp_quant, higgs
from jq.formats.base import Context
from jq.qtensor.rotated import hadamard
from jq.safetensors_file import read_header

CONTEXT = Context(config={"dtype": "bfloat16"}, label="test")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def slow_pack(codes: np.ndarray, bits: int, tile: int) -> np.ndarray:
    """FLUTE's 2- and 4-bit order, one code at a time: code [K, N] to a field of an int16 word."""
    k, n = codes.shape
    per = 16 // bits
    words = np.zeros((k, n // per), np.uint16)
    for row in range(k):
        for word in range(n // per):
            chunk, place = divmod(word, tile)
            for field in range(per):
                column = chunk * tile * per + ((row % 2) * (per // 2) + field // 2) * tile + place
                words[row, word] |= int(codes[row // 2 * 2 + 1 - field % 2, column]) << (bits * field)
    return np.ascontiguousarray(words.T).view(np.int16)


@pytest.mark.parametrize(("bits", "tile"), [(4, 32), (4, 64), (2, 32), (2, 64), (3, 32)])
def test_flute_packing(bits: int, tile: int) -> None:
    n = tile * {2: 8, 4: 4, 3: 16}[bits] * 2
    codes = np.random.default_rng(bits).integers(0, 2**bits, (6, n)).astype(np.uint8)
    words = higgs.pack(codes, bits, tile)
    assert words.shape == (n * bits // 16, 6) and words.dtype == np.int16
    np.testing.assert_array_equal(higgs.unpack(words, bits, tile), codes)
    if bits != 3:
        np.testing.assert_array_equal(words, slow_pack(codes, bits, tile))


def higgs_module(bits: int, n: int, k: int) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, Any]]:
    rng = np.random.default_rng(0)
    size = 1 << bits
    codes = rng.integers(0, size, (k, n)).astype(np.uint8)
    table = rng.standard_normal((size, size, 2)).astype(np.float16)
    scales = (rng.random((n, k // 64)) * 0.1 + 0.01).astype(np.float16)
    pairs = codes.T.reshape(n, k // 2, 2)
    rotated = table[pairs[..., 0], pairs[..., 1]].reshape(n, k) * np.repeat(scales, 64, axis=1)
    blocks = rotated.astype(np.float32).reshape(n, -1, 32) @ (hadamard(32) * np.float32(32**-0.5))
    parts = {
        "weight": higgs.pack(codes, bits, 32),
        "scales": scales,
        "tables": np.arange(size).astype(np.float16),
        "tables2": table,
    }
    template = 16 if bits == 4 else 4
    config = {
        "bits": bits,
        "p": 2,
        "group_size": 64,
        "hadamard_size": 32,
        "tune_metadata": {"m": {"template_id": template}},
    }
    return parts, blocks.reshape(n, k), config


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_higgs(bits: int, cell) -> None:
    cell("higgs", "read", "write", "identical bits")
    parts, want, config = higgs_module(bits, 512, 64)
    q = higgs.load("m", parts, higgs.parse(config, CONTEXT), CONTEXT)
    assert q.shape == (512, 64) and q.dtype == "float16"
    np.testing.assert_allclose(np.asarray(q.dequantize()).astype(np.float32), want, atol=2e-3)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    np.testing.assert_allclose(np.asarray(jq.matmul(x, q)), x @ want.T, atol=1e-2)
    for name, array in higgs.dump(q.to_jax()).items():
        assert array.dtype == parts[name].dtype and array.shape == parts[name].shape
        assert array.tobytes() == parts[name].tobytes(), name


def test_higgs_needs_the_template() -> None:
    parts, _, config = higgs_module(4, 512, 64)
    with pytest.raises(FormatError, match="template_id None"):
        higgs.load("m", parts, higgs.parse({**config, "tune_metadata": {}}, CONTEXT), CONTEXT)
    with pytest.raises(FormatError, match="bits is 5"):
        higgs.parse({"bits": 5}, CONTEXT)


def fp_quant_module(dtype: str, n: int = 8, k: int = 64) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(3)
    block = fp_quant.BLOCKS[dtype]
    codes = rng.integers(0, 16, (n, k)).astype(np.uint8)
    if dtype == "nvfp4":
        scales = rng.integers(40, 90, (n, k // block)).astype(np.uint8)
        real = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    else:
        scales = rng.integers(118, 128, (n, k // block)).astype(np.uint8)
        real = np.exp2(scales.astype(np.float32) - 127)
    matrix = (hadamard(block) * np.float32(block**-0.5)).astype(ml_dtypes.bfloat16)
    rotated = E2M1[codes] * (np.repeat(real, block, axis=1) / np.float32(3))
    dense = rotated.reshape(n, -1, block) @ matrix.astype(np.float32).T
    one = np.full(1, 3, ml_dtypes.bfloat16)
    parts = {
        "qweight": codes[:, ::2] | codes[:, 1::2] << 4,
        "scales": scales,
        "weight_global_scale": one,
        "act_global_scale": one,
        "forward_hadamard_matrix": matrix,
        "backward_hadamard_matrix": matrix,
    }
    return parts, dense.reshape(n, k)


@pytest.mark.parametrize("dtype", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("padded", [False, True])
def test_fp_quant(dtype: str, padded: bool, cell) -> None:
    cell("fp_quant", "read", "write", "identical bits")
    parts, want = fp_quant_module(dtype)
    if padded:
        parts["scales"] = np.pad(parts["scales"], [(0, 120), (0, -parts["scales"].shape[1] % 4)], constant_values=7)
    q = fp_quant.load("m", parts, fp_quant.parse({"forward_dtype": dtype}, CONTEXT), CONTEXT)
    np.testing.assert_allclose(np.asarray(q.dequantize("float32")), want, rtol=1e-2, atol=2e-2)
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    y = np.asarray(jq.matmul(x, q, quantize_activations=False))
    np.testing.assert_allclose(y, x @ want.T, rtol=2e-2, atol=0.3)
    z = np.asarray(jq.matmul(x, q))  # rounded inputs: off by some per cent, not more
    assert 0.01 < np.linalg.norm(z - y) / np.linalg.norm(y) < 0.3
    for name, array in fp_quant.dump(q.to_jax()).items():
        assert array.dtype == parts[name].dtype and array.tobytes() == parts[name].tobytes(), name


def plain_fp4(values: np.ndarray) -> np.ndarray:
    """Nearest e2m1 values in float64, one by one, ties to the even code."""
    grid = np.abs(E2M1[:8]).astype(np.float64)
    distance = np.abs(np.abs(values)[..., None] - grid)
    best = distance.min(axis=-1, keepdims=True)
    code = np.where(distance == best, np.where(np.arange(8) % 2 == 0, 0, 1), 2).argmin(axis=-1)
    return np.sign(values) * grid[code]


@pytest.mark.parametrize("transform", ["hadamard", "identity", "gsr"])
@pytest.mark.parametrize(
    ("dtype", "method", "size"), [("nvfp4", "abs_max", 16), ("mxfp4", "abs_max", 64), ("mxfp4", "quest", 32)]
)
def test_fp_quant_rounds_as_its_reference(dtype: str, method: str, size: int, transform: str, cell) -> None:
    """Scales and values after the float64 reference of the kernel's own tests."""
    cell("fp_quant", "quantize", "write", "read")
    w = (np.random.default_rng(0).standard_normal((24, 128)) * 0.05).astype(ml_dtypes.bfloat16)
    w[0] = 0
    method_ = jq.FPQuant(dtype, method, size, transform)
    q = method_.quantize(w)
    matrix = np.asarray(q.rotation).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=2e-2)
    block, whole = fp_quant.BLOCKS[dtype], 1 if method == "quest" else 3
    rotated = (w.astype(np.float64).reshape(-1, size) @ matrix).reshape(24, -1, block)
    peak = np.abs(rotated).max(axis=-1)
    if dtype == "nvfp4":
        scale = (peak * whole / 6).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    else:
        spread = rotated.std(axis=-1) * (2.92247856 / 6) if method == "quest" else peak
        scale = 2.0 ** np.floor(np.log2(spread + 1e-8))
    want = plain_fp4(rotated * whole / np.where(scale == 0, 1, scale)[..., None]) * scale[..., None] / whole
    got = np.asarray(q.base.dequantize(np.float32), np.float64).reshape(want.shape)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    parts = fp_quant.dump(q.to_jax())
    again = fp_quant.load("m", parts, fp_quant.parse(method_.config(), CONTEXT), CONTEXT)
    assert all(np.array_equal(a, parts[k]) for k, a in fp_quant.dump(again).items())


@pytest.mark.parametrize("method", ["abs_max", "quest"])
def test_fp_quant_rounds_inputs_as_weights(method: str) -> None:
    """MXFP4: the product is that of the inputs quantized as a weight is."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((6, 64)).astype(ml_dtypes.bfloat16)
    quantizer = jq.FPQuant("mxfp4", method)
    w = quantizer.quantize(rng.standard_normal((8, 64)).astype(np.float32))
    inputs = np.asarray(quantizer.quantize(x).base.dequantize(np.float32))
    want = inputs @ np.asarray(w.base.dequantize(np.float32)).T
    np.testing.assert_allclose(np.asarray(jq.matmul(x.astype(np.float32), w)), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["nvfp4-abs_max", "mxfp4-abs_max", "mxfp4-quest"])
def test_fp_quant_pseudoquantizes_as_the_library(case: str, cell) -> None:
    """Every tensor of fp_quant's own layer, whose kernels ran in Triton's interpreter."""
    cell("fp_quant", "quantize", "write", "identical bits")
    file = Path(__file__).parents[1] / "recorded" / "layers" / f"fp_quant-pseudo-{case}.safetensors"
    entries, meta = read_header(file)
    tensors = {name: np.array(entry.read()) for name, entry in entries.items()}
    options = json.loads(meta["config"])
    fields = ("forward_dtype", "forward_method", "hadamard_group_size", "transform_init", "pseudoquantization")
    method = jq.FPQuant(**{name: options[name] for name in fields})
    assert method.config(["lm_head"]) == options
    made = fp_quant.dump(method.quantize(tensors["weight"]))
    for suffix, got in made.items():
        assert got.tobytes() == tensors[f"m.{suffix}"].tobytes(), suffix
    with_master = fp_quant.parse(options | {"store_master_weights": True}, CONTEXT)
    parts = {s: a for s, a in made.items() if s != "dqweight"} | {"weight": tensors["weight"]}
    q = fp_quant.load("m", parts, with_master, CONTEXT)
    assert np.asarray(q.base.values).tobytes() == made["dqweight"].tobytes()
    again = fp_quant.dump(q.to_jax())
    assert again.keys() == parts.keys() and all(again[s].tobytes() == a.tobytes() for s, a in parts.items())


def test_fp_quant_empty_tensors_and_packed_master_weights() -> None:
    """transformers saves a loaded model with empty tensors for the forms that it does not use."""
    w = np.random.default_rng(3).standard_normal((8, 64)).astype(ml_dtypes.bfloat16)
    plain = jq.FPQuant("mxfp4").quantize(w)
    empty = np.zeros(0, np.float32)
    parts = fp_quant.dump(plain) | {"weight": empty, "dqweight": empty}
    again = fp_quant.dump(fp_quant.load("m", parts, fp_quant.Options("mxfp4"), CONTEXT).to_jax())
    assert again.keys() == parts.keys() and all(again[s].tobytes() == a.tobytes() for s, a in parts.items())
    parts = {s: a for s, a in fp_quant.dump(plain).items() if s not in ("qweight", "scales")} | {"weight": w}
    master = fp_quant.load(
        "m", parts, fp_quant.parse({"forward_dtype": "mxfp4", "store_master_weights": True}, CONTEXT), CONTEXT
    )
    np.testing.assert_array_equal(np.asarray(master.dequantize()), np.asarray(plain.dequantize()))
    assert fp_quant.dump(master)["weight"] is w


def test_fp_quant_errors() -> None:
    parts, _ = fp_quant_module("nvfp4")
    parts["scales"] = parts["scales"][:, :3]
    with pytest.raises(FormatError, match=r"m.scales: found shape \(8, 3\), expected \(8, 4\)"):
        fp_quant.load("m", parts, fp_quant.Options(), CONTEXT)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"backward_dtype": "int8"}, "backward_dtype is 'int8', expected one of"),
        ({"transform_init": "dct"}, "transform_init is 'dct'"),
        ({"hadamard_group_size": 48}, "hadamard_group_size is 48"),
        ({"hadamard_group_size": 32}, r"forward_hadamard_matrix: found shape \(16, 16\), but .* is 32"),
    ],
)
def test_fp_quant_settings_are_checked(setting: dict, message: str) -> None:
    parts, _ = fp_quant_module("nvfp4")
    with pytest.raises(FormatError, match=message):
        fp_quant.load("m", parts, fp_quant.parse(setting, CONTEXT), CONTEXT)


def test_fp_quant_scales_are_numbers() -> None:
    for name in ("weight_global_scale", "act_global_scale"):
        parts, _ = fp_quant_module("nvfp4")
        parts[name] = np.zeros_like(parts[name])
        with pytest.raises(FormatError, match=f"m.{name}: holds 0"):
            fp_quant.load("m", parts, fp_quant.parse({}, CONTEXT), CONTEXT)
        del parts[name]
        with pytest.raises(FormatError, match=f"m.{name}: missing"):
            fp_quant.load("m", parts, fp_quant.parse({}, CONTEXT), CONTEXT)
