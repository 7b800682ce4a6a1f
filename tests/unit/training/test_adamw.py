"""AdamW with small moments on the CPU: against torch's own, the mean of what is rounded at random, going on from a state."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch import nn

from nemo_automodel.components.training.adamw import AdamW
from nemo_automodel.errors import ConfigError
from nemo_automodel.kernels.adamw import seed_of, store
from tests.unit.kernels.interpreter import require_passes

EIGHT_BITS = pytest.param(
    "int8", marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
)


def train(make, steps=40, dtype=torch.float32, shape=(32, 256), seed=0):
    """Steps on a fixed sequence of gradients; returns the weight in float64 and the optimizer."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    optimizer = make([weight])
    for _ in range(steps):
        weight.grad = torch.randn(shape, generator=generator).to(dtype)
        optimizer.step()
    return weight.detach().double(), optimizer


def torchs(params):
    return torch.optim.AdamW(params, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


def ours(**options):
    return lambda params: AdamW(params, lr=1e-2, weight_decay=0.1, **options)


@pytest.mark.parametrize(("state_dtype", "bound"), [("float32", 1e-6), ("bfloat16", 0.01), ("int8", 0.04)])
def test_it_is_adamw(state_dtype, bound):
    if state_dtype == "int8":
        pytest.importorskip("bitsandbytes")
    start, _ = train(torchs, steps=0)
    expected, _ = train(torchs, dtype=torch.float32)
    found, optimizer = train(ours(state_dtype=state_dtype))
    moved = (expected - start).norm()
    assert (found - expected).norm() / moved < bound
    (state,) = optimizer.state.values()
    wanted = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}[state_dtype]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == wanted
    kept = sum(t.nbytes for t in state.values() if isinstance(t, torch.Tensor))
    assert kept / found.numel() < {"float32": 8.01, "bfloat16": 4.01, "int8": 2.04}[state_dtype]


@pytest.mark.parametrize("state_dtype", ["bfloat16", EIGHT_BITS])
def test_small_updates_survive_in_bf16_weights(state_dtype):
    """At lr 1e-5 a weight of 1 moves by 1/390 of its last bit a step: to the nearest it stays, at random its mean moves."""
    means = {}
    for at_random in (True, False):
        weight = nn.Parameter(torch.ones(64, 256, dtype=torch.bfloat16))
        optimizer = AdamW([weight], lr=1e-5, state_dtype=state_dtype, stochastic_rounding=at_random)
        for _ in range(100):
            weight.grad = torch.full_like(weight, 0.01)
            optimizer.step()
        means[at_random] = weight.detach().double().mean().item()
    assert means[False] == 1.0
    assert 1 - means[True] == pytest.approx(100e-5, rel=0.15)  # 16,384 weights: a standard error of 2%


def test_rounding_at_random_has_the_right_mean_and_only_the_two_neighbours():
    value = torch.tensor([1.0 + 2**-9, -3.1, 1e-30, 0.0, torch.inf, -torch.inf])
    drawn = []
    for i in range(4000):
        target = torch.empty(6, dtype=torch.bfloat16)
        store(target, value, seed_of(i))
        drawn.append(target)
    drawn = torch.stack(drawn).double()
    assert torch.equal(drawn[:, 3:], value[3:].double().expand(4000, 3))
    for column, exact in zip(drawn.T[:3], value[:3].double(), strict=True):
        low, high = column.min(), column.max()
        assert set(column.tolist()) == {low.item(), high.item()}
        assert low < exact < high
        assert (column.mean() - exact).abs() < 4 * (high - low) / 2 / 4000**0.5
    target = torch.empty(1, dtype=torch.bfloat16)
    store(target, torch.tensor([torch.nan]), 1)
    assert target.isnan().all()


@pytest.mark.parametrize("state_dtype", ["bfloat16", "float32", EIGHT_BITS])
def test_found_inf_leaves_everything_as_it_was(state_dtype):
    weight, optimizer = train_one(state_dtype)
    before = weight.detach().clone(), copy.deepcopy(optimizer.state[weight])
    weight.grad = torch.full_like(weight, torch.nan)
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    assert torch.equal(weight, before[0])
    state = optimizer.state[weight]
    for key, value in before[1].items():
        assert key == "updates" or torch.equal(state[key], value), key
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert not torch.equal(weight, before[0])
    assert weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", ["bfloat16", "float32", EIGHT_BITS])
def test_it_goes_on_from_its_state(state_dtype, dtype):
    """Without a checkpoint of ours: torch's own loading would make numbers of codes in eight bits."""
    generator = torch.Generator().manual_seed(1)
    one = nn.Parameter(torch.randn(32, 256, generator=generator).to(dtype))
    gradients = [torch.randn(32, 256, generator=generator).to(dtype) for _ in range(6)]
    first = AdamW([one], lr=1e-2, state_dtype=state_dtype)
    for gradient in gradients[:3]:
        one.grad = gradient
        first.step()
    other = nn.Parameter(one.detach().clone())
    second = AdamW([other], lr=1e-2, state_dtype=state_dtype)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for gradient in gradients[3:]:
        one.grad = other.grad = gradient
        first.step()
        second.step()
    assert torch.equal(one, other)
    for name, value in first.state[one].items():
        same = second.state[other][name]
        assert torch.equal(value, same) and value.dtype == same.dtype if torch.is_tensor(value) else value == same, name


def train_one(state_dtype):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(32, 256).bfloat16())
    optimizer = AdamW([weight], lr=1e-2, state_dtype=state_dtype)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    return weight, optimizer


@pytest.mark.parametrize("state_dtype", [EIGHT_BITS])
def test_what_does_not_fit_blocks_and_what_is_small_is_kept_wider(state_dtype):
    tensors = [torch.randn(8, 16), torch.randn(100, 100), torch.zeros(5000), torch.randn(16, 256)]
    params = [nn.Parameter(tensor) for tensor in tensors]
    optimizer = AdamW(params, state_dtype=state_dtype)
    for parameter in params:
        parameter.grad = torch.zeros_like(parameter)  # blocks of zeros, which have no scale
    optimizer.step()
    kept = [optimizer.state[p]["exp_avg"].dtype for p in params]
    assert kept == [torch.float32, torch.bfloat16, torch.bfloat16, torch.uint8]
    assert all(p.isfinite().all() for p in params)
    assert all(torch.equal(p.detach(), t) for p, t in zip(params, tensors, strict=True))


def test_kernel_under_the_interpreter():
    require_passes("interpreted_adamw.py")


def test_a_wrong_option_is_named():
    with pytest.raises(ConfigError, match=r"optimizer\.state_dtype='fp8': write one of float32, bfloat16, int8"):
        AdamW([nn.Parameter(torch.ones(1))], state_dtype="fp8")
    with pytest.raises(ConfigError, match=r"optimizer\.betas=\[0\.9, 1\.0\]"):
        AdamW([nn.Parameter(torch.ones(1))], betas=(0.9, 1.0))
