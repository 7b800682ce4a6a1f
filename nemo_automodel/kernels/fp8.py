"""``fp8_linear``: a frozen linear layer whose products run in FP8 (e4m3), row by row scaled, as one differentiable op.

Each token's activation and each output feature's weights have a scale of their own (largest magnitude -> 448). The weight
does not change, so it is quantised once, a second time transposed for dX, whose sum runs over the output features.
Activations and gradients are quantised as they come, in plain torch, which ``torch.compile`` fuses with what made them.
Results are in the activation's dtype; there is no gradient of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
MULTIPLE = 16
"""In and out features must be multiples of it: what the matrix units take."""


def has_units(device: torch.device) -> bool:
    """Whether ``device`` multiplies FP8 in hardware; elsewhere ``fp8_linear`` computes the same numbers in fp32."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` [T, F] as (e4m3 [T, F], fp32 scales [T, 1]), so that ``x ~ values * scales``."""
    largest = x.abs().amax(dim=1, keepdim=True).float()
    scales = largest.clamp(min=1e-12) / _LARGEST
    values = (x.float() / scales).clamp(-_LARGEST, _LARGEST)
    return values.to(FP8), scales


def fp8_linear(x: Tensor, weight: Tensor, scales: Tensor, transposed: Tensor, transposed_scales: Tensor) -> Tensor:
    """``x @ W^T`` in FP8, and dX likewise.

    Args:
        x: activations ``[..., K]``, bf16.
        weight: e4m3 ``[N, K]`` with ``scales`` [N, 1]: what ``quantize_rows`` makes of W.
        scales: see ``weight``.
        transposed: e4m3 ``[K, N]`` with ``transposed_scales`` [K, 1]: what it makes of W^T.
        transposed_scales: see ``transposed``.
    """
    return _Fp8Linear.apply(x, weight, scales, transposed, transposed_scales)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scales: Tensor, transposed: Tensor, transposed_scales: Tensor
    ) -> Tensor:
        ctx.save_for_backward(transposed, transposed_scales)
        return _product(x, weight, scales)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        transposed, scales = ctx.saved_tensors
        return _product(dy, transposed, scales), None, None, None, None


def _product(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """``x`` [..., F] times the transpose of the quantised ``weight`` [M, F] -> [..., M] in x's dtype."""
    values, x_scales = quantize_rows(x.reshape(-1, x.shape[-1]))
    if x.is_cuda:
        y = torch._scaled_mm(values, weight.t(), x_scales, scales.t(), out_dtype=x.dtype, use_fast_accum=True)
    else:
        y = ((values.float() @ weight.float().t()) * x_scales * scales.t()).to(x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])
