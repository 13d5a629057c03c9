"""What holding keys and values in fewer bits saves and costs: bytes of a token, and the change of logits and loss.

    python benchmarks/kv_cache.py SMOLLM2_DIR [--tokens 512]

On the start of the bundled text, in float32; the cache of float32 is the measure. Writes results/kv_cache.json.
"""

from __future__ import annotations

import argparse
import sys

import jax
import numpy as np
import record

FORMS = ("float32", "bfloat16", "int8", "float8_e4m3", "int4", "mxfp4")
SLOTS = 128  # of the cache whose bytes are counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    import jq
    from jq.report.perplexity import bundled_text, tokens_of

    rows, measure = [], None
    for form in FORMS:
        model = jq.load(args.model, dtype="float32", kv_cache=form)
        ids = np.asarray(tokens_of(model.tokenizer, bundled_text())[: args.tokens])
        logits = np.asarray(model(ids[None])[0], np.float64)
        measure = logits if measure is None else measure
        held = sum(a.nbytes for a in jax.tree.leaves(model.model.empty_cache(1, SLOTS)))
        rows.append(
            {
                "kv_cache": form,
                "bytes_per_token": held / SLOTS,
                "relative_error": float(np.linalg.norm(logits - measure) / np.linalg.norm(measure)),
                "loss": loss(logits, ids),
            }
        )
        print(rows[-1], file=sys.stderr)
    record.write("kv_cache", rows, tokens=len(ids))


def loss(logits: np.ndarray, ids: np.ndarray) -> float:
    """Mean negative log likelihood of each token but the first."""
    top = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
    return float(np.mean(total[:-1] - logits[np.arange(len(ids) - 1), ids[1:]]))


if __name__ == "__main__":
    main()
