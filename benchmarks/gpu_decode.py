"""A whole model of Llama-3-8B shapes (random weights) on one GPU: decode and prefill through `jq.models`.

    python benchmarks/gpu_decode.py                       # everything; writes benchmarks/results/gpu_decode_<card>.json
    python benchmarks/gpu_decode.py --weights w4a16_g128 --batch 1
    python benchmarks/gpu_decode.py --lower               # no GPU: lowers every program for CUDA and prints its size

Real attention and cache: `context` tokens are in the cache when the clock starts. The whole step (all layers, output
matrix, greedy choice) is one program; "host" calls it once a token without waiting, "device" loops over the tokens in one
program. The bound is the time of reading all weights once a step. torch.compile runs the same shapes beside it
(`peer_decode_torch.py`) where torch is installed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import functools
import gc
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# A loop body of few kernels is worth a command buffer too; read once, when the backend starts.
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_graph_min_graph_size=1")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")  # the torch peer runs beside this process
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import record

from jq.algorithms.codebook4 import NF4
from jq.load import build
from jq.models import decoder, functional, llama, steps
from jq.models.generate import plan
from jq.qtensor import Affine, Codebook, Grouping, QTensor
from jq.state import State

HERE = Path(__file__).resolve().parent
CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "dtype": "bfloat16",
}
ROOFLINE_GBS = {"h100": 3110.0}  # plain CUDA read of 4 GiB


@functools.partial(jax.jit, static_argnums=1)
def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16) * 0.02


@functools.partial(jax.jit, static_argnums=1)
def words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.bits(key, shape, jnp.uint32)


def weight(kind: str, n: int, k: int, key: jax.Array) -> Any:
    """A random [n, k] weight of the given kind."""
    if kind == "bf16":
        return normal(key, (n, k))
    codes = words(key, (n, k // 8))
    if kind == "w4a16_g128":
        scales = jnp.full((n, k // 128), 0.004, jnp.bfloat16)
        return Affine(codes, scales, code_bits=4, zero_point=8, grouping=Grouping("block", 1, 128), dtype="bfloat16")
    absmax = jnp.full((n, k // 64), 0.03, jnp.float32)
    return Codebook(codes, jnp.asarray(NF4, jnp.float32), absmax, code_bits=4, grouping=Grouping("block", 1, 64))


def model_of(kind: str, head: str, layers: int) -> Any:
    """A `CausalLM` of random weights, q/k/v and gate/up as one matrix each."""
    spec = llama.spec({**CONFIG, "num_hidden_layers": layers}).replace(fused=True)
    hidden, wide, narrow = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    keys = iter(jax.random.split(jax.random.key(0), 4 * layers + 2))
    ones = jnp.ones(hidden, jnp.bfloat16)
    tensors: dict[str, Any] = {
        "model.embed_tokens.weight": normal(next(keys), (spec.vocab_size, hidden)),
        "model.norm.weight": ones,
        "lm_head.weight": weight("w4a16_g128" if head == "w4" else "bf16", spec.vocab_size, hidden, next(keys)),
    }
    shapes = {
        "self_attn.qkv_proj": (wide + 2 * narrow, hidden),
        "self_attn.o_proj": (hidden, wide),
        "mlp.gate_up_proj": (2 * spec.intermediate_size, hidden),
        "mlp.down_proj": (hidden, spec.intermediate_size),
    }
    for i in range(layers):
        path = f"model.layers.{i}."
        tensors |= {path + name + ".weight": weight(kind, n, k, next(keys)) for name, (n, k) in shapes.items()}
        tensors |= {path + "input_layernorm.weight": ones, path + "post_attention_layernorm.weight": ones}
    return build(State(tensors, CONFIG), dtype=jnp.bfloat16, packed=True, spec=spec)


def weight_bytes(model: Any) -> int:
    """Bytes that one step reads: every weight but the embedding table."""
    body = model.model
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(functional.split(model)[1]))
    extras = sum(
        leaf.nbytes
        for q in jax.tree.leaves(functional.split(model)[1], is_leaf=_is_q)
        if _is_q(q)
        for leaf in jax.tree.leaves(q.extras)
    )
    return held - extras - body.embed_tokens.weight.get_value().nbytes


def _is_q(x: Any) -> bool:
    return isinstance(x, QTensor)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def one_step(graph: Any, state: Any, cache: Any, token: jax.Array, slot: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
    """One greedy token: (cache, token int32[B], slot + 1)."""
    return _step(functional.join(graph, state), cache, token, slot)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def many_steps(
    graph: Any, state: Any, cache: Any, token: jax.Array, slot: jax.Array, count: jax.Array
) -> tuple[Any, jax.Array, jax.Array]:
    """`count` greedy tokens in one loop on the device."""
    model = functional.join(graph, state)
    return jax.lax.fori_loop(0, count, lambda _, c: _step(model, *c), (cache, token, slot))


def _step(model: Any, cache: Any, token: jax.Array, slot: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
    positions = jnp.broadcast_to(slot, (token.shape[0], 1))
    hidden, cache = model.model(token[:, None], positions, None, cache, slot)
    logits = decoder.head(model.model, model.lm_head, hidden[:, 0], step=True)
    return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32), slot + 1


def best_of(f: Any, runs: int) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(f())
        times.append(time.perf_counter() - start)
    return min(times)


Program = tuple[Any, tuple]  # a jitted function and its arguments


def compile_all(programs: list[Program]) -> list[tuple[Any, float]]:
    """(executable, seconds of tracing, lowering and compiling) of each; compiled side by side."""
    lowered = []
    for function, args in programs:
        start = time.perf_counter()
        lowered.append((function.lower(*args), time.perf_counter() - start))

    def finish(program: tuple[Any, float]) -> tuple[Any, float]:
        start = time.perf_counter()
        return program[0].compile(), program[1] + time.perf_counter() - start

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(finish, lowered))


def compile_both(programs: list[Program]) -> list[tuple[Any, float, float]]:
    """(executable, cold seconds, seconds of a second process, by JAX's persistent cache) of each."""
    cold = compile_all(programs)
    jax.clear_caches()
    return [(made, first, again) for (_, first), (made, again) in zip(cold, compile_all(programs), strict=True)]


def decode_rows(model: Any, batches: list[int], context: int, count: int, loops: list[str]) -> list[dict]:
    graph, state = functional.split(model)
    slots, slot, many = steps.bucket(context + 2 * count, 128), jnp.int32(context), jnp.int32(count)
    cases = [(batch, loop) for batch in batches for loop in loops]
    shapes = {b: jax.eval_shape(functools.partial(model.model.empty_cache, b, slots)) for b in batches}
    programs: list[Program] = []
    for batch, loop in cases:
        args = (graph, state, shapes[batch], jax.ShapeDtypeStruct((batch,), jnp.int32), slot)
        programs.append((one_step, args) if loop == "host" else (many_steps, (*args, many)))
    rows = []
    for (batch, loop), (run, cold, warm) in zip(cases, compile_both(programs), strict=True):
        cache = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes[batch])
        token, rest = jnp.ones(batch, jnp.int32), () if loop == "host" else (many,)

        def tokens() -> Any:
            nonlocal cache
            t, s = token, slot  # noqa: B023
            for _ in range(count if loop == "host" else 1):  # noqa: B023
                cache, t, s = run(state, cache, t, s, *rest)  # noqa: B023
            return t

        tokens()
        seconds = best_of(tokens, 5)
        rows.append(
            {
                "batch": batch,
                "context": context,
                "loop": loop,
                "tok_s": batch * count / seconds,
                "compile_s": cold,
                "compile_warm_s": warm,
            }
        )
    return rows


