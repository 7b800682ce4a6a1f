"""Attention with sinks on a GPU: gpt-oss's shape in bf16 against fp32, its memory, and that it waits for nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nemo_automodel.components.attention import function
from nemo_automodel.components.attention.function import written_out_attention
from nemo_automodel.kernels.masks import written_mask
from nemo_automodel.kernels.sink_attention import sink_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def inputs(batch, length, heads=64, kv_heads=8, size=64, dtype=torch.bfloat16):
    torch.manual_seed(0)
    shapes = ((batch, length, heads, size), (batch, length, kv_heads, size), (batch, length, kv_heads, size))
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2) for shape in shapes)
    return [t.detach().requires_grad_() for t in (q, k, v, torch.randn(heads, device="cuda", dtype=dtype))]


def gradients(out, tensors):
    generator = torch.Generator(device="cuda").manual_seed(1)
    weights = torch.randn(out.shape, device="cuda", generator=generator)
    return [out, *torch.autograd.grad((out.float() * weights).sum(), tensors)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 128])
def test_as_exact_as_the_written_out_formula(window, packed, monkeypatch):
    length = 1024
    tensors = inputs(1 if packed else 2, length)
    cu_seqlens = torch.tensor([0, 300, 1000, length], dtype=torch.int32, device="cuda") if packed else None
    mask = written_mask(length, length, True, window, cu_seqlens, tensors[0].device)[None, None]
    exact = [t.detach().float().requires_grad_() for t in tensors]
    right = gradients(written_out_attention(*exact[:3], mask, sinks=exact[3]).transpose(1, 2), exact)
    written = gradients(written_out_attention(*tensors[:3], mask, sinks=tensors[3]).transpose(1, 2), tensors)
    monkeypatch.delattr(function, "written_out_attention")  # it must not come to that
    options = {"cu_seq_lens_q": cu_seqlens, "max_length_q": 700} if packed else {}
    out, _ = function.attention(nn.Module(), *tensors[:3], None, sliding_window=window, s_aux=tensors[3], **options)
    found = gradients(out, tensors)
    for ours, theirs, expected in zip(found, written, right, strict=True):
        assert (ours.float() - expected).norm() <= 1.5 * (theirs.float() - expected).norm() + 1e-4 * expected.norm()


def test_memory_grows_with_the_sequence_only_and_nothing_waits():
    tensors = inputs(1, 16384)
    gradients(sink_attention(*tensors), tensors)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(sink_attention(*tensors, window=128).sum(), tensors)
        torch.autograd.grad(sink_attention(*tensors).sum(), tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 3 * 2**30  # scores alone would be 32 GiB in bf16
