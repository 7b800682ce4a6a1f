"""The fused linear cross-entropy against the plain formula in fp32, and its row kernel under Triton's interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch

from nemo_automodel.kernels import linear_ce
from nemo_automodel.kernels.linear_ce import (
    LinearCrossEntropyOptions,
    chunk_rows,
    cross_entropy_rows,
    linear_cross_entropy,
)
from nemo_automodel.kernels.reference import linear_cross_entropy as reference
from tests.unit.kernels.interpreter import require_passes

T, H, V = 37, 24, 101


def problem(dtype=torch.float32, bias=False, seed=0, rows=T, vocab_size=V):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, H, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, H, generator=generator) * 0.3).to(dtype).requires_grad_()
    bias = torch.randn(vocab_size, generator=generator).to(dtype).requires_grad_() if bias else None
    labels = torch.randint(0, vocab_size, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.4] = -100
    return hidden, weight, bias, labels


def loss_and_grads(fn, tensors, scale=1.0):
    tensors = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    loss = fn(*tensors)
    (loss * scale).backward()
    return [loss.detach(), *[t.grad for t in tensors if t is not None]]


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (-1.5, 2.0)])
@pytest.mark.parametrize("chunk_size", [1, 7, 16, None])
def test_equals_the_formula_in_fp32(bias, scale, softcap, chunk_size):
    hidden, weight, b, labels = problem(bias=bias)
    options = LinearCrossEntropyOptions(chunk_size=chunk_size, logit_scale=scale, logit_softcap=softcap)
    got = loss_and_grads(lambda *t: linear_cross_entropy(*t, labels, None, options), (hidden, weight, b), 1 / 7)
    want = loss_and_grads(lambda *t: reference(*t, labels, -100, scale, softcap), (hidden, weight, b), 1 / 7)
    for actual, expected in zip(got, want, strict=True):
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_bf16_error_is_at_most_twice_torch_own(softcap):
    hidden, weight, bias, labels = problem(torch.bfloat16, bias=True, rows=256)
    exact = loss_and_grads(
        lambda *t: reference(*t, labels, -100, 0.5, softcap, torch.float64),
        [t.detach().double() for t in (hidden, weight, bias)],
        1 / 150,
    )
    torch_own = loss_and_grads(lambda *t: reference(*t, labels, -100, 0.5, softcap), (hidden, weight, bias), 1 / 150)
    options = LinearCrossEntropyOptions(chunk_size=64, logit_scale=0.5, logit_softcap=softcap)
    ours = loss_and_grads(lambda *t: linear_cross_entropy(*t, labels, None, options), (hidden, weight, bias), 1 / 150)
    assert [t.dtype for t in ours] == [torch.float32] + 3 * [torch.bfloat16]
    for actual, plain, expected in zip(ours, torch_own, exact, strict=True):
        assert relative_error(actual, expected) <= 2 * relative_error(plain, expected) + 1e-7


def test_what_was_in_memory_before_is_in_no_result():
    hidden, weight, bias, labels = problem(torch.bfloat16, bias=True, rows=256)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills memory that is not initialised with NaN
    try:
        assert torch.empty(3).isnan().all()
        for found in loss_and_grads(lambda *t: linear_cross_entropy(*t, labels), (hidden, weight, bias)):
            assert found.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(before)


def test_label_indices_give_what_the_labels_give():
    hidden, weight, bias, labels = problem(bias=True)
    indices = (labels != -100).nonzero().squeeze(1)
    by_mask = loss_and_grads(
        lambda h, w, b: linear_ce._LinearCrossEntropy.apply(h, w, b, labels, None, LinearCrossEntropyOptions()),
        (hidden, weight, bias),
    )
    for given in (None, indices, indices.flip(0), torch.arange(T)):
        by_index = loss_and_grads(
            lambda *t, given=given: linear_cross_entropy(*t, labels, given), (hidden, weight, bias)
        )
        for actual, expected in zip(by_index, by_mask, strict=True):
            assert relative_error(actual, expected) < 1e-6


def test_ignored_rows_get_exactly_zero_gradient():
    hidden, weight, _, labels = problem()
    _, d_hidden, _ = loss_and_grads(lambda h, w: linear_cross_entropy(h, w, None, labels), (hidden, weight))
    assert d_hidden[labels == -100].abs().max() == 0
    assert d_hidden[labels != -100].abs().sum(1).min() > 0


@pytest.mark.parametrize("given", [None, torch.empty(0, dtype=torch.int64)])
def test_all_ignored_keeps_the_graph_and_backpropagates_zeros(given):
    hidden, weight, bias, _ = problem(bias=True)
    labels = torch.full((T,), -100)
    loss, *grads = loss_and_grads(lambda *t: linear_cross_entropy(*t, labels, given), (hidden, weight, bias))
    assert loss == 0
    assert [g.shape for g in grads] == [hidden.shape, weight.shape, bias.shape]
    assert all(g.abs().max() == 0 for g in grads)


@pytest.mark.parametrize("trained", list(itertools.product([False, True], repeat=3))[1:])
def test_gradients_only_where_required(trained, monkeypatch):
    tensors = [t.detach().requires_grad_(need) for t, need in zip(problem(bias=True)[:3], trained, strict=True)]
    labels = problem(bias=True)[3]
    products = []
    monkeypatch.setattr(linear_ce, "_accumulate_product", lambda *a, **k: products.append(a))
    linear_cross_entropy(*tensors, labels).backward()
    assert [t.grad is not None for t in tensors] == list(trained)
    assert bool(products) == trained[1], "the product for dW is computed exactly when the head is trained"


def test_no_grad_computes_the_loss_alone():
    hidden, weight, bias, labels = problem(bias=True)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, bias, labels)
    assert not loss.requires_grad
    assert relative_error(loss, reference(hidden, weight, bias, labels)) < 1e-6
    frozen = linear_cross_entropy(hidden.detach(), weight.detach(), None, labels)
    assert not frozen.requires_grad


def test_backward_twice_gives_the_same_gradient():
    hidden, weight, _, labels = problem()
    loss = linear_cross_entropy(hidden, weight, None, labels)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight), torch.tensor(2.0))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(2 * a, b)


def test_label_outside_the_vocabulary_is_not_a_loss():
    hidden, weight, _, labels = problem()
    labels[3] = V
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(hidden, weight, None, labels)


def test_chunks_are_even_and_within_budget():
    assert chunk_rows(8192, 128256, 2, "cuda") == 4096
    assert chunk_rows(4097, 128256, 2, "cuda") == 2176
    assert chunk_rows(100, 128256, 2, "cuda") == 128
    assert chunk_rows(20000, 32000, 2, "cuda") == 10112
    for vocab_size, element_size in itertools.product([32000, 128256, 262208], [2, 4]):
        assert chunk_rows(8192, vocab_size, element_size, "cuda") * vocab_size * element_size <= 1 << 30


def test_row_op_is_a_well_formed_custom_op():
    hidden, weight, _, labels = problem()
    logits = (hidden @ weight.t()).detach()
    torch.library.opcheck(cross_entropy_rows, (logits, labels, None, -100, 1.0, 0.0, True))


def test_triton_row_kernel_under_the_interpreter():
    require_passes("interpreted_linear_ce.py")
