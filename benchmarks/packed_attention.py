"""Attention within packed documents, by each way torch has of doing it: time, host time and error.

python -m benchmarks.packed_attention [--out DIR]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import attention_figures, write
from nemo_automodel.components.attention.varlen import varlen

TOKENS = 16384
RAGGED = [1024, 900, 700, 800, 672, 2048, 1500, 548, 300, 250, 400, 600, 1000, 1546, 3000, 1096]
CASES: dict[str, tuple[list[int], int, int, int]] = {  # lengths, query heads, key heads, head size
    "16 x 1024, 32/8 heads, d 64": ([1024] * 16, 32, 8, 64),
    "ragged, 32/8 heads, d 64": (RAGGED, 32, 8, 64),
    "16 x 1024, 32/8 heads, d 128": ([1024] * 16, 32, 8, 128),
    "ragged, 32/8 heads, d 128": (RAGGED, 32, 8, 128),
}
COLUMNS = ["case", "way", "forward ms", "forward + backward ms", "host ms", "first call ms", "error", "failed"]


def flash_varlen(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], bounds: Tensor) -> Tensor:
    return varlen(q, k, v, (bounds, bounds), (max(lengths), max(lengths)), None, True, None)


def cudnn_dense(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], bounds: Tensor) -> Tensor:
    """Documents of one length as the rows of a batch."""
    longest = lengths[0]
    if set(lengths) != {longest}:
        raise ValueError("not of one length")
    q, k, v = (x[0].transpose(0, 1).view(len(lengths), longest, x.shape[1], -1).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).reshape(1, TOKENS, q.shape[1], -1).transpose(1, 2)


def cudnn_padded(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], bounds: Tensor) -> Tensor:
    """Documents padded on the right to a common length, in which causal attention never looks."""
    longest = -(-max(lengths) // 128) * 128
    at = torch.arange(TOKENS, device=q.device)
    row = torch.bucketize(at, bounds[1:], right=True)
    slot = row * longest + at - bounds[row]

    def spread(x: Tensor) -> Tensor:
        rows = x.new_zeros(len(lengths) * longest, x.shape[1] * x.shape[3])
        flat = rows.index_copy(0, slot, x[0].transpose(0, 1).reshape(TOKENS, -1))
        return flat.view(len(lengths), longest, x.shape[1], -1).transpose(1, 2)

    out = F.scaled_dot_product_attention(spread(q), spread(k), spread(v), is_causal=True, enable_gqa=True)
    flat = out.transpose(1, 2).reshape(len(lengths) * longest, -1)
    return flat.index_select(0, slot).view(1, TOKENS, q.shape[1], -1).transpose(1, 2)


def exact(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    parts = []
    for a, b, c in zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True):
        groups = a.shape[1] // b.shape[1]
        wide = (x.float().repeat_interleave(groups, 1) for x in (b, c))
        parts.append(F.scaled_dot_product_attention(a.float(), *wide, is_causal=True))
    return torch.cat(parts, 2)


def measure(case: str, way: str, function: Callable[..., Tensor]) -> dict[str, Any]:
    """Times and the largest of the relative errors of the output and the three gradients."""
    lengths, heads, groups, size = CASES[case]
    assert sum(lengths) == TOKENS
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [  # laid out as a model's projections leave them: [1, S, heads, size], seen as [1, heads, S, size]
        torch.randn(1, TOKENS, n, size, device="cuda", dtype=torch.bfloat16, generator=generator)
        .transpose(1, 2)
        .requires_grad_()
        for n in (heads, groups, groups)
    ]
    gradient = torch.randn(1, TOKENS, heads, size, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    figures = attention_figures(
        lambda *qkv: function(*qkv, lengths, bounds), lambda *qkv: exact(*qkv, lengths), inputs, gradient
    )
    return {"case": case, "way": way, **figures}


def main(argv: list[str] | None = None) -> int:
    """Every way in every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="directory for the results (default benchmarks/results)")
    arguments = parser.parse_args(argv)
    ways = {"flash varlen": flash_varlen, "cuDNN dense": cudnn_dense, "cuDNN padded": cudnn_padded}
    rows = []
    for case in CASES:
        for way, function in ways.items():
            try:
                rows.append(measure(case, way, function))
            except Exception as error:
                rows.append({"case": case, "way": way, "failed": str(error).strip().splitlines()[0][:150]})
            print(rows[-1], flush=True)
            table = write("packed_attention", rows, COLUMNS, arguments.out)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
