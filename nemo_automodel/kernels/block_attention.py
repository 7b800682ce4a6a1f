"""``block_attention``: causal attention in which the tokens of a block also see those ahead of them in it, one torch op.

Causal attention (or that within a window, or within packed documents) is torch's fastest kernel's, over everything. The
keys ahead within a block, an image say, are few; they are merged into its result through the log-sum-exp. In backward both
parts are given the merged output and log-sum-exp, of which their gradients are exact: dS = P (dP - rowsum(dO O)),
P = exp(S - lse), as in ring attention (arXiv 2310.01889). No [S, S] mask exists. An opaque custom op, so
``torch.compile`` keeps its graph whole.

Shape legend: B batch, H query heads, G key/value heads, S tokens, E head size, D documents.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from nemo_automodel.kernels.masks import written_mask

MAX_HEAD_SIZE = 256  # of torch's flash kernels
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_aten: Any = torch.ops.aten


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the op does not run on ``device`` in ``dtype``; None where it does. On the CPU it is there for small tests."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"there is no kernel for {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"there is no kernel for {dtype}"
    return None if torch.cuda.get_device_capability(device) >= (8, 0) else "the GPU is too old for flash attention"


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the op takes tensors of these shapes [B, H, S, E] and [B, G, S, E]."""
    size = query.shape[-1]
    return (
        size == key.shape[-1] == value.shape[-1] <= MAX_HEAD_SIZE and size % 8 == 0 and query.shape[2] == key.shape[2]
    )


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    scale: float | None = None,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
) -> Tensor:
    """Attention to the keys behind (the last ``window``, the query's own included) and to those ahead in the same block.

    Args:
        query: ``[B, H, S, E]``, any strides with the last dimension contiguous, as the others.
        key: ``[B, G, S, E]``, H a multiple of G.
        value: ``[B, G, S, E]``.
        blocks: ``[B, S, 3]`` int32: a token's block (negative: none), the first and the last position of that block.
        scale: of the scores; default E^-0.5.
        window: default all keys behind.
        cu_seqlens: ``[D+1]`` int32 boundaries of the documents of a batch of one row, whose blocks lie within them.
        longest: tokens of the longest document; default S.

    Returns ``[B, S, H, E]``, contiguous.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _forward_op(query, key, value, blocks, scale, window, cu_seqlens, longest or query.shape[2])[0]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    scale: float,
    window: int | None,
    cu_seqlens: Tensor | None,
    longest: int,
) -> tuple[Tensor, Tensor]:
    query, key, value = (last_contiguous(x) for x in (query, key, value))
    out, lse = _behind(query, key, value, scale, window, cu_seqlens, longest)
    out, lse = out.transpose(1, 2).contiguous(), lse.contiguous()
    seen = out.transpose(1, 2)
    add, _ = _keys_ahead(query)
    add(query, key, value, seen, lse, blocks.contiguous(), scale)
    return out, lse


def _backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Tensor,
    scale: float,
    window: int | None,
    cu_seqlens: Tensor | None,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = (query, key, value)
    query, key, value, dout = (last_contiguous(x) for x in (*wide, dout))
    out, dout = out.transpose(1, 2), dout.transpose(1, 2)
    grads = _behind_backward(dout, query, key, value, out, lse, scale, window, cu_seqlens, longest)
    dq, dk, dv = (laid_out_as(grad, x) for grad, x in zip(grads, wide, strict=True))
    _, add = _keys_ahead(query)
    add(query, key, value, out, lse, dout, (dq, dk, dv), blocks.contiguous(), scale)
    return dq, dk, dv


def _keys_ahead(query: Tensor) -> tuple[Callable[..., None], Callable[..., None]]:
    """What adds the keys ahead to the result and to the gradients: the kernels, or on a CPU what is written out below."""
    if query.is_cuda or _INTERPRETED:
        from nemo_automodel.kernels import block_attention_triton

        return block_attention_triton.add_forward, block_attention_triton.add_backward
    return _add_forward, _add_backward


# --- keys behind: torch's own kernels -----------------------------------------------------------------------------


def _behind(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, cu_seqlens: Tensor | None, longest: int
) -> tuple[Tensor, Tensor]:
    """Output [B, H, S, E] and natural log-sum-exp [B, H, S] in fp32."""
    if not query.is_cuda:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        mask = _additive_mask(query, window, cu_seqlens)
        return _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, mask is None, attn_mask=mask, scale=scale
        )
    batch, heads, length, _ = query.shape
    if window or cu_seqlens is not None:
        bounds = _bounds(batch, length, query.device) if cu_seqlens is None else cu_seqlens
        out, lse, *_ = _aten._flash_attention_forward(
            *(_tokens(x) for x in (query, key, value)), bounds, bounds, longest, longest, 0.0, True, False,
            scale=scale, window_size_left=window - 1 if window else -1, window_size_right=0 if window else -1,
        )  # fmt: skip
        return out.view(batch, length, heads, -1).transpose(1, 2), lse.view(heads, batch, length).transpose(0, 1)
    if _cudnn_is_faster(query, key, value, scale):
        found = _aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, True, False, scale=scale)
    else:
        found = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=scale)
    return found[0], found[1].reshape(batch, heads, -1)[..., :length]


def _behind_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int | None,
    cu_seqlens: Tensor | None,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients [B, H, S, E] and twice [B, G, S, E]; ``out`` and ``lse`` are of more keys than those behind."""
    batch, heads, length, size = query.shape
    if not query.is_cuda:
        kv_heads = key.shape[1]
        key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
        mask = _additive_mask(query, window, cu_seqlens)
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, query, key, value, out, lse, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        return dq, *(x.view(batch, kv_heads, -1, length, size).sum(2) for x in (dk, dv))
    state, none = torch.zeros(2, dtype=torch.uint64, device=query.device), query.new_empty(0)  # nothing is dropped
    if window or cu_seqlens is not None:
        bounds = _bounds(batch, length, query.device) if cu_seqlens is None else cu_seqlens
        grads = _aten._flash_attention_backward(
            *(_tokens(x) for x in (dout, query, key, value, out)), lse.transpose(0, 1).reshape(heads, -1), bounds,
            bounds, longest, longest, 0.0, True, state, none,
            scale=scale, window_size_left=window - 1 if window else -1, window_size_right=0 if window else -1,
        )  # fmt: skip
        dq, dk, dv = (x.view(batch, length, -1, size).transpose(1, 2) for x in grads)
        return dq, dk, dv
    if _cudnn_is_faster(query, key, value, scale):
        seed = torch.zeros((), dtype=torch.int64, device=query.device)
        return _aten._scaled_dot_product_cudnn_attention_backward(
            dout, query, key, value, out, lse.unsqueeze(-1), seed, seed, None, None, None, length, length, 0.0, True,
            scale=scale,
        )  # fmt: skip
    return _aten._scaled_dot_product_flash_attention_backward(
        dout, query, key, value, out, lse, None, None, length, length, 0.0, True, state, none, scale=scale
    )


