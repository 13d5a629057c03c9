"""compressed-tensors inside attention: rotated and quantized queries, keys and values (tests/recorded/attention).

A file holds `q`, `k`, `v` as they come from the rotary embedding, what the library makes of each (`q.out` ...), and what
the attention module `m` stores; the metadata its quantization_config. A new file is a new case without code.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_dirs import array, bits, raw

from jq.activation_schemes.compressed_tensors import parameters_of
from jq.errors import FormatError, JqWarning, UnsupportedError
from jq.formats.compressed_tensors_attention import Attentions
from jq.models import kv_cache

FILES = sorted((Path(__file__).parents[1] / "recorded" / "attention").glob("*.safetensors"))


def layer_of(arrays, config, **options):
    found = Attentions(
        arrays, {"quantization_config": config}, **{"quantize": True, "cache": True, "label": "here"} | options
    )
    return found.layer("m")


@pytest.mark.parametrize("file", FILES, ids=[f.stem for f in FILES])
def test_does_what_the_library_does(file):
    """Queries as they enter attention; keys and values as attention reads them from a packed cache."""
    tensors, meta = raw(file)
    arrays = {name: array(entry) for name, entry in tensors.items()}
    stored = {name: a for name, a in arrays.items() if name.startswith("m.")}
    inside, own = layer_of(stored, json.loads(meta["config"]))
    q, k, v = (jnp.asarray(arrays[w]) for w in "qkv")
    got = dict(zip("qk", jax.jit(inside.__call__)(q, k, own), strict=True))
    assert np.array_equal(bits(np.asarray(got["q"])), bits(arrays["q.out"]))
    for which, x in (("k", got["k"]), ("v", v)):
        form, static = inside.cache, parameters_of(own, which)
        buffer = jax.jit(kv_cache.encode, static_argnums=0)(form, x, static)
        decode = jax.jit(kv_cache.decode, static_argnums=(0, 3, 4))
        read = np.asarray(decode(form, buffer, static, x.shape[-1], x.dtype))
        want = arrays[f"{which}.out"]
        if form.type == "int":  # integers have no negative zero
            read, want = (np.where(a == 0, np.zeros_like(a), a) for a in (read, want))
        assert np.array_equal(bits(read), bits(want)), which
        assert buffer.codes.nbytes == x.size * form.num_bits // 8
        assert jax.tree.map(_kind, kv_cache.empty(form, x.shape, static, x.dtype)) == jax.tree.map(_kind, buffer)


def _kind(a):
    return a.shape, a.dtype


def scheme(**change):
    return {"kv_cache_scheme": {"num_bits": 8, "symmetric": False, "strategy": "tensor", "dynamic": False} | change}


def test_keeps_floats_where_they_are_asked_for():
    stored = {f"m.{w}_{p}": np.ones(1, np.float32) for w in "kv" for p in ("scale", "zero_point")}
    assert layer_of(stored, scheme()) is not None
    assert layer_of(stored, scheme(), quantize=False) is None
    assert layer_of(stored, scheme(), cache=False) is None
    assert layer_of(stored, scheme(symmetric=True)) is not None
    assert layer_of({}, scheme(symmetric=True)) is None  # each token takes a scale of its own
    with pytest.warns(JqWarning, match="each token has its own"):
        assert layer_of({}, scheme(symmetric=True, dynamic=True, strategy="token")) is None


@pytest.mark.parametrize(
    "stored, change, kind, message",
    [
        ({}, {}, FormatError, r"here: m.k_scale: missing; the config asks for int8 tensor static asym"),
        ({"m.k_scale": np.ones(1)}, {}, FormatError, r"here: m.k_zero_point: missing"),
        ({"m.k_scale": np.ones(3)}, {}, FormatError, r"m.k_scale: found shape \(3,\), expected \(1,\) or \(heads"),
        ({"m.k_scale": np.zeros(1), "m.k_zero_point": np.zeros(1)}, {}, FormatError, r"m.k_scale: is 0 or no number"),
        (
            {"m.k_scale": np.full(1, np.nan)},
            {},
            FormatError,
            r"m.k_scale: is 0 or no number.*quantize_activations=False",
        ),
        ({}, {"dynamic": True}, UnsupportedError, r"m: int8 tensor dynamic asym of k: its scale depends on all tokens"),
        ({}, {"strategy": "channel"}, UnsupportedError, r"nothing that the library runs"),
    ],
)
def test_bad_input(stored, change, kind, message):
    with pytest.raises(kind, match=message):
        layer_of(stored, scheme(**change))


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "modelopt", "kv_cache_scheme": "NVFP4"},
        {"quant_method": "modelopt", "kv_cache_scheme": {"num_bits": 4, "type": "float", "dynamic": False}},
        {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "NVFP4_AFFINE"}},
    ],
)
def test_caches_of_other_libraries_are_no_float_caches(config):
    with pytest.raises(UnsupportedError, match=r"^here: quantization_config: .*not done here.*kv_cache='bfloat16'"):
        kv_cache.scheme_of(config, "here")
    assert kv_cache.scheme_of({"quant_method": "modelopt", "kv_cache_quant_algo": "none"}, "here") is None


@pytest.mark.parametrize("inner", ["FP8", 5, ["a"], {}, None])
def test_other_methods_know_no_inner_config(inner):
    """ModelOpt's `quantization` is an object; what another method's config says there is no cache."""
    assert kv_cache.scheme_of({"quant_method": "awq", "quantization": inner}, "here") is None
