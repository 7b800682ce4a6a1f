"""fp32 oracles of the kernels: the formula, written once, as slowly and plainly as it reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Sum over labelled rows of the cross-entropy of ``softcap(logit_scale * (hidden @ weight.T + bias))``.

    The head runs in the dtype of ``hidden`` and ``weight`` (so bf16 inputs give torch's own bf16 result); what follows
    it runs in ``dtype``.

    Args:
        hidden: [T, H].
        weight: [V, H].
        bias: [V] or None.
        labels: [T] int64.
        ignore_index: label of a row that does not count.
        logit_scale: factor on the logits.
        logit_softcap: c in ``c * tanh(logits / c)``; None = none.
        dtype: of the softmax and the sum.
    """
    logits = F.linear(hidden, weight, bias).to(dtype) * logit_scale
    if logit_softcap is not None:
        logits = torch.tanh(logits / logit_softcap) * logit_softcap
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scale: float,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``x @ weight^T + bias + scale * (x @ lora_a^T) @ lora_b^T``, every operand first cast to ``dtype``.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N] or None.
        lora_a: [r, K].
        lora_b: [N, r].
        scale: alpha / r.
        dtype: of the whole computation; bf16 gives torch's own bf16 result, by which a kernel's error is judged.
    """
    x = x.to(dtype)
    y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    return y + F.linear(F.linear(x, lora_a.to(dtype)) * scale, lora_b.to(dtype))
