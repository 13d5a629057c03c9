"""In-register decode: packed words of one tile -> 16-bit floats in the order of an mma/wgmma A fragment.

A decode function knows nothing of pipelines, and a skeleton nothing of formats. `DECODES[form.decode]` has

- `order`: where the codes of a k16 step lie in its 32-bit words ("split": element e of register p at bit 4p + 16e;
  "natural": at bit 8p + 4e; "bytes": at bit 8 (p % 2) + 16e of word p // 2; "pairs": at bit 16 (p % 2) + 8e of it).
  Register p of an m16k16 step holds rows g + 8 (p % 2) and columns 2t + 8 (p // 2) + e.
- `unit(form, dtype)`: a power of two by which fragments are too small.
- `shared_bytes(form, wide)`: bytes of tables it wants in shared memory; where there are tables, `read` and `write`, so
  that other work fits between the loads and the stores.
- `fragment(form, dtype, words, zero, table)`: words of one or more k16 steps -> four registers for each.
- where zeros are integers, `integer_zeros` and `constant_zeros`: what `fragment` takes off the codes.
"""

from typing import Any

from pallas_kernels.decode import affine, affine_bytes, codebook, float8

DECODES: dict[tuple[str, int], Any] = {
    ("affine", 4): affine,
    ("affine", 8): affine_bytes,
    ("codebook", 4): codebook,
    ("e4m3", 8): float8,
    ("e5m2", 8): float8,
}
