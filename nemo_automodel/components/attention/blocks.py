"""Masks that are causal but for blocks of tokens that see all of themselves (the tokens of an image): kept as blocks.

What is handed from the mask interface to the attention function in a mask's place is [B, 1, S, 3] int32, of each token:
its block, and where that begins and ends. It is made on the device, without a look at what is in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemo_automodel.components.attention.layout import Layout
from nemo_automodel.kernels.flash import unsupported_reason

_NONE = -1


def mask_as_blocks(
    layout: Layout,
    mask_function: Callable[..., Any],
    padding: Tensor | None,
    length: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Tensor | None:
    """The blocks of a mask [B, 1, S, 3], None where it has others, or where only a dense mask will do.

    ``padding`` [B, S], True for tokens; the documents and windows of ``layout`` must reach the attention function.
    """
    if layout.read_blocks is None or unsupported_reason(torch.device(device), dtype) is not None:
        return None
    found = layout.read_blocks(mask_function)
    if found is None or found.ids.shape[-1] != length or (padding is not None and padding.shape[-1] != length):
        return None
    windowed = found.window is not None and found.window < length
    if windowed and not layout.windows_as_argument:
        return None
    if layout.cu_seqlens is not None and not layout.documents_as_argument:
        return None
    ids = found.ids
    if padding is not None:
        ids = ids.masked_fill(~padding.bool(), _NONE)
    return _with_bounds(ids, layout.cu_seqlens)


def are_blocks(mask: Tensor) -> bool:
    """Whether ``mask`` is what ``mask_as_blocks`` made."""
    return mask.dtype == torch.int32


def dense(blocks: Tensor, behind: Tensor | None) -> Tensor:
    """Bool [B, 1, S, S]: the keys ``behind`` [1, 1, S, S], and those ahead in a query's block."""
    assert behind is not None
    ids = blocks[..., 0]
    same = (ids[..., :, None] == ids[..., None, :]) & (ids[..., :, None] >= 0)
    return behind | same.triu(1)


def _with_bounds(ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Blocks may be in pieces, and end where a document does; tokens in none begin after they end."""
    if cu_seqlens is not None:
        at = torch.arange(ids.shape[-1], device=ids.device)
        document = torch.bucketize(at, cu_seqlens, right=True)
        ids = torch.where(ids >= 0, ids * (cu_seqlens.shape[0] + 1) + document, _NONE)
    ids = ids.to(torch.int64).contiguous()
    ordered, places = ids.sort(dim=-1, stable=True)
    first = places.gather(-1, torch.searchsorted(ordered, ids))
    last = places.gather(-1, torch.searchsorted(ordered, ids, right=True) - 1)
    block = torch.searchsorted(ordered, ids)  # small numbers, one a block
    blocks = torch.stack([block, first, last], dim=-1)
    return blocks.masked_fill((ids < 0)[..., None], _NONE).to(torch.int32)[:, None]