def prefill_seconds(model: Any, length: int) -> float:
    graph, state = functional.split(model)
    chosen = plan({}, max_new_tokens=2, do_sample=False, eos_token_id=[], stop=None, seed=0, options={})
    settings, starts = chosen.settings(1), jnp.zeros(1, jnp.int32)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 1000, (1, length)), jnp.int32)
    arguments = (graph, state, steps.bucket(length + 2, 128), chosen.switches, ids, starts, settings)
    run = functools.partial(steps.prefill, *arguments)
    jax.block_until_ready(run())
    return best_of(lambda: run()[0], 5)


def lower_all(kinds: list[str], heads: list[str], batches: list[int], layers: int) -> None:
    """Lowers every program for CUDA on a machine without one; the weights are shapes."""
    import pallas_kernels.api as api

    # Everything that asks for the device gets the answer of an H100.
    api.device_reason.cache_clear()
    api.device_reason = lambda: None
    jq_matmul = sys.modules["jq.matmul"]
    jq_matmul._on_gpu = lambda: True
    backend, jax.default_backend = jax.default_backend, lambda: "gpu"
    try:
        for kind in kinds:
            for head in heads:
                model = jax.eval_shape(lambda k=kind, h=head: functional.split(model_of(k, h, layers))[1])
                graph = _graph(kind, head, layers)
                for batch in batches:
                    _lower(graph, model, kind, head, batch)
    finally:
        jax.default_backend = backend


