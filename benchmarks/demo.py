"""The demo's table as a result file: runs `python -m jq demo --json` and adds machine and versions.

python benchmarks/demo.py        # needs what the demo needs: see README
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile

import record


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "jq", "demo", "--json", "--out", folder, *sys.argv[1:]]
        done = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    rows = [{**row, "path": record.shown(row["path"])} for row in done["rows"]]
    record.write("demo", rows, prompt=done["prompt"], answer=done["answer"], seconds=done["seconds"])


if __name__ == "__main__":
    main()
