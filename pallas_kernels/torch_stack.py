"""A stack of weights on torch tensors: each row of x times the weight of its expert, by the kernels of `torch`.

The kernels take the place of a weight in its stack from memory on the GPU. So few rows, one launch each, need no word
from the GPU, and a CUDA graph captures them; many rows are brought together by expert, and the host waits to learn how
many there are of each.
"""

from __future__ import annotations

import torch

from pallas_kernels.torch import TorchWeight, aligned, bucket

FEW = 16  # rows that are launched one by one


def matmul(weight: TorchWeight, x: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """y [S, N] of x [S, K]: row s times weight which[s] of a stack [E, N, K].

    Args:
      weight: of a stack.
      x: bfloat16 or float16 on its GPU.
      which: integers[S] from 0 to E; rows of E, the weight that is not there, become zero.
    """
    count, rows = weight.tensors["codes"].shape[0], len(x)
    if not rows:
        return x.new_zeros((0, weight.shape[0]))
    found = which.clamp(max=count - 1).to(torch.int32)
    with torch.cuda.device(x.device):
        y = _few(weight, aligned(x.contiguous()), found) if rows <= FEW else _many(weight, x, found, count)
    return y.masked_fill_((which >= count)[:, None], 0)


def _few(weight: TorchWeight, x: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    n, k = weight.shape
    call, size = weight.ready(1, x.dtype), x.element_size()
    y = x.new_empty((len(x), n))
    first, index, out = x.data_ptr(), which.data_ptr(), y.data_ptr()
    for row in range(len(x)):
        call.at(first + row * k * size, index + row * 4, out + row * n * size)
    return y


def _many(weight: TorchWeight, x: torch.Tensor, which: torch.Tensor, count: int) -> torch.Tensor:
    """A kernel computes rows beyond those of its expert, up to a bucket: the next expert's launch puts them right."""
    (n, k), rows, size = weight.shape, len(x), x.element_size()
    order = torch.argsort(which)
    counts = torch.bincount(which, minlength=count).tolist()
    beyond = bucket(max(counts))
    together = x.new_zeros((rows + beyond, k))
    torch.index_select(x, 0, order, out=together[:rows])
    numbers = torch.arange(count, dtype=torch.int32, device=x.device)
    y = x.new_empty((rows + beyond, n))
    first, index, out = together.data_ptr(), numbers.data_ptr(), y.data_ptr()
    start = 0
    for expert, share in enumerate(counts):
        if share:
            call = weight.ready(bucket(share), x.dtype)
            call.at(first + start * k * size, index + expert * 4, out + start * n * size)
            start += share
    back = torch.empty_like(y[:rows])
    return back.index_copy_(0, order, y[:rows])
