"""Matmul kernels for quantized weights on NVIDIA GPUs (Pallas, Mosaic GPU; compute capability 9.0).

    w = pallas_kernels.prepare(q)          # once, at load: the kernels' order of the same bits
    y = pallas_kernels.matmul(x, w)        # x [..., K] bfloat16 or float16

`supports(w, x)` says why not. Structure: skeletons (how data moves) x decode functions (what the bits mean), a `Form` that
describes a weight to both, and a table that picks kernel and configuration. Importing this needs no GPU.
"""

from typing import Any

__all__ = ["matmul", "prepare", "restore", "supports"]


def __getattr__(name: str) -> Any:
    if name in ("matmul", "supports"):
        from pallas_kernels import api

        return getattr(api, name)
    if name in ("prepare", "restore"):
        from pallas_kernels import tensors

        return getattr(tensors, name)
    raise AttributeError(name)
