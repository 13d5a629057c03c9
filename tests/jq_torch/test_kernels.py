"""The GPU kernels from torch: what is lowered (any machine with jax 0.11), and what a GPU computes."""

from __future__ import annotations

import pickle
import re
from copy import deepcopy

import jax
import numpy as np
import pytest
import torch

import jq
from jq.qtensor import stack

METHODS = {
    "rtn": lambda: jq.RTN(group_size=128),
    "hqq": lambda: jq.HQQ(group_size=64),
    "nf4": lambda: jq.NF4(),
    "nf4-double": lambda: jq.NF4(double_quant=True),
    "rtn-8": lambda: jq.RTN(bits=8, group_size=64),
    "eetq": lambda: jq.EETQ(),
    "mxfp4": lambda: jq.MXFP4A16(),
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
    from pallas_kernels import select, tensors
    from pallas_kernels.torch_launch import lower, skeleton_of

    packed = tensors.packed(tensors.prepare(weight(name).replace(extras={}, activation=None, source=None).to_jax()))
    choice = select.choose(rows, N, K, packed.form, "h100", 132, packed.perm is not None and rows == 1)
    if rows > 1:  # permuted before the kernel
        packed = packed.replace(perm=None)
    text = lower(skeleton_of(packed), rows, "bfloat16", choice).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert set(re.findall(r"stablehlo\.(\w+)", text)) == {"custom_call"}


def layer_of(q):
    from jq_torch.linear import JqLinear

    layer = JqLinear(K, N)
    layer.put("q", q)
    layer.use(quantize_activations=True, kernels=True)
    return layer


@pytest.mark.parametrize("name", METHODS)
def test_the_kernels_order_holds_the_same_bits_once(name):
    q = weight(name)
    layer, x = layer_of(q), torch.randn(3, K)
    before, want, own = {n: p.clone() for n, p in layer.named_parameters()}, layer(x), layer.state_dict()
    layer.arrange(ordered=True)
    assert sum(p.nbytes for p in layer.parameters()) == sum(p.nbytes for p in before.values())
    assert all(n.startswith("q_mma16_") for n, _ in layer.named_parameters())
    assert torch.equal(layer(x), want)
    assert all(torch.equal(copy(layer)(x), want) for copy in (deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
    ordered = layer.state_dict()
    for state in (ordered, own):  # either order loads, into either
        for start in (True, False):
            other = layer_of(weight(name))
            other.arrange(ordered=start)
            for name_of, parameter in other.named_parameters():
                parameter.data.mul_("g_idx" in name_of)  # without its groups a layer has no order
            other.load_state_dict(state)
            assert torch.equal(other(x), want)
            assert not other.to("cpu")._skeletons["q"].layout  # away from the GPU the own order
    layer.to("cpu")
    after = dict(layer.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)


def test_loaded_numbers_are_looked_at_anew(monkeypatch):
    """The kernels' order also says that scales are small, so that kernels do not look: not of those of before."""
    from jq_torch import ops

    monkeypatch.setattr(ops, "kernels_run", lambda device: True)
    layer, large = layer_of(weight("rtn")), layer_of(weight("rtn").replace(scales=weight("rtn").scales * 1e4))
    for one in (layer, large):
        one.arrange()
    assert [";most=" in one._skeletons["q"].layout for one in (layer, large)] == [True, False]
    layer.load_state_dict(large.state_dict())
    assert layer._skeletons["q"].layout == large._skeletons["q"].layout


def _hooked(layer):
    return layer.register_forward_hook(lambda layer, args, y: 2 * y).remove


def _hooked_before(layer):
    return layer.register_forward_pre_hook(lambda layer, args: (2 * args[0],)).remove


def _hooked_for_all(layer):
    return torch.nn.modules.module.register_module_forward_hook(lambda layer, args, y: 2 * y).remove


def _hooked_for_all_before(layer):
    return torch.nn.modules.module.register_module_forward_pre_hook(lambda layer, args: (2 * args[0],)).remove


def _forward_replaced(layer):
    own = layer.forward
    layer.forward = lambda x: 2 * own(x)
    return lambda: delattr(layer, "forward")


def _subclassed(layer):
    kind = type(layer)
    layer.__class__ = type("Twice", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    return lambda: setattr(layer, "__class__", kind)


def _module_patched(layer):
    own = torch.nn.Module.__call__
    torch.nn.Module.__call__ = lambda self, *args: 2 * own(self, *args)
    return lambda: setattr(torch.nn.Module, "__call__", own)


def _compiled(layer):
    layer._compiled_call_impl = lambda x: 2 * layer.forward(x)  # what `layer.compile()` sets
    return lambda: setattr(layer, "_compiled_call_impl", None)


WATCHERS = [_hooked, _hooked_before, _hooked_for_all, _hooked_for_all_before]
WATCHERS += [_forward_replaced, _subclassed, _module_patched, _compiled]


@pytest.mark.parametrize("double", WATCHERS)
def test_watchers_see_a_layer_that_goes_past_module_call(double, monkeypatch):
    from jq_torch import ops

    layer, x, calls = layer_of(weight("nf4")), torch.randn(3, K, dtype=torch.bfloat16), []
    layer.arrange(ordered=True)
    want = layer(x)

    class Kernel:
        def of(self, dtype, takes):
            return lambda x: (calls.append(1) or want * (x[0, 0] / first)) if takes(x) else None

    first = x[0, 0].clone()
    monkeypatch.setattr(ops, "cuda_weight", lambda packed, spec, dtype: Kernel())
    layer._held = layer._hold(x.dtype)
    assert torch.equal(layer(x), want) and torch.equal(layer(input=x), want) and len(calls) == 2
    undo = double(layer)
    try:
        assert torch.equal(layer(x), 2 * want)
    finally:
        undo()
    assert torch.equal(layer(x), want) and len(calls) == 4
    hook = layer.register_forward_pre_hook(lambda layer, args, kwargs: (args, {}), with_kwargs=True)
    assert torch.equal(layer(x, factor=2), want) and len(calls) == 5
    hook.remove()
    with pytest.raises(TypeError, match="factor"):
        layer(x, factor=2)
    deepcopy(layer)(x)
    layer(x.clone().requires_grad_())
    layer._parameters[layer._first].data = layer._parameters[layer._first].data.clone()
    layer(x)
    assert len(calls) == 5


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
    kept = layer.of(dtype)
    assert torch.equal(layer(wide), layer(wide.contiguous())) and torch.equal(kept(wide), layer(wide))
    for rows in (1, 1, 16, 100):  # a slice that is dense, but does not begin where the kernels can copy from
        x = torch.randn(rows * K + 3, device="cuda", dtype=dtype)[3:].view(rows, K)
        assert torch.equal(kept(x), layer(x.clone())) and torch.equal(layer(x), kept(x))
    for bad in (torch.randn(1, K - 8), torch.randn(1, K), torch.randn(1, K, dtype=dtype)):
        with pytest.raises(ValueError, match=r"shape|kernels take|is on"):
            layer(bad if bad.dtype == dtype else bad.cuda())
    with pytest.raises(ValueError, match="shape"):
        kept(torch.randn(1, K - 8, device="cuda", dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rtn", "hqq", "nf4", "nf4-double", "rtn-8", "mxfp4"])
def test_a_stack_of_experts(name):
    """Few rows and many, none for some experts, rows of the expert that is not there, in a CUDA graph."""
    from pallas_kernels import torch as kernels
    from pallas_kernels import torch_stack

    count, rng = 5, np.random.default_rng(0)
    weights = [METHODS[name]().quantize(rng.standard_normal((N, K)).astype(np.float32) * 0.05) for _ in range(count)]
    held = kernels.TorchWeight(stack(weights))
    dense = torch.stack([torch.from_numpy(np.array(w.dequantize("float32"))) for w in weights]).cuda()
    dense = torch.cat([dense, torch.zeros_like(dense[:1])])

    def expected(x, which):
        return torch.einsum("sk,snk->sn", x.float(), dense[which])

    for rows in (0, 1, 6, 16, 17, 200):
        x = torch.randn(rows, K, device="cuda", dtype=torch.bfloat16)
        which = torch.from_numpy(rng.integers(0, count + 1 if rows < 17 else count - 1, rows)).cuda()
        got, want = torch_stack.matmul(held, x, which), expected(x, which)
        assert got.shape == want.shape and (got.float() - want).norm() <= 5e-3 * want.norm(), rows
    x, which = torch.randn(6, K, device="cuda", dtype=torch.bfloat16), torch.arange(6, device="cuda") % count
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch_stack.matmul(held, x, which)
    which.copy_(torch.tensor([4, 4, 0, 5, 1, 2]))
    graph.replay()
    torch.cuda.synchronize()
    want = expected(x, which)
    assert (captured.float() - want).norm() <= 5e-3 * want.norm()


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

    q = weight("nf4")
    layer = layer_of(q).to("cuda")
    x = torch.randn(2, 5, K, device="cuda", dtype=torch.bfloat16)
    packed, spec = layer.operands()
    assert ops.cuda_weight(packed, spec, x.dtype) is not None
    want = x.float() @ torch.from_numpy(np.array(q.dequantize("float32"))).cuda().T
    assert (layer(x).float() - want).norm() < 5e-3 * want.norm()
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32):
            without = layer(x)
            layer.bias = torch.nn.Parameter(torch.randn(N, device="cuda", dtype=dtype))
            assert torch.equal(layer(x), without + layer.bias.to(x.dtype))
            layer.bias = None
        with torch.autocast("cuda", torch.float16):
            assert layer(x).dtype is torch.float16
        assert layer(x).dtype is torch.bfloat16
    x.requires_grad_()
    layer(x).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.gpu
def test_tracers_see_an_operator():
    """What is recorded without dynamo, from plain tensors, must not take the kernel's result for a constant."""
    from torch.fx.experimental.proxy_tensor import make_fx

    layer, x = layer_of(weight("rtn")).to("cuda"), torch.randn(1, K, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for traced in (torch.jit.trace(layer, x), make_fx(layer)(x)):
            for factor in (1, 2):
                assert torch.equal(traced(factor * x), layer(factor * x))


def from_the_middle(tensor):
    """The same values 4 bytes behind the beginning of another tensor: kernels copy 16 bytes at a time."""
    room = torch.empty(tensor.nbytes + 4, dtype=torch.uint8, device=tensor.device)
    return room[4:].view(tensor.dtype).view(tensor.shape).copy_(tensor)


@pytest.mark.gpu
def test_tensors_from_the_middle_of_others():
    from jq_torch import ops

    layer, x = layer_of(weight("nf4")).to("cuda"), torch.randn(1, K, device="cuda", dtype=torch.bfloat16)
    want = layer(x)
    state = {name: from_the_middle(tensor) for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)  # brings them into memory of its own
    assert ops.cuda_weight(*layer.operands(), x.dtype) is not None
    assert torch.equal(layer(x), want)
    for parameter in layer.parameters():
        parameter.data = from_the_middle(parameter.data)
    assert ops.cuda_weight(*layer.operands(), x.dtype) is None
    assert (layer(x).float() - want.float()).norm() < 5e-3 * want.float().norm()
