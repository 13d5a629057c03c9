"""Readers against damaged and hostile files; atomic writes."""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jq
from jq import checkpoint, safetensors_file
from jq.errors import CheckpointError, JqError, UnsupportedError


def make(path: Path, header: dict | bytes, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str = "F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD_HEADERS = {
    "no JSON": (b"{", b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "a list": (b"[]", b"", "must be a JSON object"),
    "deep nesting": (b"[" * 100_000, b"", "not valid JSON"),
    "duplicate key": (b'{"a": {}, "a": {}}', b"", "'a' occurs twice"),
    "no offsets": ({"w": {"dtype": "F32", "shape": [2]}}, bytes(8), "w: entry must have"),
    "unknown dtype": ({"w": entry("Q7")}, bytes(8), "w: unknown dtype 'Q7'"),
    "negative shape": ({"w": entry(shape=(-2,))}, bytes(8), "w: shape must be"),
    "float shape": ({"w": entry(shape=(2.0,))}, bytes(8), "w: shape must be"),
    "boolean shape": ({"w": entry(shape=(True, 2))}, bytes(8), "w: shape must be"),
    "absurd shape": ({"w": entry(shape=(2**62, 2**62))}, bytes(8), "w: F32"),
    "offsets past the end": ({"w": entry(shape=(4,), offsets=(0, 16))}, bytes(8), "w: ends at byte"),
    "falling offsets": ({"w": entry(offsets=(8, 0))}, bytes(8), "w: data_offsets must be"),
    "wrong span": ({"w": entry(shape=(3,))}, bytes(8), r"w: F32\[3\] takes 12 bytes, data_offsets span 8"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "b: overlaps"),
    "gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), "b: leaves a gap of 4 bytes"),
    "trailing bytes": ({"a": entry()}, bytes(9), "1 bytes after the last tensor"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "__metadata__ must map strings"),
    "path as a name": ({"../../etc/passwd": entry()}, bytes(8), "looks like a path"),
    "backslash name": ({"a\\b": entry()}, bytes(8), "looks like a path"),
    "empty name": ({"": entry()}, bytes(8), "looks like a path"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_are_named(case: str, tmp_path: Path) -> None:
    header, data, message = BAD_HEADERS[case]
    file = make(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        safetensors_file.read_header(file)
    assert "model.safetensors" in str(caught.value)


def test_truncated_and_absurd_lengths(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for raw in (b"", b"\x01\x02", (2**63).to_bytes(8, "little") + b"{}", (100).to_bytes(8, "little") + b"{}"):
        file.write_bytes(raw)
        with pytest.raises(CheckpointError, match="truncated"):
            safetensors_file.read_header(file)
    with file.open("wb") as f:
        f.write((safetensors_file.MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        f.truncate(safetensors_file.MAX_HEADER_BYTES + 100)
    with pytest.raises(CheckpointError, match="more than the format's"):
        safetensors_file.read_header(file)


def test_sub_byte_dtypes_are_refused_by_name(tmp_path: Path) -> None:
    file = make(tmp_path / "model.safetensors", {"w": entry("F4", (4,), (0, 2))}, bytes(2))
    with pytest.raises(UnsupportedError, match="w: dtype F4"):
        safetensors_file.read_header(file)


@pytest.mark.parametrize("dtype", sorted(safetensors_file.DTYPES))
def test_every_dtype_is_written_and_read(dtype: str, tmp_path: Path) -> None:
    kind = safetensors_file.DTYPES[dtype]
    data = (
        np.arange(24, dtype=np.uint8) % 2
        if dtype == "BOOL"
        else np.random.default_rng(0).integers(0, 256, 24, np.uint8)
    )
    array = data.view(kind)
    file = tmp_path / "model.safetensors"
    safetensors_file.write(file, [("w", (array.dtype, array.shape), lambda: array)], {"k": "v"})
    entries, metadata = safetensors_file.read_header(file)
    assert metadata == {"k": "v"}
    assert entries["w"].read().dtype == kind and entries["w"].read().tobytes() == array.tobytes()
    assert entries["w"].offset % 64 == 0
    if dtype in ("F32", "BF16", "I64"):
        assert jq.load_state(tmp_path)["w"].dtype == kind


def test_transposed_arrays_are_written_in_order(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    safetensors_file.write(tmp_path / "a.safetensors", [("w", (array.dtype, array.shape), lambda: array)], {})
    np.testing.assert_array_equal(safetensors_file.read_header(tmp_path / "a.safetensors")[0]["w"].read(), array)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_fuzzed_safetensors_never_crash(data, tmp_path_factory) -> None:
    """Any damage to a good file is either a JqError or leaves every tensor inside the file."""
    folder = tmp_path_factory.mktemp("fuzz")
    good = json.dumps({"__metadata__": {"format": "pt"}, "a": entry(), "b": entry("U8", (2, 4), (8, 16))}).encode()
    blob = bytearray(len(good).to_bytes(8, "little") + good + bytes(range(16)))
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(blob) - 1))
        blob[where : where + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    (folder / "model.safetensors").write_bytes(blob)
    try:
        state = jq.load_state(folder)
    except JqError as e:
        assert "model.safetensors" in str(e)
        return
    for name in state:
        np.asarray(state[name]).tobytes()


def directory(path: Path, shards: dict[str, dict[str, np.ndarray]], weight_map: dict[str, str] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    for file, tensors in shards.items():
        safetensors_file.write(path / file, [(k, (v.dtype, v.shape), lambda v=v: v) for k, v in tensors.items()], {})
    if weight_map is not None:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


ONE, TWO = np.float32([1, 2]), np.float32([3])


def test_shards_are_read_and_kept(tmp_path: Path) -> None:
    source = directory(
        tmp_path / "in",
        {"x-1.safetensors": {"a": ONE}, "x-2.safetensors": {"b": TWO}},
        {"a": "x-1.safetensors", "b": "x-2.safetensors"},
    )
    state = jq.load_state(source)
    jq.save(state, tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "x-1.safetensors",
        "x-2.safetensors",
        "model.safetensors.index.json",
    }
    np.testing.assert_array_equal(jq.load_state(tmp_path / "out")["b"], TWO)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../x-1.safetensors"}, "not a plain file name"),
        ({"a": "/etc/passwd"}, "not a plain file name"),
        ({"a": ".."}, "not a plain file name"),
        ({"a": 7}, "not a plain file name"),
        ({"a": "missing.safetensors"}, "'missing.safetensors' is missing"),
        ({"a": "x-1.safetensors", "gone": "x-1.safetensors"}, "gone: should be in 'x-1.safetensors', found in None"),
        ({}, "no weight_map"),
    ],
)
def test_bad_index_files(weight_map: dict, message: str, tmp_path: Path) -> None:
    source = directory(tmp_path / "in", {"x-1.safetensors": {"a": ONE}}, weight_map)
    with pytest.raises(CheckpointError, match=message):
        jq.load_state(source)


def test_a_tensor_in_two_shards_is_an_error(tmp_path: Path) -> None:
    source = directory(
        tmp_path / "in",
        {"x-1.safetensors": {"a": ONE}, "x-2.safetensors": {"a": TWO}},
        {"a": "x-1.safetensors", "b": "x-2.safetensors"},
    )
    with pytest.raises(CheckpointError, match="a: stored in another file too"):
        jq.load_state(source)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        jq.load_state(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or directory"):
        jq.load_state(tmp_path / "a" / "b")
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"config\.json: file is not valid JSON"):
        jq.load_state(tmp_path)


def test_unknown_method_lists_the_known(tmp_path: Path) -> None:
    source = directory(tmp_path / "in", {"model.safetensors": {"a": ONE}})
    (source / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "nonsense"}}))
    with pytest.raises(UnsupportedError, match=r"'nonsense' is not known here; known methods: .*gptq"):
        jq.load_state(source)


# Writing.


def test_a_failed_save_leaves_the_old_directory(tmp_path: Path) -> None:
    source = directory(tmp_path / "in", {"model.safetensors": {"a": ONE}})
    jq.save(jq.load_state(source), tmp_path / "out")
    state = jq.load_state(source)
    bad = state.replace({**dict(state), "b": np.zeros(2, np.complex128)})
    with pytest.raises(UnsupportedError, match="b: dtype complex128"):
        jq.save(bad, tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []
    np.testing.assert_array_equal(jq.load_state(tmp_path / "out")["a"], ONE)


def test_saving_over_the_source_keeps_it_readable(tmp_path: Path) -> None:
    source = directory(tmp_path / "in", {"model.safetensors": {"a": ONE}})
    state = jq.load_state(source, lazy=True)
    jq.save(state, source)
    np.testing.assert_array_equal(jq.load_state(source)["a"], ONE)


def test_kill_at_any_moment_leaves_old_or_new(tmp_path: Path) -> None:
    """A process that saves in a loop is killed at random times; the directory is always one whole version."""
    script = textwrap.dedent(
        """
        import sys, numpy as np
        from pathlib import Path
        from jq import safetensors_file
        from jq.directory import replacing
        version = 0
        print("ready", flush=True)
        while True:
            version += 1
            with replacing(Path(sys.argv[1])) as folder:
                for part in range(3):
                    array = np.full(50_000, version, np.int32)
                    safetensors_file.write(folder / f"{part}.safetensors", [("v", (array.dtype, array.shape), lambda: array)], {})
        """
    )
    target = tmp_path / "out"
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(target)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(float(rng.uniform(0.05, 0.3)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if target.exists():
            parts = [safetensors_file.read_header(target / f"{i}.safetensors")[0]["v"].read() for i in range(3)]
            versions = {int(v) for p in parts for v in np.unique(p)}
            assert len(versions) == 1
            seen |= versions
    assert seen


def test_hub_ids_that_cannot_be_reached_say_so(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="no such directory, and the hub did not give it"):
        checkpoint.resolve("nobody/nothing-here")


def test_lazy_state_reads_at_access(tmp_path: Path, monkeypatch) -> None:
    source = directory(tmp_path / "in", {"model.safetensors": {"a": ONE}})
    reads: list[str] = []
    read = checkpoint.Checkpoint.read
    monkeypatch.setattr(checkpoint.Checkpoint, "read", lambda self, name: (reads.append(name), read(self, name))[1])
    state = jq.load_state(source, lazy=True)
    assert "a" in state and reads == []
    for count in (1, 2):
        assert isinstance(state["a"], np.ndarray)
        np.testing.assert_array_equal(state["a"], ONE)
        assert len(reads) == 2 * count
    assert len(reads) == 4
    shallow = copy.copy(state)
    assert len(reads) == 4 and shallow["a"] is not shallow["a"]  # lazy too


def test_a_lazy_state_is_pickled_with_its_tensors(tmp_path: Path) -> None:
    source = directory(tmp_path / "in", {"model.safetensors": {"a": ONE}})
    kept = pickle.dumps(jq.load_state(source, lazy=True))
    (source / "model.safetensors").unlink()
    state = pickle.loads(kept)
    np.testing.assert_array_equal(state["a"], ONE)
    assert state.config == jq.load_state(directory(tmp_path / "again", {"model.safetensors": {"a": ONE}})).config
