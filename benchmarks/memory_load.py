"""Peak host memory while a checkpoint is loaded: at most the model's bytes plus 1.2 times its largest tensor.

    python benchmarks/memory_load.py DIR[:packed]...

Each in a process of its own. Writes results/memory_load.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import record

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    args = parser.parse_args()
    rows = []
    for model in args.models:
        for row in record.lines([sys.executable, str(HERE / "ours_cpu.py"), "memory", model]):
            allowed = row["model_bytes"] + 1.2 * row["largest_bytes"]
            row |= {"allowed_bytes": allowed, "holds": row["peak_growth_bytes"] <= allowed}
            print(
                f"{row['method']:24} model {row['model_bytes'] / 1e6:8.1f} MB, largest {row['largest_bytes'] / 1e6:6.1f} MB, "
                f"peak {row['peak_growth_bytes'] / 1e6:8.1f} MB, allowed {allowed / 1e6:8.1f} MB",
                file=sys.stderr,
            )
            rows.append(row)
    record.write("memory_load", rows)


if __name__ == "__main__":
    main()
