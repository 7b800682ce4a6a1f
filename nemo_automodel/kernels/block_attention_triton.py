"""The keys a query sees ahead of itself within its block, merged into causal attention: three Triton kernels.

Causal attention is some other kernel's; these add the rest of a block to what it left (``out`` and log-sum-exp, or the
gradients), in place. Programs whose tokens are in no block return at once, so text costs nothing.
Imported only where it is launched, so that a machine without Triton can import everything else.

Shape legend: B batch, H query heads, G key/value heads, S tokens, E head size. ``blocks`` [B, S, 3] int32: a token's
block (negative: none) with the first and the last position of that block.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nemo_automodel.kernels.tiles_triton import put, tile


@triton.jit
def _forward(q, k, v, out, lse, blocks, scale, H, groups, S,
             q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s,
             E: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Go on with the online softmax from causal attention's state: maximum ``lse``, sum 1, values ``out``."""
    first = tl.program_id(0) * TILE
    row, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    queries = first + tl.arange(0, TILE)
    blocks += row * S * 3
    block = tl.load(blocks + queries * 3, mask=queries < S, other=-1)
    last = tl.load(blocks + queries * 3 + 2, mask=block >= 0, other=-1)
    stop = tl.max(last, 0) + 1
    if stop <= first + 1:
        return
    k += row * k_b + head // groups * k_h
    v += row * v_b + head // groups * v_h
    out += row * o_b + head * o_h
    lse += (row * H + head) * S
    tile_q = tile(q + row * q_b + head * q_h, first, q_s, S, TILE, E, WIDE)
    acc = tile(out, first, o_s, S, TILE, E, WIDE).to(tl.float32)
    top = tl.load(lse + queries, mask=queries < S, other=0.0)
    total = tl.full((TILE,), 1.0, tl.float32)
    for start in range(first, stop, TILE):
        keys = start + tl.arange(0, TILE)
        of_key = tl.load(blocks + keys * 3, mask=keys < S, other=-2)
        seen = (of_key[None, :] == block[:, None]) & (block[:, None] >= 0) & (keys[None, :] > queries[:, None])
        tile_k = tile(k, start, k_s, S, TILE, E, WIDE)
        scores = tl.dot(tile_q, tl.trans(tile_k), input_precision=PRECISION) * scale
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        tile_v = tile(v, start, v_s, S, TILE, E, WIDE)
        acc = acc * shrink[:, None] + tl.dot(weights.to(tile_v.dtype), tile_v, input_precision=PRECISION)
        top = higher
    put(out, first, o_s, S, acc / total[:, None], TILE, E, WIDE)
    tl.store(lse + queries, top + tl.log(total), mask=queries < S)


