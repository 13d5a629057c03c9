"""jq.load: what is held, what is refused, what is saved again."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models.tiny import tiny, write
from reference_dirs import directories, stored

import jq

REFERENCE = directories()


@pytest.mark.parametrize("stored_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_dense_checkpoints_are_saved_byte_for_byte(stored_dtype: str, compute: str, tmp_path: Path) -> None:
    tensors, config = tiny(jnp.dtype(stored_dtype))
    tensors["model.norm.weight"][3] = np.nan
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    source = write(tmp_path / "in", tensors, config)
    jq.save(jq.load(source, dtype=compute), tmp_path / "out")
    assert stored(tmp_path / "out")[0] == stored(source)[0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", [n for n in REFERENCE if n.startswith(("gptq", "ct-", "awq", "bnb", "hqq-4-axis1"))])
def test_quantized_checkpoints_are_saved_byte_for_byte(name: str, packed: bool, tmp_path: Path) -> None:
    folder = REFERENCE[name]
    try:
        model = jq.load(folder, packed=packed)
    except jq.errors.UnsupportedError as e:
        pytest.skip(str(e))
    jq.save(model, tmp_path / "out")
    assert stored(tmp_path / "out") == stored(folder)


def test_packed_and_dense_give_the_same_logits() -> None:
    folder = REFERENCE["gptq-4-g32-sym-descact"]
    ids = np.arange(12)[None]
    dense, packed = jq.load(folder), jq.load(folder, packed=True)
    np.testing.assert_allclose(dense(ids), packed(ids), atol=1e-4)
    assert set(jq.quantized(dense)) == set(jq.quantized(packed))
    assert "model.layers.0.self_attn.q_proj" in jq.quantized(dense)


def test_packed_weights_are_not_all_dense_at_once() -> None:
    """The compiled forward pass has room for a few dense weights, not for those of all layers."""
    from jq.models import functional, steps

    model = jq.load(REFERENCE["gptq-4-g32-sym-descact"], packed=True)
    lowered = steps.logits.lower(*functional.split(model), jnp.zeros((1, 4), jnp.int32), None)
    dense = sum(q.size * 4 for q in jq.quantized(model).values())
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 0.6 * dense


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    tensors, config = tiny()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(jq.errors.CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: missing"):
        jq.load(write(tmp_path, tensors, config))


def test_leftover_tensors_are_named(tmp_path: Path) -> None:
    tensors, config = tiny()
    tensors["model.layers.1.mlp.extra.weight"] = np.ones((3, 3), np.float32)
    with pytest.raises(jq.errors.CheckpointError, match=r"model\.layers\.1\.mlp\.extra\.weight: stored, but no part"):
        jq.load(write(tmp_path, tensors, config))


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    tensors, config = tiny(intermediate_size=65)
    with pytest.raises(
        jq.errors.CheckpointError, match=r"gate_proj\.weight: found shape \(64, 32\), expected \(65, 32\)"
    ):
        jq.load(write(tmp_path, tensors, config))


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_what_is_no_float_is_no_dense_weight(dtype: str, tmp_path: Path) -> None:
    tensors, config = tiny()
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(dtype)
    with pytest.raises(jq.errors.CheckpointError, match=rf"up_proj.weight: found dtype {dtype}, expected a float"):
        jq.load(write(tmp_path, tensors, config))


@pytest.mark.parametrize("damage", ["nan", "dtype"])
def test_damaged_scales_of_inputs_are_named(damage: str) -> None:
    """They count where inputs are quantized; the weights can be read, and run with float inputs."""
    state = jq.load_state(REFERENCE["ct-fp8-static"])
    name = "model.layers.1.mlp.down_proj"
    q = state[name + ".weight"]
    bad = jnp.full_like(q.extras["input_scale"], jnp.nan) if damage == "nan" else jnp.ones((1,), jnp.int32)
    damaged = q.replace(extras={**q.extras, "input_scale": bad})
    state = state.replace({k: damaged if k == name + ".weight" else state[k] for k in state})
    with pytest.raises(jq.errors.CheckpointError, match=r"down_proj.input_scale: is .*quantize_activations=False"):
        jq.load(state)
    assert np.isfinite(np.asarray(jq.load(state, quantize_activations=False)(np.ones((1, 4), np.int32)))).all()


def test_unknown_families_are_refused_with_what_works(tmp_path: Path) -> None:
    tensors, config = tiny()
    with pytest.raises(jq.errors.UnsupportedError, match=r"'mamba'.*llama, .*jq\.load_state"):
        jq.load(write(tmp_path, tensors, config | {"model_type": "mamba"}))


def test_tied_head_and_stored_head(tmp_path: Path) -> None:
    tensors, config = tiny(tie_word_embeddings=True)
    ids = np.arange(9)[None]
    both = jq.load(write(tmp_path / "both", tensors, config))
    assert both.lm_head is not None  # stored beside the embedding: both are used, as transformers does
    del tensors["lm_head.weight"]
    tied = jq.load(write(tmp_path / "tied", tensors, config))
    assert tied.lm_head is None
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    same = jq.load(write(tmp_path / "same", tensors, config | {"tie_word_embeddings": False}))
    np.testing.assert_allclose(tied(ids), same(ids), atol=1e-5)


def test_scales_of_a_tied_head_are_kept_and_not_used(tmp_path: Path) -> None:
    """transformers saves `lm_head.weight_scale_inv` of tied FP8 models, and the output layer is the embedding's."""
    tensors, config = tiny(tie_word_embeddings=True)
    del tensors["lm_head.weight"]
    want = jq.load(write(tmp_path / "plain", tensors, config))(np.arange(9)[None])
    tensors["lm_head.weight_scale_inv"] = np.ones((1, 1), np.float32)
    said = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    source = write(tmp_path / "fp8", tensors, config | {"quantization_config": said})
    model = jq.load(source)
    np.testing.assert_array_equal(model(np.arange(9)[None]), want)
    jq.save(model, tmp_path / "out")
    assert stored(tmp_path / "out")[0] == stored(source)[0]


