"""Causal attention with its log-sum-exp by torch's fastest kernel: what attention with something of its own is made of.

Who adds to the keys that it sees, or to the sum that normalises, corrects the output and the log-sum-exp, and gives both to
the backward, whose gradients are then exact: dS = P (dP - rowsum(dO O)), P = exp(S - lse), as in ring attention (arXiv
2310.01889). Without a GPU it is torch's CPU kernel, with a mask.

Shape legend: B batch, H query heads, G key/value heads, S tokens, E head size, D documents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from nemo_automodel.kernels.masks import written_mask

MAX_HEAD_SIZE = 256  # of torch's flash kernels
_aten: Any = torch.ops.aten


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``flash`` does not run on ``device`` in ``dtype``; None where it does. On the CPU it is there for small tests."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"there is no kernel for {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"there is no kernel for {dtype}"
    # Not get_device_capability: torch.compile takes the properties for constants.
    return None if torch.cuda.get_device_properties(device).major >= 8 else "the GPU is too old for flash attention"


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether flash attention takes tensors of these shapes [B, H, S, E] and [B, G, S, E]."""
    size = query.shape[-1]
    return (
        size == key.shape[-1] == value.shape[-1] <= MAX_HEAD_SIZE and size % 8 == 0 and query.shape[2] == key.shape[2]
    )


def flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, cu_seqlens: Tensor | None, longest: int
) -> tuple[Tensor, Tensor]:
    """Causal attention to the last ``window`` keys (None: all) within documents ``cu_seqlens`` (None: a row each).

    ``query`` [B, H, S, E], ``key`` and ``value`` [B, G, S, E]; ``longest`` tokens of the longest document.
    Returns the output [B, H, S, E] and the natural log-sum-exp of each query's scores [B, H, S], in fp32 (fp64 for fp64).
    """
    if not query.is_cuda:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        mask = _additive_mask(query, window, cu_seqlens)
        return _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, mask is None, attn_mask=mask, scale=scale
        )
    batch, heads, length, _ = query.shape
    if window or cu_seqlens is not None:
        bounds = _bounds(batch, length, query.device) if cu_seqlens is None else cu_seqlens
        out, lse, *_ = _aten._flash_attention_forward(
            *(_tokens(x) for x in (query, key, value)), bounds, bounds, longest, longest, 0.0, True, False,
            scale=scale, window_size_left=window - 1 if window else -1, window_size_right=0 if window else -1,
        )  # fmt: skip
        return out.view(batch, length, heads, -1).transpose(1, 2), lse.view(heads, batch, length).transpose(0, 1)
    if _cudnn_is_faster(query, key, value, scale):
        found = _aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, True, False, scale=scale)
    else:
        found = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=scale)
    return found[0], found[1].reshape(batch, heads, -1)[..., :length]


def flash_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int | None,
    cu_seqlens: Tensor | None,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients [B, H, S, E] and twice [B, G, S, E]; ``out`` and ``lse`` may be of more than the keys seen here."""
    batch, heads, length, size = query.shape
    if not query.is_cuda:
        kv_heads = key.shape[1]
        key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
        mask = _additive_mask(query, window, cu_seqlens)
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, query, key, value, out, lse, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        return dq, *(x.view(batch, kv_heads, -1, length, size).sum(2) for x in (dk, dv))
    state, none = torch.zeros(2, dtype=torch.uint64, device=query.device), query.new_empty(0)  # nothing is dropped
    if window or cu_seqlens is not None:
        bounds = _bounds(batch, length, query.device) if cu_seqlens is None else cu_seqlens
        grads = _aten._flash_attention_backward(
            *(_tokens(x) for x in (dout, query, key, value, out)), lse.transpose(0, 1).reshape(heads, -1), bounds,
            bounds, longest, longest, 0.0, True, state, none,
            scale=scale, window_size_left=window - 1 if window else -1, window_size_right=0 if window else -1,
        )  # fmt: skip
        dq, dk, dv = (x.view(batch, length, -1, size).transpose(1, 2) for x in grads)
        return dq, dk, dv
    if _cudnn_is_faster(query, key, value, scale):
        seed = torch.zeros((), dtype=torch.int64, device=query.device)
        return _aten._scaled_dot_product_cudnn_attention_backward(
            dout, query, key, value, out, lse.unsqueeze(-1), seed, seed, None, None, None, length, length, 0.0, True,
            scale=scale,
        )  # fmt: skip
    return _aten._scaled_dot_product_flash_attention_backward(
        dout, query, key, value, out, lse, None, None, length, length, 0.0, True, state, none, scale=scale
    )


def _cudnn_is_faster(query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
    """Whether torch itself would train with cuDNN's kernel here."""
    with torch.enable_grad():  # a compiled graph's tensors ask for no gradient, on which the choice depends
        q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
        gqa = q.shape[1] != k.shape[1]
        choice = _aten._fused_sdp_choice(q, k, v, None, 0.0, True, scale=scale, enable_gqa=gqa)
    return bool(choice == SDPBackend.CUDNN_ATTENTION.value)


def _additive_mask(query: Tensor, window: int | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """Additive [S, S], None where plain causal is meant; for the CPU only."""
    if not window and cu_seqlens is None:
        return None
    length = query.shape[2]
    seen = written_mask(length, length, True, window, cu_seqlens, query.device)
    return query.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)


def _bounds(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)


def _tokens(x: Tensor) -> Tensor:
    """[B, H, S, E] as [B * S, H, E]."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def last_contiguous(x: Tensor) -> Tensor:
    """``x`` with its last dimension contiguous, as the kernels want it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the layout of ``torch.empty_like(like)``, which is what a compiled graph was told of."""
    if x.stride() == like.stride() or x.stride() == torch.empty_like(like, device="meta").stride():
        return x
    return torch.empty_like(like).copy_(x)
