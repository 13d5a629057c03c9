"""LoRA on an NF4 base: does the loss fall with jaxq as it does with bitsandbytes, on the same seed and data?

    python benchmarks/torch_lora.py MODEL TEXT --backend jaxq --out benchmarks/results/torch_lora.json
    python benchmarks/torch_lora.py MODEL TEXT --backend bitsandbytes --out benchmarks/results/torch_lora.json

MODEL is a float model with its tokenizer, TEXT a text file. Each run adds its curve to the JSON file; bitsandbytes needs
an environment with that library, jaxq one without. Adapters are drawn from the same seed; the base is quantized while loading.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch


def load(model: str, backend: str) -> Any:
    if backend == "jaxq":
        import jq_torch

        jq_torch.enable()
    import transformers

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return transformers.AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32)


def batches(model: str, text: str, tokens: int, batch: int, steps: int) -> torch.Tensor:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(Path(text).read_text()[:400_000])["input_ids"]
    need = tokens * batch * steps
    return torch.tensor(ids[:need]).reshape(steps, batch, tokens)


def train(args: argparse.Namespace) -> dict[str, Any]:
    import peft

    data = batches(args.model, args.text, args.tokens, args.batch, args.steps)
    base = load(args.model, args.backend)
    torch.manual_seed(args.seed)
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    losses, seconds = [], []
    for ids in data:
        start = time.perf_counter()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
        seconds.append(time.perf_counter() - start)
        print(f"{args.backend} step {len(losses)}: loss {losses[-1]:.4f}, {seconds[-1]:.1f} s", flush=True)
    return {
        "loss": losses,
        "median_step_s": round(sorted(seconds)[len(seconds) // 2], 3),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} torch threads",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--backend", choices=("jaxq", "bitsandbytes"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    setting = {k: getattr(args, k) for k in ("steps", "tokens", "batch", "lr", "seed")}
    found["setting"] = {**setting, "model": Path(args.model).name, "text": Path(args.text).name, "base": "NF4, float32"}
    found[args.backend] = train(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
