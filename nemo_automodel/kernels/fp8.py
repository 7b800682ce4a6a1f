"""Linear layers whose products run in FP8 (e4m3), row by row scaled, as differentiable ops.

Each row of both factors of a product has a scale of its own (largest magnitude -> 448), a row being what the product sums
over: a token's activations with an output feature's weights forward, a token's gradients with an input feature's weights
for dX, an output feature's gradients with an input feature's activations for dW.
``fp8_linear`` is for a weight that does not change: it is quantised once, a second time transposed for dX, and has no
gradient; ``fp8_lora_linear`` adds a low-rank adapter to it. ``fp8_dynamic_linear`` quantises the weight as it comes
(torchao's row-wise recipe does the same).
Quantising is plain torch, which ``torch.compile`` fuses with what made the numbers. Results are in the activation's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_automodel.kernels.lora import INTERPRETED

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
MULTIPLE = 16
"""In and out features must be multiples of it: what the matrix units take."""


def has_units(device: torch.device) -> bool:
    """Whether ``device`` multiplies FP8 in hardware; elsewhere ``fp8_linear`` computes the same numbers in fp32."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def joins_products(device: torch.device) -> bool:
    """Whether ``product_with_low_rank`` is one kernel on ``device``: made for Hopper's units, and measured there alone."""
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
    return INTERPRETED


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


def fp8_lora_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    transposed: Tensor,
    transposed_scales: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
) -> Tensor:
    """``fp8_linear(x, ...) + scale * (x @ lora_a^T) @ lora_b^T``, the low-rank part in x's dtype.

    Args:
        x: activations ``[..., K]``, bf16.
        weight: e4m3 ``[N, K]``, as the three after it made as for ``fp8_linear``.
        scales: fp32 ``[N, 1]``.
        transposed: e4m3 ``[K, N]``.
        transposed_scales: fp32 ``[K, 1]``.
        lora_a: ``[r, K]`` of any floating dtype; its gradient comes in that dtype, summed in x's.
        lora_b: ``[N, r]``, as ``lora_a``.
        scale: alpha / r.
    """
    return _Fp8LoRALinear.apply(x, weight, scales, transposed, transposed_scales, lora_a, lora_b, scale)


class _Fp8LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scales: Tensor,
        transposed: Tensor,
        transposed_scales: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        xa = (rows @ lora_a.to(x.dtype).t()) * scale
        ctx.save_for_backward(rows, xa, transposed, transposed_scales, lora_a, lora_b)
        ctx.scale = scale
        y = product_with_low_rank(*quantize_rows(rows), weight, scales, xa, lora_b.t())
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, xa, transposed, scales, lora_a, lora_b = ctx.saved_tensors
        dy_rows = dy.reshape(-1, dy.shape[-1])
        dyb = (dy_rows @ lora_b.to(dy.dtype)) * ctx.scale
        dx = None
        if ctx.needs_input_grad[0]:
            dx = product_with_low_rank(*quantize_rows(dy_rows), transposed, scales, dyb, lora_a)
            dx = dx.view(*dy.shape[:-1], rows.shape[-1])
        d_lora_a, d_lora_b = (dyb.t() @ rows).to(lora_a.dtype), (dy_rows.t() @ xa).to(lora_b.dtype)
        return dx, None, None, None, None, d_lora_a, d_lora_b, None


def product_with_low_rank(x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """``(x * x_scales) @ (w * w_scales)^T + u @ v`` [T, N] in u's dtype.

    One Triton kernel where ``joins_products``, which ``torch.compile`` takes as it is; elsewhere a product each and their sum.

    Args:
        x: e4m3 ``[T, F]``.
        x_scales: fp32 ``[T, 1]``, contiguous.
        w: e4m3 ``[N, F]``, contiguous.
        w_scales: fp32 ``[N, 1]``, contiguous.
        u: bf16 ``[T, r]``, r at most ``lora.MAX_RANK``.
        v: ``[r, N]`` of any floating dtype and any strides; rounded to u's dtype.
    """
    return torch.ops.automodel.fp8_product_with_low_rank(x, x_scales, w, w_scales, u, v)


def _product_with_low_rank(x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, u: Tensor, v: Tensor) -> Tensor:
    if x.shape[0] > 0 and joins_products(x.device):
        from nemo_automodel.kernels import fp8_triton

        return fp8_triton.product_with_low_rank(x.contiguous(), x_scales, w, w_scales, u.contiguous(), v)
    return _multiply(x, x_scales, w, w_scales, u.dtype).addmm_(u, v.to(u.dtype))


_library = torch.library.Library("automodel", "FRAGMENT")  # without custom_op's layers, which take longer than the call
_library.define(
    "fp8_product_with_low_rank(Tensor x, Tensor x_scales, Tensor w, Tensor w_scales, Tensor u, Tensor v) -> Tensor"
)
for _key in ("CUDA", "CPU"):
    _library.impl("fp8_product_with_low_rank", _product_with_low_rank, _key)


@torch.library.register_fake("automodel::fp8_product_with_low_rank")
def _(x, x_scales, w, w_scales, u, v):
    return u.new_empty(x.shape[0], w.shape[0])


def fp8_dynamic_linear(x: Tensor, weight: Tensor, fp8_grad_weight: bool) -> Tensor:
    """``x @ W^T`` and dX in FP8, from a weight that is quantised in each of them.

    Args:
        x: activations ``[..., K]``, bf16.
        weight: ``[N, K]`` in the dtype of ``x``.
        fp8_grad_weight: dW in FP8 too, instead of in the dtype of ``x``.
    """
    return _Fp8DynamicLinear.apply(x, weight, fp8_grad_weight)


class _Fp8DynamicLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, fp8_grad_weight: bool) -> Tensor:
        ctx.fp8_grad_weight = fp8_grad_weight
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _product(x, *quantize_rows(weight))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _product(dy, *quantize_rows(weight.t().contiguous()))
        if ctx.needs_input_grad[1]:
            flat_dy, flat_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
            in_fp8 = ctx.fp8_grad_weight and flat_x.shape[0] > 0  # an expert may have no token
            dw = _grad_weight_in_fp8(flat_dy, flat_x) if in_fp8 else flat_dy.t() @ flat_x
        return dx, dw, None


def _grad_weight_in_fp8(dy: Tensor, x: Tensor) -> Tensor:
    """``dy^T x`` of ``dy`` [T, N] and ``x`` [T, K], with a scale for each of the N and K features."""
    if missing := -dy.shape[0] % MULTIPLE:
        dy, x = F.pad(dy, (0, 0, 0, missing)), F.pad(x, (0, 0, 0, missing))
    return _product(dy.t().contiguous(), *quantize_rows(x.t().contiguous()))


def _product(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """``x`` [..., F] times the transpose of the quantised ``weight`` [M, F] -> [..., M] in x's dtype."""
    y = _multiply(*quantize_rows(x.reshape(-1, x.shape[-1])), weight, scales, x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def _multiply(x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``(x * x_scales) @ (w * w_scales)^T`` in ``dtype``."""
    if x.is_cuda:
        return torch._scaled_mm(x, w.t(), x_scales, w_scales.t(), out_dtype=dtype, use_fast_accum=True)
    return ((x.float() @ w.float().t()) * x_scales * w_scales.t()).to(dtype)
