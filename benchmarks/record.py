"""Where benchmark results go: one JSON file a question, with the machine, the versions and the command that made it."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("jax", "flax", "numpy", "torch", "transformers", "bitsandbytes", "gemlite", "xllamacpp", "gguf")


def circumstances() -> dict[str, Any]:
    """Machine, versions, commit, date, load: what a figure means nothing without."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "command": "python "
        + shlex.join([os.path.relpath(sys.argv[0], RESULTS.parent.parent), *map(shown, sys.argv[1:])]),
        "commit": commit.stdout.strip(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "load_average": round(os.getloadavg()[0], 1),
    }


def shown(argument: str) -> str:
    """A command's argument as it is recorded: of an absolute path only the name, the rest is this machine's business."""
    return Path(argument).name if argument.startswith("/") else argument


def processor() -> str:
    """The processor's name as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(name: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    """Writes results/NAME.json: {"made": circumstances, ..., "rows": rows}."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"made": circumstances(), **more, "rows": rows}, indent=1) + "\n")
    print(f"wrote {path}", file=sys.stderr)
    return path


def lines(command: list[str], **environment: str) -> list[dict[str, Any]]:
    """Runs a program that prints JSON lines, and returns them; its stderr goes to ours."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environment})
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def wikitext(given: str | None) -> Path:
    """WikiText-2's raw test split: the path given, else $JAXQ_DATA/wikitext2-test.txt, else ../shared/data."""
    if given:
        return Path(given)
    for folder in (os.environ.get("JAXQ_DATA"), Path(__file__).parents[2] / "shared" / "data"):
        if folder and (Path(folder) / "wikitext2-test.txt").is_file():
            return Path(folder) / "wikitext2-test.txt"
    raise SystemExit("wikitext2-test.txt (WikiText-2 raw test split) is needed: --text FILE, or JAXQ_DATA=its folder")
