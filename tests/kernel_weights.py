"""Random QTensors of every kind that the kernels take."""

import jax
import jax.numpy as jnp
import numpy as np

from jq.qtensor import Affine, Codebook, NarrowFloat
from jq.qtensor.base import Grouping

# QLoRA paper, appendix E
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)  # fmt: skip
# bitsandbytes' FP4: sign, then 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4
_FP4 = np.array([0.0, 0.0052083333, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25], np.float32)
FP4 = np.concatenate([_FP4, -_FP4])

KINDS = (
    "w4a16_g128", "w4a16_g32", "w4a16_row", "w4a16_signed", "w4a16_g128_asym", "w4a16_actorder", "w4a16_hqq", "w4a16_awq_sub",
    "w4a16_behind", "w4a16_tinygemm", "w4a16_signed_zeros", "w8a16_g128", "w8a16_row",
    "w8a16_g128_asym", "w8a16_actorder", "w8a16_signed", "w8a16_signed_zeros", "w8a16_hqq", "w8a16_tinygemm", "mxfp4", "e4m3_row",
    "e4m3_one", "e4m3_g128", "e5m2_row", "nf4_b64", "nf4_b64_dq", "fp4_b64", "nf4_b4096", "nf4_b384",
)  # fmt: skip


class Random:
    """Random numpy arrays: operations of JAX compile for each shape."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def bits(self, shape):
        return self.rng.integers(0, 256, shape, np.uint8)

    def uniform(self, shape):
        return self.rng.random(shape, np.float32)

    def normal(self, shape):
        return self.rng.standard_normal(shape, np.float32)


def _on_device(make, *args, **options):
    """What `make` makes of JAX arrays."""
    args, options = jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, (args, options))
    return make(*args, **options)


def make(kind: str, n: int, k: int, seed: int = 0):
    """A QTensor [n, k] with random codes and parameters."""
    draw = Random(seed)
    if kind.startswith(("mxfp4", "e4m3", "e5m2")):
        return _float(kind, n, k, draw)
    bits = 8 if kind.startswith("w8") else 4
    most, half = (1 << bits) - 1, 1 << (bits - 1)
    codes = draw.bits((n, k)) & most
    if kind.startswith(("nf4", "fp4")):
        block = int(kind.split("_b")[1].removesuffix("_dq"))
        return _codebook(kind, codes, block, draw)
    kind = kind.removeprefix(f"w{bits}a16_")
    group = {"g32": 32, "row": k, "signed": k if bits == 8 else 128, "hqq": 64}.get(kind, 128)
    scale_dtype = jnp.float16 if kind in ("hqq", "awq_sub") else jnp.bfloat16
    groups = -(-k // group)
    scales = (draw.uniform((n, groups)) * 0.02 + 0.001).astype(scale_dtype)
    common = {"code_bits": bits, "grouping": Grouping("block", 1, group), "dtype": str(np.dtype(scale_dtype))}
    signed = (codes.astype(np.int32) - half).astype(np.int8)
    if kind == "signed":
        return _on_device(Affine.make, signed, scales, signed=True, **common)
    if kind == "g128_asym":
        zeros = (draw.bits((n, groups)) & most).astype(np.int32)
        return _on_device(Affine.make, codes, scales, zeros=zeros, zeros_bits=bits, **common)
    if kind == "actorder":
        g_idx = draw.rng.permutation(np.arange(k, dtype=np.int32) // group)
        return _on_device(Affine.make, codes, scales, zero_point=half, g_idx=g_idx, **common)
    if kind == "hqq":
        zeros = (draw.uniform((n, groups)) * most).astype(scale_dtype)
        return _on_device(Affine.make, codes, scales, zeros=zeros, **common)
    if kind == "behind":  # AWQ's GEMV files round the number of groups up
        more = np.concatenate([scales, scales + scales.dtype.type(1)], 1)
        zeros = (draw.bits(more.shape) & most).astype(np.int32)
        return _on_device(Affine.make, codes, more, zeros=zeros, zeros_bits=bits, **common)
    if kind == "tinygemm":
        zeros = (draw.normal((n, groups)) * 0.05).astype(scale_dtype)
        return _on_device(Affine.make, codes, scales, zeros=zeros, formula="f32_mul_add", **common)
    if kind == "signed_zeros":
        zeros = ((draw.bits((n, groups)) & most).astype(np.int32) - half).astype(np.int8)
        return _on_device(Affine.make, signed, scales, zeros=zeros, signed=True, **common)
    if kind == "awq_sub":
        zeros = (scales * 7.5).astype(scale_dtype)
        return _on_device(Affine.make, codes, scales, zeros=zeros, formula="mul_sub", **common)
    return _on_device(Affine.make, codes, scales, zero_point=half, **common)


def _float(kind, n, k, draw):
    if kind == "mxfp4":
        codes = draw.bits((n, k)) & 15
        scales = 115 + draw.bits((n, k // 32)) // 32
        options = {"scale_kind": "e8m0", "grouping": Grouping("block", 1, 32), "formula": "own"}
        return _on_device(NarrowFloat.make, codes, scales, kind="e2m1", **options)
    codes = draw.normal((n, k)) * 60
    name, _, rule = kind.partition("_")
    codes = codes.astype(jnp.float8_e4m3fn if name == "e4m3" else jnp.float8_e5m2)
    codes = codes.view(np.uint8)
    rows, cols = {"row": (n, 1), "one": (1, 1), "g128": (n, k // 128)}[rule]
    scales = draw.uniform((rows, cols)) * 0.02 + 0.001
    grouping = Grouping("block", 0 if rule == "one" else 1, 128 if rule == "g128" else 0)
    return _on_device(NarrowFloat.make, codes, scales, kind="e4m3fn" if name == "e4m3" else "e5m2", grouping=grouping)


def _codebook(kind, codes, block, draw):
    n, k = codes.shape
    table = FP4 if kind.startswith("fp4") else NF4
    whole = k % block == 0
    grouping = Grouping("block", 1, block) if whole else Grouping("flat", 0, block)
    shape = (n, k // block) if whole else (-(-n * k // block),)
    if not kind.endswith("dq"):
        absmax = draw.uniform(shape) * 0.05 + 0.01
        return _on_device(Codebook.make, codes, table, absmax, code_bits=4, grouping=grouping)
    inner = draw.bits(shape)
    count = n * k // block
    second = draw.uniform((-(-count // 256),)) * 0.02 + 0.001
    steps = np.linspace(-1, 1, 256, dtype=np.float32) ** 3
    nested = _on_device(
        Codebook.make,
        inner,
        steps,
        second,
        code_bits=8,
        grouping=Grouping("flat", 0, 256),
        offset=jnp.float32(0.03),
        dtype="float32",
    )
    return _on_device(Codebook.make, codes, table, nested, code_bits=4, grouping=grouping)
