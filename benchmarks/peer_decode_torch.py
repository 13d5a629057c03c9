"""torch.compile with CUDA graphs on the shapes of `gpu_decode.py`: bf16, and int4 of groups of 128 by tinygemm.

    python benchmarks/peer_decode_torch.py --batch 1 --context 512

Prints one JSON line: {"bf16": {"torch": tokens/s}, "w4a16_g128": {"tinygemm": tokens/s}}.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import nn
from torch.nn import functional

LAYERS, HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD, VOCAB = 32, 4096, 14336, 32, 8, 128, 128256


class Int4(nn.Module):
    """A random int4 weight in tinygemm's layout, one scale and zero for 128 inputs."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device="cuda")
        scales = torch.zeros(inputs // 128, outputs, 2, dtype=torch.bfloat16, device="cuda")
        scales[..., 0] = 0.004
        self.register_buffer("codes", torch.ops.aten._convert_weight_to_int4pack(codes, 8))
        self.register_buffer("scales", scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, self.codes, 128, self.scales)


def dense(outputs: int, inputs: int) -> nn.Linear:
    made = nn.Linear(inputs, outputs, bias=False, device="cuda", dtype=torch.bfloat16)
    return made.requires_grad_(False)


class Block(nn.Module):
    def __init__(self, kind: str, batch: int, slots: int) -> None:
        super().__init__()
        linear = Int4 if kind == "w4a16_g128" else dense
        self.qkv = linear((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN)
        self.out = linear(HIDDEN, HEADS * HEAD)
        self.gate_up = linear(2 * WIDTH, HIDDEN)
        self.down = linear(HIDDEN, WIDTH)
        ones = torch.ones(HIDDEN, dtype=torch.bfloat16, device="cuda")
        cache = torch.zeros(batch, KV_HEADS, slots, HEAD, dtype=torch.bfloat16, device="cuda")
        for name, value in {"n1": ones, "n2": ones.clone(), "keys": cache, "values": cache.clone()}.items():
            self.register_buffer(name, value)

    def forward(self, x: torch.Tensor, slot: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor):
        sizes = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
        q, k, v = self.qkv(functional.rms_norm(x, (HIDDEN,), self.n1, 1e-5)).split(sizes, dim=-1)

        def rotate(t: torch.Tensor, heads: int) -> torch.Tensor:
            first, second = t.view(len(x), heads, 1, HEAD).float().chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

        self.keys.index_copy_(2, slot, rotate(k, KV_HEADS))
        self.values.index_copy_(2, slot, v.view(len(x), KV_HEADS, 1, HEAD))
        a = functional.scaled_dot_product_attention(
            rotate(q, HEADS), self.keys, self.values, attn_mask=mask, enable_gqa=True
        )
        x = x + self.out(a.reshape(len(x), -1))
        gate, up = self.gate_up(functional.rms_norm(x, (HIDDEN,), self.n2, 1e-5)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up)


class Model(nn.Module):
    def __init__(self, kind: str, batch: int, slots: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(kind, batch, slots) for _ in range(LAYERS))
        self.slots = slots
        self.head = dense(VOCAB, HIDDEN)
        self.register_buffer("embed", torch.randn(VOCAB, HIDDEN, dtype=torch.bfloat16, device="cuda") * 0.02)
        self.register_buffer("norm", torch.ones(HIDDEN, dtype=torch.bfloat16, device="cuda"))
        self.register_buffer("rate", 500000.0 ** (-torch.arange(HEAD // 2, device="cuda") / (HEAD // 2)))

    def forward(self, token: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        angles = slot.float() * self.rate
        cos, sin = angles.cos(), angles.sin()
        mask = (torch.arange(self.slots, device="cuda") <= slot)[None, None, None]
        x = self.embed[token]
        for block in self.blocks:
            x = block(x, slot, cos, sin, mask)
        return self.head(functional.rms_norm(x, (HIDDEN,), self.norm, 1e-5)).argmax(dim=-1)


@torch.no_grad()
def tokens_per_second(kind: str, batch: int, context: int, count: int = 64) -> float:
    model = Model(kind, batch, context + 2 * count)
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    def run() -> float:
        token = torch.ones(batch, dtype=torch.long, device="cuda")
        slot = torch.full((1,), context, dtype=torch.long, device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            token = step(token, slot).clone()
            slot = slot + 1
        torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(2):
        run()
    return batch * count / min(run() for _ in range(4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    for kind, name in (("w4a16_g128", "tinygemm"), ("bf16", "torch")):
        found[kind] = {name: tokens_per_second(kind, options.batch, options.context)}
        torch.compiler.reset()
        torch.cuda.empty_cache()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
