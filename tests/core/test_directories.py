"""What lies in directories that are read and written: other files, links, shards, odd configs; what is kept, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from reference_dirs import directories

import jq
from jq import checkpoint, safetensors_file
from jq.errors import CheckpointError, FormatError, JqWarning, UnsupportedError
from jq.state import State


def checkpoint_of(folder: Path, **values: float) -> Path:
    jq.save(State({name: np.full(2, v, np.float32) for name, v in values.items()}, {"model_type": "a"}), folder)
    return folder


def test_saving_never_deletes_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "home/letters").mkdir(parents=True)
    (tmp_path / "home/letters/one.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"home: holds files \(letters\), but no checkpoint"):
        jq.save({"w": np.zeros(2, np.float32)}, tmp_path / "home")
    assert (tmp_path / "home/letters/one.txt").read_text() == "x"
    (tmp_path / "empty").mkdir()
    jq.save({"w": np.zeros(2, np.float32)}, tmp_path / "empty")


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": b'{"debug": true}', "train.py": b"x"},
        {"config.json": b"no JSON", "notes.md": b"x"},
        {"best.pt": b"x", "train.py": b"x"},
        {"training_args.bin": b"x", "trainer_state.json": b"x"},
        {"adapter_model.safetensors": b"x", "adapter_config.json": b"{}"},
    ],
)
def test_other_programs_directories_are_no_checkpoints(files: dict[str, bytes], tmp_path: Path) -> None:
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"holds files .*, but no checkpoint"):
        jq.save({"w": np.zeros(2, np.float32)}, tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == files


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("config.json", b'{"model_type": "llama"}'),
        ("config.json", b'{"architectures": ["LlamaForCausalLM"]}'),
        ("pytorch_model-00001-of-00002.bin", b""),
        ("model.safetensors.index.json", b"{}"),
        ("model.safetensors", b""),
        ("a.gguf", b""),
    ],
)
def test_what_a_model_left_is_replaced(name: str, raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o710)
    (tmp_path / "out" / name).write_bytes(raw)
    checkpoint_of(tmp_path / "out", a=1)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o710


def test_the_current_directory_is_not_replaced(tmp_path: Path, monkeypatch) -> None:
    """The process and its shell would be left in a directory that has no name any more."""
    checkpoint_of(tmp_path / "out", a=1)
    (tmp_path / "out/sub").mkdir()
    monkeypatch.chdir(tmp_path / "out/sub")
    for path in ("", "."):
        with pytest.raises(CheckpointError, match=r"the path is empty or '\.'"):
            checkpoint_of(Path(path), b=2)
    for path in ("..", "../../out", tmp_path / "out/sub"):
        with pytest.raises(CheckpointError, match="is or holds the current directory"):
            checkpoint_of(Path(path), b=2)
    assert list(jq.load_state(tmp_path / "out")) == ["a"] and os.listdir() == []
    checkpoint_of(Path("new"), b=2)
    assert list(jq.load_state("new")) == ["b"]


def test_two_renames_where_none_exchanges(tmp_path: Path, monkeypatch) -> None:
    folder = checkpoint_of(tmp_path / "out", a=1)
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    (tmp_path / ".out.old").mkdir()  # of another program
    checkpoint_of(folder, b=2)
    assert list(jq.load_state(folder)) == ["b"]
    real, calls = os.rename, []

    def second_fails(*paths: object) -> None:
        calls.append(paths)
        if len(calls) == 2:
            raise OSError("busy")
        real(*paths)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(CheckpointError, match="cannot be written: busy"):
        checkpoint_of(folder, c=3)
    assert list(jq.load_state(folder)) == ["b"]
    assert sorted(f.name for f in tmp_path.iterdir()) == [".out.old", "out"]


@pytest.mark.parametrize("fields", [{"files": {"w": "../out.safetensors"}}, {"side_files": {"../evil": b""}}])
def test_a_state_writes_plain_file_names_only(fields: dict, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a plain file name"):
        jq.save(State({"w": np.zeros(2, np.float32)}, **fields), tmp_path / "a/out")
    assert list((tmp_path / "a").iterdir()) == []


def test_configs_that_json_cannot_hold_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be written: .*float32"):
        jq.save(State({"w": np.zeros(2, np.float32)}, {"eps": np.float32(1)}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    config = {"half": "\ud800", "whole": "\u00e4"}
    jq.save(State({"w": np.zeros(2, np.float32)}, config), tmp_path / "out")
    assert jq.load_state(tmp_path / "out").config == config


def test_directories_and_hidden_files_of_a_replaced_checkpoint_stay(tmp_path: Path) -> None:
    folder = checkpoint_of(tmp_path / "out", a=1)
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5/state").write_text("5")
    (folder / ".gitattributes").write_text("lfs")
    (folder / "quantize_config.json").write_text("{}")  # would contradict the new checkpoint
    checkpoint_of(folder, b=2)
    assert (folder / "checkpoint-5/state").read_text() == "5"
    assert (folder / ".gitattributes").read_text() == "lfs"
    assert not (folder / "quantize_config.json").exists()
    assert list(jq.load_state(folder)) == ["b"]


def test_what_reading_leaves_out_outlives_saving_in_place(tmp_path: Path, monkeypatch) -> None:
    """Files beside the weights are read with them and written again; those that are not would be lost."""
    folder = checkpoint_of(tmp_path / "out", a=1)
    monkeypatch.setattr(checkpoint, "MAX_SIDE_FILE_BYTES", 8)
    beside = {
        "README.md": b"mine",
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ a }}",
        "importance.dat": b"0123456789",
        "adapter_model.safetensors": b"x",
        "adapter_config.json": b"{}",
        "optimizer.pt": b"y",
    }
    for name, raw in beside.items():
        (folder / name).write_bytes(raw)
    (folder / "pytorch_model.bin").write_bytes(b"the same weights once more")
    before = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    jq.save(jq.load_state(folder), folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == beside | before
    state = jq.load_state(folder)
    state.side_files["importance.dat"] = b"new, and long"  # what is written stays as written
    jq.save(state, folder)
    assert (folder / "importance.dat").read_bytes() == b"new, and long"


def test_saving_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    folder = checkpoint_of(tmp_path / "real", a=1)
    (tmp_path / "link").symlink_to(folder)
    checkpoint_of(tmp_path / "link", b=2)
    assert (tmp_path / "link").is_symlink()
    assert list(jq.load_state(folder)) == ["b"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_a_lazy_state_of_a_file_that_was_replaced_says_so(tmp_path: Path) -> None:
    folder = checkpoint_of(tmp_path / "out", a=1, b=2)
    state = jq.load_state(folder, lazy=True)
    assert float(state["a"][0]) == 1.0
    checkpoint_of(folder, b=4, a=3)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was written to since it was opened"):
        state["a"]


def test_what_cannot_be_written_names_the_target(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"out: cannot be written: .*No space left on device"):
        jq.save({"w": np.zeros(2, np.float32)}, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="cannot be written"):
        jq.save({"w": np.zeros(2, np.float32)}, tmp_path / ("n" * 300))


def test_names_that_the_reader_refuses_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tensor name 'a/b' looks like a path"):
        jq.save({"a/b": np.zeros(2, np.float32)}, tmp_path / "out")


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "gguf"])
def test_a_missing_shard_without_an_index_is_an_error(suffix: str, tmp_path: Path) -> None:
    for number in (1, 3):
        checkpoint_of(tmp_path / "one", **{f"w{number}": number})
        os.rename(tmp_path / "one/model.safetensors", tmp_path / f"model-0000{number}-of-00003.{suffix}")
    with pytest.raises(CheckpointError, match=rf"shard 'model-00002-of-00003\.{suffix}' is missing"):
        jq.load_state(tmp_path)


def test_complete_shards_need_no_index_and_consolidated_files_are_left_out(tmp_path: Path) -> None:
    for name, tensor in (("model-00001-of-00002", "a"), ("model-00002-of-00002", "b"), ("consolidated", "layers.a")):
        checkpoint_of(tmp_path / "one", **{tensor: 1})
        os.rename(tmp_path / "one/model.safetensors", tmp_path / f"{name}.safetensors")
    assert set(jq.load_state(tmp_path)) == {"a", "b"}


def test_one_file_beside_other_shards_is_read_as_transformers_does(tmp_path: Path) -> None:
    checkpoint_of(tmp_path, whole=1)
    checkpoint_of(tmp_path / "one", part=1)
    os.rename(tmp_path / "one/model.safetensors", tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"part": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.warns(JqWarning, match=r"model\.safetensors\.index\.json: names other files than model\.safetensors"):
        assert list(jq.load_state(tmp_path)) == ["whole"]


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_adapters_are_no_models(weights: str, tmp_path: Path) -> None:
    (tmp_path / weights).write_bytes(b"")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    with pytest.raises(CheckpointError, match=r"holds an adapter, no model; .*'some/base'"):
        jq.load_state(tmp_path)


def test_the_path_of_a_weight_file_finds_what_lies_beside_it(tmp_path: Path) -> None:
    state = State({"w": np.zeros(2, np.float32)}, {"a": 1}, side_files={"tokenizer.json": b"{}"})
    jq.save(state, tmp_path / "out")
    assert jq.load_state(tmp_path / "out/model.safetensors").side_files == {"tokenizer.json": b"{}"}


@pytest.mark.parametrize("value", [[], "", 0, False, "gptq", [1]])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantization_config_of_a_wrong_type_is_named(key: str, value: object, tmp_path: Path) -> None:
    jq.save(State({"w": np.zeros(2, np.float32)}, {key: value}), tmp_path)
    with pytest.raises(FormatError, match=rf"config\.json: {key} must be a JSON object, found"):
        jq.load_state(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({key: None, "text_config": {key: value}}))
    with pytest.raises(FormatError, match=rf"config\.json: {key} must be a JSON object, found"):
        jq.load_state(tmp_path)


@pytest.mark.parametrize("named", ["LlamaForCausalLM", ["LlamaForCausalLM"], {"a": 1}, 5, [None], []])
def test_inspect_takes_architectures_of_any_type(named: object, tmp_path: Path) -> None:
    config = {"architectures": named, "model_type": "llama"}
    jq.save(State({"w": np.zeros(2, np.float32)}, config), tmp_path / "out")
    assert jq.inspect(tmp_path / "out").architecture == ("LlamaForCausalLM" if "Llama" in str(named) else "llama")


def test_numbers_in_names_may_have_any_length(tmp_path: Path) -> None:
    names = {f"model.layers.{n}.w": np.zeros(2, np.float32) for n in ("0", "1", "9" * 5000)}
    jq.save(names, tmp_path / "out")
    assert jq.inspect(tmp_path / "out").layers == 2


def test_quantized_parts_of_a_model_name_their_method(tmp_path: Path) -> None:
    jq.save(
        State({"w": np.zeros(2, np.float32)}, {"llm_config": {"quantization_config": {"quant_method": "x"}}}), tmp_path
    )
    with pytest.raises(UnsupportedError, match="quant_method 'x' is not known") as caught:
        jq.load_state(tmp_path)
    assert str(caught.value).count(str(tmp_path)) == 1


@pytest.mark.parametrize(
    ("directory", "suffix"),
    [
        ("bnb-nf4-dq-bf16storage", "weight_format"),
        ("ct-w4a16-g32-asym", "weight_global_scale"),
        ("ct-nvfp4", "weight_zero_point"),
        ("hqq-4-axis1-g64-hf", "zero_q"),
    ],
)
@pytest.mark.parametrize("lazy", [False, True])
def test_what_a_format_has_no_use_for_is_kept(directory: str, suffix: str, lazy: bool, tmp_path: Path) -> None:
    source = directories()[directory]
    opened = checkpoint.open_checkpoint(source)
    arrays = {name: np.array(opened.read(name)) for name in opened.entries}
    prefix = "model.layers.0.mlp.up_proj"
    arrays[f"{prefix}.{suffix}"] = np.arange(3, dtype=np.uint8)
    (tmp_path / "config.json").write_text(json.dumps(opened.config))
    tensors = [(name, (a.dtype, a.shape), lambda a=a: a) for name, a in arrays.items()]
    safetensors_file.write(tmp_path / "model.safetensors", tensors, opened.merged_metadata)
    state = jq.load_state(tmp_path, lazy=lazy)
    plain = jq.quantized(jq.load_state(source))
    for name, q in jq.quantized(state).items():
        np.testing.assert_array_equal(q.to_numpy()._dense(), plain[name].to_numpy()._dense())
    jq.save(state, tmp_path / "out")
    saved = checkpoint.open_checkpoint(tmp_path / "out")
    assert set(saved.entries) == set(arrays)
    assert all(saved.read(name).tobytes() == a.tobytes() for name, a in arrays.items())


def test_what_a_format_has_no_use_for_is_kept_from_torch_files(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    opened = checkpoint.open_checkpoint(directories()["ct-fp8-static"])
    arrays = {name: np.array(opened.read(name)) for name in opened.entries}
    arrays["model.layers.0.mlp.up_proj.weight_shape"] = np.arange(3, dtype=np.int64)
    own = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
    given = {
        name: torch.from_numpy(a.view(f"i{a.itemsize}")).view(own[str(a.dtype)])
        if str(a.dtype) in own
        else torch.from_numpy(a)
        for name, a in arrays.items()
    }
    torch.save(given, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(opened.config))
    jq.save(jq.load_state(tmp_path), tmp_path / "out")
    saved = checkpoint.open_checkpoint(tmp_path / "out")
    assert set(saved.entries) == set(arrays)
    assert all(saved.read(name).tobytes() == a.tobytes() for name, a in arrays.items())


def test_downloads_leave_out_what_nothing_reads(tmp_path: Path, monkeypatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    there = ["config.json", "model.safetensors", "original/consolidated.00.pth", "onnx/model.onnx", "tf_model.h5"]
    checkpoint_of(tmp_path / "snapshot", w=1)
    taken: list[str] = []

    def download(name: str, *, revision: str | None, ignore_patterns: list[str]) -> str:
        assert (name, revision) == ("some/model", "v1")
        taken.extend(filter_repo_objects(there, ignore_patterns=ignore_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert list(jq.load_state("some/model", revision="v1")) == ["w"]
    assert taken == ["config.json", "model.safetensors"]
