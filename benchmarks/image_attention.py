"""Causal attention whose images see all of themselves, by each way there is of doing it: time, host time and error.

python -m benchmarks.image_attention [--out DIR] [--flex]
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
from nemo_automodel.components.attention.blocks import _with_bounds
from nemo_automodel.kernels.block_attention import block_attention

CASES: dict[
    str, tuple[int, int, int, int, int, int]
] = {  # rows, tokens, image tokens, query heads, key heads, head size
    "D: 8 x 1024, image of 256, 8/4 heads, d 256": (8, 1024, 256, 8, 4, 256),
    "1 x 8192, 8 images of 256, 8/4 heads, d 256": (1, 8192, 256, 8, 4, 256),
    "4 x 4096, 4 images of 256, 32/8 heads, d 128": (4, 4096, 256, 32, 8, 128),
}
LAYERS = 34
COLUMNS = ["case", "way", "forward ms", "forward + backward ms", f"{LAYERS} layers ms", "host ms", "first call ms", "error", "failed"]  # fmt: skip


def ids_of(rows: int, length: int, image: int) -> Tensor:
    """An image every 1024 tokens, after the fourth."""
    ids = torch.full((rows, length), -1, device="cuda")
    for number, start in enumerate(range(4, length - image, 1024)):
        ids[:, start : start + image] = number
    return ids


def dense_mask(ids: Tensor) -> Tensor:
    at = torch.arange(ids.shape[1], device=ids.device)
    same = (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None]
    return ((at[None, :] <= at[:, None]) | same)[:, None]


def dense(ids: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What transformers does: a mask made once a step, keys and values repeated for each query head."""
    mask = dense_mask(ids)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        wide = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (k, v))
        return F.scaled_dot_product_attention(q, *wide, attn_mask=mask).transpose(1, 2).contiguous()

    return function


def causal_only(ids: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Without the images: the floor, and wrong."""
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def blocks(ids: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    bounds = _with_bounds(ids, None)[:, 0]
    return lambda q, k, v: block_attention(q, k, v, bounds)


def flex(ids: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def allowed(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) | ((ids[b, q] == ids[b, k]) & (ids[b, q] >= 0))

    mask = create_block_mask(allowed, ids.shape[0], None, ids.shape[1], ids.shape[1], device="cuda")
    compiled: Any = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


WAYS = {"dense mask": dense, "causal only": causal_only, "blocks (ours)": blocks, "flex, compiled": flex}


def measure(case: str, way: str) -> dict[str, Any]:
    """Times and the largest of the relative errors of the output and the three gradients."""
    rows, length, image, heads, groups, size = CASES[case]
    generator = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    inputs = [
        torch.randn(rows, length, n, size, **options).transpose(1, 2).requires_grad_() for n in (heads, groups, groups)
    ]
    gradient = torch.randn(rows, length, heads, size, **options)
    ids = ids_of(rows, length, image)
    function = WAYS[way](ids)
    figures = attention_figures(function, dense(ids), inputs, gradient)
    return {
        "case": case,
        "way": way,
        **figures,
        f"{LAYERS} layers ms": round(LAYERS * figures["forward + backward ms"], 1),
    }


def main(argv: list[str] | None = None) -> int:
    """Every way in every case; compiled flex attention only where asked for, since its first call takes a minute."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="directory for the results (default benchmarks/results)")
    parser.add_argument("--flex", action="store_true", help="compiled flex_attention too")
    arguments = parser.parse_args(argv)
    rows = []
    for case in CASES:
        for way in WAYS:
            if way.startswith("flex") and not arguments.flex:
                continue
            try:
                rows.append(measure(case, way))
            except Exception as error:
                rows.append({"case": case, "way": way, "failed": str(error).strip().splitlines()[0][:150]})
            print(rows[-1], flush=True)
            table = write("image_attention", rows, COLUMNS, arguments.out)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
