"""The matrix products of one decode step in one jitted function, float32, batch 1: what a dense decode step stands on.

    python benchmarks/decode_bound.py CONFIG_DIR

No attention, norms or cache. Prints one JSON line: milliseconds a token and the tokens/s that follow from it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np


def weights(config: dict, rng: np.random.Generator) -> tuple[list[dict[str, jax.Array]], jax.Array]:
    """Random float32 weights [out, in] of every layer, and the output matrix."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    shapes |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}

    def one(shape: tuple[int, int]) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, dtype=np.float32) * 0.02)

    layers = [{name: one(shape) for name, shape in shapes.items()} for _ in range(config["num_hidden_layers"])]
    return layers, one((config["vocab_size"], hidden))


@jax.jit
def step(x: jax.Array, layers: list[dict[str, jax.Array]], head: jax.Array) -> jax.Array:
    """Every product of a token, each feeding the next so that none can be left out."""
    for w in layers:
        queries, keys, values = w["q"] @ x, w["k"] @ x, w["v"] @ x
        mixed = queries + jnp.resize(keys + values, queries.shape)
        x = x + w["o"] @ (mixed * 0.01)
        x = x + w["down"] @ (jax.nn.silu(w["gate"] @ x) * (w["up"] @ x) * 0.01)
        x = x * jax.lax.rsqrt(jnp.mean(x * x) + 1e-5)
    return jnp.argmax(head @ x)


class Bound:
    """The step of one model with random weights.

    Args:
      config: config.json.
    """

    def __init__(self, config: dict) -> None:
        self.layers, self.head = weights(config, np.random.default_rng(0))
        self.x = jnp.ones((config["hidden_size"],), jnp.float32)
        self()

    def __call__(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        step(self.x, self.layers, self.head).block_until_ready()
        return time.perf_counter() - start

    def times(self, seconds: float) -> list[float]:
        """Of as many steps as fit, at least 10."""
        times: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times) < 10:
            times.append(self())
        return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory with a config.json")
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()
    times = Bound(json.loads((Path(args.model) / "config.json").read_text())).times(args.seconds)
    row = {
        "peer": "bound",
        "method": "matrix products alone, float32",
        "tokens_per_s": 1 / statistics.median(times),
        "best_tokens_per_s": 1 / min(times),
        "load_average": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
