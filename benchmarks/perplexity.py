"""Perplexity of SmolLM2 by this project and by transformers + bitsandbytes, on the same tokens, float32 products.

    python benchmarks/perplexity.py SMOLLM2_DIR [--text wikitext2-test.txt] [--peer-python VENV/bin/python]

Quantizes the float checkpoint with jaxq, saves, loads it again and measures, 32 windows of 1024 tokens (int8:8 = int8 on
8 windows: the peer's int8 is slow on a CPU). The peer quantizes the same checkpoint itself. Writes
results/perplexity.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import record

HERE = Path(__file__).parent
LIMIT = 2e-3  # relative difference that is allowed; float32: 0.01 absolute


def methods() -> dict:
    import jq

    return {"nf4": jq.NF4(), "nf4-dq": jq.NF4(double_quant=True), "fp4": jq.FP4(), "int8": jq.Int8()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument(
        "--peer-rows", help="JSON lines of an earlier run of peer_transformers.py, in place of a new one"
    )
    parser.add_argument(
        "--our-rows", help="JSON lines of an earlier run of ours_cpu.py, with bits_per_weight, likewise"
    )
    parser.add_argument("--methods", nargs="+", default=["float32", "nf4", "nf4-dq", "fp4", "int8:8"])
    args = parser.parse_args()
    text = str(record.wikitext(args.text))
    wanted = [(name, count or "32") for name, _, count in (m.partition(":") for m in args.methods)]
    import jq

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, windows in wanted if not args.our_rows else ():
            path = args.model
            if name != "float32":
                path = str(Path(folder) / name)
                jq.save(jq.quantize(jq.load_state(args.model, lazy=True), methods()[name]), path)
            found = record.lines(
                [sys.executable, str(HERE / "ours_cpu.py"), "perplexity", path, "--text", text, "--windows", windows]
            )
            rows += [{**row, "method": name, "bits_per_weight": jq.inspect(path).bits_per_weight} for row in found]
    if args.our_rows:
        rows = [json.loads(line) for line in Path(args.our_rows).read_text().splitlines()]
    if args.peer_rows:
        peer = [json.loads(line) for line in Path(args.peer_rows).read_text().splitlines()]
    else:
        script = str(HERE / "peer_transformers.py")
        peer = []
        for name, windows in wanted:
            words = ["perplexity", args.model, name, "--text", text, "--windows", windows]
            peer += record.lines([args.peer_python, script, *words])
    theirs = {row["method"]: row for row in peer}
    for row in rows:
        other = theirs.get(row["method"])
        if other and other["windows"] == row["windows"]:
            row["peer_perplexity"] = other["perplexity"]
            row["relative_difference"] = row["perplexity"] / other["perplexity"] - 1
            row["holds"] = abs(row["relative_difference"]) < LIMIT
        print(json.dumps(row), file=sys.stderr)
    record.write("perplexity", rows, text=Path(text).name, window=1024, limit=LIMIT)


if __name__ == "__main__":
    main()
