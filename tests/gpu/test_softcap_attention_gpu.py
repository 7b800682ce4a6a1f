"""Soft-capped attention on CUDA in 16 bit: at most twice as far from fp32 as the formula written out, in little memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nemo_automodel.components.attention import function
from nemo_automodel.components.attention.function import _written_mask, written_out_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

SOFTCAP = 50.0
BOUNDARIES = [0, 1000, 1003, 3000, 4096]


@pytest.fixture(autouse=True)
def _by_the_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(function, "written_out_attention")


def inputs(rows: int, length: int, size: int = 256, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """As projections leave them; scores have a deviation of 20, so that the cap bends many of them."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(rows, length, n, size, device="cuda") for n in (8, 4, 4))
    return [x.to(dtype).transpose(1, 2).requires_grad_() for x in (20 * query, key, value)]


def written_out(tensors: list[Tensor], window: int | None, cu_seqlens: Tensor | None, causal: bool = True) -> Tensor:
    query, key, value = tensors
    mask = _written_mask(query.shape[2], query.shape[2], causal, window, cu_seqlens, query.device)
    return written_out_attention(query, key, value, mask, softcap=SOFTCAP).transpose(1, 2)


def compare(tensors: list[Tensor], window: int | None = None, bounds: list[int] | None = None, causal: bool = True,
            compiled: bool = False) -> None:  # fmt: skip
    options: dict[str, Any] = {"softcap": SOFTCAP, "sliding_window": window, "is_causal": causal}
    cu_seqlens = None
    if bounds is not None:
        cu_seqlens = torch.tensor(bounds, device="cuda", dtype=torch.int32)
        options |= {"cu_seq_lens_q": cu_seqlens, "max_length_q": int(cu_seqlens.diff().max())}
    call = torch.compile(function.attention, fullgraph=True) if compiled else function.attention
    out, _ = call(nn.Module(), *tensors, None, **options)
    gradient = torch.randn_like(out)
    ours = [out, *torch.autograd.grad(out, tensors, gradient)]

    def plain(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        wide = written_out(leaves, window, cu_seqlens, causal)
        return [wide, *torch.autograd.grad(wide, leaves, gradient.to(dtype))]

    for mine, torchs, exact in zip(ours, plain(out.dtype), plain(torch.float32), strict=True):
        error, allowed = (mine.float() - exact).abs().max(), 2 * (torchs.float() - exact).abs().max()
        assert error <= allowed, (error, allowed)


@pytest.mark.parametrize("window", [None, 1024])
@pytest.mark.parametrize("compiled", [False, True])
def test_rows_of_gemma_2(window: int | None, compiled: bool) -> None:
    compare(inputs(2, 2048), window, compiled=compiled)


@pytest.mark.parametrize("window", [None, 1024])
@pytest.mark.parametrize("compiled", [False, True])
def test_documents(window: int | None, compiled: bool) -> None:
    compare(inputs(1, 4096), window, BOUNDARIES, compiled=compiled)


@pytest.mark.parametrize("size", [64, 72, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_other_heads_and_odd_lengths(size: int, causal: bool) -> None:
    compare(inputs(2, 1003, size), causal=causal)
    compare(inputs(1, 1003, size, torch.float16), bounds=[0, 700, 1003], causal=causal)


def test_memory() -> None:
    tensors = inputs(1, 8192)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, _ = function.attention(nn.Module(), *tensors, None, softcap=SOFTCAP)
    torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert torch.cuda.max_memory_allocated() - before < 2**30


@pytest.mark.parametrize(("rows", "length"), [(2, 2048), (1, 8192)])
@pytest.mark.parametrize("window", [None, 1024])
def test_time(rows: int, length: int, window: int | None) -> None:
    """Printed beside the formula's (``pytest -s``); the figures have no bound."""
    tensors = inputs(rows, length)
    ways: dict[str, Callable[[], Tensor]] = {
        "kernels": lambda: function.attention(nn.Module(), *tensors, None, softcap=SOFTCAP, sliding_window=window)[0],
        "written out": lambda: written_out(tensors, window, None),
    }
    for name, way in ways.items():
        out = way()
        gradient = torch.ones_like(out)
        forward = milliseconds(way)
        backward = milliseconds(lambda out=out, gradient=gradient: torch.autograd.grad(out, tensors, gradient, True))
        print(f"\n{rows}x{length} window {window}, {name}: forward {forward:.2f} ms, backward {backward:.2f} ms")


def milliseconds(call: Callable[[], Any], times: int = 10) -> float:
    for _ in range(3):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / times
