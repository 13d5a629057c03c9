"""Drives a format as `jq.state` does, without files: tensors by name in, QTensors by module out, and back."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from hypothesis import strategies as st

from jq.formats.base import Context, group_by_prefix

TURNS = st.integers(0, 3)  # see `dense`


def context_of(tensors: dict[str, np.ndarray], dtype: str = "bfloat16") -> Context:
    return Context(
        config={"dtype": dtype},
        shapes={k: v.shape for k, v in tensors.items()},
        dtypes={k: v.dtype for k, v in tensors.items()},
        label="checkpoint",
    )


def read(fmt: Any, tensors: dict[str, np.ndarray], config: dict[str, Any], dtype: str = "bfloat16") -> dict[str, Any]:
    """{prefix: QTensor} of every quantized module; asserts that dump gives each stored tensor back byte for byte."""
    context = context_of(tensors, dtype)
    options = fmt.parse(config, context)
    names = list(tensors)
    groups = fmt.group(names, options, context) if fmt.group else group_by_prefix(names, fmt.markers, fmt.suffixes)
    found = {}
    for prefix, stored in groups.items():
        q = fmt.load(prefix, {s: tensors[n] for s, n in stored.items()}, options, context)
        if q is None:
            continue
        found[prefix] = q
        back = {fmt.join(prefix, s): a for s, a in fmt.dump(q).items()}
        assert set(back) == set(stored.values())
        for name in back:
            assert_same(back[name], tensors[name], name)
    return found


def assert_same(got: Any, want: Any, name: str = "") -> None:
    """Equal dtype, shape and bytes."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype and got.shape == want.shape, (name, got.dtype, got.shape, want.dtype, want.shape)
    assert np.ascontiguousarray(got).tobytes() == np.ascontiguousarray(want).tobytes(), name


def dense(q: Any, turn: int) -> np.ndarray:
    """The weight of one of a property's many examples.

    In turn 0 as XLA compiles it, for each shape anew, which takes most of such a test's time; in the other turns by the
    same formula over numpy arrays.
    """
    return np.asarray(q.dequantize() if turn == 0 else q.to_numpy()._dense())


def held_bytes(q: Any) -> int:
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(q))


def compressed_tensors_config(weights, inputs=None, *, form="pack-quantized", targets=("Linear",), **more):
    """A quantization_config with one scheme."""
    scheme = {"targets": list(targets), "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
        "version": "0.20.0",
        **more,
    }


def named(parts, prefix="model.layers.0.self_attn.q_proj"):
    """Parts of a module by their stored names."""
    return {f"{prefix}.{k}": v for k, v in parts.items()}
