"""Layers as the original libraries stored and computed them (tests/recorded/layers): read, written, dequantized, run.

A file holds the tensors of a module `m` (or what its metadata calls it), the library's `dequantized` weight and, where inputs are quantized, an `input`
with the library's `output`; in its metadata the format, the quantization_config, config.json, and how it was made. Where
the weight is rotated, `inner` is the library's weight before that, which is exact. A new file is a new case without code.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from reference_dirs import array, bits, raw

import jq
from jq.formats.base import Context, group_by_prefix

FILES = sorted((Path(__file__).parent / "recorded" / "layers").glob("*.safetensors"))


@pytest.mark.parametrize("file", FILES, ids=[f.stem for f in FILES])
def test_reads_what_the_library_stores(file: Path, cell) -> None:
    tensors, meta = raw(file)
    arrays = {name: array(entry) for name, entry in tensors.items()}
    fmt = jq.formats()[meta["format"]]
    cell(fmt.name, "read", "write", "identical bits", "identical dequantize")
    module = meta.get("module", "m")
    stored = {name: a for name, a in arrays.items() if name.startswith(f"{module}.")}
    context = Context(
        config=json.loads(meta.get("model", "{}")),
        shapes={name: a.shape for name, a in stored.items()},
        dtypes={name: a.dtype for name, a in stored.items()},
        objects=json.loads(meta.get("objects", "{}")),
        label=file.name,
    )
    options = fmt.parse(json.loads(meta["config"]), context)
    names = list(stored)
    groups = fmt.group(names, options, context) if fmt.group else group_by_prefix(names, fmt.markers, fmt.suffixes)
    assert set(groups) == {module}, groups
    q = fmt.load(module, {suffix: stored[name] for suffix, name in groups[module].items()}, options, context)
    assert q is not None
    back = fmt.dump(q.to_jax())
    names = {s: name for s, name in groups[module].items() if not s.startswith("~")}  # others stay entries of their own
    assert {fmt.join(module, suffix) for suffix in back} == set(names.values())
    for suffix, got in back.items():
        want = stored[names[suffix]]
        assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes()), suffix
    want = arrays["dequantized"]
    dense = np.asarray(q.dequantize(want.dtype))
    if "inner" in arrays:
        inner = np.asarray(q.base.dequantize(arrays["inner"].dtype))
        assert np.array_equal(bits(inner), bits(arrays["inner"]))
        assert np.abs(dense - want).max() <= 1e-6 * np.abs(want).max()  # sums of 128 products, in any order
    else:
        assert np.array_equal(bits(dense), bits(want))
    if "output" in arrays:
        got = np.asarray(jq.matmul(arrays["input"], q.to_jax()))
        assert got.dtype == arrays["output"].dtype
        scale = np.abs(arrays["output"].astype(np.float32)).max()
        limit = float(meta.get("limit", "0"))
        assert np.abs(got.astype(np.float32) - arrays["output"].astype(np.float32)).max() <= limit * scale
