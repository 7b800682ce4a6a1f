"""The AdamW kernel in Triton's interpreter (``tests/unit/training/test_adamw.py`` starts this file) against plain torch."""

from __future__ import annotations

import logging

import pytest
import torch

from nemo_automodel.components.training import local_step
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
        scale = torch.tensor(3.0) if step == 7.0 else None
        adamw_triton.adamw_(*ours, torch.tensor(step), None, update, scale)
        adamw._in_torch(*plain, torch.tensor(step), update, scale)
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


@pytest.mark.parametrize("number", [1e-5, 1e-3, 0.1, 0.49, 0.51, 3.0, 200.0])
def test_bias_correction_is_exact_for_any_beta_and_step(number):
    """With a first moment of 0 after the update's own share, the weight moves by lr / (1 - beta1^step) exactly."""
    beta = float(torch.exp(torch.tensor(-number, dtype=torch.float64)))
    update = Update(1.0, beta, 0.0, 0.0, 0.0, False, 0)
    weight, grad, mean, square = torch.zeros(4), torch.ones(4), torch.ones(4), torch.ones(4)
    adamw_triton.adamw_(weight, grad, mean, square, torch.tensor(1.0), None, update)
    expected = torch.tensor(-1 / (1 - beta), dtype=torch.float64)
    torch.testing.assert_close(weight.double(), expected.expand(4), rtol=3e-7, atol=0)


SHAPES = [(37, 61), (8, 8), (64, 64), (61,)]


def train(wrap, dtype, cls=torch.optim.AdamW, **options):
    """Five steps of torch's fused optimizer, gradients divided by a scale, the third step left out by the flag."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    optimizer = wrap(cls(params, lr=1e-2, betas=(0.9, 0.999), fused=True, **options))
    for step in range(5):
        for parameter in params[step % 2 :]:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0 + step), torch.tensor(float(step == 2))
        optimizer.step()
        optimizer.zero_grad()
    states = [optimizer.state[p][key] for p in params for key in ("step", "exp_avg", "exp_avg_sq")]
    return [p.detach() for p in params], states


@pytest.fixture
def large(monkeypatch):
    """From 2,048 numbers a weight is large: two of the four above."""
    monkeypatch.setattr(local_step, "_LARGE", 2048)
    calls = []
    monkeypatch.setattr(local_step, "adamw_", lambda *a: calls.append(a[0].shape) or adamw.adamw_(*a))
    return calls


@pytest.mark.parametrize(
    ("cls", "options", "by_kernel"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.1}, True),
        (torch.optim.Adam, {"weight_decay": 0.0}, True),
        (torch.optim.Adam, {"weight_decay": 0.1}, False),
        (torch.optim.AdamW, {"amsgrad": True}, False),
        (torch.optim.AdamW, {"maximize": True}, False),
    ],
)
def test_large_weights_of_torchs_fused_optimizers_get_the_same_update(large, cls, options, by_kernel):
    expected, their_states = train(lambda o: o, torch.float32, cls, **options)
    found, states = train(local_step.step_on_local_tensors, torch.float32, cls, **options)
    assert set(large) - {(2048,)} == ({(37, 61), (64, 64)} if by_kernel else set())  # the one taken off is the proof
    for ours, theirs in zip(found + states, expected + their_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)


def test_a_kernel_that_is_wrong_is_not_used(large, monkeypatch, caplog):
    def wrong(weight, *others):
        adamw.adamw_(weight, *others)
        weight.mul_(1.001)

    monkeypatch.setattr(local_step, "adamw_", wrong)
    expected, their_states = train(lambda o: o, torch.float32)
    with caplog.at_level(logging.WARNING):
        found, states = train(local_step.step_on_local_tensors, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found + states, expected + their_states, strict=True))
    assert "torch's is used" in caplog.text
