"""Reading torch files without torch: damaged and hostile ones, and those that torch wrote.

They are written with the pickle module alone, in the layout of torch.save.
"""

from __future__ import annotations

import collections
import json
import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jq
from jq import torch_file
from jq.errors import CheckpointError, JqError, UnsupportedError


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def torch_zip(path: Path, data_pkl: bytes, members: dict[str, bytes] = {}, compression=zipfile.ZIP_STORED) -> Path:  # noqa: B006
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        archive.writestr("archive/byteorder", "little")
        for name, raw in members.items():
            archive.writestr(f"archive/data/{name}", raw)
    return path


def call(module: str, name: str, *arguments: bytes) -> bytes:
    """Opcodes that push module.name(*arguments)."""
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n(" + b"".join(arguments) + b"tR"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


HOSTILE = {
    "os.system": call("os", "system", text("touch PWNED")),
    "builtins.eval": call("builtins", "eval", text("open('PWNED', 'w')")),
    "builtins.getattr": call("builtins", "getattr", text("a"), text("b")),
    "subprocess.Popen": call("subprocess", "Popen", text("touch PWNED")),
    "nested pickle": call("pickle", "loads", text("x")),
    "torch.load": call("torch", "load", text("x")),
    "a jq function": call("jq.state", "save", text("x")),
    "dotted name": call("collections", "OrderedDict.__init__.__globals__"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles_call_nothing(case: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch_zip(tmp_path / "pytorch_model.bin", pickled(HOSTILE[case]))
    with pytest.raises(CheckpointError, match=r"Refused|damaged"):
        jq.load_state(tmp_path)
    assert not (tmp_path / "PWNED").exists()


def tensor_record(shape=(2, 3), strides=(3, 1), offset=0, count=6, key="0") -> bytes:
    def integers(values) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"

    storage = (
        b"("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text(key)
        + text("cpu")
        + b"J"
        + struct.pack("<i", count)
        + b"tQ"
    )
    empty = b"ccollections\nOrderedDict\n)R"
    body = storage + b"J" + struct.pack("<i", offset) + integers(shape) + integers(strides) + b"\x89" + empty
    return b"}" + text("layer.weight") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + body + b"tR" + b"s"


def test_torch_tensors_are_read(tmp_path: Path) -> None:
    data = np.arange(6, dtype=np.float32)
    torch_zip(tmp_path / "pytorch_model.bin", pickled(tensor_record()), {"0": data.tobytes()})
    np.testing.assert_array_equal(jq.load_state(tmp_path)["layer.weight"], data.reshape(2, 3))
    torch_zip(tmp_path / "pytorch_model.bin", pickled(tensor_record((3, 2), (1, 3))), {"0": data.tobytes()})
    np.testing.assert_array_equal(jq.load_state(tmp_path)["layer.weight"], data.reshape(2, 3).T)


@pytest.mark.parametrize(
    ("record", "members", "message"),
    [
        (tensor_record(), {}, "is missing"),
        (tensor_record(count=60), {"0": bytes(8)}, r"shape \(2, 3\) needs 6 elements"),
        (tensor_record(shape=(2, 3000)), {"0": bytes(24)}, "needs 3003 elements"),
        (tensor_record(shape=(10000, 10000), strides=(0, 0)), {"0": bytes(24)}, "a tensor of shape"),
        (tensor_record(offset=4), {"0": bytes(24)}, "needs 10 elements"),
        (tensor_record(shape=(-2, 3)), {"0": bytes(24)}, "is damaged"),
        (tensor_record(strides=(3,)), {"0": bytes(24)}, "is damaged"),
        (tensor_record(key="../../../etc/passwd"), {"0": bytes(24)}, "is missing"),
    ],
)
def test_damaged_torch_tensors(record: bytes, members: dict, message: str, tmp_path: Path) -> None:
    torch_zip(tmp_path / "pytorch_model.bin", pickled(record), members)
    with pytest.raises(CheckpointError, match=message):
        jq.load_state(tmp_path)


def test_compressed_and_old_torch_files(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch_zip(file, pickled(tensor_record()), {"0": bytes(24)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed"):
        jq.load_state(tmp_path)
    file.write_bytes(pickle.dumps({"a": 1}, 2))
    with pytest.raises(UnsupportedError, match=r"torch < 1\.6"):
        jq.load_state(tmp_path)
    file.write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match=r"not a torch file.*a model.s directory"):
        jq.load_state(tmp_path)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_fuzzed_pickles_never_escape(data, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    blob = bytearray(pickled(tensor_record()))
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(blob) - 1))
        blob[where : where + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    file = torch_zip(folder / "pytorch_model.bin", bytes(blob), {"0": bytes(24)})
    try:
        tensors, _ = torch_file.flatten(torch_file.read(file))
    except JqError:
        return
    for tensor in tensors.values():
        tensor.read().tobytes()


def test_torch_saves_what_we_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    weights = collections.OrderedDict(
        a=torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,
        b=torch.ones(3, dtype=torch.int64),
        c=torch.nn.Parameter(torch.zeros(2)),
    )
    torch.save(weights, tmp_path / "pytorch_model.bin")
    state = jq.load_state(tmp_path)
    assert state["a"].dtype == ml_dtypes.bfloat16 and state["a"].shape == (3, 2) and float(state["a"][2, 1]) == 5
    assert state["b"].dtype == np.int64 and state["c"].shape == (2,)


def test_a_tied_head_is_held_once(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    table = torch.ones(4, 2)
    torch.save({"model.embed_tokens.weight": table, "lm_head.weight": table}, tmp_path / "pytorch_model.bin")
    assert set(jq.load_state(tmp_path)) == {"model.embed_tokens.weight", "lm_head.weight"}
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    assert set(jq.load_state(tmp_path)) == {"model.embed_tokens.weight"}


TORCH_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "complex64", "bool", "uint8", "int8", "int16", "int32", "int64"),
    *("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    "float8_e8m0fnu",
)


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_every_dtype_that_torch_saves(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    dtype = getattr(torch, name)
    raw = torch.arange(6 * torch.zeros(1, dtype=dtype).element_size(), dtype=torch.uint8) % 2
    whole = raw.view(dtype).reshape(2, 3)
    torch.save({"a": whole.T, "b": whole[1, 1:]}, tmp_path / "pytorch_model.bin")
    found = jq.load_state(tmp_path)
    assert found["a"].dtype.name == name and found["a"].shape == (3, 2) and found["b"].shape == (2,)
    size = raw.numel() // 6
    expected = raw.numpy().reshape(2, 3, size)
    np.testing.assert_array_equal(
        np.ascontiguousarray(found["a"]).view(np.uint8).reshape(3, 2, size), expected.swapaxes(0, 1)
    )
    np.testing.assert_array_equal(np.ascontiguousarray(found["b"]).view(np.uint8).reshape(2, size), expected[1, 1:])
