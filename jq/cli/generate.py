"""`jaxq generate`: text from a model."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from jq.cli.console import DtypeOption, JsonOption, emit, say
from jq.errors import JqError


def run(
    model: Annotated[str, typer.Argument(help="Directory, .gguf file, or Hugging Face hub id.")],
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="One or more prompts; - reads one from stdin.")
    ],
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", help="Tokens to make at most.", min=1)
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text itself, without the model's chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", min=0.0)] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens.", min=0)] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the likeliest tokens of this probability.", min=0.0, max=1.0)
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens less likely than this part of the likeliest.", min=0.0, max=1.0)
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 makes used tokens less likely.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends the text; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    dtype: DtypeOption = None,
    packed: Annotated[
        bool | None, typer.Option("--packed/--dense", help="Keep codes packed, or dequantize once at load.")
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(help="Hold keys and values as float32, bfloat16, float16, int8, float8_e4m3, int4 or mxfp4."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Continue prompts, or answer them where the model has a chat template. One prompt streams to stdout.

    Example: jaxq generate ./SmolLM2-nf4 "What is the capital of France?" -n 40
    """
    import jq
    from jq.models import tokenizer as text

    start = time.perf_counter()
    loaded = jq.load(model, dtype=dtype, packed=packed, kv_cache=kv_cache)
    load_s = time.perf_counter() - start
    chat = not raw and getattr(loaded.tokenizer, "chat_template", None) is not None
    if system is not None and not chat:
        raise typer.BadParameter("--system needs a model with a chat template, and no --raw")
    asked = [as_prompt(sys.stdin.read() if p == "-" else p, system, chat=chat) for p in prompts]
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop,
        "seed": seed,
    }
    start = time.perf_counter()
    try:
        if len(asked) == 1 and not as_json:
            answer = ""
            for piece in loaded.stream(asked[0], max_new_tokens, **options):
                answer += piece
                print(piece, end="", flush=True)
            print()
            answers = [answer]
        else:
            answers = loaded.generate(asked, max_new_tokens, **options)
    except JqError:
        raise
    except ValueError as error:  # an option or a prompt that generation refuses
        raise typer.BadParameter(str(error)) from error
    seconds = time.perf_counter() - start
    count = sum(len(loaded.tokenizer(a, add_special_tokens=False)["input_ids"]) for a in answers)
    result = {
        "model": model,
        "answers": [
            {"prompt": p, "prompt_tokens": len(text.encode(loaded.tokenizer, a)), "text": t}
            for p, a, t in zip(prompts, asked, answers)
        ],
        "new_tokens": count,
        "load_s": round(load_s, 2),
        "generate_s": round(seconds, 2),
    }
    if as_json:
        emit(result, "", as_json=True)
    elif len(asked) > 1:
        print("\n\n".join(f"> {p}\n{t}" for p, t in zip(prompts, answers)))
    say(f"loaded in {load_s:.1f} s; {count} tokens in {seconds:.1f} s, compilation included")


def as_prompt(prompt: str, system: str | None, *, chat: bool) -> Any:
    """The text itself, or a conversation for the chat template."""
    if not chat:
        return prompt
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]
