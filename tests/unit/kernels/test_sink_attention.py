"""Attention with sinks against the formula in float64: output, four gradients, windows, documents, the compiler."""

from __future__ import annotations

import pytest
import torch

from nemo_automodel.components.attention.function import written_out_attention
from nemo_automodel.kernels.masks import written_mask
from nemo_automodel.kernels.sink_attention import sink_attention


def inputs(dtype=torch.float64, batch=2, heads=4, kv_heads=2, length=24, size=16):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, length, heads, size), (batch, length, kv_heads, size), (batch, length, kv_heads, size))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes)
    sinks = torch.randn(heads, generator=generator).to(dtype) * 2
    return [t.requires_grad_() for t in (q, k, v, sinks)]


def formula(q, k, v, sinks, window, cu_seqlens):
    mask = written_mask(q.shape[2], q.shape[2], True, window, cu_seqlens, q.device)
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, -torch.inf)
    together = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1).softmax(-1)
    return (together[..., :-1] @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)).transpose(1, 2)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_it_is_the_formula(window, packed):
    tensors = inputs(batch=1 if packed else 2)
    cu_seqlens = torch.tensor([0, 7, 20, 24], dtype=torch.int32) if packed else None
    out = sink_attention(*tensors, window=window, cu_seqlens=cu_seqlens, longest=13 if packed else None)
    expected = formula(*tensors, window, cu_seqlens)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), tensors) for y in (out, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_sink_far_below_changes_nothing_and_one_far_above_takes_all():
    q, k, v, _ = inputs()
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(sink_attention(q, k, v, torch.full((4,), -1e4, dtype=torch.float64)), plain)
    assert sink_attention(q, k, v, torch.full((4,), 1e4, dtype=torch.float64)).abs().max() < 1e-12


def test_compiled_as_one_graph_it_is_the_same():
    tensors = inputs(torch.float32)
    compiled = torch.compile(lambda *a: sink_attention(*a, window=5) * 2, fullgraph=True)
    outs = [compiled(*tensors), sink_attention(*tensors, window=5) * 2]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), tensors) for out in outs))


def test_in_bfloat16_it_is_no_further_off_than_the_written_out_formula():
    low, exact = inputs(torch.bfloat16, length=64), inputs(length=64)
    out = sink_attention(*low).double()
    mask = written_mask(64, 64, True, None, None, torch.device("cpu"))[None, None]
    written = written_out_attention(*low[:3], mask, sinks=low[3]).transpose(1, 2).double()
    right = formula(*(t.detach().bfloat16().double() for t in exact), None, None)
    assert (out - right).norm() <= 1.2 * (written - right).norm()
