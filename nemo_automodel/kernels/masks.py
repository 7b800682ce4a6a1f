"""Masks of attention written out, for where no kernel takes their rule instead."""

from __future__ import annotations

import torch
from torch import Tensor


def written_mask(
    q_length: int, k_length: int, causal: bool, window: int | None, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """Bool [S, K], True where attention is allowed; the queries are the last ``q_length`` positions of the keys'.

    Args:
        q_length: S.
        k_length: K.
        causal: no query sees keys ahead of itself.
        window: with ``causal``, keys that a query sees, its own included; None or 0 for all.
        cu_seqlens: ``[D+1]`` boundaries of documents, which do not see each other.
        device: where the mask is to be.
    """
    q = torch.arange(k_length - q_length, k_length, device=device)[:, None]
    k = torch.arange(k_length, device=device)[None, :]
    mask = k <= q if causal else torch.ones(q_length, k_length, dtype=torch.bool, device=device)
    if causal and window:
        mask = mask & (k > q - window)
    if cu_seqlens is not None:
        document = torch.bucketize(k[0], cu_seqlens, right=True)
        mask = mask & (document[:, None] == document[None, :])
    return mask
