"""Scales and zeros of a warp's part of a pass: neighbouring lanes fetch neighbouring words, shuffles hand them out.

The parameters of a warp's groups lie behind each other, so that one load of the warp brings up to 128 bytes of them; and
what is on its way takes a register for each load and not for each group.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.form import ITEM_BYTES, ROWS
from pallas_kernels.ptx import Int


def loads(kind: str, groups: int) -> int:
    """Loads of a lane for so many groups."""
    return -(-groups * ROWS * ITEM_BYTES[kind] // 128)


def fetch(pointer: ir.Value, kind: str, groups: int, lane: Int) -> list[ir.Value]:
    """This lane's words of the groups that begin at `pointer`."""
    words, out = groups * ROWS * ITEM_BYTES[kind] // 4, []
    for first in range(0, words, 32):
        rest = words - first
        word = lane if rest >= 32 else ptx.select(lane < rest, lane, 0)
        out.append(ptx.load_kept(ptx.address(pointer, word + first, 4)))
    return out


def of_group(fetched: Sequence[ir.Value], kind: str, group: int, lane: Int) -> list[ir.Value]:
    """Of rows g and g + 8 of this lane: a register for 8- and 16-bit kinds, two of float32."""
    size, pair = ITEM_BYTES[kind], lane >> 2
    word, held = divmod(group * ROWS * size // 4, 32)
    if size == 4:
        halves = (ptx.shuffle(fetched[word], pair * 2 + (held + i)) for i in range(2))
        return [ptx.as_float(half) for half in halves]
    if size == 2:
        return [ptx.raw(ptx.shuffle(fetched[word], pair + held))]
    two = ptx.shuffle(fetched[word], (lane >> 3) + held)  # those of two lanes' rows
    return [ptx.raw((two >> ((pair & 1) << 4)) & 0xFFFF)]
