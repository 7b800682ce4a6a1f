"""The fused loss on a real GPU: accuracy against fp64, peak memory, no wait for the device."""

from __future__ import annotations

import pytest
import torch

from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.kernels.linear_ce import LinearCrossEntropyOptions, cross_entropy_rows, linear_cross_entropy
from nemo_automodel.kernels.reference import linear_cross_entropy as reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [101, 50257, 128256])
@pytest.mark.parametrize(("bias", "scale", "softcap"), [(False, 1.0, 0.0), (True, 0.5, 0.0), (True, -1.5, 30.0)])
def test_row_kernel_equals_the_torch_one(dtype, vocab_size, bias, scale, softcap):
    torch.manual_seed(0)
    logits = (torch.randn(33, vocab_size, device="cuda") * 5).to(dtype)
    labels = torch.randint(0, vocab_size, (33,), device="cuda")
    labels[4] = -100
    b = torch.randn(vocab_size, device="cuda").to(dtype) if bias else None
    on_cpu = [t if t is None else t.cpu() for t in (logits, labels, b)]
    for with_grad in (False, True):
        loss = cross_entropy_rows(logits, labels, b, -100, scale, softcap, with_grad)
        expected = cross_entropy_rows(*on_cpu, -100, scale, softcap, with_grad)
        torch.testing.assert_close(loss.cpu(), expected, rtol=1e-5, atol=1e-5)
        tolerance = 1e-5 if dtype == torch.float32 else 8e-3
        torch.testing.assert_close(logits.cpu(), on_cpu[0], rtol=tolerance, atol=1e-7)


def test_scaled_rounds_once():
    from nemo_automodel.kernels.linear_ce_triton import launch_scaled

    x, factor = torch.randn(1000, 333, device="cuda"), torch.tensor(1 / 3, device="cuda")
    assert torch.equal(launch_scaled(x, factor, torch.bfloat16), (x * factor).bfloat16())


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("vocab_size", [32001, 50257])
def test_bf16_error_is_at_most_twice_torch_own(softcap, vocab_size):
    torch.manual_seed(0)
    hidden = torch.randn(1500, 512, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocab_size, 512, device="cuda", dtype=torch.bfloat16) * 0.05
    bias = torch.randn(vocab_size, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, vocab_size, (1500,), device="cuda")
    labels[::3] = -100

    def run(fn, tensors):
        tensors = [t.detach().clone().requires_grad_() for t in tensors]
        loss = fn(*tensors)
        return [loss, *torch.autograd.grad(loss, tensors, torch.tensor(1 / 1000, device="cuda", dtype=loss.dtype))]

    tensors = (hidden, weight, bias)
    exact = run(lambda *t: reference(*t, labels, -100, 0.5, softcap, torch.float64), [t.double() for t in tensors])
    plain = run(lambda *t: reference(*t, labels, -100, 0.5, softcap), tensors)
    indices = (labels != -100).nonzero().squeeze(1)
    options = LinearCrossEntropyOptions(chunk_size=384, logit_scale=0.5, logit_softcap=softcap)
    for given in (None, indices):
        ours = run(lambda *t, given=given: linear_cross_entropy(*t, labels, given, options), tensors)
        for a, p, e in zip(ours, plain, exact, strict=True):
            assert relative_error(a, e) <= 2 * relative_error(p, e) + 1e-7


def test_peak_memory_is_at_most_035_of_the_unfused_loss():
    hidden = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(128256, 4096, device="cuda", dtype=torch.bfloat16) * 0.02).requires_grad_()
    labels = torch.randint(0, 128256, (8192,), device="cuda")
    peaks = []
    for loss_of in (
        lambda: FusedLinearCrossEntropy()(hidden, labels, weight),
        lambda: MaskedCrossEntropy()(hidden @ weight.t(), labels),
    ):
        hidden.grad = weight.grad = None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        (loss_of() / 8192).backward()
        peaks.append(torch.cuda.max_memory_allocated() / 2**30)
    print(f"fused {peaks[0]:.2f} GiB, unfused {peaks[1]:.2f} GiB, ratio {peaks[0] / peaks[1]:.3f}")
    assert peaks[0] <= 0.35 * peaks[1]


@pytest.mark.parametrize("with_indices", [False, True])
def test_never_waits_for_the_device(with_indices):
    hidden = torch.randn(256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 1000, (256,), device="cuda")
    indices = torch.arange(0, 256, 2, device="cuda") if with_indices else None
    loss_fn = FusedLinearCrossEntropy()
    loss_fn(hidden, labels, weight, label_indices=indices).backward()  # compile the kernel first
    torch.cuda.set_sync_debug_mode("error")
    try:
        (loss_fn(hidden, labels, weight, label_indices=indices) / 3).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_all_ignored_keeps_its_graph():
    hidden = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(300, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.full((64,), -100, device="cuda")
    for indices in (None, torch.empty(0, dtype=torch.int64, device="cuda")):
        hidden.grad = weight.grad = None
        loss = FusedLinearCrossEntropy()(hidden, labels, weight, label_indices=indices)
        loss.backward()
        assert loss == 0
        assert hidden.grad.abs().max() == 0
        assert weight.grad.abs().max() == 0
