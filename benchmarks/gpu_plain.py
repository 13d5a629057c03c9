"""Times `matmul` in plain JAX on a GPU, for the weights and devices that no kernel takes: few rows of x.

    python benchmarks/gpu_plain.py  # writes benchmarks/results/gpu_plain_<card>.json

Beside it the same weight dequantized and multiplied by a dot, which is what runs beyond `FUSED_ROWS` rows, and a dense
bfloat16 weight. CUPTI kernel time, rotated weights.
"""

from __future__ import annotations

import json

import record

OUTPUTS, INPUTS = (4096, 28672), 4096
ROWS = (1, 2, 3, 4)


def main() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jq
    from jq.matmul import dense_matmul
    from pallas_kernels.select import device_key
    from pallas_kernels.timing import copies, median_us

    if jax.default_backend() != "gpu":
        raise SystemExit("gpu_plain.py: needs a GPU")
    methods = {
        "int4 g128": jq.RTN(bits=4, group_size=128),
        "int3 g128": jq.RTN(bits=3, group_size=128),
        "int8 g128": jq.RTN(bits=8, group_size=128),
        "NF4 b64": jq.NF4(),
        "MXFP4": jq.MXFP4A16(),
        "FP8": jq.FP8(),
    }
    fused = jax.jit(lambda x, w: jq.matmul(x, w, impl="jnp", quantize_activations=False))
    dot = jax.jit(lambda x, w: dense_matmul(x, w.dequantize(x.dtype)))
    values = np.random.default_rng(0).standard_normal((max(OUTPUTS), INPUTS), np.float32) * 0.02
    rows = []
    for n in OUTPUTS:
        weights = {name: method.quantize(values[:n]) for name, method in methods.items()}
        weights["bfloat16"] = jnp.asarray(values[:n], jnp.bfloat16)
        for name, weight in weights.items():
            nbytes = sum(a.nbytes for a in jax.tree.leaves(weight))
            many = [jax.tree.map(lambda a: a + 0, weight) for _ in range(copies(nbytes))]
            for m in ROWS:
                x = jnp.asarray(np.random.default_rng(m).standard_normal((m, INPUTS), np.float32), jnp.bfloat16)
                calls = {"us": fused, **({} if name == "bfloat16" else {"dequantize_then_dot_us": dot})}
                row = {"weight": name, "m": m, "n": n, "k": INPUTS}
                row |= {key: round(median_us(f, [(x, w) for w in many]), 2) for key, f in calls.items()}
                if name != "bfloat16":
                    a, b = (np.asarray(f(x, weight), np.float32) for f in (fused, dot))
                    row["rel_difference"] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
                    row["ratio"] = round(row["dequantize_then_dot_us"] / row["us"], 2)
                rows.append(row)
                print(json.dumps(row), flush=True)
    card = jax.devices()[0].device_kind
    record.write(f"gpu_plain_{device_key(card)}", rows, card=card)


if __name__ == "__main__":
    main()
