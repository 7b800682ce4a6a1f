"""Tiles of rows in Triton kernels, read and written with 64-bit offsets where tensors may be larger than 2^31 numbers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(ptr, first, stride, S, ROWS: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr):
    """[ROWS, WIDE] of the rows of E values from ``first`` on, zeros outside. Only the first row's place needs 64 bits."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDE)
    return tl.load(ptr + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + columns[None, :]),
                   mask=(rows[:, None] < S - first) & (columns[None, :] < E), other=0.0)  # fmt: skip


@triton.jit
def put(ptr, first, stride, S, values, ROWS: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr):
    """Write [ROWS, WIDE] ``values`` to where ``tile`` reads them."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDE)
    tl.store(ptr + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + columns[None, :]),
             values.to(ptr.dtype.element_ty), mask=(rows[:, None] < S - first) & (columns[None, :] < E))  # fmt: skip
