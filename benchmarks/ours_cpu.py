"""jaxq's side of the CPU benchmarks, one JSON line a checkpoint.

python benchmarks/ours_cpu.py speed DIR[:packed]... [--new 64] [--bound]
python benchmarks/ours_cpu.py perplexity DIR... --text FILE
python benchmarks/ours_cpu.py memory DIR[:packed]...
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from decode_bound import Bound

import jq
from jq.report.perplexity import perplexity, tokens_of

PROMPT = (
    "The history of the lighthouse begins in antiquity , when fires were built on hills near the shore so that sailors "
    "could find the harbour at night , and"
)


def speed(model, new: int, runs: int, bound: Bound | None) -> dict:
    """Greedy decode of `new` tokens after the prompt.

    tokens_per_s is of the whole call with the prompt, decode_tokens_per_s of the steps after it; medians of `runs`.
    decode_to_bound, where a bound is given, compares each run's steps with a second of bound before and one behind
    it, so that a machine that gets slower or faster meanwhile does so for both.
    """
    ids = tokens_of(model.tokenizer, PROMPT)[None]
    options = {"do_sample": False, "eos_token_id": []}
    model.generate(ids, new, **options)
    rates, decode, bounds = [], [], []
    for _ in range(runs):
        if bound is not None:
            bounds.append(1 / statistics.median(bound.times(1.0)))
        start = time.perf_counter()
        model.generate(ids, 1, **options)
        first = time.perf_counter()
        model.generate(ids, new, **options)
        end = time.perf_counter()
        rates.append(new / (end - first))
        decode.append((new - 1) / (end - first - (first - start)))
    row = {
        "tokens_per_s": statistics.median(rates),
        "decode_tokens_per_s": statistics.median(decode),
        "best_decode_tokens_per_s": max(decode),
        "runs": rates,
        "prompt_tokens": ids.shape[1],
        "new_tokens": new,
    }
    if bound is None:
        return row
    bounds.append(1 / statistics.median(bound.times(1.0)))
    ratios = [2 * d / (before + behind) for d, before, behind in zip(decode, bounds, bounds[1:], strict=False)]
    return row | {"bound_beside": bounds, "decode_to_bound": ratios}


def peak_bytes() -> int:
    """Largest resident set of this process so far (Linux: kilobytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(path: str, packed: bool | None) -> dict:
    """Growth of the peak resident set while a checkpoint is loaded, beside what the model's arrays take."""
    jax.numpy.zeros(1).block_until_ready()
    load = jq.load  # the import is not the loader's memory
    before = peak_bytes()
    start = time.perf_counter()
    model = load(path, packed=packed)
    arrays = [leaf for leaf in jax.tree.leaves(model_state(model)) if hasattr(leaf, "nbytes")]
    jax.block_until_ready(arrays)
    seconds = time.perf_counter() - start
    return {
        "load_s": seconds,
        "model_bytes": sum(a.nbytes for a in arrays),
        "largest_bytes": max(a.nbytes for a in arrays),
        "peak_growth_bytes": peak_bytes() - before,
    }


def model_state(model):
    from flax import nnx

    return nnx.state(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "perplexity", "memory"])
    parser.add_argument("models", nargs="+", help="checkpoint directory; with :packed to keep codes packed")
    parser.add_argument("--text")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--bound", action="store_true", help="speed: time the matrix products alone between the runs")
    args = parser.parse_args()
    for name in args.models:
        path, _, how = name.partition(":")
        packed = True if how == "packed" else None
        row = {"peer": "jaxq", "method": Path(path).name + (", packed" if packed else "")}
        start = time.perf_counter()
        if args.what == "memory":
            row |= memory(path, packed)
        else:
            model = jq.load(path, packed=packed)
            row["load_s"] = round(time.perf_counter() - start, 2)
            start = time.perf_counter()
            if args.what == "speed":
                bound = Bound(model.config) if args.bound and not packed else None
                row |= speed(model, args.new, args.runs, bound)
            else:
                ids = tokens_of(model.tokenizer, Path(args.text).read_text("utf-8"))[: args.windows * args.window]
                row |= {"perplexity": perplexity(model, ids, window=args.window), "windows": args.windows}
            del model
        row |= {"seconds": round(time.perf_counter() - start, 1), "load_average": round(os.getloadavg()[0], 1)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
