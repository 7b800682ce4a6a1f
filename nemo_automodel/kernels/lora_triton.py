"""The three Triton kernels of the low-rank path: narrow products that only move memory, so each reads its big input once.

T tokens, F features (K in, N out of the layer), R = rank padded to a power of two >= 16 (the least a tile may be).
Factors are read in their own dtype (fp32 masters) and rounded to the activation's as they enter the product.
Imported only where it is launched, so that a machine without Triton can import everything else.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def round_to(x, dtype: tl.constexpr, INTERPRETED_BF16: tl.constexpr):
    """x in ``dtype``, to nearest even. (Triton's interpreter truncates to bf16: there the carry is added first.)"""
    if INTERPRETED_BF16 and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, INTERPRETED_BF16: tl.constexpr):
    """acc + a @ b: b is rounded to a's dtype, the products are summed in fp32. (The interpreter has no bf16 product.)"""
    b = round_to(b, a.dtype, INTERPRETED_BF16)
    if INTERPRETED_BF16:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif PRECISION == "ieee":
        # One sum per tile, then a sum of those: half the error of a single long one. (The limit, which means nothing
        # to an fp32 product, keeps the compiler from joining the two.)
        acc += tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _shrink(x_ptr, v_ptr, u_ptr, T, F, rank, scale, stride_x, stride_vf, stride_vr,
            R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
            PRECISION: tl.constexpr, INTERPRETED_BF16: tl.constexpr):  # fmt: skip
    """u[T, rank] = scale * x[T, F] @ v[F, rank], one program per BLOCK_T rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, R)
    features = tl.arange(0, BLOCK_F)
    acc = tl.zeros((BLOCK_T, R), tl.float32)
    for start in range(0, F, BLOCK_F):
        cols = start + features
        x = tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :],
                    mask=(rows[:, None] < T) & (cols[None, :] < F), other=0.0)  # fmt: skip
        v = tl.load(v_ptr + cols[:, None] * stride_vf + ranks[None, :] * stride_vr,
                    mask=(cols[:, None] < F) & (ranks[None, :] < rank), other=0.0)  # fmt: skip
        acc = dot(x, v, acc, PRECISION, INTERPRETED_BF16)
    tl.store(u_ptr + rows[:, None] * rank + ranks[None, :], round_to(acc * scale, u_ptr.dtype.element_ty, INTERPRETED_BF16),
             mask=(rows[:, None] < T) & (ranks[None, :] < rank))  # fmt: skip


@triton.jit
def _expand(u_ptr, v_ptr, bias_ptr, y_ptr, T, F, rank, scale, stride_y, stride_vf, stride_vr,
            HAS_BIAS: tl.constexpr, ADD: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr,
            BLOCK_F: tl.constexpr,
            PRECISION: tl.constexpr, INTERPRETED_BF16: tl.constexpr):  # fmt: skip
    """y[T, F] = scale * u[T, rank] @ v[rank, F] (+ bias[F]) (+ y where ADD)."""
    rows = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    ranks = tl.arange(0, R)
    u = tl.load(u_ptr + rows[:, None] * rank + ranks[None, :],
                mask=(rows[:, None] < T) & (ranks[None, :] < rank), other=0.0)  # fmt: skip
    v = tl.load(v_ptr + ranks[:, None] * stride_vr + cols[None, :] * stride_vf,
                mask=(ranks[:, None] < rank) & (cols[None, :] < F), other=0.0)  # fmt: skip
    y = dot(u, v, tl.zeros((BLOCK_T, BLOCK_F), tl.float32), PRECISION, INTERPRETED_BF16) * scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=cols < F, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows[:, None] * stride_y + cols[None, :]
    inside = (rows[:, None] < T) & (cols[None, :] < F)
    if ADD:
        y += tl.load(y_ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptrs, round_to(y, y_ptr.dtype.element_ty, INTERPRETED_BF16), mask=inside)


@triton.jit
def _gradient(u_ptr, z_ptr, g_ptr, T, F, rank, scale, rows_per_split, stride_z, stride_gs, stride_gf, stride_gr,
              R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
            PRECISION: tl.constexpr, INTERPRETED_BF16: tl.constexpr):  # fmt: skip
    """g[split, rank, F] = scale * u[rows of split, rank]^T @ z[rows of split, F], in fp32."""
    cols = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    split = tl.program_id(1).to(tl.int64)
    ranks = tl.arange(0, R)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, T)
    acc = tl.zeros((R, BLOCK_F), tl.float32)
    for start in range(0, rows_per_split, BLOCK_T):
        rows = first + start + tl.arange(0, BLOCK_T)
        u = tl.load(u_ptr + rows[None, :] * rank + ranks[:, None],
                    mask=(rows[None, :] < last) & (ranks[:, None] < rank), other=0.0)  # fmt: skip
        z = tl.load(z_ptr + rows[:, None] * stride_z + cols[None, :],
                    mask=(rows[:, None] < last) & (cols[None, :] < F), other=0.0)  # fmt: skip
        acc = dot(u, z, acc, PRECISION, INTERPRETED_BF16)
    g_ptrs = g_ptr + split * stride_gs + ranks[:, None] * stride_gr + cols[None, :] * stride_gf
    tl.store(g_ptrs, acc * scale, mask=(ranks[:, None] < rank) & (cols[None, :] < F))


def shrink(x: torch.Tensor, v: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """``scale * x @ v`` for ``x [T, F]`` with contiguous rows and ``v [F, r]`` of any strides -> ``[T, r]``."""
    (tokens, features), rank = x.shape, v.shape[1]
    u = torch.empty(tokens, rank, dtype=x.dtype, device=x.device)
    likely = _likely(tokens)
    block_t = 64 if likely >= 8192 else 32 if likely >= 4096 else 16  # about one program per multiprocessor
    padded = padded_rank(rank)
    block_f = (128 if padded <= 32 else 64) * 2 // x.element_size()
    stages = (4 if padded <= 32 else 3) - (_little_shared_memory(x) and padded != 64)
    _launcher(_shrink, x)[(triton.cdiv(tokens, block_t),)](
        x, v, u, tokens, features, rank, scale, x.stride(0), v.stride(0), v.stride(1),
        R=padded, BLOCK_T=block_t, BLOCK_F=block_f, **_product(x), num_warps=4, num_stages=stages,
    )  # fmt: skip
    return u


def expand(
    u: torch.Tensor,
    v: torch.Tensor,
    y: torch.Tensor,
    scale: float = 1.0,
    bias: torch.Tensor | None = None,
    add: bool = False,
) -> None:
    """Write ``scale * u @ v + bias`` to ``y [T, F]`` (or add it there), for ``u [T, r]``, ``v [r, F]`` of any strides."""
    tokens, features = y.shape
    rank = u.shape[1]
    padded = padded_rank(rank)
    block_t, block_f = 64, 128
    _launcher(_expand, u)[(triton.cdiv(features, block_f), triton.cdiv(tokens, block_t))](
        u, v, bias, y, tokens, features, rank, scale, y.stride(0), v.stride(1), v.stride(0),
        HAS_BIAS=bias is not None, ADD=add, R=padded, BLOCK_T=block_t, BLOCK_F=block_f, **_product(u),
        num_warps=4, num_stages=1,
    )  # fmt: skip


def gradient(u: torch.Tensor, z: torch.Tensor, scale: float = 1.0, transposed: bool = False) -> torch.Tensor:
    """``scale * u^T @ z`` in fp32 for ``u [T, r]`` and ``z [T, F]`` -> ``[r, F]``, or ``[F, r]`` where ``transposed``.

    Tokens are split over programs by shape alone (in compiled code that of the first call) and the parts added in order, so
    the result is deterministic.
    """
    (tokens, features), rank = z.shape, u.shape[1]
    padded = padded_rank(rank)
    block_t, block_f = 64, 128 * 2 // z.element_size()
    columns = triton.cdiv(features, block_f)
    likely = _likely(tokens)
    splits = max(1, min(512 // columns, likely // (4 * block_t)))
    splits = triton.cdiv(likely, triton.cdiv(triton.cdiv(likely, splits), block_t) * block_t)
    rows_per_split = triton.cdiv(triton.cdiv(tokens, splits), block_t) * block_t
    shape = (splits, features, rank) if transposed else (splits, rank, features)
    parts = torch.empty(shape, dtype=torch.float32, device=z.device)
    stride_f, stride_r = (parts.stride(1), parts.stride(2)) if transposed else (parts.stride(2), parts.stride(1))
    _launcher(_gradient, z)[(columns, splits)](
        u, z, parts, tokens, features, rank, scale, rows_per_split, z.stride(0), parts.stride(0), stride_f, stride_r,
        R=padded, BLOCK_T=block_t, BLOCK_F=block_f, **_product(z), num_warps=4, num_stages=3,
    )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(0)


def _launcher(kernel: Any, x: torch.Tensor) -> Any:
    """``kernel``, to be launched on real tensors, or to be recorded where ``x`` stands for one while a graph is traced."""
    return kernel if type(x) in (torch.Tensor, torch.nn.Parameter) else torch.library.wrap_triton(kernel)


def _likely(size: int | torch.SymInt) -> int:
    """``size``; of one that may change in compiled code, what it was when traced, so that no code is tied to it."""
    return size if isinstance(size, int) else size.node.hint or 8192


def padded_rank(rank: int) -> int:
    """``rank`` as tiles have it: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(rank))


def _little_shared_memory(x: torch.Tensor) -> bool:
    """Whether a block of threads has about 100 KB (consumer GPUs), not the 160 KB or more of data-centre ones."""
    if not x.is_cuda:
        return False
    properties = torch.cuda.get_device_properties(x.device)
    return getattr(properties, "shared_memory_per_block_optin", 0) < 160 * 1024


def _product(x: torch.Tensor) -> dict[str, Any]:
    """How ``dot`` multiplies. fp32 stays fp32: TF32 would halve its digits, and these products wait for memory anyway."""
    return {
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "INTERPRETED_BF16": x.dtype == torch.bfloat16 and not isinstance(_shrink, triton.JITFunction),
    }