def _graph(kind: str, head: str, layers: int) -> Any:
    found: list[Any] = []

    def make() -> Any:
        graph, state = functional.split(model_of(kind, head, layers))
        found.append(graph)
        return state

    jax.eval_shape(make)
    return found[0]


def _lower(graph: Any, state: Any, kind: str, head: str, batch: int) -> None:
    cache = jax.eval_shape(lambda s: functional.join(graph, s).model.empty_cache(batch, 768), state)
    integer = jax.ShapeDtypeStruct((), jnp.int32)
    token = jax.ShapeDtypeStruct((batch,), jnp.int32)
    start = time.perf_counter()
    for name, function, args in (("host", one_step, ()), ("device", many_steps, (integer,))):
        traced = function.trace(graph, state, cache, token, integer, *args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        seconds = time.perf_counter() - start
        print(
            f"{kind} head {head} batch {batch} {name}: {len(text) // 1000} kB, {text.count('custom_call')} custom calls, {seconds:.1f} s"
        )


def peers(batch: int, context: int) -> dict[str, dict[str, float]]:
    """torch.compile on the same shapes: {weights: {name: tokens/s}}."""
    command = [sys.executable, str(HERE / "peer_decode_torch.py"), "--batch", str(batch), "--context", str(context)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as e:
        print(f"peer: {type(e).__name__}: {getattr(e, 'stderr', '')}"[-600:], file=sys.stderr)
        return {}


def save(path: Path, card: str, versions: dict[str, str], rows: list[dict]) -> None:
    """Writes the rows, each with the time of its run; those of an earlier run that were not measured now stay, and so do
    its peers' figures, with their time.
    """

    def key(row: dict) -> tuple:
        return tuple(row[k] for k in ("weights", "head", "batch", "context", "loop"))

    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    new = {key(row): row | {"measured": now} for row in rows}
    earlier = {key(row): row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    for place, row in new.items():
        before = earlier.get(place, {})
        if row["peers"]:
            row["peers_measured"] = now
        elif before.get("peers"):
            row |= {name: before[name] for name in ("peers", "peers_measured") if name in before}
    both = list((earlier | new).values())
    result = {"card": card, "date": datetime.date.today().isoformat(), "versions": versions, "rows": both}
    result["command"] = " ".join(["python", "benchmarks/gpu_decode.py", *map(record.shown, sys.argv[1:])])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", nargs="+", default=["w4a16_g128", "nf4", "bf16"])
    parser.add_argument("--head", nargs="+", default=["bf16", "w4"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--loop", nargs="+", default=["host", "device"])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--peers", nargs="*", type=int, help="batches to run torch at; all by default")
    parser.add_argument("--lower", action="store_true", help="lower for CUDA only")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if options.lower:
        lower_all(options.weights, options.head, options.batch, min(options.layers, 2))
        return
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    card = jax.devices()[0].device_kind
    short = next((name for name in ("h100", "h200") if name in card.lower()), card.lower().replace(" ", "_"))
    rows: list[dict] = []

    def write() -> None:  # after each row, so that a run that is cut off keeps what it measured
        versions = {"jax": jax.__version__, "python": sys.version.split()[0]}
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions["torch"] = importlib.metadata.version("torch").split("+")[0]
        save(options.out / f"gpu_decode_{short}.json", card, versions, rows)

    for kind in options.weights:
        for head in options.head if kind != "bf16" else options.head[:1]:
            model = model_of(kind, head, options.layers)
            step_s = weight_bytes(model) / 1e9 / ROOFLINE_GBS.get(short, 3110.0)
            prefill = prefill_seconds(model, 2048)
            for row in decode_rows(model, options.batch, options.context, options.tokens, options.loop):
                bound = {"bound_tok_s": row["batch"] / step_s, "prefill_2048_s": prefill, "peers": {}}
                rows.append({"weights": kind, "head": head, **row, **bound})
                print(json.dumps(rows[-1]), flush=True)
                write()
            del model
            gc.collect()
    jax.clear_caches()
    for batch in options.batch if options.peers is None else options.peers:
        beside = peers(batch, options.context)
        for row in rows:
            if row["batch"] == batch:
                row["peers"] = beside.get(row["weights"], {})
        print(json.dumps({"batch": batch, "peers": beside}), flush=True)
        write()


if __name__ == "__main__":
    main()
