"""``block_attention``: causal attention in which the tokens of a block also see those ahead of them in it, one torch op.

Causal attention (or that within a window, or within packed documents) is torch's fastest kernel's, over everything. The
keys ahead within a block, an image say, are few; they are merged into its result through the log-sum-exp. In backward both
parts are given the merged output and log-sum-exp, of which their gradients are exact: dS = P (dP - rowsum(dO O)),
P = exp(S - lse), as in ring attention (arXiv 2310.01889). No [S, S] mask exists. An opaque custom op, so
``torch.compile`` keeps its graph whole.

Shape legend: B batch, H query heads, G key/value heads, S tokens, E head size, D documents.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from nemo_automodel.kernels.attention_op import attention_op
from nemo_automodel.kernels.flash import flash, flash_backward, laid_out_as, last_contiguous

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    scale: float | None = None,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
) -> Tensor:
    """Attention to the keys behind (the last ``window``, the query's own included) and to those ahead in the same block.

    Args:
        query: ``[B, H, S, E]``, any strides with the last dimension contiguous, as the others.
        key: ``[B, G, S, E]``, H a multiple of G.
        value: ``[B, G, S, E]``.
        blocks: ``[B, S, 3]`` int32: a token's block (negative: none), the first and the last position of that block.
        scale: of the scores; default E^-0.5.
        window: default all keys behind.
        cu_seqlens: ``[D+1]`` int32 boundaries of the documents of a batch of one row, whose blocks lie within them.
        longest: tokens of the longest document; default S.

    Returns ``[B, S, H, E]``, contiguous.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _op(query, key, value, blocks, scale, window, cu_seqlens, longest or query.shape[2])[0]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    scale: float,
    window: int | None,
    cu_seqlens: Tensor | None,
    longest: int,
) -> tuple[Tensor, Tensor]:
    query, key, value = (last_contiguous(x) for x in (query, key, value))
    out, lse = flash(query, key, value, scale, window, cu_seqlens, longest)
    out, lse = out.transpose(1, 2).contiguous(), lse.contiguous()
    seen = out.transpose(1, 2)
    add, _ = _keys_ahead(query)
    add(query, key, value, seen, lse, blocks.contiguous(), scale)
    return out, lse


def _backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    scale: float,
    window: int | None,
    cu_seqlens: Tensor | None,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = (query, key, value)
    query, key, value, dout = (last_contiguous(x) for x in (*wide, dout))
    out, dout = out.transpose(1, 2), dout.transpose(1, 2)
    behind = flash_backward(dout, query, key, value, out, lse, scale, window, cu_seqlens, longest)
    dq, dk, dv = (last_contiguous(grad) for grad in behind)
    _, add = _keys_ahead(query)
    add(query, key, value, out, lse, dout, (dq, dk, dv), blocks.contiguous(), scale)
    return laid_out_as(dq, wide[0]), laid_out_as(dk, wide[1]), laid_out_as(dv, wide[2])


def _keys_ahead(query: Tensor) -> tuple[Callable[..., None], Callable[..., None]]:
    """What adds the keys ahead to the result and to the gradients: the kernels, or on a CPU what is written out below."""
    if query.is_cuda or _INTERPRETED:
        from nemo_automodel.kernels import block_attention_triton

        return block_attention_triton.add_forward, block_attention_triton.add_backward
    return _add_forward, _add_backward


# --- keys ahead, written out: for the CPU ---------------------------------------------------------------------------


def _spans(blocks: Tensor) -> list[tuple[int, Tensor]]:
    """(row, positions) of each block."""
    ids = blocks[..., 0]
    return [
        (row, (ids[row] == number).nonzero().squeeze(1))
        for row in range(ids.shape[0])
        for number in ids[row].unique().tolist()
        if number >= 0
    ]


def _ahead(query: Tensor, key: Tensor, row: int, at: Tensor, scale: float) -> Tensor:
    """Scores [H, n, n] of the block's tokens among themselves, -inf but for keys ahead."""
    groups = query.shape[1] // key.shape[1]
    q, k = query[row][:, at].double(), key[row][:, at].double().repeat_interleave(groups, dim=0)
    seen = at[None, :] > at[:, None]
    return (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)


def _add_forward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, blocks: Tensor, scale: float
) -> None:
    groups = query.shape[1] // key.shape[1]
    for row, at in _spans(blocks):
        scores = _ahead(query, key, row, at, scale)
        level = lse[row][:, at].double()
        merged = torch.logaddexp(level, scores.logsumexp(-1))
        v = value[row][:, at].double().repeat_interleave(groups, dim=0)
        part = (scores - merged[..., None]).exp() @ v
        out[row, :, at] = (out[row][:, at] * (level - merged).exp()[..., None] + part).to(out.dtype)
        lse[row, :, at] = merged.to(lse.dtype)


def _add_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    blocks: Tensor,
    scale: float,
) -> None:
    kv_heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    for row, at in _spans(blocks):
        weights = (_ahead(query, key, row, at, scale) - lse[row][:, at][..., None]).exp()
        q, o, do = (x[row][:, at].double() for x in (query, out, dout))
        k, v = (x[row][:, at].double().repeat_interleave(groups, dim=0) for x in (key, value))
        d_scores = weights * (do @ v.transpose(1, 2) - (do * o).sum(-1, keepdim=True)) * scale
        parts = (d_scores @ k, d_scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ do)
        for grad, part in zip(grads, parts, strict=True):
            if grad.shape[1] != part.shape[0]:
                part = part.unflatten(0, (kv_heads, groups)).sum(1)
            grad[row, :, at] += part.to(grad.dtype)


_op = attention_op(
    "block_attention",
    _forward,
    _backward,
    "Tensor blocks, float scale, int? window, Tensor? cu_seqlens, SymInt longest",
)
