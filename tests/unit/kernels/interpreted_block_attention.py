"""Block attention against the formula in float64; run as it is and in Triton's interpreter (``test_block_attention.py``).

Claims: output and all gradients equal those of attention with the dense mask, for grouped heads, odd sizes, several blocks
a row, at its ends, none, in pieces, of one token, windows shorter than a block, and documents; the op is well formed.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_automodel.components.attention.blocks import _with_bounds, dense
from nemo_automodel.components.attention.function import _written_mask
from nemo_automodel.kernels.block_attention import block_attention

LENGTH = 75
ROWS: dict[str, list[tuple[int, int, int]]] = {  # (block, start, end)
    "middle": [(0, 3, 33), (1, 40, 65)],  # the last of each alone in a tile of 32 or 64
    "ends": [(0, 0, 20), (1, 21, 22), (5, 50, LENGTH)],
    "none": [],
    "adjacent": [(0, 10, 37), (1, 37, 70)],
    "in pieces": [(0, 0, 10), (0, 30, 41), (1, 41, 44), (0, 70, 72)],
    "whole": [(0, 0, LENGTH)],
}


def ids_of(*rows: str) -> Tensor:
    ids = torch.full((len(rows), LENGTH), -1)
    for row, name in zip(ids, rows, strict=True):
        for block, start, end in ROWS[name]:
            row[start:end] = block
    return ids


def inputs(rows: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [  # as a model's projections leave them: [B, S, heads, size], seen as [B, heads, S, size]
        torch.randn(rows, LENGTH, n, size, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


def both(function, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, leaves, gradient.to(out.dtype))]


def written_out(mask: Tensor, scale: float | None = None, dtype: torch.dtype = torch.float64):
    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)

    return lambda *tensors: function(*(x.to(dtype) for x in tensors))


def compare(ids: Tensor, tensors: list[Tensor], window: int | None = None, bounds: list[int] | None = None,
            scale: float | None = None) -> None:  # fmt: skip
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    blocks = _with_bounds(ids, cu_seqlens)
    at = torch.arange(LENGTH)
    same = (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None]
    seen = (at[None, :] <= at[:, None]) | same
    if window:
        seen = seen & (at[None, :] > at[:, None] - window)
    if cu_seqlens is not None:
        document = torch.bucketize(at, cu_seqlens, right=True)
        seen = seen & (document[None, :] == document[:, None])
    behind = _written_mask(LENGTH, LENGTH, True, window, cu_seqlens, ids.device)
    assert torch.equal(dense(blocks, behind), seen[:, None])
    longest = None if bounds is None else max(b - a for a, b in pairwise(bounds))
    ours = both(lambda q, k, v: block_attention(q, k, v, blocks[:, 0], scale, window, cu_seqlens, longest), tensors)
    exact = both(written_out(seen[:, None], scale), tensors)
    plain = both(written_out(seen[:, None], scale, tensors[0].dtype), tensors)
    for mine, wanted, torchs in zip(ours, exact, plain, strict=True):
        error, own = (mine - wanted).abs().max().item(), (torchs - wanted).abs().max().item()
        allowed = max(1e-5, 3 * own) if mine.dtype == torch.float32 else 2 * own
        assert error <= allowed, (error, own)


@pytest.mark.parametrize("rows", [("middle", "ends", "none"), ("adjacent", "in pieces", "whole")])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), pytest.param(2, 2, 8, marks=pytest.mark.full), pytest.param(6, 1, 40, marks=pytest.mark.full)])  # fmt: skip
def test_blocks(rows: tuple[str, ...], heads: int, kv_heads: int, size: int) -> None:
    compare(ids_of(*rows), inputs(3, heads, kv_heads, size))


@pytest.mark.parametrize("window", [7, pytest.param(1, marks=pytest.mark.full), pytest.param(64, marks=pytest.mark.full)])  # fmt: skip
def test_windows(window: int) -> None:
    compare(ids_of("middle", "ends", "in pieces"), inputs(3, 4, 2, 16), window=window)


@pytest.mark.parametrize("row", ["in pieces", pytest.param("adjacent", marks=pytest.mark.full), pytest.param("whole", marks=pytest.mark.full)])  # fmt: skip
@pytest.mark.parametrize("window", [None, 5])
def test_documents(row: str, window: int | None) -> None:
    compare(ids_of(row), inputs(1, 4, 2, 16), window=window, bounds=[0, 20, 39, 42, LENGTH])


def test_scale() -> None:
    compare(ids_of("ends"), inputs(1, 2, 1, 16), scale=0.7)


def test_scores_far_apart() -> None:
    """Keys ahead may outweigh those behind by more than e^88, and the reverse."""
    query, key, value = inputs(2, 2, 1, 16)
    query, key = 30 * query.detach(), 30 * key.detach()
    scores = (query @ key.transpose(2, 3) * 0.015)[1]
    ahead = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    gap = scores.masked_fill(~ahead, -torch.inf).amax(-1) - scores.masked_fill(ahead, -torch.inf).amax(-1)
    assert gap[:, :-1].max() > 88
    assert gap[:, :-1].min() < -88
    compare(ids_of("middle", "whole"), [query, key, value], scale=0.015)


def test_half_precision() -> None:
    compare(ids_of("middle", "ends"), inputs(2, 4, 2, 16, torch.float16))


def test_contiguous_inputs_and_the_op_itself() -> None:
    tensors = [x.detach().contiguous().requires_grad_() for x in inputs(2, 4, 2, 16)]
    blocks = _with_bounds(ids_of("middle", "ends"), None)[:, 0]
    op = torch.ops.automodel.block_attention.default
    torch.library.opcheck(op, (*tensors, blocks, 0.25, None, None, LENGTH))
    torch.library.opcheck(op, (*inputs(2, 4, 2, 16), blocks, 0.25, 7, None, LENGTH))


@pytest.mark.parametrize("layout", [(0, 1, 3, 2), (1, 0, 2, 3)])
def test_other_layouts(layout: tuple[int, ...]) -> None:
    """Gradients have the layout of what they belong to, also where its last dimension is not contiguous."""
    back = sorted(range(4), key=layout.__getitem__)
    tensors = [x.detach().permute(layout).contiguous().permute(back) for x in inputs(2, 4, 2, 16)]
    compare(ids_of("middle", "ends"), tensors)
