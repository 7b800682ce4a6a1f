"""``softcap_attention``: attention whose scores are ``softcap * tanh(q k^T * scale / softcap)`` (Gemma 2), one torch op.

Flash attention in Triton (``softcap_attention_triton``): neither scores nor a mask are ever in memory, grouped keys are
not repeated, and tiles that no query sees cost nothing. Deterministic. An opaque custom op, so ``torch.compile`` keeps
its graph whole.

Shape legend: B batch, H query heads, G key/value heads, S tokens, E head size, D documents.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from nemo_automodel.kernels import flash
from nemo_automodel.kernels.attention_op import attention_op
from nemo_automodel.kernels.flash import laid_out_as, last_contiguous

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the op does not run on ``device`` in ``dtype``; None where it does: on the CPU in Triton's interpreter only."""
    if not _HAS_TRITON:
        return "Triton is not installed"
    if device.type == "cpu" and _INTERPRETED:
        return None if dtype in (torch.float32, torch.float16) else f"Triton's interpreter has no {dtype}"
    return "there is no kernel for cpu" if device.type == "cpu" else flash.unsupported_reason(device, dtype)


def softcap_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softcap: float,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Attention with soft-capped scores.

    Args:
        query: ``[B, H, S, E]``, any strides, E a multiple of 8 up to 256 (``flash.fits``), as the others.
        key: ``[B, G, S, E]``, H a multiple of G.
        value: ``[B, G, S, E]``.
        softcap: above 0; no score is further from 0.
        scale: of the scores; default E^-0.5.
        causal: no query sees keys ahead of itself.
        window: with ``causal``, keys that a query sees, its own included; default all.
        cu_seqlens: ``[D+1]`` int32 boundaries of the documents of a batch of one row.

    Returns ``[B, S, H, E]``, contiguous.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _op(query, key, value, softcap, scale, causal, window if causal else None, cu_seqlens)[0]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softcap: float,
    scale: float,
    causal: bool,
    window: int | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from nemo_automodel.kernels import softcap_attention_triton

    query, key, value = (last_contiguous(x) for x in (query, key, value))
    bounds = _bounds(cu_seqlens, query.shape[2])
    return softcap_attention_triton.forward(query, key, value, softcap, scale, causal, window, bounds)


def _backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softcap: float,
    scale: float,
    causal: bool,
    window: int | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from nemo_automodel.kernels import softcap_attention_triton

    wide = (query, key, value)
    query, key, value, dout = (last_contiguous(x) for x in (*wide, dout))
    dq, dk, dv = (last_contiguous(torch.empty_like(x)) for x in wide)
    bounds = _bounds(cu_seqlens, query.shape[2])
    softcap_attention_triton.backward(
        dout.transpose(1, 2), query, key, value, out.transpose(1, 2), lse, (dq, dk, dv), softcap, scale, causal, window,
        bounds,
    )  # fmt: skip
    return laid_out_as(dq, wide[0]), laid_out_as(dk, wide[1]), laid_out_as(dv, wide[2])


def _bounds(cu_seqlens: Tensor | None, length: int) -> Tensor | None:
    """[S, 2] int32, the first position and the end of each token's document; what is past the last is one more."""
    if cu_seqlens is None:
        return None
    positions = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    ends = torch.nn.functional.pad(cu_seqlens, (0, 1), value=length)
    document = torch.bucketize(positions, cu_seqlens, right=True)
    return torch.stack([ends[document - 1], ends[document]], dim=1).to(torch.int32)


_op = attention_op(
    "softcap_attention",
    _forward,
    _backward,
    "float softcap, float scale, bool causal, int? window, Tensor? cu_seqlens",
)
