"""The LR horizon is exact (failure class 10), and randomness is a function of (seed, step, rank)."""

import os
import random

import numpy as np
import pytest
import torch

from nemo_automodel.components.training.lr import warmup_decay
from nemo_automodel.components.training.rng import StatefulRNG
from nemo_automodel.errors import ConfigError


def trace(total, **kwargs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = warmup_decay(optimizer, total, **kwargs)
    lrs = []
    for _ in range(total):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return lrs


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize("total", [1, 2, 10, 333])
def test_class_10_last_step_runs_at_the_end_value(decay, total):
    lrs = trace(total, decay=decay, min_lr_ratio=0.25, warmup_steps=total // 3)
    assert lrs[-1] == pytest.approx(0.1, rel=1e-9)
    assert max(lrs) <= 0.4


def test_warmup_reaches_the_peak_and_linear_is_linear():
    lrs = trace(14, decay="linear", warmup_steps=4, min_lr_ratio=0.0)
    assert lrs[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert lrs[4:] == pytest.approx([0.4 * (1 - i / 10) for i in range(1, 11)])


def test_constant_keeps_the_peak():
    assert trace(10, decay="constant", warmup_steps=0) == pytest.approx([0.4] * 10)


def test_warmup_longer_than_run():
    with pytest.raises(ConfigError, match=r"warmup_steps=20.*10 steps"):
        trace(10, warmup_steps=20)


def draws():
    return random.random(), np.random.rand(), torch.rand(3).tolist()


def test_steps_draw_the_same_whatever_ran_before():
    rng = StatefulRNG(seed=7)
    rng.seed_step(5)
    expected = draws()
    other = StatefulRNG(seed=7)
    torch.rand(1000)
    other.seed_step(4)
    assert draws() != expected
    other.seed_step(5)
    assert draws() == expected


def test_ranks_differ_only_when_ranked():
    def at(**kwargs):
        rng = StatefulRNG(**kwargs)
        built = torch.rand(2).tolist()
        rng.seed_step(1)
        return built, draws()

    assert at(seed=1, rank=0)[0] == at(seed=1, rank=1)[0]
    assert at(seed=1, rank=0)[1] != at(seed=1, rank=1)[1]
    assert at(seed=1, rank=0, ranked=False)[1] == at(seed=1, rank=1, ranked=False)[1]
    assert at(seed=1)[1] != at(seed=2)[1]


def test_deterministic_algorithms_on_request_alone(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        StatefulRNG()
        assert torch.are_deterministic_algorithms_enabled() == before
        StatefulRNG(deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(before)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
