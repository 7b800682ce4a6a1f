"""One Triton kernel: a product of FP8 rows, each with its scale, that adds a low-rank product before it writes.

Tiles come by TMA into ``wgmma``, as in Triton's own persistent product; the low-rank part is one more step of the sum, in
bf16, so that its result is never written and read by itself. Imported only where it is launched.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nemo_automodel.kernels.lora import INTERPRETED
from nemo_automodel.kernels.lora_triton import dot, padded_rank, round_to

_BLOCK_T, _BLOCK_N, _BLOCK_K, _GROUP = 128, 256, 128, 16


@triton.jit
def _product_with_low_rank(x_tiles, w_tiles, y_ptr, x_scale_ptr, w_scale_ptr, u_ptr, v_ptr, T, N, K, rank,
                           stride_vr, stride_vn, PROGRAMS, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
                           BLOCK_K: tl.constexpr, GROUP: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """y[T, N] = x_scale[T] w_scale[N] (x[T, K] @ w[N, K]^T) + u[T, rank] @ v[rank, N]; GROUP rows of tiles share w's."""
    down, across = tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N)
    ranks = tl.arange(0, R)
    for tile in range(tl.program_id(0), down * across, PROGRAMS):
        first = tile // (GROUP * across) * GROUP
        height = tl.minimum(down - first, GROUP)
        row = (first + tile % (GROUP * across) % height) * BLOCK_T
        col = tile % (GROUP * across) // height * BLOCK_N
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = dot(x_tiles.load([row, k]), w_tiles.load([col, k]).T, acc, "tf32", INTERPRETED)
        rows, cols = row + tl.arange(0, BLOCK_T), col + tl.arange(0, BLOCK_N)
        x_scale = tl.load(x_scale_ptr + rows, mask=rows < T, other=0.0)
        w_scale = tl.load(w_scale_ptr + cols, mask=cols < N, other=0.0)
        acc = acc * x_scale[:, None] * w_scale[None, :]
        u = tl.load(u_ptr + rows[:, None] * rank + ranks[None, :],
                    mask=(rows[:, None] < T) & (ranks[None, :] < rank), other=0.0)  # fmt: skip
        v = tl.load(v_ptr + ranks[:, None] * stride_vr + cols[None, :] * stride_vn,
                    mask=(ranks[:, None] < rank) & (cols[None, :] < N), other=0.0)  # fmt: skip
        acc = dot(u, v, acc, "tf32", INTERPRETED)
        tl.store(y_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :], round_to(acc, y_ptr.dtype.element_ty, INTERPRETED),
                 mask=(rows[:, None] < T) & (cols[None, :] < N))  # fmt: skip


def product_with_low_rank(
    x: torch.Tensor, x_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, u: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """``(x * x_scales) @ (w * w_scales)^T + u @ v``; see ``fp8.product_with_low_rank``."""
    (tokens, features), out = x.shape, w.shape[0]
    y = torch.empty(tokens, out, dtype=u.dtype, device=x.device)
    tiles = triton.cdiv(tokens, _BLOCK_T) * triton.cdiv(out, _BLOCK_N)
    programs = min(tiles, _multiprocessors(x.device))
    with torch.cuda.device_of(x):  # of no effect on the CPU
        x_tiles = TensorDescriptor.from_tensor(x, [_BLOCK_T, _BLOCK_K])
        w_tiles = TensorDescriptor.from_tensor(w, [_BLOCK_N, _BLOCK_K])
        _product_with_low_rank[(programs,)](
            x_tiles, w_tiles, y, x_scales, w_scales, u, v, tokens, out, features, u.shape[1], v.stride(0), v.stride(1),
            programs, R=padded_rank(u.shape[1]), BLOCK_T=_BLOCK_T, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, GROUP=_GROUP,
            INTERPRETED=INTERPRETED, num_warps=8, num_stages=4,
        )  # fmt: skip
    return y


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
