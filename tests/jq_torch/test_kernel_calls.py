"""How a call from torch gets to a GPU kernel, with a kernel on the CPU in its place."""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import jq
from jq_torch import ops
from jq_torch.linear import JqLinear
from pallas_kernels import torch as kernels

N, K = 256, 512


@pytest.fixture
def on_the_cpu(monkeypatch):
    """A TorchWeight whose kernel, on the CPU, fills each row of y with the first number of that of x; its launches."""
    launches = []

    def prepare(weight, rows, dtype):
        def fill(context, stream, pointers):
            time.sleep(1e-5)  # other threads write their pointers
            x, y = pointers[0], pointers[len(weight.tensors) + 1]
            launches.append((context, stream, x))
            first = np.frombuffer((ctypes.c_uint16 * (rows * K)).from_address(x), np.uint16).reshape(rows, K)[:, :1]
            np.frombuffer((ctypes.c_uint16 * (rows * N)).from_address(y), np.uint16).reshape(rows, N)[:] = first

        class Launcher:
            function = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))(fill)
            start = ctypes.PYFUNCTYPE(None)(ctypes.cast(function, ctypes.c_void_p).value)
            parts = start, kernels.pointer(7)

        weight._ready[rows, dtype] = call = kernels._Call(Launcher, list(weight.tensors.values()), None)
        return call

    monkeypatch.setattr(kernels, "available", lambda: None)
    monkeypatch.setattr(kernels, "_empty", lambda index: lambda s, t, d: torch.empty_strided(s, t, dtype=d))
    monkeypatch.setattr(kernels.TorchWeight, "_prepare", prepare)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 2**40, raising=False)
    layer = JqLinear(K, N)
    layer.put("q", jq.NF4().quantize(np.random.default_rng(0).standard_normal((N, K)).astype(np.float32) * 0.05))
    layer.use(quantize_activations=True, kernels=True)
    layer.arrange(ordered=True)
    return layer, ops._cuda_weight(*layer.operands()), launches


def test_each_call_looks_at_its_tensor(on_the_cpu, monkeypatch):
    (_, held, launches), asked = on_the_cpu, []
    call = held.of(torch.bfloat16, lambda x: asked.append(1) or bool(x.flatten()[0] < 50))

    def right(x):
        launches.clear()
        assert torch.equal(call(x), x[..., :1].expand(*x.shape[:-1], N))
        assert [launch[:2] for launch in launches] == [(7, 2**40)] and launches[0][2] % 16 == 0
        return True

    shapes = [(1, K), (1, 1, K), (K,), (2, 3, K), (6, K), (3, 2, K)]
    many, flat = torch.randn(40, 3, K, dtype=torch.bfloat16), torch.randn(6 * K + 3, dtype=torch.bfloat16)
    assert all(right(torch.randn(shape, dtype=torch.bfloat16)) for _ in range(3) for shape in [*shapes, shapes[0]])
    assert len(asked) == len(shapes)
    for x in (many[:6, 0], many[:3, :2, : K // 2].repeat(1, 1, 2), many[3, 2:], flat[3:].view(6, K), many[:17, 1]):
        assert all(right(x) for _ in range(3))  # parts of tensors; and a number of rows that no kernel is made for
    assert call(torch.randn(6, K, dtype=torch.float16)) is None and call(torch.full((5, K), 99).bfloat16()) is None
    with torch.inference_mode():
        assert all(right(torch.randn(shape, dtype=torch.bfloat16)) for _ in range(2) for shape in shapes)
    xs = [torch.full((6, K), float(i), dtype=torch.bfloat16) for i in range(8)]
    with ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda x: all((call(x) == x[0, 0]).all() for _ in range(200)), xs)
        assert all(found)
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    call = held.of(torch.bfloat16)
    assert kernels._like(x) is kernels._nothing and all(right(many[0]) and right(many[:2]) for _ in range(3))


def test_what_is_alike():
    x, seen = torch.randn(1, 4, K), []
    like = kernels._like(x)
    assert like(x) and like(torch.randn(2, 4, K)[1:]) and like(torch.randn(4, K)[None])
    assert like(torch.randn(4, K).as_strided((1, 4, K), (3, K, 1)))  # of one there is no next
    others = [x[0], x[:, :3], x.half(), x.to("meta"), torch.randn(1, K, 4).mT, torch.randn(1, 4, 2 * K)[..., ::2]]
    others += [x.clone().requires_grad_(), torch.nn.Parameter(x, requires_grad=False), x.to_sparse(), None, x.numpy()]
    assert not any(map(like, others))
    with torch.no_grad():
        assert like(torch.randn(1, 4, K))
    with torch.inference_mode():
        assert not like(torch.randn(1, 4, K)) and kernels._like(torch.randn(1, 4, K))(torch.randn(1, 4, K))
    with torch.autocast("cpu"):
        assert not like(x)
    torch.jit.trace(lambda x: seen.append(like(x)) or 2 * x, x, check_trace=False)
    torch.func.vmap(lambda x: seen.append(like(x)) or 2 * x)(x[None])
    torch.func.grad(lambda x: seen.append(like(x)) or (2 * x).sum())(x)
    assert seen == [False] * 3


def test_a_layer_that_has_run_is_still_seen(on_the_cpu, monkeypatch):
    """By those who record: modes, traces, gradients."""
    (layer, held, launches), x = on_the_cpu, torch.randn(1, 3, K, dtype=torch.bfloat16)
    want = layer(x)
    monkeypatch.setattr(ops, "cuda_weight", lambda packed, spec, dtype: held)
    layer._held = layer._hold(x.dtype)
    for _ in range(3):
        assert torch.equal(layer(x), x[..., :1].expand(1, 3, N))
    monkeypatch.undo()
    launches.clear()
    with FlopCounterMode(display=False):
        assert torch.equal(layer(x), want)
    with torch.no_grad():
        assert torch.equal(make_fx(layer)(x)(2 * x), 2 * want)
        assert torch.equal(torch.jit.trace(layer, x, check_trace=False)(2 * x), 2 * want)
    layer(x.clone().requires_grad_()).sum().backward()
    assert not launches
    layer(x)
    assert len(launches) == 1
