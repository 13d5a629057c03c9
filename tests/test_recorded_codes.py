"""What the original libraries stored for given weights (tests/recorded): the same codes and scales, byte for byte.

A file holds `input`, the tensors that the library stores for it, and in its metadata the format, the method of `jq` with
its options, the library and how it was run. `dequantized`, where it is there, is the library's own. A new file is a new
case without code.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from reference_dirs import array, bits, raw

import jq

FILES = sorted((Path(__file__).parent / "recorded").glob("*.safetensors"))


@pytest.mark.parametrize("file", FILES, ids=[f.stem for f in FILES])
def test_stores_what_the_library_stores(file: Path, cell) -> None:
    tensors, meta = raw(file)
    arrays = {name: array(entry) for name, entry in tensors.items()}
    columns = ["quantize"] if meta["made"].startswith("library") else []
    cell(meta["format"], *columns, *(["identical dequantize"] if "dequantized" in arrays and columns else []))
    w = arrays.pop("input")
    dense = arrays.pop("dequantized", None)
    method = getattr(jq, meta["method"])(**json.loads(meta["options"]))
    q = method.quantize(w, **json.loads(meta.get("arguments", "{}")))
    got = jq.formats()[meta["format"]].dump(q.to_jax())
    assert got.keys() == arrays.keys()
    allowed = int(meta.get("differing_bytes", 0))
    for name, want in arrays.items():
        assert (got[name].dtype, got[name].shape) == (want.dtype, want.shape), name
        different = int((np.ascontiguousarray(got[name]).view("u1") != np.ascontiguousarray(want).view("u1")).sum())
        assert different <= allowed, f"{name}: {different} of {want.nbytes} bytes differ"
    if dense is not None and not allowed:
        assert np.array_equal(bits(np.asarray(q.dequantize())), bits(dense))
