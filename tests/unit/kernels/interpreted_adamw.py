"""The AdamW kernel in Triton's interpreter (``tests/unit/training/test_adamw.py`` starts this file) against plain torch."""

from __future__ import annotations

import pytest
import torch

from nemo_automodel.kernels import adamw, adamw_triton
from nemo_automodel.kernels.adamw import Update


def tensors(dtype, moments, size=(37, 61)):
    g = torch.Generator().manual_seed(0)
    weight, grad = torch.randn(size, generator=g).to(dtype), torch.randn(size, generator=g).to(dtype)
    return [weight, grad, torch.randn(size, generator=g).to(moments), torch.rand(size, generator=g).to(moments)]


@pytest.mark.parametrize(
    ("dtype", "moments", "at_random"),
    [
        (torch.float32, torch.float32, True),
        (torch.float32, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, True),  # to the nearest is left to the GPU: the interpreter cuts bits off
    ],
)
def test_kernel_is_the_formula(dtype, moments, at_random):
    update = Update(1e-2, 0.9, 0.95, 1e-8, 0.1, at_random, 12345)
    for step in (1.0, 7.0):
        ours, plain = tensors(dtype, moments), tensors(dtype, moments)
        adamw_triton.adamw_(*ours, torch.tensor(step), None, update)
        adamw._in_torch(*plain, torch.tensor(step), update)
        for found, expected in zip(ours, plain, strict=True):
            if found.dtype == torch.float32:
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            else:  # the same random bits: another neighbour only where fp32 results differ in a last bit
                assert (found != expected).float().mean() < 0.002
                torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)
        assert not torch.equal(ours[0], tensors(dtype, moments)[0])


def test_a_step_is_left_out_by_the_flag():
    update = Update(1e-2, 0.9, 0.95, 1e-8, 0.1, True, 1)
    ours = tensors(torch.bfloat16, torch.bfloat16)
    adamw_triton.adamw_(*ours, torch.tensor(1.0), torch.ones(()), update)
    assert all(torch.equal(a, b) for a, b in zip(ours, tensors(torch.bfloat16, torch.bfloat16), strict=True))
    adamw_triton.adamw_(*ours, torch.tensor(1.0), torch.zeros(()), update)
    assert not torch.equal(ours[0], tensors(torch.bfloat16, torch.bfloat16)[0])
