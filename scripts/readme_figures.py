"""Fills the figures of README.md from benchmarks/results and the format tests' results.

    python scripts/readme_figures.py            # rewrites README.md
    python scripts/readme_figures.py --check    # exit code 1 where it is not up to date

A part of the README between `<!-- figures: NAME -->` and `<!-- end -->` is what `FIGURES[NAME]` returns.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
NOT_YET = "*Not measured yet.*"


def table(header: list[str], rows: list[list[str]], *, right: int = 1) -> str:
    """A markdown table; columns from `right` on are right-aligned."""
    line = "|" + "|".join(" --- " if i < right else " ---: " for i in range(len(header))) + "|"
    return "\n".join(["| " + " | ".join(header) + " |", line, *("| " + " | ".join(row) + " |" for row in rows)])


def made_by(made: dict[str, Any]) -> str:
    """The line under a table: machine, versions, date, command."""
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items() if name != "gguf")
    return (
        f"\n\n{made['processor']}, {made['cores']} cores, load {made['load_average']}; Python {made['python']}, "
        f"{versions}; {made['date'][:10]}; `{made['command']}`"
    )


def read(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def demo() -> str:
    """What the demo printed."""
    from jq.inspect import size_text

    found = read("demo")
    if found is None:
        return NOT_YET
    rows = [
        [
            row["name"],
            f"{row['bits_per_weight']:.2f}",
            size_text(row["file_bytes"]),
            f"{row['perplexity']:.2f}",
            f"{row['tokens_per_s']:.1f}",
        ]
        for row in found["rows"]
    ]
    header = ["format", "bits/weight", "on disk", "perplexity (4 windows)", "tokens/s (CPU)"]
    answer = f"\n\n> {found['prompt']}\n>\n> **{found['answer'].strip()}**"
    return table(header, rows) + answer + made_by(found["made"])


def cpu_generate() -> str:
    """Decode speed beside the peers."""
    found = read("cpu_generate")
    if found is None:
        return NOT_YET
    rows = []
    for row in found["rows"]:
        bound = row["peer"] == "bound"  # one step, no prompt
        whole = "-" if bound else f"{row['tokens_per_s']:.1f}"
        step = row["tokens_per_s"] if bound else row.get("decode_tokens_per_s")
        rows.append([row["peer"], row["method"], whole, "-" if step is None else f"{step:.1f}"])
    header = ["SmolLM2-135M, batch 1", "weights", "tokens/s with the prompt", "tokens/s of the steps alone"]
    return table(header, rows, right=2) + made_by(found["made"])


def perplexity() -> str:
    """Perplexity beside transformers + bitsandbytes."""
    found = read("perplexity")
    if found is None:
        return NOT_YET
    rows = []
    for row in found["rows"]:
        peer = "-" if "peer_perplexity" not in row else f"{row['peer_perplexity']:.3f}"
        cells = [row["method"], f"{row['bits_per_weight']:.2f}", f"{row['perplexity']:.3f}", peer, str(row["windows"])]
        rows.append(cells)
    header = ["method", "bits/weight", "perplexity", "of the peer", f"windows of {found['window']}"]
    return table(header, rows) + f"\n\n`{found['text']}`; " + made_by(found["made"]).lstrip()


def gpu_line(found: dict[str, Any]) -> str:
    """The line under a table of a GPU: card, versions, date, command, bytes over which the weights of kernels rotated."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    line = f"\n\n{found['card']}; {versions}; {found['date']}" + (f"; {found['command']}" if "command" in found else "")
    return line + (f"; weights rotate over {found['rotated_bytes'] >> 20} MB" if "rotated_bytes" in found else "")


def gpu_matmul() -> str:
    """4-bit matmul kernels beside their limits: one row a shape, from the H100's results."""
    found = read("gpu_matmul_h100")
    if found is None:
        return NOT_YET
    cells: dict[tuple[int, int], dict[tuple[str, int], dict]] = {}
    for row in found["rows"]:
        cells.setdefault((row["n"], row["k"]), {})[row["kernel"], row["m"]] = row
    rows = []
    for (n, k), at in sorted(cells.items(), key=lambda item: item[0][0] * item[0][1]):
        one, nf4 = at.get(("w4a16_g128", 1)), at.get(("nf4_b64", 1))
        if one is None:
            continue
        many = [at.get(("w4a16_g128", m)) for m in (16, 64, 256, 4096)]
        beside = None if nf4 is None else nf4["peers"].get("bitsandbytes_nf4")
        rows.append(
            [
                f"{n}x{k}",
                f"{one['us']:.1f}",
                f"{one['bare_read_us'] / one['us']:.2f}",
                f"{min(one['peers'].values()) / one['us']:.2f}",
                "-" if nf4 is None else f"{nf4['us']:.1f}",
                "-" if nf4 is None or beside is None else f"{beside / nf4['us']:.2f}",
                *("-" if m is None else f"{m['cublas_us'] / m['us']:.2f}" for m in many),
            ]
        )
    header = ["out x in", "int4 M=1, us", "of a bare read", "best peer / ours", "NF4 M=1, us", "bitsandbytes / ours"]
    header += [f"cuBLAS bf16 / ours, M={m}" for m in (16, 64, 256, 4096)]
    beside_int4 = [
        f"{title} {', '.join(over_int4(cells, kernel, m) for m in (1, 8, 16, 64))}"
        for kernel, title in (("nf4_b64", "NF4"), ("nf4_b64_dq", "with nested scales"))
    ]
    text = f"\n\nTime over int4's at 1, 8, 16 and 64 rows: {'; '.join(beside_int4)}."
    return table(header, rows) + gpu_line(found) + text


