"""Flash attention with soft-capped scores: three Triton kernels (FlashAttention-2's loops, Dao 2023, arXiv 2307.08691).

Every pattern there is (causal, a window, packed documents, all of it) lets a query see one range of keys and a key be
seen by one range of queries; both ranges only move forward, so a tile's loop runs over what its rows see and no more.
Imported only where it is launched, so that a machine without Triton can import everything else.

Shape legend: B batch, H query heads, G key/value heads, S tokens, E head size. ``bounds`` [S, 2] int32: the first
position and the end of a token's document. Scores are in units of log2 inside the kernels, ``lse`` [B, H, S] is natural.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from nemo_automodel.kernels.tiles_triton import put, tile

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _capped(products, slope, cap):
    """``cap`` * tanh(x) of x = products * slope / (2 log2 e), and the part r that tanh' = 4 r (1 - r) is made of.

    r = 1 / (1 + e^2x), tanh x = 1 - 2 r. Where e^2x would overflow, r is nothing beside 1 already; NaN stays NaN.
    """
    part = 1.0 / (1.0 + tl.exp2(tl.minimum(products * slope, 126.0, propagate_nan=tl.PropagateNan.ALL)))
    return cap - 2.0 * cap * part, part


@triton.jit
def _document(tokens, bounds, S, PACKED: tl.constexpr):
    if PACKED:
        low = tl.load(bounds + 2 * tokens, mask=tokens < S, other=S)
        high = tl.load(bounds + 2 * tokens + 1, mask=tokens < S, other=0)
    else:
        low = tl.zeros_like(tokens)
        high = low + S
    return low, high


@triton.jit
def _keys_of(queries, bounds, window, S, PACKED: tl.constexpr, CAUSAL: tl.constexpr):
    """The first key that each query sees, and the end of them."""
    low, high = _document(queries, bounds, S, PACKED)
    if CAUSAL:
        low = tl.maximum(low, queries - window + 1)
        high = tl.minimum(queries + 1, S)
    return low, high


@triton.jit
def _queries_of(keys, bounds, window, S, PACKED: tl.constexpr, CAUSAL: tl.constexpr):
    """The first query that sees each key, and the end of them."""
    low, high = _document(keys, bounds, S, PACKED)
    if CAUSAL:
        low = keys
        high = tl.minimum(high, keys + window)
    return low, high


@triton.jit
def _forward(q, k, v, out, lse, bounds, slope, cap, window, H, groups, S,
             q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s,
             E: tl.constexpr, WIDE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
             PACKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES  # the longest loops, the last tiles', begin first
    row, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    k += row * k_b + head // groups * k_h
    v += row * v_b + head // groups * v_h
    queries = first + tl.arange(0, QUERIES)
    low, high = _keys_of(queries, bounds, window, S, PACKED, CAUSAL)
    tile_q = tile(q + row * q_b + head * q_h, first, q_s, S, QUERIES, E, WIDE)
    acc = tl.zeros((QUERIES, WIDE), tl.float32)
    top = tl.zeros((QUERIES,), tl.float32) - cap  # no score is lower, so none of these is ever -inf
    total = tl.zeros((QUERIES,), tl.float32)
    for start in range(tl.min(low, 0), tl.max(high, 0), KEYS):
        keys = start + tl.arange(0, KEYS)
        tile_k = tile(k, start, k_s, S, KEYS, E, WIDE)
        scores, _ = _capped(tl.dot(tile_q, tl.trans(tile_k), input_precision=PRECISION), slope, cap)
        scores = tl.where((keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None]), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        tile_v = tile(v, start, v_s, S, KEYS, E, WIDE)
        acc = tl.dot(weights.to(tile_v.dtype), tile_v, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    put(out + row * o_b + head * o_h, first, o_s, S, acc / total[:, None], QUERIES, E, WIDE)
    tl.store(lse + (row * H + head) * S + queries, (top + tl.log2(total)) * _LN_2, mask=queries < S)


@triton.jit
def _backward_q(q, k, v, out, lse, dout, dq, delta, bounds, slope, cap, scale, window, H, groups, S,
                q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, do_b, do_h, do_s, dq_b, dq_h, dq_s,
                E: tl.constexpr, WIDE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
                PACKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dq, and on the way ``delta`` [B, H, S], rowsum(dO O)."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    row, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    k += row * k_b + head // groups * k_h
    v += row * v_b + head // groups * v_h
    queries = first + tl.arange(0, QUERIES)
    low, high = _keys_of(queries, bounds, window, S, PACKED, CAUSAL)
    tile_o = tile(out + row * o_b + head * o_h, first, o_s, S, QUERIES, E, WIDE)
    tile_do = tile(dout + row * do_b + head * do_h, first, do_s, S, QUERIES, E, WIDE)
    minus = tl.sum(tile_do.to(tl.float32) * tile_o.to(tl.float32), 1)
    tl.store(delta + (row * H + head) * S + queries, minus, mask=queries < S)
    level = tl.load(lse + (row * H + head) * S + queries, mask=queries < S, other=0.0) * _LOG2_E
    tile_q = tile(q + row * q_b + head * q_h, first, q_s, S, QUERIES, E, WIDE)
    acc = tl.zeros((QUERIES, WIDE), tl.float32)
    for start in range(tl.min(low, 0), tl.max(high, 0), KEYS):
        keys = start + tl.arange(0, KEYS)
        tile_k = tile(k, start, k_s, S, KEYS, E, WIDE)
        scores, part = _capped(tl.dot(tile_q, tl.trans(tile_k), input_precision=PRECISION), slope, cap)
        seen = (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])
        weights = tl.exp2(tl.where(seen, scores - level[:, None], float("-inf")))
        sloped = weights * (4.0 * part * (1.0 - part))
        tile_v = tile(v, start, v_s, S, KEYS, E, WIDE)
        d_weights = tl.dot(tile_do, tl.trans(tile_v), input_precision=PRECISION)
        d_scores = sloped * (d_weights - minus[:, None])
        acc = tl.dot(d_scores.to(tile_k.dtype), tile_k, acc, input_precision=PRECISION)
    put(dq + row * dq_b + head * dq_h, first, dq_s, S, acc * scale, QUERIES, E, WIDE)


@triton.jit
def _backward_kv(q, k, v, lse, dout, dk, dv, delta, bounds, slope, cap, scale, window, H, groups, S,
                 q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s,
                 dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
                 E: tl.constexpr, WIDE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
                 PACKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dk and dv, from every query head of the group; all products are [keys, queries], whose rows fill Hopper's tiles."""
    first = tl.program_id(0) * KEYS
    kv_heads = H // groups
    row, group = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    keys = first + tl.arange(0, KEYS)
    low, high = _queries_of(keys, bounds, window, S, PACKED, CAUSAL)
    begin, end = tl.min(low, 0), tl.max(high, 0)
    tile_k = tile(k + row * k_b + group * k_h, first, k_s, S, KEYS, E, WIDE)
    tile_v = tile(v + row * v_b + group * v_h, first, v_s, S, KEYS, E, WIDE)
    acc_k = tl.zeros((KEYS, WIDE), tl.float32)
    acc_v = tl.zeros((KEYS, WIDE), tl.float32)
    for member in range(groups):
        head = group * groups + member
        numbers = (row * H + head) * S
        for start in range(begin, end, QUERIES):
            queries = start + tl.arange(0, QUERIES)
            tile_q = tile(q + row * q_b + head * q_h, start, q_s, S, QUERIES, E, WIDE)
            level = tl.load(lse + (numbers + start) + tl.arange(0, QUERIES), mask=queries < S, other=0.0) * _LOG2_E
            scores, part = _capped(tl.dot(tile_k, tl.trans(tile_q), input_precision=PRECISION), slope, cap)
            seen = (queries[None, :] >= low[:, None]) & (queries[None, :] < high[:, None])
            weights = tl.exp2(tl.where(seen, scores - level[None, :], float("-inf")))
            sloped = weights * (4.0 * part * (1.0 - part))
            tile_do = tile(dout + row * do_b + head * do_h, start, do_s, S, QUERIES, E, WIDE)
            acc_v = tl.dot(weights.to(tile_do.dtype), tile_do, acc_v, input_precision=PRECISION)
            minus = tl.load(delta + (numbers + start) + tl.arange(0, QUERIES), mask=queries < S, other=0.0)
            d_weights = tl.dot(tile_v, tl.trans(tile_do), input_precision=PRECISION)
            d_scores = sloped * (d_weights - minus[None, :])
            acc_k = tl.dot(d_scores.to(tile_q.dtype), tile_q, acc_k, input_precision=PRECISION)
    put(dk + row * dk_b + group * dk_h, first, dk_s, S, acc_k * scale, KEYS, E, WIDE)
    put(dv + row * dv_b + group * dv_h, first, dv_s, S, acc_v, KEYS, E, WIDE)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    softcap: float,
    scale: float,
    causal: bool,
    window: int | None,
    bounds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, S, H, E], contiguous, and ``lse`` [B, H, S] in fp32, of [B, H, S, E] and twice [B, G, S, E]."""
    batch, heads, length, size = query.shape
    out = query.new_empty(batch, length, heads, size)
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    plan = _plan(query).forward
    _forward[(triton.cdiv(length, plan.queries), batch * heads)](
        query, key, value, out, lse, bounds, *_units(softcap, scale), window or length, heads, heads // key.shape[1],
        length, *_strides(query, key, value, out.transpose(1, 2)), **_options(query, plan, causal, bounds),
    )  # fmt: skip
    return out, lse


def backward(
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    softcap: float,
    scale: float,
    causal: bool,
    window: int | None,
    bounds: torch.Tensor | None,
) -> None:
    """Write ``grads``, those of query, key and value; ``dout`` and ``out`` are [B, H, S, E]."""
    batch, heads, length, _ = query.shape
    kv_heads = key.shape[1]
    dq, dk, dv = grads
    delta = torch.empty_like(lse)
    sizes = (*_units(softcap, scale), scale, window or length, heads, heads // kv_heads, length)
    plan = _plan(query)
    _backward_q[(triton.cdiv(length, plan.backward_q.queries), batch * heads)](
        query, key, value, out, lse, dout, dq, delta, bounds, *sizes,
        *_strides(query, key, value, out, dout, dq), **_options(query, plan.backward_q, causal, bounds),
    )  # fmt: skip
    _backward_kv[(triton.cdiv(length, plan.backward_kv.keys), batch * kv_heads)](
        query, key, value, lse, dout, dk, dv, delta, bounds, *sizes,
        *_strides(query, key, value, dout, dk, dv), **_options(query, plan.backward_kv, causal, bounds),
    )  # fmt: skip


@dataclass(frozen=True)
class _Tiles:
    """How one kernel is cut: queries and keys of a tile, warps of a program, stages of its pipeline of loads."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class _Plan:
    """The tiles of the three kernels."""

    forward: _Tiles
    backward_q: _Tiles
    backward_kv: _Tiles


