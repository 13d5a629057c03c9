"""Decode speed at batch 1 on the CPU: jaxq beside transformers, bitsandbytes and llama.cpp, in one run.

    python benchmarks/cpu_generate.py SMOLLM2_DIR --gguf FILE.gguf [--peer-python VENV/bin/python] [--rounds 2]

Each peer runs in a process of its own, one after the other, with all cores. The bound (the matrix products alone, one
jitted function) is taken before and after, and between the runs of jaxq in jaxq's process. --peer-python is an environment with torch, transformers, bitsandbytes and
xllamacpp. Writes results/cpu_generate.json and .svg.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import record

HERE = Path(__file__).parent


def checkpoints(model: str, folder: Path) -> list[str]:
    """The float model and an NF4 checkpoint of it, the latter also kept packed."""
    import jq

    target = folder / "nf4"
    jq.save(jq.quantize(jq.load_state(model, lazy=True), jq.NF4()), target)
    return [model, str(target), f"{target}:packed"]


def merge(rows: list[dict]) -> list[dict]:
    """One row for each (peer, method): medians over rounds, the best of what is called so, and all runs."""
    merged: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        merged.setdefault((row["peer"], row["method"]), []).append(row)
    result = []
    for same in merged.values():
        speeds = {
            key: (max if key.startswith("best") else statistics.median)([row[key] for row in same])
            for key in same[0]
            if key.endswith("tokens_per_s")
        }
        runs = [run for row in same for run in row.get("runs", [row["tokens_per_s"]])]
        lists = {
            key: [x for row in same for x in row[key]] for key in ("bound_beside", "decode_to_bound") if key in same[0]
        }
        loads = [row["load_average"] for row in same]
        result.append({**same[0], **speeds, **lists, "runs": runs, "load_average": max(loads)})
    return result


def plot(rows: list[dict], path: Path) -> None:
    """Bars of tokens/s, written as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(rows) + 1))
    names = [f"{row['peer']}: {row['method']}" for row in rows]
    bars = axes.barh(
        names, [row["tokens_per_s"] for row in rows], color=["#3b76c4" if r["peer"] == "jaxq" else "#999" for r in rows]
    )
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s, SmolLM2-135M, batch 1")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--gguf")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    sizes = ["--new", str(args.new), "--runs", str(args.runs)]
    bound = [sys.executable, str(HERE / "decode_bound.py"), args.model]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        ours = [
            sys.executable,
            str(HERE / "ours_cpu.py"),
            "speed",
            *checkpoints(args.model, Path(folder)),
            *sizes,
            "--bound",
        ]
        torch = [args.peer_python, str(HERE / "peer_transformers.py"), "speed", args.model, "float32", "nf4", *sizes]
        llama = [args.peer_python, str(HERE / "peer_llamacpp.py"), args.gguf, *sizes]
        for _ in range(args.rounds):
            for command in (bound, ours, torch, *([llama] if args.gguf else []), bound):
                for row in record.lines(command):
                    print(f"{row['peer']:28} {row['method']:32} {row['tokens_per_s']:8.1f} tokens/s", file=sys.stderr)
                    rows.append(row)
    rows = merge(rows)
    by_name = {(row["peer"], row["method"]): row for row in rows}
    default, bound_row = by_name["jaxq", Path(args.model).name], by_name["bound", "matrix products alone, float32"]
    ratios = {
        "default_to_transformers_float32": default["tokens_per_s"] / by_name["transformers", "float32"]["tokens_per_s"],
        # Like with like: the bound has no prompt. Each run of ours beside the bound of the same seconds.
        "decode_to_bound": statistics.median(default["decode_to_bound"]),
        "nf4_decode_to_bound": statistics.median(by_name["jaxq", "nf4"]["decode_to_bound"]),
        "best_decode_to_best_bound_beside": default["best_decode_tokens_per_s"] / max(default["bound_beside"]),
        # Other processes, minutes apart.
        "decode_to_bound_of_all_minutes": default["decode_tokens_per_s"] / bound_row["tokens_per_s"],
        "default_with_prompt_to_best_bound": default["tokens_per_s"] / bound_row["best_tokens_per_s"],
    }
    path = record.write("cpu_generate", rows, ratios=ratios)
    try:
        plot(rows, path.with_suffix(".svg"))
    except ImportError:
        print("no plot: matplotlib is not installed (extra `bench`)", file=sys.stderr)


if __name__ == "__main__":
    main()
