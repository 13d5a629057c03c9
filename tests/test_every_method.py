"""Every method that quantizes without data: what it makes saves, loads again to the same weights, and runs."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import jq
from jq.cli import methods
from jq.errors import FormatError

NAMES = sorted(name for name in methods.names().values() if hasattr(methods.find(name), "quantize"))
# The tiny model's matrices are 64 to 256 long: groups of 128 do not divide them all.
OPTIONS = {
    "RTN": {"group_size": 64},
    "FP8": {"block_size": (64, 64)},
    "HIGGS": {"group_size": 64, "hadamard_size": 64},
}
SKIP = {"HIGGS": ["k_proj", "v_proj", "lm_head"]}  # fewer outputs than a tile of FLUTE
NO_LINEARS = {"MXFP4": "stores experts of gpt-oss, no Linear layer"}


@pytest.fixture(scope="module")
def one_layer(tiny: Path) -> jq.State:
    """The tiny model without its second layer: compiling the products of quantized inputs takes most of the time."""
    whole = jq.load_state(tiny)
    kept = {name: whole[name] for name in whole if not name.startswith("model.layers.1.")}
    return whole.replace(kept, whole.config | {"num_hidden_layers": 1})


def format_name(method: object) -> str:
    """The format that the method's class belongs to."""
    return next(fmt.name for fmt in jq.formats().values() if type(method) in fmt.methods_table.values())


@pytest.mark.parametrize("name", NAMES)
def test_what_it_makes_saves_loads_and_runs(name: str, one_layer: jq.State, tmp_path: Path, cell) -> None:
    if name in NO_LINEARS:
        pytest.skip(NO_LINEARS[name])
    method = getattr(jq, name)(**OPTIONS.get(name, {}))
    cell(format_name(method), "quantize")
    state = one_layer
    made = jq.quantize(state, method, skip=SKIP.get(name))
    weights = jq.quantized(made)
    assert weights, "nothing was quantized"
    for module, q in weights.items():
        want = np.asarray(state[f"{module}.weight"], np.float32)
        got = np.asarray(q.dequantize("float32"))
        assert got.shape == want.shape
        assert np.linalg.norm(got - want) < 0.7 * np.linalg.norm(want), (
            f"{module}: not an approximation of the weight"
        )  # ternary: 0.62
    jq.save(made, tmp_path / "made")
    again = jq.quantized(jq.load_state(tmp_path / "made"))
    assert again.keys() == weights.keys()
    for module, q in weights.items():
        np.testing.assert_array_equal(np.asarray(again[module].dequantize()), np.asarray(q.dequantize()))
    assert json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    logits = np.asarray(jq.load(tmp_path / "made")(np.arange(12)[None]))
    assert logits.shape == (1, 12, 256) and np.isfinite(logits).all()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NO_LINEARS])
def test_what_it_makes_shares_no_memory_that_can_be_written(name: str) -> None:
    """Else a change of one layer in place, such as torch's, would change all."""
    dense = np.random.default_rng(0).standard_normal((128, 256)).astype(np.float32)
    method = getattr(jq, name)(**OPTIONS.get(name, {}))
    one, other = ([a for a in jax.tree.leaves(method.quantize(dense)) if isinstance(a, np.ndarray)] for _ in range(2))
    for a in one:
        assert not a.flags.writeable or not any(np.shares_memory(a, b) for b in [*other, dense]), a


@pytest.mark.parametrize("said", ["float16", "float32", None])
@pytest.mark.parametrize("held", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", [n for n in NAMES if n not in NO_LINEARS])
def test_loads_to_the_same_bits_whatever_dtype_config_json_names(
    name: str, held: type, said: str | None, tmp_path: Path
) -> None:
    """Weights in one dtype, config.json that says another or none, and in one case two dtypes in one model."""
    if name == "EETQ" and held is ml_dtypes.bfloat16 and said is not None:
        pytest.skip("EETQ quantizes no bfloat16")
    rng = np.random.default_rng(0)
    shapes = {"self_attn.q_proj": (128, 128), "self_attn.k_proj": (128, 128), "mlp.down_proj": (128, 256)}
    tensors = {f"model.layers.0.{m}.weight": rng.standard_normal(s).astype(held) for m, s in shapes.items()}
    if said is None:
        tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].astype("f4")
    config = {"model_type": "llama"} | ({"torch_dtype": said} if said else {})
    made = jq.quantize(jq.State(tensors, config), getattr(jq, name)(**OPTIONS.get(name, {})))
    jq.save(made, tmp_path)
    again = jq.quantized(jq.load_state(tmp_path))
    assert len(again) == 3
    for module, q in jq.quantized(made).items():
        want, got = np.asarray(q.dequantize()), np.asarray(again[module].dequantize())
        assert (got.dtype, again[module].dtype) == (want.dtype, q.dtype), module
        assert got.tobytes() == want.tobytes(), module


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_is_refused(name: str, bad: float) -> None:
    """Scale rules that look for a maximum, or saturate, would make numbers of it."""
    w = np.ones((2, 256, 256) if name in NO_LINEARS else (256, 256), np.float32)
    w[..., 3, 5] = bad
    method = getattr(jq, name)(**OPTIONS.get(name, {}))
    with pytest.raises(ValueError, match=r"layer: holds values that are not finite"):
        method.quantize(w, name="layer")
    if name not in NO_LINEARS:
        with pytest.raises(ValueError, match=r"layer: holds values that are not finite"):
            jq.quantize({"layer.weight": w}, method)


@pytest.mark.parametrize("bad", [((64,), "float32"), ((256, 256), "int32"), ((256, 256), "float64"), ((8, 0), "float32"), ((0, 64), "float32")], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_weight_is_refused(name: str, bad: tuple[tuple[int, ...], str]) -> None:
    method = getattr(jq, name)(**OPTIONS.get(name, {}))
    with pytest.raises(FormatError, match=r"layer: found "):
        method.quantize(np.zeros(*bad), name="layer")


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(NO_LINEARS)))
def test_a_transposed_view_is_the_same_weight(name: str) -> None:
    w = np.random.default_rng(0).standard_normal((256, 256), np.float32)
    method = getattr(jq, name)(**OPTIONS.get(name, {}))
    found = method.quantize(np.asfortranarray(w)).dequantize("float32")
    np.testing.assert_array_equal(found, method.quantize(w).dequantize("float32"))
