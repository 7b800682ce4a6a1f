"""Clipping by the optimizer's own division of gradients, against ``torch.nn.utils.clip_grad_norm_``."""

from __future__ import annotations

import copy

import pytest
import torch

from nemo_automodel.components.distributed.grads import GradClipper
from nemo_automodel.components.training.adamw import AdamW
from nemo_automodel.components.training.local_step import step_on_local_tensors
from nemo_automodel.components.training.nonfinite import NonFiniteGuard
from nemo_automodel.types import TrainState


def fused(params):
    return step_on_local_tensors(torch.optim.AdamW(params, lr=1e-2, fused=True))


def one_by_one(params):
    return step_on_local_tensors(torch.optim.AdamW(params, lr=1e-2))


def ours(params):
    return AdamW(params, lr=1e-2, state_dtype="float32")


class Schedule:
    step = 1

    def state_dict(self):
        return {}


def run(make, clip, max_norm, dtype=torch.float32):
    """Four steps through the recipe's guard; weights, norms and the last step's gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((8, 16), (16,))]
    optimizer = make(params)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    guard = NonFiniteGuard()
    guard.protect(TrainState(None, None, None, optimizer, lr_scheduler, Schedule(), None, {}), save=lambda state: None)
    clipper, norms = clip(optimizer, max_norm), []
    for scale in (10.0, 0.01, 5.0, 1.0):
        for parameter in params:
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator).to(dtype)
        raw = copy.deepcopy([p.grad for p in params])
        norms.append(clipper(params))
        kept = copy.deepcopy([p.grad for p in params])
        guard.step(torch.ones(()), norms[-1], [torch.ones(())], [{}])
        assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()
    return [p.detach() for p in params], norms, raw, kept


def torchs(optimizer, max_norm):
    return lambda params: torch.nn.utils.clip_grad_norm_(params, max_norm)


@pytest.mark.parametrize("max_norm", [1.0, 1e9])
@pytest.mark.parametrize("make", [fused, one_by_one, ours])
def test_clipping_is_torchs_whoever_divides(make, max_norm):
    expected, their_norms, *_ = run(make, torchs, max_norm)
    found, norms, raw, kept = run(make, lambda optimizer, norm: GradClipper(norm, optimizer), max_norm)
    torch.testing.assert_close(norms, their_norms)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    by_itself = make is not one_by_one
    assert all(torch.equal(a, b) for a, b in zip(raw, kept, strict=True)) is (by_itself or max_norm > 1)


def test_float64_gradients_are_clipped_in_float64():
    expected, *_ = run(one_by_one, torchs, 1.0, torch.float64)
    found, *_ = run(fused, lambda optimizer, norm: GradClipper(norm, optimizer), 1.0, torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_clipped_update_is_another_than_the_unclipped():
    clipped, *_ = run(fused, lambda optimizer, norm: GradClipper(norm, optimizer), 0.1)
    free, *_ = run(fused, lambda optimizer, norm: GradClipper(None, optimizer), 0.1)
    assert not torch.allclose(clipped[0], free[0], rtol=1e-4)
