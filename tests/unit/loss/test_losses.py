"""The two losses: equal to each other, to the plain formula, and under every split of a batch (failure class 1)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.errors import ConfigError

B, S, H, V = 6, 11, 16, 53


def ragged_batch(seed=0):
    """Hidden states, and labels of rows with 0 to S trained positions."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, S, H, generator=generator)
    labels = torch.randint(0, V, (B, S), generator=generator)
    for row, length in enumerate([11, 1, 0, 7, 3, 9]):
        labels[row, length:] = -100
    return hidden, labels


class Net(nn.Module):
    def __init__(self, tied=False, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, H)
        self.body = nn.Linear(H, H)
        self.head = nn.Linear(H, V, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def hidden(self, ids):
        return torch.tanh(self.body(self.embed(ids)))


def fused(net, ids, labels, **kwargs):
    return FusedLinearCrossEntropy(**kwargs)(net.hidden(ids), labels, net.head.weight, net.head.bias)


def masked(net, ids, labels):
    return MaskedCrossEntropy()(net.head(net.hidden(ids)), labels)


def gradients(net, loss_of, micro_batches, count):
    net.zero_grad()
    total = 0.0
    for ids, labels in micro_batches:
        loss = loss_of(net, ids, labels) / count
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("loss_of", [masked, fused, lambda *a: fused(*a, chunk_size=4)])
@pytest.mark.parametrize("split", [1, 2, 3, 6])
def test_class_1_every_split_of_a_ragged_batch_gives_the_same_gradients(loss_of, split, tied):
    _, labels = ragged_batch()
    ids = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(2))
    count = int((labels != -100).sum())
    net = Net(tied)
    whole = F.cross_entropy(net.head(net.hidden(ids)).flatten(0, 1), labels.flatten())  # torch's own mean
    whole.backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters()}
    parts = list(zip(ids.chunk(split), labels.chunk(split), strict=True))
    loss, grads = gradients(net, loss_of, parts, count)
    assert loss == pytest.approx(whole.item(), rel=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.0625, None), (1.0, 30.0), (2.0, 1.5)])
@pytest.mark.parametrize("bias", [False, True])
def test_fused_equals_unfused_on_the_post_processed_logits(scale, softcap, bias):
    net, (hidden, labels) = Net(bias=bias), ragged_batch()
    results = []
    for use_fused in (True, False):
        x = hidden.clone().requires_grad_()
        if use_fused:
            loss = FusedLinearCrossEntropy()(
                x, labels, net.head.weight, net.head.bias, logit_scale=scale, logit_softcap=softcap
            )
        else:
            logits = net.head(x) * scale
            logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
            loss = MaskedCrossEntropy()(logits, labels)
        results.append([loss, *torch.autograd.grad(loss / 31, [x, *net.head.parameters()])])
    assert results[0][1].shape == hidden.shape
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_of", [masked, fused])
def test_all_ignored_batch_keeps_its_graph(loss_of):
    net, labels = Net(), torch.full((B, S), -100)
    loss, grads = gradients(net, loss_of, [(torch.zeros(B, S, dtype=torch.int64), labels)], 1)
    assert loss == 0
    assert all(g.abs().max() == 0 for g in grads.values())


def test_label_indices_of_the_collator():
    (hidden, labels), net = ragged_batch(), Net()
    indices = (labels.flatten() != -100).nonzero().squeeze(1)
    loss = FusedLinearCrossEntropy()
    with_indices = loss(hidden, labels, net.head.weight, net.head.bias, label_indices=indices)
    torch.testing.assert_close(with_indices, loss(hidden, labels, net.head.weight, net.head.bias))


def test_other_ignore_index():
    (hidden, labels), net = ragged_batch(), Net()
    other = labels.masked_fill(labels == -100, -1)
    expected = MaskedCrossEntropy()(net.head(hidden), labels)
    torch.testing.assert_close(MaskedCrossEntropy(ignore_index=-1)(net.head(hidden), other), expected)
    fused_loss = FusedLinearCrossEntropy(ignore_index=-1)(hidden, other, net.head.weight, net.head.bias)
    torch.testing.assert_close(fused_loss, expected)


def test_under_autocast_the_head_runs_in_its_dtype_and_the_master_gets_fp32_gradients():
    (hidden, labels), net = ragged_batch(), Net(bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        ours = FusedLinearCrossEntropy()(hidden, labels, net.head.weight)
        plain = MaskedCrossEntropy()(net.head(hidden), labels)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=0)
    (grad,) = torch.autograd.grad(ours, net.head.weight)
    (expected,) = torch.autograd.grad(plain, net.head.weight)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad, expected, rtol=0.05, atol=0.05)


def test_bf16_logits_are_summed_in_fp32():
    logits = torch.randn(1, 512, V, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.zeros(1, 512, dtype=torch.int64)
    loss = MaskedCrossEntropy()(logits, labels)
    assert loss.dtype == torch.float32
    exact = F.cross_entropy(logits[0].double(), labels[0], reduction="sum")
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_bad_chunk_size_is_named():
    with pytest.raises(ConfigError, match="chunk_size=0"):
        FusedLinearCrossEntropy(chunk_size=0)
