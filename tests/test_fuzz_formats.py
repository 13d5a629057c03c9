"""Every format against damaged modules and configs: a clear jq exception, or a tensor that can be used; never a crash."""

from __future__ import annotations

import copy
import random
import warnings
from pathlib import Path

import mutations
import numpy as np
import pytest
from reference_dirs import directories, stored

import jq
from jq.errors import JqError, JqWarning

FOLDERS = {
    name: path
    for name, path in directories().items()
    if "/tests/reference/" in path.as_posix() or (Path(__file__).parent / "reference" / name).exists()
}
FOLDERS = {name: path for name, path in FOLDERS.items() if any(path.glob("*.safetensors")) and stored(path)[0]}
ROUNDS = 25


@pytest.mark.filterwarnings("ignore::jq.errors.JqWarning")
@pytest.mark.parametrize("name", FOLDERS)
def test_damage_is_an_error_or_harmless(name: str, tmp_path: Path) -> None:
    seed = mutations.seed_of(FOLDERS[name])
    rng = random.Random(name)
    for round_ in range(ROUNDS):
        tensors, config, sides, metadata = copy.deepcopy(seed)
        done = [mutations.mutate(rng, tensors, config, sides) for _ in range(rng.choice([1, 1, 2]))]
        folder = tmp_path / str(round_)
        mutations.write(folder, tensors, config, sides, metadata)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", JqWarning)
                state = jq.load_state(folder)
        except JqError as e:
            assert str(folder) in str(e) or any(t in str(e) for t in tensors), (
                f"{done}: names neither file nor tensor: {e}"
            )
            continue
        except Exception as e:
            raise AssertionError(f"{name}: {done}: {type(e).__name__}: {e}") from e
        for key in state:
            value = state[key]
            if hasattr(value, "dequantize"):
                assert np.asarray(value.unpack() if hasattr(value, "unpack") else 0) is not None
