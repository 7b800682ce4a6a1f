"""``sink_attention``: causal attention in which a logit that no value goes with shares in each query's softmax, one torch op.

gpt-oss learns such a sink for each head. It takes part in the sum that normalises and in nothing else, so that the result is
torch's fastest kernel's times sigmoid(lse - sink). In backward that kernel is given the result and the log-sum-exp with the
sink in it, of which its gradients are exact; the sink's own is -sum exp(sink - lse) rowsum(dO O). No [S, S] mask exists.
An opaque custom op, so ``torch.compile`` keeps its graph whole.

Shape legend: B batch, H query heads, G key/value heads, S tokens, E head size, D documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_automodel.kernels.attention_op import attention_op
from nemo_automodel.kernels.flash import flash, flash_backward, laid_out_as, last_contiguous


def sink_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    scale: float | None = None,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
) -> Tensor:
    """Attention to the keys behind (the last ``window``, the query's own included) and to the head's sink.

    Args:
        query: ``[B, H, S, E]``, any strides with the last dimension contiguous, as the others.
        key: ``[B, G, S, E]``, H a multiple of G.
        value: ``[B, G, S, E]``.
        sinks: ``[H]``, logits, any floating dtype; their gradient is summed in fp32.
        scale: of the scores; default E^-0.5.
        window: default all keys behind.
        cu_seqlens: ``[D+1]`` int32 boundaries of the documents of a batch of one row.
        longest: tokens of the longest document; default S.

    Returns ``[B, S, H, E]``, contiguous.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _op(query, key, value, sinks, scale, window, cu_seqlens, longest or query.shape[2])[0]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    scale: float,
    window: int | None,
    cu_seqlens: Tensor | None,
    longest: int,
) -> tuple[Tensor, Tensor]:
    query, key, value = (last_contiguous(x) for x in (query, key, value))
    out, lse = flash(query, key, value, scale, window, cu_seqlens, longest)
    logits = sinks.to(lse.dtype)[None, :, None]
    share = torch.sigmoid(lse - logits).transpose(1, 2)[..., None]
    out = (out.transpose(1, 2) * share).to(query.dtype).contiguous()
    return out, torch.logaddexp(lse, logits).contiguous()


def _backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    scale: float,
    window: int | None,
    cu_seqlens: Tensor | None,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = torch.exp(sinks.to(lse.dtype)[None, :, None] - lse)  # the sink's share of each query's softmax
    level = torch.linalg.vecdot(dout.to(lse.dtype), out.to(lse.dtype)).transpose(1, 2)
    dsinks = -(weight * level).sum(dim=(0, 2)).to(sinks.dtype)
    wide = (query, key, value)
    query, key, value, dout = (last_contiguous(x) for x in (*wide, dout))
    grads = flash_backward(
        dout.transpose(1, 2), query, key, value, out.transpose(1, 2), lse, scale, window, cu_seqlens, longest
    )
    dq, dk, dv = (laid_out_as(grad, x) for grad, x in zip(grads, wide, strict=True))
    return dq, dk, dv, dsinks


_op = attention_op(
    "sink_attention",
    _forward,
    _backward,
    "Tensor sinks, float scale, int? window, Tensor? cu_seqlens, SymInt longest",
    num_gradients=4,
)
