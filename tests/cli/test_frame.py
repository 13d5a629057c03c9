"""What every command shares: help, exit codes, where output goes."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import jq
import jq.inspect
from jq.cli import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(jaxq, command):
    ran = jaxq(command, "--help")
    assert ran.code == 0
    assert f"Example: jaxq {command}" in re.sub(r"\s+", " ", ran.out)
    assert "--json" in ran.out


def test_help_lists_all_commands(jaxq):
    ran = jaxq("--help")
    assert ran.code == 0
    assert all(command in ran.out for command in COMMANDS)
    assert jaxq().out == ran.out


@pytest.mark.parametrize(
    "words, hint",
    [
        (["nonsense"], "(see: jaxq --help)"),
        (["convert", "x", "y", "--to", "nonsense"], "none of gptq, awq, compressed-tensors,"),
        (["inspect"], "model"),
        (["inspect", "x", "--what"], "--what"),
        (["eval", "x", "--window", "1"], "--window"),
        (["eval", "x", "--text", "/nowhere/text"], "/nowhere/text"),
        (["quantize", "x", "y", "--method", "nonsense"], "methods"),
        (["quantize", "x", "y", "--method", "rtn", "--block-size", "64"], "block_size"),
        (["quantize", "x", "y", "--method", "rtn", "--set", "bits"], "key=value"),
    ],
)
def test_wrong_use_is_exit_code_2(jaxq, words, hint):
    ran = jaxq(*words)
    assert ran.code == 2
    assert ran.out == ""
    assert hint in ran.err
    assert ran.err.count("\n") == 1


def test_the_version(jaxq):
    ran = jaxq("--version")
    assert (ran.code, ran.out) == (0, f"jaxq {jq.__version__}\n")


def test_ctrl_c_is_exit_code_130_and_no_traceback(jaxq, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["jq.inspect"], "inspect", interrupted)
    ran = jaxq("inspect", "x")
    assert (ran.code, ran.out, ran.err.strip()) == (130, "", "jaxq: error: interrupted")


def test_a_failure_is_one_line_and_exit_code_1(jaxq, tmp_path):
    ran = jaxq("inspect", tmp_path / "nothing", "--json")
    assert ran.code == 1
    assert ran.out == ""
    assert re.fullmatch(r"jaxq: error: .*nothing: no such file or directory\n", ran.err)


def test_a_damaged_file_names_itself(jaxq, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    ran = jaxq("inspect", tmp_path)
    assert ran.code == 1
    assert "model.safetensors" in ran.err
    assert ran.err.count("\n") == 1


def test_an_unexpected_failure_is_one_line_too(jaxq, monkeypatch):
    import jq.report.format_table

    def broken():
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(jq.report.format_table, "rows", broken)
    ran = jaxq("formats")
    assert ran.code == 1
    assert "RuntimeError: two lines" in ran.err
    assert ran.err.count("\n") == 1
    monkeypatch.setenv("JAXQ_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        main(["formats"])


def test_python_m_jq_is_the_same_program(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "jq", "inspect", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    assert "no *.safetensors" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_progress_is_off_where_stderr_is_no_terminal(capsys):
    from jq.cli.console import progress

    with progress("work") as advance:
        advance(1, 2, "half")
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_tells_the_time_left(monkeypatch):
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    from jq.cli.console import progress

    with progress("work") as advance:
        advance(1, 2, "half")
    shown = terminal.getvalue()
    assert "work" in shown and "left" in shown


@pytest.mark.parametrize(
    "words, hint",
    [
        (["--top-k", "-1"], "--top-k"),
        (["--top-p", "1.5"], "--top-p"),
        (["--min-p", "-0.5"], "--min-p"),
        (["--temperature", "-1"], "--temperature"),
        (["--dtype", "float7"], "float32, bfloat16"),
        (["--dtype", "int8"], "float32, bfloat16"),
        (["--repetition-penalty", "0"], "repetition_penalty"),
        (["--stop", ""], "stop"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
    ],
)
def test_wrong_options_of_generation_are_wrong_use(jaxq, tiny, words, hint):
    ran = jaxq("generate", tiny, "The light", *words)
    assert (ran.code, ran.out) == (2, "")
    assert hint in ran.err and ran.err.count("\n") == 1


def test_an_empty_prompt_is_wrong_use(jaxq, tiny):
    ran = jaxq("generate", tiny, "", "-n", "2")
    assert ran.code == 2
    assert "at least one token" in ran.err and ran.err.count("\n") == 1


@pytest.mark.parametrize("raw, said", [(b"\xff\xfe\x00", "is no UTF-8 text"), (b" \n", "holds no text")])
def test_texts_that_are_none(jaxq, tiny, tmp_path, raw, said):
    (tmp_path / "text").write_bytes(raw)
    ran = jaxq("eval", tiny, "--text", tmp_path / "text")
    assert ran.code == 1
    assert said in ran.err and "unexpected" not in ran.err and ran.err.count("\n") == 1


@pytest.mark.parametrize("words", [("inspect", "MODEL", "--json"), ("formats",)])
def test_a_reader_that_goes_away_is_no_error(tiny, words):
    command = [sys.executable, "-m", "jq", *(str(tiny) if w == "MODEL" else w for w in words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    said = process.stderr.read()
    assert (process.wait(), said) == (0, b"")
