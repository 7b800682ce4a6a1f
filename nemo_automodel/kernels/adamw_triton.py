"""``adamw.adamw_`` as one Triton kernel: each number is read once and written once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from nemo_automodel.kernels.adamw import Update

_BLOCK, _WARPS = 1024, 8


def adamw_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    skip: Tensor | None,
    update: Update,
    grad_scale: Tensor | None = None,
) -> None:
    """See ``adamw.adamw_``; every tensor contiguous and on one device."""
    from nemo_automodel.kernels.adamw import _SALTS, log

    size = weight.numel()
    seeds = [_signed(update.seed ^ salt) for salt in _SALTS]
    with torch.cuda.device(weight.device) if weight.is_cuda else torch.no_grad():
        _kernel[(triton.cdiv(size, _BLOCK),)](
            weight, grad, exp_avg, exp_avg_sq, step, step if skip is None else skip, step if grad_scale is None else grad_scale, size,
            update.lr, update.beta1, update.beta2, 1 - update.beta1, 1 - update.beta2, log(update.beta1), log(update.beta2), update.eps,
            1 - update.lr * update.weight_decay, *seeds,
            SKIPS=skip is not None, SCALES=grad_scale is not None, ROUND=update.stochastic_rounding, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip


def _signed(number: int) -> int:
    return number - 2**32 if number >= 2**31 else number


@triton.jit
def _kernel(
    weight, grad, exp_avg, exp_avg_sq, step, skip, grad_scale, size,
    lr, beta1, beta2, one_minus_beta1, one_minus_beta2, log_beta1, log_beta2, eps, decay, seed_w, seed_m, seed_v,
    SKIPS: tl.constexpr, SCALES: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if SKIPS:
        size = tl.where(tl.load(skip) == 0.0, size, 0)
    inside = at < size
    number = tl.load(step)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if SCALES:
        g = g / tl.load(grad_scale)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(tl.float32)
    m = m * beta1 + g * one_minus_beta1
    v = v * beta2 + g * g * one_minus_beta2
    mean = m / _one_minus_exp(number * log_beta1)
    spread = tl.sqrt(v / _one_minus_exp(number * log_beta2)) + eps
    w = w * decay - lr * (mean / spread)
    _store(weight, at, w, inside, seed_w, ROUND)
    _store(exp_avg, at, m, inside, seed_m, ROUND)
    _store(exp_avg_sq, at, v, inside, seed_v, ROUND)


@triton.jit
def _one_minus_exp(x):
    """1 - e^x for x <= 0; near 0 by its series, where the difference would lose what beta2 = 0.999 makes of it."""
    series = 1.0 + x / 6.0 * (1.0 + x / 7.0 * (1.0 + x / 8.0))
    series = 1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0 * series)))
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _store(target, at, value, inside, seed, ROUND: tl.constexpr):
    if ROUND and target.dtype.element_ty == tl.bfloat16:
        h = (at * 0x9E3779B1 + seed).to(tl.uint32)
        h = (h ^ (h >> 16)) * 0x85EBCA6B
        h = (h ^ (h >> 13)) * 0xC2B2AE35
        h = h ^ (h >> 16)
        bits = value.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        bits = tl.where(finite, (bits + (h & 0xFFFF)) & 0xFFFF0000, bits)
        value = bits.to(tl.float32, bitcast=True)
    tl.store(target + at, value.to(target.dtype.element_ty), mask=inside)
