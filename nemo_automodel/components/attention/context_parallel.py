"""Attention of one rank's chunks of a sequence to the keys of all ranks.

Keys and values are gathered whole, grouped heads as they are (as in Llama 3's context parallelism, arXiv 2407.21783,
section 3.3.2); each chunk of queries then sees no more than the prefix, window and documents it needs. Gradients of keys
and values are summed back to the ranks they came from.

Shape legend: B batch, H query heads, G key/value heads, S this rank's tokens, N all ranks' tokens, E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from nemo_automodel.components.attention.varlen import has_kernel, varlen
from nemo_automodel.errors import ModelError
from nemo_automodel.types import ContextLayout

Piece = tuple[int, int, int]  # first query, end of queries and of keys, first key: positions in the whole sequence


@torch.compiler.disable
def context_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: ContextLayout,
    dropout: float = 0.0,
    scaling: float | None = None,
    window: int | None = None,
    formula: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Causal attention of this rank's tokens within their documents and the last ``window`` keys.

    ``query`` [B, H, S, E], ``key`` and ``value`` [B, G, S, E], chunks in the order of ``context.held``; ``formula``
    (query, key, value, mask) is used instead of torch's kernels where given. Returns [B, H, S, E].
    """
    length = query.shape[2] // len(context.held)
    key, value = _whole(key, value, context, length)
    outputs = []
    for chunk, q in zip(context.held, query.split(length, dim=2), strict=True):
        pieces = _pieces(chunk * length, (chunk + 1) * length, context.cu_seqlens, window)
        if formula is None and has_kernel(query, key, value, dropout):
            outputs.append(_varlen_pieces(q, key, value, pieces, scaling, window))
            continue
        for part, piece in zip(q.split([end - first for first, end, _ in pieces], dim=2), pieces, strict=True):
            k, v = (x[:, :, piece[2] : piece[1]] for x in (key, value))
            outputs.append(_piece_attention(part, k, v, dropout, scaling, window, formula))
    return torch.cat(outputs, dim=2)


def refuse(reason: str) -> NoReturn:
    """Raise the ModelError of a model whose sequence cannot be sharded."""
    raise ModelError(
        f"distributed.cp_size: this model's sequence cannot be sharded, because {reason}; write cp_size: 1"
    )


def _pieces(first: int, end: int, cu_seqlens: tuple[int, ...] | None, window: int | None) -> list[Piece]:
    """What lies of each document within the chunk [first, end), and where its keys start."""
    found = []
    for start, stop in pairwise(cu_seqlens or (0, end)):
        q_start, q_stop = max(start, first), min(stop, end)
        if q_start < q_stop:
            found.append((q_start, q_stop, max(start, q_start - window + 1) if window else start))
    return found


def _piece_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
    formula: Callable[..., Tensor] | None,
) -> Tensor:
    """Queries whose last is level with the last of the keys."""
    q_length, k_length = query.shape[2], key.shape[2]
    square = q_length == k_length and not (window and window < k_length)
    mask = None
    if not square or formula is not None:
        position = torch.arange(k_length, device=query.device)
        behind = position[k_length - q_length :, None] - position[None, :]
        mask = (behind >= 0) & (behind < (window or k_length))
    if formula is not None:
        return formula(query, key, value, mask)
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=gqa
    )


def _varlen_pieces(
    query: Tensor, key: Tensor, value: Tensor, pieces: list[Piece], scaling: float | None, window: int | None
) -> Tensor:
    """All pieces of one chunk in one call: only the first one's keys start before the chunk, so keys are contiguous."""
    batch = query.shape[0]
    key, value = (x[:, :, pieces[0][2] : pieces[-1][1]] for x in (key, value))
    lengths = ([end - first for first, end, _ in pieces], [end - start for _, end, start in pieces])
    q_bounds, k_bounds = (
        torch.tensor([0, *accumulate(part * batch)], dtype=torch.int32).to(query.device, non_blocking=True)
        for part in lengths
    )
    return varlen(
        query, key, value, (q_bounds, k_bounds), (max(lengths[0]), max(lengths[1])), scaling, True, window or None
    )


def _whole(key: Tensor, value: Tensor, context: ContextLayout, length: int) -> tuple[Tensor, Tensor]:
    """All ranks' keys and values [B, G, N, E] in the order of the sequence; one collective for both."""
    both = torch.cat([key, value], dim=-1)
    ranks = (both,) if context.group is None else _Gather.apply(both, context.group).unbind(0)
    chunks = [chunk for part in ranks for chunk in part.split(length, dim=2)]
    placed = dict(zip(context.order, chunks, strict=True))
    whole = torch.cat([placed[i] for i in range(len(placed))], dim=2)
    return whole[..., : key.shape[-1]], whole[..., key.shape[-1] :]


class _Gather(torch.autograd.Function):
    """[...] on each rank -> [ranks, ...] on all of them; backward sums the ranks' gradients of each part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out.unflatten(0, (-1, x.shape[0]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].flatten(0, 1).contiguous()
        out = grad.new_empty(grad.shape[0] // dist.get_world_size(ctx.group), *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad, group=ctx.group)
        return out, None
