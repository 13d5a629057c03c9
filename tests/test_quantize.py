"""`jq.quantize` on a State, a loaded model and any NNX module; what is skipped and what the config says."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from reference_dirs import directories

import jq
from jq.errors import CalibrationError, JqWarning, UnsupportedError

METHODS = {
    "nf4": jq.NF4(),
    "nf4-double": jq.NF4(block_size=128, double_quant=True, quant_storage="bfloat16"),
    "fp4": jq.FP4(double_quant=True),
    "int8": jq.Int8(),
    "rtn4": jq.RTN(4, 32),
    "rtn3-asym": jq.RTN(3, 64, sym=False),
    "rtn8-all": jq.RTN(8, -1),
    "rtn2-short-group": jq.RTN(2, 96, sym=False, scale_dtype="bfloat16"),
}


def float_state(tied=False, dtype=np.float32, layers=2, extra=()):
    """A Llama-like State of random weights."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (64, 128), "model.norm": (128,)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {
            f"{at}.input_layernorm": (128,),
            f"{at}.self_attn.q_proj": (128, 128),
            f"{at}.self_attn.k_proj": (64, 128),
        }
        shapes |= {f"{at}.mlp.up_proj": (256, 128), f"{at}.mlp.down_proj": (128, 256)}
    shapes |= {} if tied else {"lm_head": (64, 128)}
    shapes |= dict(extra)
    tensors = {f"{name}.weight": rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    tensors["model.layers.0.self_attn.q_proj.bias"] = rng.normal(size=128).astype(dtype)
    return jq.State(tensors, {"model_type": "llama", "tie_word_embeddings": tied, "dtype": str(np.dtype(dtype))})


@pytest.mark.parametrize("name", METHODS)
def test_state_saves_and_loads(name, tmp_path, cell):
    method = METHODS[name]
    cell(method.format, "write", "quantize")
    state = float_state(dtype=ml_dtypes.bfloat16)
    made = jq.quantize(state, method)
    found = jq.quantized(made)
    assert len(found) == 8 and "lm_head" not in found and "model.embed_tokens" not in found
    assert "quantization_config" not in state.config
    jq.save(made, tmp_path / "out")
    again = jq.load_state(tmp_path / "out")
    assert again.config["quantization_config"] == json.loads(json.dumps(made.config["quantization_config"]))
    for path, q in jq.quantized(again).items():
        np.testing.assert_array_equal(
            np.asarray(q.dequantize(), np.float32), np.asarray(found[path].dequantize(), np.float32), err_msg=path
        )
        w = np.asarray(state[path + ".weight"], np.float32)
        error = np.linalg.norm(np.asarray(q.dequantize(), np.float32) - w) / np.linalg.norm(w)
        assert error < {"int8": 0.02, "rtn8-all": 0.02, "rtn3-asym": 0.3, "rtn2-short-group": 0.6}.get(name, 0.15), path
    assert set(again) == set(state)
    dense = "model.layers.0.self_attn.q_proj.bias"
    assert np.asarray(again[dense]).tobytes() == state[dense].tobytes()


def test_model_in_place_equals_state(tiny, tmp_path):
    model = jq.load(tiny)
    assert jq.quantize(model, jq.NF4(double_quant=True)) is model
    made = jq.quantize(jq.load_state(tiny), jq.NF4(double_quant=True))
    found, wanted = jq.quantized(model), jq.quantized(made)
    assert found.keys() == wanted.keys() and len(found) == 14
    for path in found:
        np.testing.assert_array_equal(found[path].dequantize(), wanted[path].dequantize())
    jq.save(model, tmp_path / "model")
    jq.save(made, tmp_path / "state")
    one, two = (jq.load_state(tmp_path / n) for n in ("model", "state"))
    assert one.config == two.config
    assert {k: v.tobytes() for k, v in one.stored()} == {k: v.tobytes() for k, v in two.stored()}
    ids = np.arange(8)[None]
    np.testing.assert_allclose(model(ids), jq.load(tmp_path / "model")(ids), atol=1e-5)


def test_model_keeps_how_it_was_loaded(tiny):
    """`packed` and `kv_cache` of jq.load hold for the quantized model too; the widths are counted by hand."""
    model = jq.quantize(jq.load(tiny, packed=True, kv_cache="int8"), jq.NF4())
    assert isinstance(model.model.layers[0].mlp.up_proj.weight.get_value(), jq.Codebook)
    keys, _ = model.model.empty_cache(1, 16)[0]
    assert keys.codes.dtype == np.int8 and keys.scales.shape == keys.codes.shape[:-1]
    dense = jq.quantize(jq.load(tiny, kv_cache="bfloat16"), jq.NF4())
    assert not isinstance(dense.model.layers[0].mlp.up_proj.weight.get_value(), jq.QTensor)
    assert dense.model.empty_cache(1, 16)[0][0].codes.dtype == "bfloat16"


def test_path_is_quantized_to_a_state(tiny):
    assert len(jq.quantized(jq.quantize(tiny, jq.RTN(4, 32)))) == 14


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(48, 48, rngs=rngs) for _ in range(2)])
        self.lm_head = nnx.Linear(48, 5, use_bias=False, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.lm_head(x)


def test_any_module():
    x = np.random.default_rng(0).normal(size=(3, 48)).astype(np.float32)
    for method in (jq.NF4(), jq.Int8(), jq.RTN(8, 16)):
        net = Net(nnx.Rngs(0))
        before = net(x)
        assert jq.quantize(net, method) is net
        assert sorted(jq.quantized(net)) == ["layers.0", "layers.1"]
        assert float(np.linalg.norm(net(x) - before) / np.linalg.norm(before)) < 0.3
    net = Net(nnx.Rngs(0))
    jq.quantize(net, jq.NF4(), skip=["layers.0"])
    assert sorted(jq.quantized(net)) == ["layers.1", "lm_head"]


@pytest.mark.parametrize("skip", ["layers", ["layers"], ["layers.0", "layers.1"], ["0", "1"], ["layers.*"]])
def test_modules_skip_as_checkpoints_do(skip):
    net = Net(nnx.Rngs(0))
    assert jq.nn.replace_linears(net, jq.NF4(), skip=skip) == ["lm_head"]
    net = Net(nnx.Rngs(0))
    assert sorted(jq.quantized(jq.quantize(net, jq.NF4(), skip=skip))) == ["lm_head"]


def test_modules_name_what_is_wrong():
    net = Net(nnx.Rngs(0))
    for call in (jq.quantize, jq.nn.replace_linears):
        with pytest.raises(ValueError, match=r"skip: 'layer' matches no linear layer; layers are named like layers\.0"):
            call(net, jq.NF4(), skip="layer")
    net.layers[1].kernel.set_value(net.layers[1].kernel.get_value().at[0, 0].set(np.nan))
    with pytest.raises(ValueError, match=r"layers\.1"):
        jq.quantize(net, jq.NF4())
    with pytest.raises(ValueError, match="Net: no linear layer to quantize"):
        jq.quantize(Net(nnx.Rngs(0)), jq.NF4(), skip=lambda name: True)


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (None, {"lm_head"}),
        ([], set()),
        (["lm_head", "k_proj"], {"lm_head", "model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj"}),
        (["model.layers.1"], {f"model.layers.1.{n}" for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")}),
        (["*.up_proj"], {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}),
        ("down_proj", {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}),
        (lambda name: "self_attn" in name, {f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qk"}),
    ],
)  # fmt: skip
def test_skip(skip, left):
    state = float_state()
    made = jq.quantize(state, jq.NF4(), skip=skip)
    linears = {k.removesuffix(".weight") for k in state if k.endswith("_proj.weight") or k == "lm_head.weight"}
    assert linears - set(jq.quantized(made)) == left
    assert set(made.config["quantization_config"]["llm_int8_skip_modules"]) == left


def test_tied_output_is_named_in_the_config():
    made = jq.quantize(float_state(tied=True), jq.Int8())
    assert made.config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]


def test_gptq_config_names_what_stays_float():
    made = jq.quantize(float_state(), jq.RTN(4, 32), skip=["lm_head", "k_proj"])
    config = made.config["quantization_config"]
    assert config["modules_in_block_to_quantize"] == [["mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"]]
    assert set(config["dynamic"]) == {rf"-:^model\.layers\.{i}\.self_attn\.k_proj$" for i in (0, 1)}
    assert config["lm_head"] is False
    # What blocks do not agree on cannot be said by ends of names.
    uneven = jq.quantize(float_state(), jq.RTN(4, 32), skip=["lm_head", "model.layers.1.mlp"])
    assert "modules_in_block_to_quantize" not in uneven.config["quantization_config"]
    assert jq.quantize(float_state(), jq.RTN(4, 32), skip=[]).config["quantization_config"]["lm_head"] is True


def test_routers_stay_float():
    extra = {f"model.layers.0.mlp.experts.{e}.up_proj": (96, 128) for e in range(3)}
    made = jq.quantize(float_state(extra=extra | {"model.layers.0.mlp.gate": (3, 128)}), jq.NF4())
    assert "model.layers.0.mlp.gate" not in jq.quantized(made)
    assert "model.layers.0.mlp.experts.2.up_proj" in jq.quantized(made)
    assert "model.layers.0.mlp.gate" in made.config["quantization_config"]["llm_int8_skip_modules"]


def test_conv1d_weights_are_turned():
    rng = np.random.default_rng(0)
    tensors = {
        "wte.weight": rng.normal(size=(64, 32)).astype(np.float32),
        "h.0.attn.c_attn.weight": rng.normal(size=(32, 96)).astype(np.float32),
        "h.0.attn.c_attn.bias": rng.normal(size=96).astype(np.float32),
    }
    made = jq.quantize(jq.State(tensors, {"model_type": "gpt2"}), jq.Int8())
    assert jq.quantized(made)["h.0.attn.c_attn"].shape == (96, 32)


def test_progress_is_told():
    seen = []
    jq.quantize(float_state(), jq.NF4(), advance=lambda done, total, name: seen.append((done, total, name)))
    assert [s[:2] for s in seen] == [(i, 8) for i in range(8)]
    assert seen[0][2].startswith("model.layers.0.")


def test_refusals():
    state = float_state()
    with pytest.raises(
        CalibrationError, match=r"GPTQ needs calibration data, and jaxq does not calibrate.*jq\.NF4\(\)"
    ):
        jq.quantize(state, jq.GPTQ())
    with pytest.raises(UnsupportedError, match=r"quantizing with data \(NF4\) is not done here"):
        jq.quantize(state, jq.NF4(), data=np.zeros((1, 8), np.int32))
    with pytest.raises(ValueError, match="skip: 'qproj' matches no linear layer; layers are named like"):
        jq.quantize(state, jq.NF4(), skip=["qproj"])
    with pytest.raises(UnsupportedError, match="is quantized already"):
        jq.quantize(jq.quantize(state, jq.NF4()), jq.Int8())
    with pytest.raises(ValueError, match=r"no linear layer to quantize \(9 found, all skipped\)"):
        jq.quantize(state, jq.NF4(), skip=lambda name: True)
    with pytest.raises(TypeError, match="takes a loaded model, an NNX module, a State or a path, got int"):
        jq.quantize(3, jq.NF4())
    bad = dict(state) | {"model.layers.1.mlp.up_proj.weight": np.full((256, 128), np.inf, np.float32)}
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: holds values that are not finite"):
        jq.quantize(jq.State(bad, state.config), jq.NF4())


def test_quantized_reference_is_refused():
    with pytest.raises(UnsupportedError, match="gptq-4-g32-sym-descact: is quantized already"):
        jq.quantize(jq.load_state(directories()["gptq-4-g32-sym-descact"]), jq.NF4())


@pytest.mark.parametrize("method", ["nf4", jq.NF4])
def test_a_name_or_a_class_is_no_method(method, tiny):
    with pytest.raises(TypeError, match=r"expected an object such as jq\.NF4\(\)"):
        jq.quantize(tiny, method)


def test_quantized_takes_models_and_states():
    with pytest.raises(TypeError, match=r"jq\.quantized takes a model or a State, got str"):
        jq.quantized("a/path")


def test_stacks_of_experts_that_no_decoder_takes_apart_are_told_of() -> None:
    rng = np.random.default_rng(0)
    block = "model.layers.0.mlp"
    tensors = {
        f"{block}.experts.gate_up_proj": rng.standard_normal((2, 32, 64), np.float32),
        f"{block}.router.weight": rng.standard_normal((2, 64), np.float32),
        "model.layers.0.self_attn.q_proj.weight": rng.standard_normal((64, 64), np.float32),
    }
    with pytest.warns(JqWarning, match=r"experts.gate_up_proj and 0 more stacks of experts stay float"):
        made = jq.quantize(jq.State(tensors, {"model_type": "of_nobody"}), jq.RTN(bits=8, group_size=32))
    assert isinstance(made["model.layers.0.self_attn.q_proj.weight"], jq.QTensor)
    assert not isinstance(made[f"{block}.router.weight"], jq.QTensor)
