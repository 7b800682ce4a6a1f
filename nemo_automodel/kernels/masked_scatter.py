"""The gradient of ``Tensor.masked_scatter``'s source without waiting for the device.

Vision-language models put images' features where their tokens stand by ``masked_scatter``. torch picks the source's gradient
out by ``masked_select``, whose size the host has to know: it waits, near the end of each backward, until the device is
through, and all that the host does after it, clipping and the optimizer, is then time in which the device has nothing to do.
But the size is that of the source, which is known.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def source_gradient(grad: Tensor, mask: Tensor, sizes: Sequence[int]) -> Tensor:
    """What torch's ``masked_scatter_backward`` returns.

    Args:
        grad: gradient of the result.
        mask: bool, of a shape that broadcasts to that of ``grad``.
        sizes: of the source, whose first numbers, as many as ``mask`` has True, went into the result in order.

    Returns the gradient of the source, 0 for numbers that went nowhere.
    """
    count = math.prod(sizes)
    width = grad.shape[-1] if grad.ndim else 1
    rows_of_mask = mask.ndim == grad.ndim > 0 and (mask.shape[-1] == 1 or mask.stride(-1) == 0)
    whole_rows = rows_of_mask and width > 0 and count % width == 0
    if not whole_rows:
        width = 1
    wanted = mask[..., :1].expand(*grad.shape[:-1], 1) if whole_rows else mask.expand_as(grad)
    rows, number = wanted.reshape(-1), count // width
    place = (rows.cumsum(0) - 1).masked_fill_(~rows, number).clamp_(max=number)  # one row more takes what is not wanted
    found = grad.new_zeros(number + 1, width)
    found.index_copy_(0, place, grad.reshape(-1, width))
    return found[:number].reshape(sizes)


@functools.cache
def register() -> torch.library.Library:
    """Let torch use ``source_gradient`` on CUDA, in this process."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("masked_scatter_backward", source_gradient, "CUDA")
    return library