def over_int4(cells: dict[tuple[int, int], dict[tuple[str, int], dict]], kernel: str, m: int) -> str:
    """Smallest and largest time of a kernel over int4's among shapes, at m rows."""
    ratios = [at[kernel, m]["us"] / at["w4a16_g128", m]["us"] for at in cells.values() if (kernel, m) in at]
    return f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "-"


KINDS = {"w8a16_g128": "int8 in groups of 128", "e4m3_row": "float8 e4m3, rows", "mxfp4": "MXFP4"}


def gpu_kinds() -> str:
    """Kernels for other weights beside a bare read and cuBLAS: one row a kind and shape."""
    found = read("gpu_kinds_h100")
    if found is None:
        return NOT_YET
    cells = {(row["kernel"], row["n"], row["k"], row["m"]): row for row in found["rows"]}
    rows = []
    for name, title in KINDS.items():
        for n, k in ((4096, 4096), (28672, 4096)):
            one = cells.get((name, n, k, 1))
            if one is None:
                continue
            many = [cells.get((name, n, k, m)) for m in (1, 64, 256, 4096)]
            shares = ("-" if m is None else f"{m['cublas_us'] / m['us']:.2f}" for m in many)
            rows.append([title, f"{n}x{k}", f"{one['us']:.1f}", f"{one['bare_read_us'] / one['us']:.2f}", *shares])
    header = ["weights", "out x in", "M=1, us", "of a bare read"]
    header += [f"cuBLAS bf16 / ours, M={m}" for m in (1, 64, 256, 4096)]
    return table(header, rows) + gpu_line(found)


def kv_cache() -> str:
    """Caches of fewer bits: one row a form."""
    found = read("kv_cache")
    if found is None:
        return NOT_YET
    rows = [
        [row["kv_cache"], f"{row['bytes_per_token']:,.0f}", f"{row['relative_error']:.3f}", f"{row['loss']:.3f}"]
        for row in found["rows"]
    ]
    header = ["kv_cache", "bytes a token", "relative error of the logits (L2)", "mean loss"]
    return table(header, rows) + made_by(found["made"])


DECODE_WEIGHTS = {
    "w4a16_g128": "int4 in groups of 128",
    "nf4": "NF4",
    "bf16": "bfloat16",
    "w4": "int4 in groups of 128",
}


def gpu_decode() -> str:
    """A model of 8B shapes on the H100."""
    found = read("gpu_decode_h100")
    if found is None:
        return NOT_YET
    rows = []
    for row in sorted(found["rows"], key=lambda row: [*DECODE_WEIGHTS].index(row["weights"])):
        if row["loop"] == "device":
            peers = ", ".join(f"{name} {speed:.0f}" for name, speed in row["peers"].items()) or "-"
            names = [DECODE_WEIGHTS[row["weights"]], DECODE_WEIGHTS[row["head"]], str(row["batch"])]
            rows.append(
                [*names, f"{row['tok_s']:.0f}", f"{row['bound_tok_s']:.0f}", f"{row['prefill_2048_s']:.3f}", peers]
            )
    header = [
        "weights",
        "output matrix",
        "batch",
        "tokens/s",
        "bound",
        "prefill of 2,048, s",
        "torch.compile, tokens/s",
    ]
    days = sorted({row["peers_measured"][:10] for row in found["rows"] if "peers_measured" in row})
    beside = f"; torch.compile: {', '.join(days)}" if days else ""
    return table(header, rows, right=2) + gpu_line(found) + beside


TORCH_KINDS = {
    "nf4": "jq, NF4",
    "bitsandbytes": "bitsandbytes, NF4",
    "rtn": "jq, int4 in groups of 128",
    "gemlite": "gemlite, int4 in groups of 128",
    "bf16": "torch, bfloat16",
}


def gpu_torch() -> str:
    """A model of 8B shapes behind transformers' generate on the H100, beside the peers."""
    found = read("gpu_torch")
    if found is None:
        return NOT_YET
    speeds = {row["kind"]: row for row in found["rows"] if "tokens_per_s" in row}
    rows = [
        [name, f"{speeds[kind]['tokens_per_s']:.0f}", f"{speeds[kind]['peak_gib']:.1f}"]
        for kind, name in TORCH_KINDS.items()
        if kind in speeds
    ]
    return table(["weights", "tokens/s", "peak GiB"], rows) + gpu_line(
        {**found["made"], "card": found["device"], "date": found["made"]["date"][:10]}
    )


def formats() -> str:
    """The table of formats."""
    from jq.report.format_table import markdown, rows

    return markdown(rows())


FIGURES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "cpu_generate": cpu_generate,
    "perplexity": perplexity,
    "gpu_matmul": gpu_matmul,
    "kv_cache": kv_cache,
    "gpu_kinds": gpu_kinds,
    "gpu_decode": gpu_decode,
    "gpu_torch": gpu_torch,
    "formats": formats,
}


def filled(text: str) -> str:
    """The README with every figure made anew."""

    def replace(found: re.Match[str]) -> str:
        name = found.group(1)
        return f"<!-- figures: {name} -->\n{FIGURES[name]()}\n<!-- end -->"

    return re.sub(r"<!-- figures: (\w+) -->\n.*?<!-- end -->", replace, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 where README.md is out of date"
    )
    args = parser.parse_args()
    text = README.read_text("utf-8")
    new = filled(text)
    if args.check:
        if new != text:
            print("README.md is out of date; run: python scripts/readme_figures.py", file=sys.stderr)
        return int(new != text)
    README.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