@triton.jit
def _backward_q(q, k, v, out, lse, dout, dq, delta, blocks, scale, H, groups, S,
                q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, do_b, do_h, do_s, dq_b, dq_h, dq_s,
                E: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dq += what comes through the keys ahead; ``delta`` [B, H, S], rowsum(dO O), of every query that sees any."""
    first = tl.program_id(0) * TILE
    row, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    queries = first + tl.arange(0, TILE)
    blocks += row * S * 3
    block = tl.load(blocks + queries * 3, mask=queries < S, other=-1)
    last = tl.load(blocks + queries * 3 + 2, mask=block >= 0, other=-1)
    stop = tl.max(last, 0) + 1
    if stop <= first + 1:
        return
    k += row * k_b + head // groups * k_h
    v += row * v_b + head // groups * v_h
    dq += row * dq_b + head * dq_h
    tile_q = tile(q + row * q_b + head * q_h, first, q_s, S, TILE, E, WIDE)
    tile_do = tile(dout + row * do_b + head * do_h, first, do_s, S, TILE, E, WIDE)
    tile_o = tile(out + row * o_b + head * o_h, first, o_s, S, TILE, E, WIDE)
    minus = tl.sum(tile_do.to(tl.float32) * tile_o.to(tl.float32), 1)
    tl.store(delta + (row * H + head) * S + queries, minus, mask=queries < S)
    level = tl.load(lse + (row * H + head) * S + queries, mask=queries < S, other=0.0)
    acc = tl.zeros((TILE, WIDE), tl.float32)
    for start in range(first, stop, TILE):
        keys = start + tl.arange(0, TILE)
        of_key = tl.load(blocks + keys * 3, mask=keys < S, other=-2)
        seen = (of_key[None, :] == block[:, None]) & (block[:, None] >= 0) & (keys[None, :] > queries[:, None])
        tile_k = tile(k, start, k_s, S, TILE, E, WIDE)
        scores = tl.dot(tile_q, tl.trans(tile_k), input_precision=PRECISION) * scale
        weights = tl.exp(tl.where(seen, scores - level[:, None], float("-inf")))
        tile_v = tile(v, start, v_s, S, TILE, E, WIDE)
        d_weights = tl.dot(tile_do, tl.trans(tile_v), input_precision=PRECISION)
        d_scores = weights * (d_weights - minus[:, None])
        acc += tl.dot(d_scores.to(tile_k.dtype), tile_k, input_precision=PRECISION)
    put(dq, first, dq_s, S, tile(dq, first, dq_s, S, TILE, E, WIDE).to(tl.float32) + acc * scale, TILE, E, WIDE)


@triton.jit
def _backward_kv(q, k, v, lse, dout, dk, dv, delta, blocks, scale, H, groups, S,
                 q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s,
                 dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
                 E: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dk, dv += what comes from the queries behind, of every query head of the group."""
    first = tl.program_id(0) * TILE
    row = (tl.program_id(1) // (H // groups)).to(tl.int64)
    group = (tl.program_id(1) % (H // groups)).to(tl.int64)
    keys = first + tl.arange(0, TILE)
    blocks += row * S * 3
    block = tl.load(blocks + keys * 3, mask=keys < S, other=-1)
    begin = tl.min(tl.load(blocks + keys * 3 + 1, mask=block >= 0, other=2147483647), 0)
    end = tl.minimum(first + TILE, S)
    if begin >= end - 1:
        return
    begin = begin // TILE * TILE
    tile_k = tile(k + row * k_b + group * k_h, first, k_s, S, TILE, E, WIDE)
    tile_v = tile(v + row * v_b + group * v_h, first, v_s, S, TILE, E, WIDE)
    acc_k = tl.zeros((TILE, WIDE), tl.float32)
    acc_v = tl.zeros((TILE, WIDE), tl.float32)
    for member in range(groups):
        head = group * groups + member
        for start in range(begin, end, TILE):
            queries = start + tl.arange(0, TILE)
            of_query = tl.load(blocks + queries * 3, mask=queries < S, other=-2)
            seen = (of_query[:, None] == block[None, :]) & (block[None, :] >= 0) & (keys[None, :] > queries[:, None])
            tile_q = tile(q + row * q_b + head * q_h, start, q_s, S, TILE, E, WIDE)
            tile_do = tile(dout + row * do_b + head * do_h, start, do_s, S, TILE, E, WIDE)
            minus = tl.load(delta + (row * H + head) * S + queries, mask=of_query >= 0, other=0.0)
            level = tl.load(lse + (row * H + head) * S + queries, mask=queries < S, other=0.0)
            scores = tl.dot(tile_q, tl.trans(tile_k), input_precision=PRECISION) * scale
            weights = tl.exp(tl.where(seen, scores - level[:, None], float("-inf")))
            acc_v += tl.dot(tl.trans(weights.to(tile_do.dtype)), tile_do, input_precision=PRECISION)
            d_weights = tl.dot(tile_do, tl.trans(tile_v), input_precision=PRECISION)
            d_scores = tl.where(seen, weights * (d_weights - minus[:, None]), 0.0)  # delta is unset for some others
            acc_k += tl.dot(tl.trans(d_scores.to(tile_q.dtype)), tile_q, input_precision=PRECISION)
    dk += row * dk_b + group * dk_h
    dv += row * dv_b + group * dv_h
    put(dk, first, dk_s, S, tile(dk, first, dk_s, S, TILE, E, WIDE).to(tl.float32) + acc_k * scale, TILE, E, WIDE)
    put(dv, first, dv_s, S, tile(dv, first, dv_s, S, TILE, E, WIDE).to(tl.float32) + acc_v, TILE, E, WIDE)


def add_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    blocks: torch.Tensor,
    scale: float,
) -> None:
    """Merge the keys ahead into ``out`` [B, H, S, E] and ``lse`` [B, H, S] (fp32, contiguous) of causal attention."""
    batch, heads, length, _ = query.shape
    options = _options(query)
    _forward[(triton.cdiv(length, options["TILE"]), batch * heads)](
        query, key, value, out, lse, blocks, scale, heads, heads // key.shape[1], length,
        *_strides(query, key, value, out), **options,
    )  # fmt: skip


def add_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    blocks: torch.Tensor,
    scale: float,
) -> None:
    """Add to ``grads`` (those of query, key and value) what goes through keys ahead; ``out`` and ``lse`` are merged."""
    batch, heads, length, _ = query.shape
    kv_heads = key.shape[1]
    dq, dk, dv = grads
    delta = torch.empty_like(lse)
    options = _options(query)
    grid = triton.cdiv(length, options["TILE"])
    sizes = (scale, heads, heads // kv_heads, length)
    _backward_q[(grid, batch * heads)](
        query, key, value, out, lse, dout, dq, delta, blocks, *sizes,
        *_strides(query, key, value, out, dout, dq), **options,
    )  # fmt: skip
    _backward_kv[(grid, batch * kv_heads)](
        query, key, value, lse, dout, dk, dv, delta, blocks, *sizes,
        *_strides(query, key, value, dout, dk, dv), **options,
    )  # fmt: skip


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [tensor.stride(dim) for tensor in tensors for dim in (0, 1, 2)]


def _options(query: torch.Tensor) -> dict[str, Any]:
    """Tiles of 64 tokens use the tensor cores best, and two of them of 256 values and their gradients want 139 KB."""
    size = query.shape[-1]
    wide = max(16, triton.next_power_of_2(size))
    tile = 64 if query.dtype != torch.float32 and (wide <= 128 or _has_shared_memory(query)) else 32
    precision = "ieee" if query.dtype == torch.float32 else "tf32"
    warps = 8 if wide * tile >= 64 * 256 else 4
    return {"E": size, "WIDE": wide, "TILE": tile, "PRECISION": precision, "num_warps": warps, "num_stages": 1}


def _has_shared_memory(x: torch.Tensor) -> bool:
    if not x.is_cuda:
        return True
    properties = torch.cuda.get_device_properties(x.device)
    return getattr(properties, "shared_memory_per_block_optin", 0) >= 160 * 1024
