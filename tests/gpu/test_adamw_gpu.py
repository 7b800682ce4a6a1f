"""The AdamW kernel on a GPU: the formula, the same random bits as on the CPU, the host's moments, no waiting."""

from __future__ import annotations

import pytest
import torch

from nemo_automodel.components.distributed.grads import GradClipper
from nemo_automodel.components.training.adamw import AdamW
from nemo_automodel.components.training.local_step import step_on_local_tensors
from nemo_automodel.kernels import adamw
from nemo_automodel.kernels.adamw import Update

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def tensors(dtype, moments, size=(1000, 613)):
    g = torch.Generator().manual_seed(0)
    parts = torch.randn(size, generator=g), torch.randn(size, generator=g), torch.randn(size, generator=g)
    return [
        t.to(d) for t, d in zip((*parts, torch.rand(size, generator=g)), (dtype, dtype, moments, moments), strict=True)
    ]


@pytest.mark.parametrize("at_random", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_is_the_formula_with_the_cpus_random_bits(dtype, at_random):
    update = Update(1e-2, 0.9, 0.95, 1e-8, 0.1, at_random, 12345)
    for step in (1.0, 1000.0):
        plain = tensors(dtype, dtype)
        ours = [t.cuda() for t in tensors(dtype, dtype)]
        adamw._in_torch(*plain, torch.tensor(step), update)
        adamw.adamw_(*ours, torch.tensor(step, device="cuda"), None, update)
        for found, expected in zip(ours, plain, strict=True):
            found = found.cpu()
            if dtype == torch.float32:
                torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)
            else:
                assert (found != expected).float().mean() < 0.002
                torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_moments_on_the_host_change_nothing_and_take_no_device_memory(state_dtype):
    if state_dtype == "int8":
        pytest.importorskip("bitsandbytes")
    results = []
    for offload in (False, True):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(4096, 1024, device="cuda").bfloat16())
        optimizer = AdamW([weight], lr=1e-2, state_dtype=state_dtype, offload=offload)
        for _ in range(4):
            weight.grad = torch.randn_like(weight)
            optimizer.step()
        state = optimizer.state_dict()["state"][0]
        assert state["exp_avg"].is_cuda is not offload
        results.append([weight.detach().cpu(), state["exp_avg"].cpu(), state["exp_avg_sq"].cpu()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_step_waits_for_nothing():
    weight = torch.nn.Parameter(torch.randn(512, 512, device="cuda").bfloat16())
    optimizer = AdamW([weight], lr=1e-2)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.found_inf = torch.zeros((), device="cuda")
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.state[weight]["step"].item() == 2


def test_a_flag_leaves_the_weight_as_it_was():
    weight = torch.nn.Parameter(torch.randn(512, 512, device="cuda").bfloat16())
    optimizer = AdamW([weight], lr=1e-2)
    weight.grad, optimizer.found_inf = torch.randn_like(weight), torch.ones((), device="cuda")
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight, before)
    assert not optimizer.state[weight]["exp_avg"].any()
    assert optimizer.state[weight]["step"].item() == 0


SIZES = [(2048, 2048), (64, 64), (3, 2**21)]


def train(dtype, wrap, clips):
    """Six steps, the fourth left out: norms, weights and state of torch's fused AdamW over gradients drawn in ``dtype[0]``."""
    drawn, kept = dtype
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size, device="cuda").to(drawn).to(kept)) for size in SIZES]
    optimizer = wrap(torch.optim.AdamW(params, lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1, fused=True))
    clip = GradClipper(0.5, optimizer if clips else None)
    norms = []
    for step in range(6):
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, device="cuda").to(drawn).to(kept)
        norms.append(clip(params))
        optimizer.found_inf = torch.tensor(float(step == 3), device="cuda")
        optimizer.step()
    states = (optimizer.state[p][key] for p in params for key in ("exp_avg", "exp_avg_sq", "step"))
    return [t.detach().double() for t in (*norms, *params, *states)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_weights_of_torchs_fused_adamw_are_updated_by_our_kernel_as_exactly(dtype, monkeypatch):
    from nemo_automodel.components.training import local_step

    calls = []
    monkeypatch.setattr(local_step, "adamw_", lambda *a: calls.append(a[0].shape) or adamw.adamw_(*a))
    exact = train((dtype, torch.float64), lambda optimizer: optimizer, clips=False)
    theirs = train((dtype, dtype), lambda optimizer: optimizer, clips=False)
    found = train((dtype, dtype), step_on_local_tensors, clips=True)
    assert set(calls) == {(2048, 2048), (3, 2**21), (2**22,)}  # the last is the proof
    for ours, plain, right in zip(found, theirs, exact, strict=True):
        assert (ours - right).norm() <= max(1.5 * (plain - right).norm(), 1e-6 * right.norm())


def test_a_step_with_large_weights_waits_for_nothing():
    params = [
        torch.nn.Parameter(torch.randn(2048, 2048, device="cuda").to(dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    optimizer = step_on_local_tensors(torch.optim.AdamW(params, lr=1e-2, fused=True))
    clip = GradClipper(1.0, optimizer)
    for step in range(2):
        for parameter in params:
            parameter.grad = torch.randn_like(parameter)
        if step:  # the first step proves the kernel
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            clip(params)
            optimizer.found_inf = torch.zeros((), device="cuda")
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [optimizer.state[p]["step"].item() for p in params] == [2, 2]
