"""The GPU kernels from torch: what is lowered (any machine with jax 0.11), and what a GPU computes."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
import torch

import jq

METHODS = {
    "rtn": lambda: jq.RTN(group_size=128),
    "hqq": lambda: jq.HQQ(group_size=64),
    "nf4": lambda: jq.NF4(),
    "nf4-double": lambda: jq.NF4(double_quant=True),
    "act-order": lambda: jq.RTN(group_size=128),
}
N, K = 256, 512


def weight(name: str):
    dense = np.random.default_rng(0).standard_normal((N, K)).astype(np.float32) * 0.05
    q = METHODS[name]().quantize(dense)
    if name == "act-order":
        q = q.replace(g_idx=np.random.default_rng(1).permutation(np.repeat(np.arange(K // 128), 128)).astype(np.int32))
    return q


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need jax 0.11")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_a_kernel_is_one_mosaic_call(name, rows):
    from pallas_kernels import api, select, tensors
    from pallas_kernels import torch as kernels

    packed = tensors.packed(tensors.prepare(weight(name).replace(extras={}, activation=None, source=None).to_jax()))
    choice = select.choose(rows, N, K, packed.form, "h100", 132, packed.perm is not None and rows == 1)
    if choice.kernel != "stream" and packed.form.scale == "u8":
        packed = api.expand_scales(packed)
    if rows > 1:  # permuted before the kernel
        packed = packed.replace(perm=None)
    text = kernels.lower(kernels.skeleton_of(packed), rows, "bfloat16", choice).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert set(re.findall(r"stablehlo\.(\w+)", text)) == {"custom_call"}


def test_without_a_gpu_the_reason_is_said():
    from pallas_kernels import torch as kernels

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert re.search(r"jax|CUDA", kernels.available())


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_the_kernel(name, dtype):
    from pallas_kernels import torch as kernels

    assert kernels.available() is None
    q = weight(name)
    layer, dense = kernels.TorchWeight(q), torch.from_numpy(np.array(q.dequantize("float32"))).cuda()
    for shape in ((1, K), (3, K), (16, K), (17, K), (100, K), (2, 3, K), (K,), (0, K)):
        x = torch.randn(shape, device="cuda", dtype=dtype)
        got, want = layer(x), x.float() @ dense.T
        assert got.dtype == dtype and got.shape == want.shape
        assert (got.float() - want).norm() <= 5e-3 * want.norm(), shape
    wide = torch.randn(4, 2 * K, device="cuda", dtype=dtype)[:, ::2]
    assert torch.equal(layer(wide), layer(wide.contiguous()))
    for bad in (torch.randn(1, K - 8), torch.randn(1, K), torch.randn(1, K, dtype=dtype)):
        with pytest.raises(ValueError, match=r"shape|kernels take|is on"):
            layer(bad if bad.dtype == dtype else bad.cuda())


@pytest.mark.gpu
def test_on_the_current_stream_and_in_a_cuda_graph():
    from pallas_kernels import torch as kernels

    layer = kernels.TorchWeight(weight("nf4"))
    x = torch.randn(1, K, device="cuda", dtype=torch.bfloat16)
    want = layer(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        moved = x.clone()
        other = layer(moved)
    stream.synchronize()
    assert torch.equal(other, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    x.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, 2 * want, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_a_packed_layer_takes_the_kernel():
    from jq_torch import ops
    from jq_torch.linear import JqLinear

    q = weight("nf4")
    layer = JqLinear(K, N)
    layer.put("q", q)
    layer.use(quantize_activations=True, kernels=True)
    layer.to("cuda")
    x = torch.randn(2, 5, K, device="cuda", dtype=torch.bfloat16)
    packed, spec = layer.operands()
    assert ops.cuda_weight(packed, spec, x.dtype) is not None
    want = x.float() @ torch.from_numpy(np.array(q.dequantize("float32"))).cuda().T
    assert (layer(x).float() - want).norm() < 5e-3 * want.norm()
    x.requires_grad_()
    layer(x).sum().backward()
    assert torch.isfinite(x.grad).all()
