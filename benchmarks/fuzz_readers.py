"""Fuzzes every reader for a set time and counts what happened: python benchmarks/fuzz_readers.py [--seconds 300]

Each execution damages a good checkpoint (tests/reference: one module of each format; plus safetensors headers, pickles
and GGUF files byte by byte), loads it, and accepts a JqError or a State that can be read. Anything else is a finding:
it is printed with the seed that repeats it, and the exit status is 1. Writes benchmarks/results/fuzz_readers.json.
"""

from __future__ import annotations

import argparse
import collections
import copy
import datetime
import json
import platform
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import mutations  # noqa: E402
from reference_dirs import directories, stored  # noqa: E402

import jq  # noqa: E402
from jq.errors import JqError  # noqa: E402


def damaged_bytes(rng: random.Random, source: bytes, head: int) -> bytes:
    """A few bytes changed, removed, inserted or cut off, mostly in the first `head` bytes."""
    blob = bytearray(source)
    for _ in range(rng.randrange(1, 6)):
        where = rng.randrange(min(head, len(blob)) if rng.random() < 0.9 else len(blob))
        blob[where : where + rng.randrange(4)] = rng.randbytes(rng.randrange(5))
    if rng.random() < 0.1:
        del blob[rng.randrange(len(blob)) :]
    return bytes(blob)


def read_all(path: Path) -> None:
    state = jq.load_state(path)
    for key in state:
        value = state[key]
        if hasattr(value, "unpack"):
            value.unpack()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    folders = {n: p for n, p in directories().items() if (ROOT / "tests" / "reference" / n).exists()}
    modules = {n: mutations.seed_of(p) for n, p in folders.items() if stored(p)[0]}
    files = {
        f"{n}/{f.name}": f for n, p in folders.items() for f in p.iterdir() if f.suffix in (".gguf", ".pt", ".bin")
    }
    files |= {f"{n}/{f.name}": f for n, p in list(folders.items())[:4] for f in p.glob("model.safetensors")}
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    findings = []
    start, execution = time.time(), 0
    work = Path(tempfile.mkdtemp(prefix="fuzz"))
    try:
        while time.time() - start < options.seconds:
            rng = random.Random(f"{options.seed}/{execution}")
            name = rng.choice(sorted(modules) + sorted(files))
            target = work / "case"
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            if name in modules:
                tensors, config, sides, metadata = copy.deepcopy(modules[name])
                done = [mutations.mutate(rng, tensors, config, sides) for _ in range(rng.choice([1, 1, 2, 3]))]
                mutations.write(target, tensors, config, sides, metadata)
            else:
                source = files[name]
                done = ["bytes"]
                (target / source.name).write_bytes(damaged_bytes(rng, source.read_bytes(), 20_000))
            execution += 1
            try:
                read_all(target)
                counts[name]["loaded"] += 1
            except JqError as e:
                counts[name][type(e).__name__] += 1
            except Exception as e:
                counts[name]["FOUND"] += 1
                findings.append(
                    {
                        "case": name,
                        "seed": f"{options.seed}/{execution - 1}",
                        "done": done,
                        "error": f"{type(e).__name__}: {e}"[:300],
                    }
                )
                print(json.dumps(findings[-1]), flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "seconds": round(time.time() - start),
        "executions": execution,
        "findings": findings,
        "outcomes": {name: dict(c) for name, c in sorted(counts.items())},
    }
    (ROOT / "benchmarks" / "results" / "fuzz_readers.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{execution} executions in {result['seconds']} s, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
