"""In-register decode: packed words of one tile -> 16-bit floats in the order of an mma/wgmma A fragment.

A decode function knows nothing of pipelines, and a skeleton nothing of formats. `DECODES[form.kind]` has

- `order`: where the eight codes of a 32-bit word lie ("split": element e of register p at bit 4p + 16e;
  "natural": at bit 8p + 4e). Register p of an m16k16 step holds rows g + 8 (p % 2) and columns 2t + 8 (p // 2) + e.
- `unit(form, dtype)`: a power of two by which fragments are too small.
- `shared_bytes(form)`: bytes of tables it wants in shared memory, and `fill(...)`, which writes them; where there are
  tables, also its halves `read` and `write`, so that other work fits between the loads and the stores.
- `fragment(form, dtype, words, zero, table)`: words of one 16 x 64 tile (`bits` of them per thread) -> 16 registers.
"""

from pallas_kernels.decode import affine, codebook

DECODES = {"affine": affine, "codebook": codebook}