def test_quantized_head_of_a_tied_model(tmp_path: Path) -> None:
    folder = REFERENCE.get("gptq-dynamic-lmhead")
    if folder is None:
        pytest.skip("the directory gptq-dynamic-lmhead was not found")
    state = jq.load_state(folder)
    model = jq.load(jq.State(dict(state), state.config | {"tie_word_embeddings": True}))
    np.testing.assert_array_equal(model(np.arange(9)), jq.load(folder)(np.arange(9)))


def test_models_are_ordinary_nnx_modules(tmp_path: Path) -> None:
    tensors, config = tiny()
    model = jq.load(write(tmp_path, tensors, config))
    ids = jnp.arange(9)[None]
    want = model(ids)
    graph, state = nnx.split(model)
    np.testing.assert_array_equal(nnx.merge(graph, state)(ids), want)
    np.testing.assert_allclose(nnx.jit(lambda m, i: m(i))(model, ids), want, atol=1e-5)
    grads = nnx.jit(nnx.grad(lambda m: m(ids).mean()))(model)
    norms = [float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)]
    assert len(norms) == len(tensors) and min(norms) > 0


def test_changed_weights_are_what_is_saved(tmp_path: Path) -> None:
    tensors, config = tiny(np.float16)
    model = jq.load(write(tmp_path / "in", tensors, config))
    model.model.norm.weight.set_value(jnp.full(32, 2.0))
    jq.save(model, tmp_path / "out")
    again = jq.load_state(tmp_path / "out")
    assert again["model.norm.weight"].dtype == np.float16
    assert (np.asarray(again["model.norm.weight"]) == 2).all()


def test_checkpoint_cache_scales_are_used() -> None:
    folder = REFERENCE.get("ct-kv-fp8")
    if folder is None:
        pytest.skip("the directory ct-kv-fp8 was not found")
    model = jq.load(folder)
    attention = model.model.layers[0].self_attn
    assert str(attention.form) == "fp8 tensor static"
    cache = attention.empty_cache(1, 16)[0]
    assert cache.codes.dtype == jnp.float8_e4m3fn and cache.scales is None
    assert float(attention.inside_arrays.get_value()["k_scale"][0]) > 0
    tokens = model.generate(np.arange(3, 15)[None], 8, eos_token_id=-5)
    np.testing.assert_array_equal(np.asarray(model(tokens))[:, 11:-1].argmax(-1), tokens[:, 12:])
    plain = jq.load(folder, quantize_activations=False)
    assert plain.model.layers[0].self_attn.form == "float32"


@pytest.mark.parametrize("name", ["gptq-4-g128-sym", "gptq-2-g64-asym-v1", "awq-gemm-g64", "bnb-nf4", "bnb-nf4-dq-f32"])
def test_fused_layers_keep_their_names_and_bytes(name: str, tmp_path: Path, monkeypatch) -> None:
    """What a GPU does with packed weights: q/k/v and gate/up as one matrix."""
    from jq.models import reader

    folder = REFERENCE.get(name)
    if folder is None:
        pytest.skip(f"the directory {name} was not found")
    apart = jq.load(folder, packed=True)
    module = sys.modules["jq.load"]  # the name jq.load is the function
    monkeypatch.setattr(module, "Reader", lambda *a, **k: reader.Reader(*a, **{**k, "fuse": True}))
    model = jq.load(folder, packed=True)
    attention = model.model.layers[0].self_attn
    assert attention.fused == ("dq" not in name)  # nested scales of blocks of 256 do not end with rows
    ids = np.arange(3, 17)[None]
    np.testing.assert_allclose(model(ids), apart(ids), atol=2e-4)
    assert set(jq.quantized(model)) == set(jq.quantized(apart))
    for path, q in jq.quantized(apart).items():
        np.testing.assert_array_equal(jq.quantized(model)[path].dequantize(), q.dequantize())
    jq.save(model, tmp_path / "out")
    assert stored(tmp_path / "out") == stored(folder)


