"""Files made to break a reader: pickles that change what was rebuilt, archives and indexes that lie, odd file types."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

import jq
from jq import torch_file
from jq.errors import CheckpointError, JqError

PAYLOAD = np.arange(4, dtype=np.float32).tobytes()


def push(value: object) -> bytes:
    """Opcodes that push a plain value."""
    return pickle.dumps(value, 2)[2:-1].replace(b"q\x00", b"").replace(b"q\x01", b"")


def symbol(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def tensor(shape=(4,), strides=(1,), storage: bytes = symbol("torch", "FloatStorage"), change: bytes = b"") -> bytes:
    record = b"(" + push("storage") + storage + push("0") + push("cpu") + push(4) + b"tQ" + change
    rest = push(0) + push(shape) + push(strides) + b"\x89}"
    return symbol("torch._utils", "_rebuild_tensor_v2") + b"(" + record + rest + b"tR"


def items(**values: bytes) -> bytes:
    return b"}(" + b"".join(push(k.replace("__", ".")) + v for k, v in values.items()) + b"u"


def archive(body: bytes, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        made.writestr("archive/data/0", PAYLOAD)
    return path


def test_the_opcodes_read_as_a_tensor(tmp_path: Path) -> None:
    path = archive(items(a__weight=tensor()), tmp_path / "pytorch_model.bin")
    np.testing.assert_array_equal(jq.load_state(path)["a.weight"], np.arange(4, dtype=np.float32))


BUILD = {
    # Strides of opposite sign span nothing by their sum, and would reach a megabyte outside the file.
    "strides": tensor((2, 2), (2, 1)) + push({"strides": (250_000, -250_000)}) + b"b",
    "slots": tensor() + b"(N" + push({"entry": 3}) + b"tb",
    "storage": tensor(change=push({"count": 1 << 20, "key": "0"}) + b"b"),
    "storage type": tensor(
        storage=symbol("torch", "BFloat16Storage") + push((3, "<", None, None, None, -1, -1, 0)) + b"b"
    ),
    "function": symbol("torch._utils", "_rebuild_parameter") + b"(N" + push({"__defaults__": (1,)}) + b"tb",
    "class": symbol("collections", "OrderedDict") + b"(N" + push({"items": 1}) + b"tb",
}


@pytest.mark.parametrize("case", BUILD)
def test_pickles_cannot_change_what_was_rebuilt(case: str, tmp_path: Path) -> None:
    path = archive(items(a__weight=BUILD[case]), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: data\.pkl is damaged"):
        jq.load_state(path)


def test_attributes_of_a_state_dict_are_harmless(tmp_path: Path) -> None:
    """torch itself stores `_metadata` on the OrderedDict; a hostile file may store `items` there."""
    body = symbol("collections", "OrderedDict") + b")R(" + push("a.weight") + tensor() + b"u"
    path = archive(body + push({"_metadata": 1, "items": 2, "keys": 3}) + b"b", tmp_path / "pytorch_model.bin")
    assert list(jq.load_state(path)) == ["a.weight"]


NESTED = {
    "itself": b"}q\x07(" + push("a") + b"h\x07u",
    "deep": b"".join(b"}" + push("a") for _ in range(100_000)) + b"N" + b"s" * 100_000,
    "doubling": items(a=b"N")
    + b"".join(b"q%c0}(" % (i,) + push("l") + b"h%c" % i + push("r") + b"h%cu" % i for i in range(1, 40)),
    "tuple key": b"}(" + push((1, 2)) + tensor() + b"u",
    "two names": items(a__weight=tensor(), a=items(weight=tensor())),
}


@pytest.mark.parametrize("case", NESTED)
def test_containers_that_are_no_checkpoint(case: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch_file, "MAX_VALUES", 20_000)
    path = archive(NESTED[case], tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin: .*(nested without end|expected a name|occurs twice)"
    ):
        jq.load_state(path)


def _directory_of(raw: bytearray, member: bytes) -> int:
    """Offset of a member's record in the archive's directory."""
    return raw.rfind(b"PK\x01\x02", 0, raw.rfind(member))


def _beyond(raw: bytearray) -> None:
    at = _directory_of(raw, b"archive/data/0")
    raw[at + 42 : at + 46] = struct.pack("<I", 0x7FFFFFFF)


def _encrypted(raw: bytearray) -> None:
    raw[6] |= 1
    raw[raw.find(b"PK\x01\x02") + 8] |= 1


def _unknown_compression(raw: bytearray) -> None:
    raw[8] = raw[raw.find(b"PK\x01\x02") + 10] = 99


@pytest.mark.parametrize("damage", [_beyond, _encrypted, _unknown_compression])
def test_archives_that_lie(damage, tmp_path: Path) -> None:
    path = archive(items(a__weight=tensor()), tmp_path / "pytorch_model.bin")
    raw = bytearray(path.read_bytes())
    damage(raw)
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: "):
        jq.load_state(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice_in_an_archive(tmp_path: Path) -> None:
    path = archive(items(a__weight=tensor()), tmp_path / "pytorch_model.bin")
    with zipfile.ZipFile(path, "a") as again:
        again.writestr("archive/data/0", bytes(16))
    with pytest.raises(CheckpointError, match="holds a name twice"):
        jq.load_state(path)


def safetensors(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def one(**changed: object) -> dict:
    return {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changed}}


HEADERS = {
    "an integer of 6000 digits": b'{"a":{"dtype":"F32","shape":[' + b"9" * 6000 + b'],"data_offsets":[0,4]}}',
    "a hundred axes": one(shape=[1] * 100),
    "an empty tensor of absurd size": one(shape=[2**62, 2**62, 0], data_offsets=[0, 0]),
    "half a character": b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "a list for a dtype": one(dtype=["F32"]),
    "a space first": b" {}",
    "a list": b"[" * 100_000,
    "true for a size": one(shape=[True]),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(case: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors(HEADERS[case], bytes(4)))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        jq.load_state(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"weight_map": {"a": ["one.safetensors"]}}),
        json.dumps({"weight_map": {"a": {}}}),
        json.dumps({"weight_map": {"a": None}}),
        json.dumps({"weight_map": {"a": ""}}),
        json.dumps({"weight_map": {"a": "x" * 5000}}),
        json.dumps({"weight_map": {"a": "a\0b"}}),
        json.dumps({"weight_map": {"a": "config.json"}}),
        json.dumps({"weight_map": [1]}),
        '{"metadata": {"total_size": ' + "9" * 6000 + '}, "weight_map": {}}',
        '{"weight_map": {"a": "one.safe',
        "[" * 100_000,
        "",
    ],
)
def test_index_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "one.safetensors").write_bytes(safetensors(one(), bytes(4)))
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError):
        jq.load_state(tmp_path)


def test_an_index_that_nothing_needs_is_checked_too(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors(one(), bytes(4)))
    (tmp_path / "other.safetensors.index.json").write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(CheckpointError, match=r"other\.safetensors\.index\.json: weight_map is a list"):
        jq.load_state(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.gguf"])
def test_pipes_and_directories_are_no_weights(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="no regular file"):
        jq.load_state(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match="no regular file"):
        jq.load_state(tmp_path)


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(safetensors(one(), PAYLOAD[4:8]))
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/model.safetensors").symlink_to("../blob")
    assert float(jq.load_state(tmp_path / "snapshot")["a"][0]) == 1.0
    (tmp_path / "blob").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        jq.load_state(tmp_path / "snapshot")


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "./nothing", "a/b/c"])
def test_paths_that_are_none(path: str, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(JqError):
        jq.load_state(path)


def test_state_dicts_of_torch_still_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    layer = torch.nn.Linear(3, 2)
    shared = {"bits": 4}
    stored = collections.OrderedDict(model=layer.state_dict(), a={"meta": shared}, b={"meta": shared})
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    (tmp_path / "pytorch_model.bin").write_bytes(buffer.getvalue())
    state = jq.load_state(tmp_path)
    np.testing.assert_array_equal(state["model.weight"], layer.weight.detach().numpy())
    assert set(state) == {"model.weight", "model.bias"}
    shutil.rmtree(tmp_path)
