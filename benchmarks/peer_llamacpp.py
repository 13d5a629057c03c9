"""llama.cpp's decode speed on the CPU, through the xllamacpp wheel: one JSON line.

python benchmarks/peer_llamacpp.py FILE.gguf [--new 64]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics

import xllamacpp

PROMPT = (
    "The history of the lighthouse begins in antiquity , when fires were built on hills near the shore so that sailors "
    "could find the harbour at night , and"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = args.gguf
    params.n_ctx, params.n_parallel, params.warmup = 1024, 1, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    server = xllamacpp.Server(params)
    request = {
        "prompt": PROMPT,
        "max_tokens": args.new,
        "temperature": 0.0,
        "top_k": 1,
        "cache_prompt": False,
        "ignore_eos": True,
    }
    timings = []
    for _ in range(args.runs):
        answer = server.handle_completions(request)
        timings.append((json.loads(answer) if isinstance(answer, (str, bytes)) else answer)["timings"])
    # The whole call, prompt included, as for the other peers.
    rates = [args.new / (1e-3 * (t["predicted_ms"] + t["prompt_ms"])) for t in timings]
    decode = [t["predicted_per_second"] for t in timings]
    row = {
        "peer": "llama.cpp",
        "method": "Q4_1 file",
        "tokens_per_s": statistics.median(rates),
        "decode_tokens_per_s": statistics.median(decode),
        "runs": rates,
        "prompt_tokens": timings[0]["prompt_n"],
        "new_tokens": args.new,
        "load_average": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
