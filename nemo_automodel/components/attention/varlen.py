"""Attention within packed documents and within a sliding window, without a dense mask where a kernel allows.

Documents of one length are rows of a batch, and SDPA's fastest kernel does them (cuDNN's, about 1.3 times as fast as
variable-length flash attention on an H200). Others: on CUDA in 16 bit, torch's variable-length flash attention; elsewhere
one SDPA call a document.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_automodel.kernels import flash

varlen_attn: Any = None
with contextlib.suppress(ImportError):  # a torch built without it
    from torch.nn.attention.varlen import varlen_attn
_TAKES_GQA = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    dropout: float = 0.0,
    scaling: float | None = None,
    causal: bool = True,
    window: int | None = None,
) -> Tensor:
    """Each document attends to itself only.

    ``query`` [B, H, S, E], ``key`` and ``value`` [B, G, S, E]; ``cu_seqlens`` [D+1] boundaries along S of a batch of
    one row; ``longest`` tokens of the longest document; ``window`` keys a query sees, its own included.
    Returns [B, H, S, E].
    """
    documents = cu_seqlens.shape[0] - 1
    if not window and documents * longest == query.shape[2]:  # none is longer, so all are as long
        return _equal_documents(query, key, value, documents, dropout, scaling, causal)
    if has_kernel(query, key, value, dropout):
        return varlen(query, key, value, (cu_seqlens, cu_seqlens), (longest, longest), scaling, causal, window)
    lengths = torch.diff(cu_seqlens).tolist()
    parts = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        if causal and window and q.shape[2] > window:
            parts.append(window_attention(q, k, v, dropout, scaling, window))
        else:
            gqa = q.shape[1] != k.shape[1]
            parts.append(
                F.scaled_dot_product_attention(
                    q, k, v, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=gqa
                )
            )
    return torch.cat(parts, dim=2)


def _equal_documents(
    query: Tensor, key: Tensor, value: Tensor, documents: int, dropout: float, scaling: float | None, causal: bool
) -> Tensor:
    """``packed_attention`` of ``documents`` of one length each; views, nothing is copied."""
    _, heads, length, _ = query.shape
    q, k, v = (x.transpose(1, 2).unflatten(1, (documents, -1))[0].transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=heads != key.shape[1]
    )
    return out.transpose(1, 2).reshape(1, length, heads, value.shape[-1]).transpose(1, 2)


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int
) -> Tensor:
    """Causal attention to the last ``window`` keys, the query's own included; shapes as in ``packed_attention``."""
    batch, _, length, _ = query.shape
    if has_kernel(query, key, value, dropout):
        boundaries = torch.arange(0, (batch + 1) * length, length, device=query.device, dtype=torch.int32)
        return varlen(query, key, value, (boundaries, boundaries), (length, length), scaling, True, window)
    position = torch.arange(length, device=query.device)
    behind = position[:, None] - position[None, :]
    band = (behind >= 0) & (behind < window)
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=band, dropout_p=dropout, scale=scaling, enable_gqa=gqa
    )


def has_kernel(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether ``varlen`` can be used."""
    return (
        varlen_attn is not None
        and query.is_cuda
        and dropout == 0.0
        and flash.unsupported_reason(query.device, query.dtype) is None
        and query.shape[-1] == key.shape[-1] == value.shape[-1] <= flash.MAX_HEAD_SIZE
        and query.shape[-1] % 8 == 0
    )


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scaling: float | None,
    causal: bool,
    window: int | None,
) -> Tensor:
    """Variable-length flash attention; a piece's last query is level with its last key.

    ``query`` [B, H, S, E], ``key`` and ``value`` [B, G, K, E]; ``cu_seqlens`` and ``longest`` of the pieces of the
    queries [B*S] and of the keys [B*K]. Returns [B, H, S, E].
    """
    batch, heads, length, size = query.shape
    options: dict[str, Any] = {
        "scale": scaling,
        "window_size": (window - 1, 0) if window else (-1, 0 if causal else -1),
    }
    if heads != key.shape[1] and _TAKES_GQA:  # torch 2.11 has no such argument and groups heads unasked
        options["enable_gqa"] = True
    q, k, v = (x.transpose(1, 2).reshape(-1, x.shape[1], size) for x in (query, key, value))
    out = varlen_attn(q, k, v, *cu_seqlens, *longest, **options)
    return out.view(batch, length, heads, size).transpose(1, 2)
