"""The kernels of a decode step lower for CUDA without a GPU, and say what they do not take."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tune
from pallas_kernels.form import Form

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason=f"jax {jax.__version__}: Mosaic GPU of 0.11 is needed"
)


def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype)


def lowered(function, *args, **static):
    text = jax.jit(functools.partial(function, **static)).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1
    return text


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "dim", "three", "window", "softcap", "sinks", "dtype"),
    [
        (1, 32, 8, 128, False, None, None, False, jnp.bfloat16),
        (32, 32, 8, 128, False, 100, None, False, jnp.bfloat16),
        (3, 9, 3, 64, True, None, None, True, jnp.float16),
        (2, 16, 16, 256, True, None, 50.0, False, jnp.bfloat16),
        (2, 71, 1, 64, False, None, None, False, jnp.bfloat16),
    ],
)
def test_attention(batch, heads, kv_heads, dim, three, window, softcap, sinks, dtype):
    from pallas_kernels.attention import Heads, decode_attention

    widths = [n * dim for n in (heads, kv_heads, kv_heads)]
    parts = tuple(shape(batch, w, dtype=dtype) for w in (widths if three else [sum(widths)]))
    cache = shape(batch, kv_heads, 256, dim, dtype=dtype)
    table = shape(batch, dim // 2, dtype=jnp.float32)
    integers = shape(dtype=jnp.int32), shape(batch, dtype=jnp.int32)
    sink = shape(heads, dtype=jnp.float32) if sinks else None
    spec = Heads(heads, kv_heads, dim, dim**-0.5, window, softcap)
    text = lowered(decode_attention, parts, cache, cache, (table, table), *integers, sink, spec=spec)
    assert text.count("output_operand_alias<") == 2  # the cache is written in place


def test_attention_says_what_it_does_not_take():
    from pallas_kernels.attention import Heads, refusal

    spec = Heads(8, 2, 128, 0.1)
    assert refusal(spec, jnp.bfloat16.dtype, jnp.bfloat16.dtype, 128) is None
    assert "float32" in refusal(spec, jnp.float32.dtype, jnp.float32.dtype, 128)
    assert "int8" in refusal(spec, jnp.bfloat16.dtype, jnp.int8.dtype, 128)
    assert "32 of 128" in refusal(spec, jnp.bfloat16.dtype, jnp.bfloat16.dtype, 32)
    assert "80" in refusal(Heads(8, 2, 80, 0.1), jnp.bfloat16.dtype, jnp.bfloat16.dtype, 80)


def prologues(m, k):
    from pallas_kernels.prologue import Gate, Norm

    x, gain = shape(m, k), shape(k)
    yield Norm(1e-5), (x, x, gain)
    yield Norm(1e-6, 1.0, False), (x, None, gain)
    yield Gate("gelu_tanh"), (shape(m, 2 * k), None, None)


def all_prologues(m, k):
    from pallas_kernels.prologue import Plain

    yield from prologues(m, k)
    yield Plain(), (shape(m, k), None, None)


@pytest.mark.parametrize("form", [Form(), Form("codebook", 4, 64, "bf16"), Form(group=32, zero="u8")])
def test_packed_products(form):
    from pallas_kernels import fused
    from pallas_kernels.prologue import Gate

    for m in (1, 2):
        w = jax.eval_shape(functools.partial(tune.random_weight, form, 576, 1536))
        for prologue, (a, b, gain) in prologues(m, 1536):
            choice = fused.choice_for(prologue, m, w)
            assert choice is not None
            bias = shape(576, dtype=jnp.float32)
            lowered(fused.matmul, a, w, b, gain, bias, prologue=prologue, config=choice.config)
            gated = fused.gated_choice(prologue, m, w) if b is not None else None
            if gated is not None:
                lowered(fused.matmul, a, w, b, gain, prologue=prologue, epilogue=Gate(), config=gated.config)
    assert fused.choice_for(prologue, 3, w) is None


def test_dense_products():
    from pallas_kernels import dense
    from pallas_kernels.prologue import Plain

    for m in (1, 5):
        for prologue, (a, b, gain) in all_prologues(m, 512):
            plan = dense.plan_for(prologue, m, 576, 512, jnp.bfloat16.dtype)
            assert plan is not None
            lowered(dense.matmul, a, shape(576, 512), b, gain, prologue=prologue, plan=plan)
    for m, n, k in ((9, 576, 512), (1, 570, 512), (1, 576, 500)):
        assert dense.plan_for(Plain(), m, n, k, jnp.bfloat16.dtype) is None
    assert dense.plan_for(Plain(), 1, 576, 512, jnp.float32.dtype) is None


def test_norm_and_gate():
    from pallas_kernels import norm
    from pallas_kernels.prologue import Gate, Norm

    for m, k in ((1, 4096), (7, 576)):
        lowered(norm.add_norm, shape(m, k), shape(m, k), shape(k), prologue=Norm(1e-5))
        lowered(norm.gate, shape(m, 2 * k), prologue=Gate())
    assert norm.refusal(jnp.float32.dtype, 64) and norm.refusal(jnp.bfloat16.dtype, 12)


def test_lowered_text_does_not_depend_on_what_was_lowered_before():
    """Else JAX's persistent cache would miss in a process that compiles in another order."""
    from pallas_kernels import norm
    from pallas_kernels.prologue import Gate

    texts = []
    for _ in range(2):
        texts.append(lowered(norm.gate, shape(1, 256), prologue=Gate()))
        jax.clear_caches()
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "form", [Form(group=32), Form("codebook", 4, 64, "bf16"), Form(bits=8, zero_point=128)], ids=str
)
@pytest.mark.parametrize(("n", "k"), [(28672, 4096), (6144, 2048), (49152, 2048), (64, 512)])
def test_a_product_makes_its_input_in_any_shape(form, n, k):
    """Also where the table of measured shapes is silent, or another kernel is the best one for a product alone."""
    from pallas_kernels import fused
    from pallas_kernels.prologue import Norm

    w = jax.eval_shape(functools.partial(tune.random_weight, form, n, k))
    for choice in (fused.choice_for(Norm(1e-5), 1, w), fused.gated_choice(Norm(1e-5), 1, w)):
        assert choice is not None and choice.kernel == "stream"
