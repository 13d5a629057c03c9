"""GGUF: every block type against the gguf package."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jq
from jq.errors import FormatError, UnsupportedError
from jq.formats.gguf import take_rows
from jq.formats.gguf_blocks import ROWS, tensor_of
from jq.formats.gguf_types import BY_NAME, TYPES
from jq.qtensor.blocks import KINDS

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
from gguf import GGMLQuantizationType as Type  # noqa: E402

# Where float16 scales lie in a block: random bytes there would be NaN or infinite now and then.
SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "MXFP4": (),
    "NVFP4": (),
    "IQ1_M": (),
}
DECODED = sorted(
    ((ROWS.keys() | KINDS.keys()) & BY_NAME.keys()) - {"Q8_K", "Q1_0", "Q8_1", "Q8_1_HALF"}
)  # which gguf itself cannot decode


def random_blocks(kind: str, rows: int, blocks: int, seed: int) -> np.ndarray:
    """uint8[rows, blocks * bytes] of any bits but for finite scales."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, blocks, BY_NAME[kind].bytes), np.uint8)
    for at in SCALES.get(kind, (0,)):
        d = ((rng.random((rows, blocks)) - 0.5) * 0.1).astype(np.float16)
        raw[..., at : at + 2] = d.view(np.uint8).reshape(rows, blocks, 2)
    if kind == "IQ1_M":  # the exponent's top bit, in the last word: clear, so that the scale is finite
        raw[..., 55] &= 0xBF
    return raw.reshape(rows, -1)


def bits(a: Any) -> np.ndarray:
    return np.asarray(a).view(np.uint32)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("kind", DECODED)
def test_blocks_decode_as_gguf_does(kind: str) -> None:
    for seed, (rows, blocks) in enumerate([(1, 1), (3, 2)]):
        raw = random_blocks(kind, rows, blocks, seed)
        if kind == "MXFP4":  # exponents that make subnormal and infinite weights
            raw[:, 0] = [0, 1, 255][:rows]
        q = tensor_of(raw, kind)
        want = gguf.dequantize(raw, Type[kind])
        assert q.shape == want.shape and q.dtype == "float32"
        np.testing.assert_array_equal(bits(q.dequantize()), bits(want))
        assert q.nbytes <= raw.nbytes + 64  # 64: the table of IQ4


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"])
def test_quantized_by_gguf(kind: str) -> None:
    w = np.random.default_rng(1).standard_normal((5, 512), np.float32)
    w[0, :256] = 0
    raw = gguf.quantize(w, Type[kind])
    np.testing.assert_array_equal(bits(tensor_of(raw, kind).dequantize()), bits(gguf.dequantize(raw, Type[kind])))


def test_q8_k_has_a_float32_scale() -> None:
    d, codes = np.float32(0.3), np.arange(-128, 128).astype(np.int8)
    raw = np.concatenate([d.reshape(1).view(np.uint8), codes.view(np.uint8), np.zeros(32, np.uint8)])[None]
    np.testing.assert_array_equal(np.asarray(tensor_of(raw, "Q8_K").dequantize())[0], d * codes)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("kind", ["Q4_K", "IQ4_XS", "IQ3_S", "MXFP4"])
def test_stacked_experts_and_rows(kind: str) -> None:
    raw = np.stack([random_blocks(kind, 4, 1, seed) for seed in range(3)])
    q, want = tensor_of(raw, kind).to_jax(), gguf.dequantize(raw, Type[kind])
    assert q.shape == want.shape == (3, 4, 256 if kind != "MXFP4" else 32)
    np.testing.assert_array_equal(bits(q.dequantize()), bits(want))
    np.testing.assert_array_equal(bits(q[1].dequantize()), bits(want[1]))
    order = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(bits(take_rows(tensor_of(raw[0], kind), order).dequantize()), bits(want[0][order]))


def test_one_bit_as_ggml_reads_it() -> None:
    """Q1_0, which gguf 0.19.0 cannot dequantize: bit j of byte j // 8 chooses between d and -d."""
    rng = np.random.default_rng(1)
    scales = (rng.random((3, 2)) + 0.01).astype(np.float16)
    signs = rng.integers(0, 2, (3, 2, 128))
    blocks = np.zeros((3, 2, 18), np.uint8)
    blocks[..., :2] = scales[..., None].view(np.uint8)
    for j in range(128):
        blocks[..., 2 + j // 8] |= (signs[..., j] << (j % 8)).astype(np.uint8)
    q = tensor_of(blocks.reshape(3, 36), "Q1_0")
    want = np.where(signs, scales[..., None], -scales[..., None]).astype(np.float32).reshape(3, 256)
    np.testing.assert_array_equal(bits(q.dequantize()), bits(want))
    assert q.nbytes - 8 <= blocks.nbytes  # but for the table of two values


def test_scales_that_are_not_finite() -> None:
    for kind in ("Q4_0", "Q6_K", "IQ2_XS", "IQ4_XS"):
        raw = random_blocks(kind, 2, 1, 0)
        at = SCALES.get(kind, (0,))[0]
        raw[1, at : at + 2] = np.array([np.nan], np.float16).view(np.uint8)
        with pytest.raises(FormatError, match=r"blk\.0.* 1 of 2 .*not finite"):
            tensor_of(raw, kind, "blk.0.attn_q.weight")


def test_types_have_the_sizes_of_gguf() -> None:
    for number, kind in TYPES.items():
        assert (Type(number).name, gguf.GGML_QUANT_SIZES[Type(number)]) == (kind.name, (kind.elements, kind.bytes))


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_q8_1_in_the_size_of_the_package_and_of_ggml(tmp_path: Path, half: bool) -> None:
    """Two numbers before the codes: d and d times their sum. Blocks of 40 bytes and, where 40 do not fit, of 36."""
    rng = np.random.default_rng(3)
    codes, d = rng.integers(-128, 128, (4, 2, 32)).astype(np.int8), rng.random((4, 2, 1)).astype(np.float16)
    two = np.concatenate([d, d * np.float16(0.5)], axis=-1).astype(np.float16 if half else np.float32)
    raw = np.concatenate([two.view(np.uint8), codes.view(np.uint8)], axis=-1).reshape(4, -1)
    body = b"".join(
        len(name).to_bytes(8, "little") + name + struct.pack("<IQQIQ", 2, 64, 4, 9, offset)
        for name, offset in ((b"a.weight", 0), (b"b.weight", raw.nbytes))
    )
    start = b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + body
    file = tmp_path / "model.gguf"
    file.write_bytes(start + bytes(-len(start) % 32) + raw.tobytes() + raw.tobytes())
    state = jq.load_state(str(file))
    want = d.astype(np.float32) * codes.astype(np.float32)
    for name in ("a.weight", "b.weight"):
        np.testing.assert_array_equal(np.asarray(state[name].dequantize()), want.reshape(4, 64))


def test_grids_need_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from jq.qtensor import blocks

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedError, match="pip install gguf"):
        blocks._table.__wrapped__("IQ3_S")