def _cudnn_is_faster(query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
    """Whether torch itself would train with cuDNN's kernel here."""
    with torch.enable_grad():  # a compiled graph's tensors ask for no gradient, on which the choice depends
        q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
        gqa = q.shape[1] != k.shape[1]
        choice = _aten._fused_sdp_choice(q, k, v, None, 0.0, True, scale=scale, enable_gqa=gqa)
    return bool(choice == SDPBackend.CUDNN_ATTENTION.value)


def _additive_mask(query: Tensor, window: int | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """Additive [S, S], None where plain causal is meant; for the CPU only."""
    if not window and cu_seqlens is None:
        return None
    length = query.shape[2]
    seen = written_mask(length, length, True, window, cu_seqlens, query.device)
    return query.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)


def _bounds(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)


def _tokens(x: Tensor) -> Tensor:
    """[B, H, S, E] as [B * S, H, E]."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def last_contiguous(x: Tensor) -> Tensor:
    """``x`` or a copy of it, the last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the layout of ``torch.empty_like(like)``, which is what a compiled graph was told of."""
    if x.stride() == like.stride() or x.stride() == torch.empty_like(like, device="meta").stride():
        return x
    return torch.empty_like(like).copy_(x)


# --- keys ahead, written out: for the CPU ---------------------------------------------------------------------------


def _spans(blocks: Tensor) -> list[tuple[int, Tensor]]:
    """(row, positions) of each block."""
    ids = blocks[..., 0]
    return [
        (row, (ids[row] == number).nonzero().squeeze(1))
        for row in range(ids.shape[0])
        for number in ids[row].unique().tolist()
        if number >= 0
    ]


def _ahead(query: Tensor, key: Tensor, row: int, at: Tensor, scale: float) -> Tensor:
    """Scores [H, n, n] of the block's tokens among themselves, -inf but for keys ahead."""
    groups = query.shape[1] // key.shape[1]
    q, k = query[row][:, at].double(), key[row][:, at].double().repeat_interleave(groups, dim=0)
    seen = at[None, :] > at[:, None]
    return (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)


def _add_forward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, blocks: Tensor, scale: float
) -> None:
    groups = query.shape[1] // key.shape[1]
    for row, at in _spans(blocks):
        scores = _ahead(query, key, row, at, scale)
        level = lse[row][:, at].double()
        merged = torch.logaddexp(level, scores.logsumexp(-1))
        v = value[row][:, at].double().repeat_interleave(groups, dim=0)
        part = (scores - merged[..., None]).exp() @ v
        out[row, :, at] = (out[row][:, at] * (level - merged).exp()[..., None] + part).to(out.dtype)
        lse[row, :, at] = merged.float()


