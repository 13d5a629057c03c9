"""Words of PTX as Python functions: what Mosaic GPU's dialects do not offer, or offer only for whole warpgroups.

Everything here runs while a kernel is traced (inside `plgpu.inline_mgpu`) and emits MLIR at the current insertion
point. Scalars are `Int` (32 bits, with operators) or plain `ir.Value`. Addresses of shared memory are 32-bit `Int`s,
addresses of global memory are 64-bit `ir.Value`s.
"""

from pallas_kernels.ptx.barriers import *  # noqa: F403
from pallas_kernels.ptx.memory import *  # noqa: F403
from pallas_kernels.ptx.values import *  # noqa: F403
