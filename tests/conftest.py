"""Settings of the whole suite: CPU unless asked otherwise, `--slow`, import paths, and a cache of compiled programs."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path

import hypothesis
import pytest

pytest_plugins = ["format_results", "tiny_checkpoints"]

sys.path.insert(0, str(Path(__file__).parent))
if not os.environ.get("JAXQ_TEST_GPU"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

if os.environ.get("CI"):  # the same examples in every run there; elsewhere new ones each time
    hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
    hypothesis.settings.load_profile("ci")


# Most of the suite's time is XLA's. What one worker, process or run has compiled the others read: the key is the
# program with its options and the version of XLA. A directory for each machine, since programs fit one processor.
COMPILED = {
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".pytest_cache" / f"compiled-{platform.node()}"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
if "JAX_COMPILATION_CACHE_DIR" not in os.environ and not os.environ.get("JAXQ_TEST_GPU"):
    os.environ.update(COMPILED)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wants = {
        "slow": (config.getoption("--slow"), "takes minutes: --slow runs it"),
        "gpu": (bool(os.environ.get("JAXQ_TEST_GPU")), "needs a GPU: set JAXQ_TEST_GPU=1 where there is one"),
        "peers": (importlib.util.find_spec("bitsandbytes") is not None, "needs the original libraries: extra `peers`"),
    }
    for item in items:
        for name, (there, reason) in wants.items():
            if name in item.keywords and not there:
                item.add_marker(pytest.mark.skip(reason=reason))