def _add_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    blocks: Tensor,
    scale: float,
) -> None:
    kv_heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    for row, at in _spans(blocks):
        weights = (_ahead(query, key, row, at, scale) - lse[row][:, at][..., None]).exp()
        q, o, do = (x[row][:, at].double() for x in (query, out, dout))
        k, v = (x[row][:, at].double().repeat_interleave(groups, dim=0) for x in (key, value))
        d_scores = weights * (do @ v.transpose(1, 2) - (do * o).sum(-1, keepdim=True)) * scale
        parts = (d_scores @ k, d_scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ do)
        for grad, part in zip(grads, parts, strict=True):
            if grad.shape[1] != part.shape[0]:
                part = part.unflatten(0, (kv_heads, groups)).sum(1)
            grad[row, :, at] += part.to(grad.dtype)


_ARGUMENTS = "Tensor blocks, float scale, int? window, Tensor? cu_seqlens, SymInt longest"
_forward_op = torch.library.custom_op(
    "automodel::block_attention",
    _forward,
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, {_ARGUMENTS}) -> (Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "automodel::block_attention_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(query, key, value, blocks, scale, window, cu_seqlens, longest):
    batch, heads, length, size = query.shape
    return query.new_empty(batch, length, heads, size), query.new_empty(batch, heads, length, dtype=torch.float32)


@_backward_op.register_fake
def _(dout, query, key, value, out, lse, blocks, scale, window, cu_seqlens, longest):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, blocks, scale, window, cu_seqlens, longest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, blocks, cu_seqlens)
    ctx.scale, ctx.window, ctx.longest = scale, window, longest


def _differentiate(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, blocks, cu_seqlens = ctx.saved_tensors
    grads = _backward_op(dout, *tensors, blocks, ctx.scale, ctx.window, cu_seqlens, ctx.longest)
    return (*grads, None, None, None, None, None)


_forward_op.register_autograd(_differentiate, setup_context=_save)
