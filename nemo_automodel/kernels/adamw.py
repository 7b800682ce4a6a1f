"""One AdamW update (Loshchilov and Hutter 2019) of one tensor, in fp32 whatever its parts are kept in.

What is kept in bfloat16 is rounded up or down at random, in proportion to how near the two are, so that its mean is right
and an update far below the last bit is not lost. The random bits are a hash of (seed, position): the same on every device and
in every process, and nothing that a checkpoint has to hold.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_MASK = 0xFFFFFFFF
_SALTS = (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35)  # of the weight, the first and the second moment


@dataclass(frozen=True)
class Update:
    """The numbers of an update: AdamW's own, and the ``seed`` of what is rounded at random."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    stochastic_rounding: bool
    seed: int


def has_kernel(device_type: str) -> bool:
    """Whether the update is one kernel on this kind of device: "cuda", and "cpu" in Triton's interpreter (for tests)."""
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") == "1"
    return _HAS_TRITON and (device_type == "cuda" or interpreted)


@torch.no_grad()
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
    """Update ``weight`` and its moments in place.

    Args:
        weight: fp32 or bf16; contiguous, or updated without the kernel.
        grad: of the same shape.
        exp_avg: first moment, fp32 or bf16, contiguous and of the same shape.
        exp_avg_sq: second moment, likewise.
        step: fp32 scalar on weight's device: this update's number, from 1.
        skip: fp32 scalar there; where it is not 0, nothing is changed. None = never.
        update: see there.
        grad_scale: fp32 scalar there, by which ``grad`` is divided first; ``grad`` itself stays. None = 1.
    """
    if weight.numel() == 0:
        return
    if has_kernel(weight.device.type) and weight.is_contiguous():
        from nemo_automodel.kernels import adamw_triton

        adamw_triton.adamw_(weight, grad.contiguous(), exp_avg, exp_avg_sq, step, skip, update, grad_scale)
    elif skip is None or not bool(skip):
        _in_torch(weight, grad, exp_avg, exp_avg_sq, step, update, grad_scale)


def _in_torch(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    update: Update,
    grad_scale: Tensor | None = None,
) -> None:
    number = float(step)
    gradient = grad.float() if grad_scale is None else grad.float() / grad_scale
    first = exp_avg.float() * update.beta1 + gradient * (1 - update.beta1)
    second = exp_avg_sq.float() * update.beta2 + gradient * gradient * (1 - update.beta2)
    mean = first / (1 - update.beta1**number)
    spread = (second / (1 - update.beta2**number)).sqrt() + update.eps
    value = weight.float() * (1 - update.lr * update.weight_decay) - update.lr * (mean / spread)
    for target, result, salt in zip((weight, exp_avg, exp_avg_sq), (value, first, second), _SALTS, strict=True):
        store(target, result, update.seed ^ salt if update.stochastic_rounding else None)


def store(target: Tensor, value: Tensor, seed: int | None) -> None:
    """Write fp32 ``value`` into ``target``; a bf16 one is rounded at random by ``seed``, to the nearest without."""
    if seed is None or target.dtype != torch.bfloat16:
        target.copy_(value)
        return
    bits = value.contiguous().view(torch.int32).to(torch.int64) & _MASK
    noise = _hash(torch.arange(value.numel(), device=value.device), seed).view(value.shape) & 0xFFFF
    rounded = (bits + noise) & 0xFFFF0000
    kept = torch.where(value.isfinite(), rounded, bits)
    signed = torch.where(kept >= 2**31, kept - 2**32, kept).to(torch.int32)
    target.copy_(signed.view(torch.float32))


def _hash(index: Any, seed: int) -> Any:
    """The finaliser of MurmurHash3 (32 bits) over ``index``, an int64 tensor or an int, and ``seed``."""
    h = (index * 0x9E3779B1 + seed) & _MASK
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)


def seed_of(*numbers: int) -> int:
    """A 32-bit seed from any integers, the same everywhere."""
    h = 0
    for number in numbers:
        for part in (number & _MASK, (number >> 32) & _MASK):
            h = _hash(part, h ^ 0x27D4EB2F)
    return h


def log(beta: float) -> float:
    """``ln(beta)``, for powers of it on the device; of 0, what makes every power 0."""
    return math.log(beta) if beta > 0 else -1e30