def pointer(linear) -> int:
    return linear.weight.get_value().unsafe_buffer_pointer()


def test_dense_weights_of_one_input_lie_together(tmp_path: Path) -> None:
    from jq.models import functional

    tensors, config = tiny(np.float16, attention_bias=True)
    rng = np.random.default_rng(1)
    tensors |= {
        f"model.layers.{i}.self_attn.{n}_proj.bias": rng.standard_normal(size).astype(np.float16)
        for i in range(2)
        for n, size in {"q": 32, "k": 16, "v": 16, "o": 32}.items()
    }
    folder = write(tmp_path / "in", tensors, config)
    model = jq.load(folder)
    layer = model.model.layers[1]
    attention, mlp = layer.self_attn, layer.mlp
    assert pointer(attention.k_proj) == pointer(attention.q_proj) + 32 * 32 * 4
    assert pointer(attention.v_proj) == pointer(attention.k_proj) + 16 * 32 * 4
    assert pointer(mlp.up_proj) == pointer(mlp.gate_proj) + 64 * 32 * 4
    state = functional.split(model)[1]
    held = sum(a.nbytes for a in jax.tree.leaves(state))
    assert held == sum(t.size * 4 for t in tensors.values())  # each weight once
    whole = state[2]["model", "layers", 1, "self_attn"]
    assert whole.shape == (64, 32) and whole.unsafe_buffer_pointer() == pointer(attention.q_proj)
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert names == set(tensors)
    jq.save(model, tmp_path / "out")
    assert stored(tmp_path / "out") == stored(folder)


def test_a_changed_weight_is_what_computes(tmp_path: Path) -> None:
    tensors, config = tiny()
    folder = write(tmp_path, tensors, config)
    model, ids = jq.load(folder), np.arange(9)[None]
    before = model(ids)
    name = "model.layers.0.mlp.up_proj.weight"
    layer = model.model.layers[0].mlp.up_proj
    value = layer.weight.get_value()
    layer.weight.set_value(value * 2)
    fresh = jq.load(jq.State(tensors | {name: tensors[name] * 2}, config))
    np.testing.assert_array_equal(model(ids), fresh(ids))
    assert np.abs(model(ids) - before).max() > 1e-3
    layer.weight.set_value(value)
    np.testing.assert_array_equal(model(ids), before)
    jq.nn.replace_linears(model, jq.RTN(bits=8, group_size=32), skip=["lm_head"])
    assert len(jq.quantized(model)) == 14 and np.abs(model(ids) - before).max() < 0.5


def test_joined_memory_ends_with_the_model(tmp_path: Path) -> None:
    import gc

    from jq.models import joined

    tensors, config = tiny()
    gc.collect()
    before = len(joined._wholes)
    model = jq.load(jq.State(tensors, config))
    model(np.arange(9)[None])
    assert len(joined._wholes) == before + 4
    del model
    gc.collect()
    assert len(joined._wholes) == before


@pytest.mark.parametrize("dtype", ["int8", "float64", "float8_e4m3fn", "abc", 5])
def test_dtypes_that_nothing_computes_in(dtype: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected float32, bfloat16, float16"):
        jq.load(write(tmp_path, *tiny()), dtype=dtype)


def test_the_checkpoints_own_dtype_is_checked() -> None:
    from jq.load import _own_dtype

    assert _own_dtype({"torch_dtype": "torch.float16"}, "DIR") == np.float16
    assert _own_dtype({"dtype": "float64"}, "DIR") == np.float32
    with pytest.raises(jq.errors.CheckpointError, match=r"DIR: config\.json: dtype is 'four'"):
        _own_dtype({"dtype": "four"}, "DIR")


@pytest.mark.parametrize("ids", [[[1.5]], np.zeros((1, 0), np.int32), np.zeros((1, 2, 3), np.int32), [True]])
def test_what_are_no_token_ids(ids: object) -> None:
    tensors, config = tiny()
    with pytest.raises(TypeError, match="input_ids must be integers"):
        jq.load(jq.State(tensors, config))(ids)
