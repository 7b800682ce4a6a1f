"""Attention with blocks (images) on CUDA in bfloat16: at most twice as far from float64 as torch's own with a dense mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nemo_automodel.components.attention import function
from nemo_automodel.components.attention.blocks import _with_bounds

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

LENGTH = 1024
BOUNDARIES = [0, 200, 456, 460, 1024]
BLOCKS = [[(0, 4, 260)], [(0, 0, 100), (1, 100, 356), (2, 900, 1024)], [], [(0, 0, 50), (0, 300, 333), (1, 333, 334)]]


@pytest.fixture(autouse=True)
def _by_the_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(function, "dense")


def ids_of(rows: int) -> Tensor:
    ids = torch.full((rows, LENGTH), -1, device="cuda")
    for row, blocks in zip(ids, BLOCKS if rows > 1 else BLOCKS[1:], strict=False):
        for block, start, end in blocks:
            row[start:end] = block
    return ids


def compare(size: int, window: int | None, packed: bool, compiled: bool) -> None:
    torch.manual_seed(0)
    rows = 1 if packed else 4
    inputs = [
        torch.randn(rows, LENGTH, heads, size, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for heads in (8, 4, 4)
    ]
    ids, cu_seqlens = ids_of(rows), None
    at = torch.arange(LENGTH, device="cuda")
    seen = (at[None, :] <= at[:, None]) | ((ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None])
    if window:
        seen = seen & (at[None, :] > at[:, None] - window)
    options: dict = {"sliding_window": window, "scaling": size**-0.5}
    if packed:
        cu_seqlens = torch.tensor(BOUNDARIES, device="cuda", dtype=torch.int32)
        document = torch.bucketize(at, cu_seqlens, right=True)
        seen = seen & (document[None, :] == document[:, None])
        options |= {"cu_seq_lens_q": cu_seqlens, "max_length_q": 564}
    blocks = _with_bounds(ids, cu_seqlens)
    call = torch.compile(function.attention, fullgraph=True) if compiled else function.attention
    out, _ = call(nn.Module(), *inputs, blocks, **options)
    gradient = torch.randn_like(out)
    ours = [out, *torch.autograd.grad(out, inputs, gradient)]

    def plain(dtype: torch.dtype) -> list[Tensor]:
        query, key, value = (x.detach().to(dtype).requires_grad_() for x in inputs)
        wide = F.scaled_dot_product_attention(
            query, *(x.repeat_interleave(2, dim=1) for x in (key, value)), attn_mask=seen[:, None]
        ).transpose(1, 2)
        return [wide, *torch.autograd.grad(wide, [query, key, value], gradient.to(dtype))]

    for mine, torchs, exact in zip(ours, plain(torch.bfloat16), plain(torch.float64), strict=True):
        error, allowed = (mine.double() - exact).abs().max(), 2 * (torchs.double() - exact).abs().max()
        assert error <= allowed, (error, allowed)


@pytest.mark.parametrize("size", [64, 72, 128, 256])
@pytest.mark.parametrize("compiled", [False, True])
def test_rows(size: int, compiled: bool) -> None:
    compare(size, None, False, compiled)


@pytest.mark.parametrize("size", [64, 256])
def test_flash_attention_behind(size: int) -> None:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        op_only(size)


def op_only(size: int) -> None:
    """As ``compare``, but the reference is made of the formula, for which no kernel has to be allowed."""
    torch.manual_seed(0)
    inputs = [
        torch.randn(4, n, LENGTH, size, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (8, 4, 4)
    ]
    ids = ids_of(4)
    at = torch.arange(LENGTH, device="cuda")
    seen = (at[None, :] <= at[:, None]) | ((ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None])
    out, _ = function.attention(nn.Module(), *inputs, _with_bounds(ids, None), scaling=size**-0.5)
    ours = [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    def formula(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        wide = function.written_out_attention(*leaves, mask=seen[:, None]).transpose(1, 2)
        return [wide, *torch.autograd.grad(wide.to(torch.promote_types(dtype, torch.float32)).square().sum(), leaves)]

    for mine, torchs, exact in zip(ours, formula(torch.bfloat16), formula(torch.float64), strict=True):
        error, allowed = (mine.double() - exact).abs().max(), 2 * (torchs.double() - exact).abs().max()
        assert error <= allowed, (error, allowed)


@pytest.mark.parametrize(("size", "window"), [(64, 64), (256, 64), (128, 300)])
@pytest.mark.parametrize("packed", [False, True])
def test_windows(size: int, window: int, packed: bool) -> None:
    compare(size, window, packed, False)


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("compiled", [False, True])
def test_documents(size: int, compiled: bool) -> None:
    compare(size, None, True, compiled)