# By the padded head size. On Hopper a product of the loop is given 64 rows for every 4 warps, and is made twice where
# there are fewer: only dK and dV of heads of 256, too many to be 4 warps' registers, put up with that.
_PLANS = {
    64: _Plan(_Tiles(128, 64, 4, 3), _Tiles(64, 64, 4, 2), _Tiles(64, 64, 4, 2)),
    128: _Plan(_Tiles(128, 64, 8, 2), _Tiles(64, 64, 4, 2), _Tiles(32, 64, 4, 2)),
    256: _Plan(_Tiles(128, 64, 8, 2), _Tiles(128, 32, 8, 2), _Tiles(32, 64, 8, 2)),
}
_SMALL = _Plan(*(_Tiles(32, 32, 4, 1),) * 3)  # for at most 80 KB of shared memory


def _plan(query: torch.Tensor) -> _Plan:
    """The tiles for heads of ``query`` [B, H, S, E] on its device."""
    wide = max(64, triton.next_power_of_2(query.shape[-1]))
    return _SMALL if query.dtype == torch.float32 or not _has_shared_memory(query) else _PLANS[wide]


def _options(query: torch.Tensor, tiles: _Tiles, causal: bool, bounds: torch.Tensor | None) -> dict[str, Any]:
    size = query.shape[-1]
    return {
        "E": size,
        "WIDE": max(16, triton.next_power_of_2(size)),
        "QUERIES": tiles.queries,
        "KEYS": tiles.keys,
        "PACKED": bounds is not None,
        "CAUSAL": causal,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _units(softcap: float, scale: float) -> tuple[float, float]:
    """``slope`` and ``cap`` of ``_capped``."""
    return 2 * math.log2(math.e) * scale / softcap, math.log2(math.e) * softcap


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [tensor.stride(dim) for tensor in tensors for dim in (0, 1, 2)]


def _has_shared_memory(x: torch.Tensor) -> bool:
    """Whether ``_PLANS``, which want up to 208 KB, fit: on data-centre GPUs since Hopper."""
    if not x.is_cuda:
        return True
    properties = torch.cuda.get_device_properties(x.device)
    return getattr(properties, "shared_memory_per_block_optin", 0) >= 208 * 1024
