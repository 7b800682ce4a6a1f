"""One attention function for every model that takes attention from transformers' registry: dense, packed, windowed.

``register()`` adds it under the name ``automodel``. Soft-capped scores have kernels of their own on CUDA, sinks torch's. Whatever
there is no fast path for goes to transformers' own SDPA function or to the written-out formula, so that it is right for
every argument a model may pass: a 4D mask, a sliding window, a soft-cap, attention sinks, dropout, a KV cache.

Shape legend: B batch, H query heads, G key/value heads, S query length, K key length, E head size, D documents.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import and_masks, sdpa_mask

from nemo_automodel.components.attention.blocks import are_blocks, dense, mask_as_blocks
from nemo_automodel.components.attention.context_parallel import context_attention, refuse
from nemo_automodel.components.attention.layout import Layout, current_context, current_layout
from nemo_automodel.components.attention.varlen import packed_attention, window_attention
from nemo_automodel.kernels.block_attention import block_attention
from nemo_automodel.kernels.flash import fits, unsupported_reason
from nemo_automodel.kernels.masks import written_mask
from nemo_automodel.kernels.sink_attention import sink_attention
from nemo_automodel.kernels.softcap_attention import softcap_attention
from nemo_automodel.kernels.softcap_attention import unsupported_reason as no_softcap_reason

NAME = "automodel"
ARGUMENTS = frozenset(
    ("query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "sliding_window", "softcap", "s_aux",
     "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "indices", "position_bias", "position_ids",
     "output_attentions", "deterministic")
)  # fmt: skip
"""What a layer may write into its call of ``attention``, which needs no more to know what is attended to."""
_EXTRAS = ("indices", "position_bias")  # arguments that say more of what is attended to


def register() -> str:
    """Make the function known to transformers (any number of times) and return its name."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)
    return NAME


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with transformers' calling convention.

    ``query`` [B, H, S, E], ``key`` and ``value`` [B, G, K, E]; returns [B, S, H, E] and None for the weights.
    ``attention_mask`` None means causal (where ``is_causal``, else the module, says so), within documents
    ``cu_seq_lens_q`` [D+1] if given and within ``sliding_window`` keys, the query's own included.
    A 4D ``attention_mask`` (bool, or additive float) says everything by itself: windows and documents are in it.
    Blocks (``blocks.mask_as_blocks``) in its place are as None, and let tokens see those ahead in their block besides.
    ``indices`` [B, S, N], the keys that a sparse attention's indexer chose, narrow it further.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    length = query.shape[2]
    if cu_seq_lens_q is not None and query.shape[0] != 1 and (attention_mask is None or are_blocks(attention_mask)):
        raise ValueError(f"packed attention takes one row that holds every document, not {query.shape[0]} rows")
    if attention_mask is not None and are_blocks(attention_mask):
        special = softcap is not None or s_aux is not None or any(kwargs.get(name) is not None for name in _EXTRAS)
        flash = _fits_alone(query, key, value) and unsupported_reason(query.device, query.dtype) is None
        if flash and not special and not dropout:
            window, blocks = _window(sliding_window, max_length_q or length), attention_mask[:, 0]
            return block_attention(query, key, value, blocks, scaling, window, cu_seq_lens_q, max_length_q), None
        behind = _written_mask(length, key.shape[2], True, sliding_window, cu_seq_lens_q, query.device)
        attention_mask = dense(attention_mask, behind)
    if (indices := kwargs.pop("indices", None)) is not None:
        if attention_mask is None:
            attention_mask = _written_mask(length, key.shape[2], causal, sliding_window, cu_seq_lens_q, query.device)
        attention_mask = _only_selected(indices, key.shape[2], attention_mask, query)
    context = current_context()
    if context is not None:
        if attention_mask is not None or not causal or kwargs.get("position_bias") is not None:
            refuse("its layers attend by a mask or bias of their own")
        formula = None
        if softcap is not None or s_aux is not None:
            formula = partial(written_out_attention, dropout=dropout, scaling=scaling, softcap=softcap, sinks=s_aux)
        out = context_attention(query, key, value, context, dropout, scaling, sliding_window, formula)
        return out.transpose(1, 2).contiguous(), None
    biased = kwargs.get("position_bias") is not None  # which SDPA lays over a mask, not over a window or documents
    written_out = softcap is not None or s_aux is not None
    if written_out and biased:
        raise NotImplementedError("a position_bias beside a soft-cap or sinks: write model.attn_implementation: eager")
    if written_out and attention_mask is None and not dropout and _fits_alone(query, key, value):
        window = _window(sliding_window, max_length_q or length)
        if softcap and s_aux is None and no_softcap_reason(query.device, query.dtype) is None:
            return softcap_attention(query, key, value, softcap, scaling, bool(causal), window, cu_seq_lens_q), None
        if s_aux is not None and softcap is None and causal and unsupported_reason(query.device, query.dtype) is None:
            return sink_attention(query, key, value, s_aux, scaling, window, cu_seq_lens_q, max_length_q), None
    if attention_mask is None and (written_out or (biased and (sliding_window or cu_seq_lens_q is not None))):
        attention_mask = _written_mask(length, key.shape[2], causal, sliding_window, cu_seq_lens_q, query.device)
    if written_out:
        out = written_out_attention(query, key, value, attention_mask, dropout, scaling, softcap, s_aux)
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is not None or length != key.shape[2] or biased:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if cu_seq_lens_q is not None:
        longest = max_length_q or length
        out = packed_attention(
            query, key, value, cu_seq_lens_q, longest, dropout, scaling, causal, _window(sliding_window, longest)
        )
    elif causal and (window := _window(sliding_window, length)):
        out = window_attention(query, key, value, dropout, scaling, window)
    else:
        gqa = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=bool(causal) and length > 1, scale=scaling, enable_gqa=gqa
        )
    return out.transpose(1, 2).contiguous(), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The 4D mask a model asks for, or None where ``attention`` needs none.

    None is right for a batch whose layout was announced (``layout.announce``): plain causal rows, or packed documents,
    without an overlay of the model's own. Everything else gets the real mask, documents included.
    """
    if getattr(kwargs.get("config"), "use_bidirectional_attention", False) is True:
        allow_is_causal_skip = False  # its layers say they are not causal, so no mask would be no mask at all
    layout = current_layout()
    if layout is not None and layout.context is not None:
        _refuse_context_mask(layout, q_length, local_size, allow_is_causal_skip)
        return None
    if layout is not None and q_length == kv_length:
        windowed = local_size is not None and local_size < q_length
        needed = (windowed and not layout.windows_as_argument) or (
            layout.cu_seqlens is not None and not layout.documents_as_argument
        )
        if allow_is_causal_skip and not needed:
            return None
        device, dtype = kwargs.get("device", "cpu"), kwargs.get("dtype", torch.float32)
        blocks = mask_as_blocks(layout, mask_function, attention_mask, q_length, device, dtype)
        if blocks is not None:
            return blocks
        if layout.cu_seqlens is not None:
            mask_function = and_masks(mask_function, _same_document(layout.cu_seqlens, q_length))
            attention_mask, allow_is_causal_skip = None, False
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def written_out_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The formula itself, for what no kernel does: ``softcap`` of scores, and ``sinks`` [H], a logit no value goes with.

    Shapes as in ``attention``; returns [B, H, S, E]. Scores are made in the inputs' dtype and normalised in fp32.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.float()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask[..., : key.shape[2]]
    if sinks is not None:
        sink = sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return F.dropout(weights.to(query.dtype), p=dropout, training=dropout > 0) @ value


def _fits_alone(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return query.dtype == key.dtype == value.dtype and fits(query, key, value)


def _only_selected(indices: Tensor, keys: int, mask: Tensor | None, query: Tensor) -> Tensor:
    """``mask`` [B or 1, 1, S, K] with only the keys ``indices`` [B, S, N] left."""
    chosen = torch.zeros(*indices.shape[:2], keys, dtype=torch.bool, device=query.device)
    chosen = chosen.scatter(-1, indices.long(), True)[:, None]
    if mask is None or mask.dtype == torch.bool:
        return chosen if mask is None else mask & chosen
    return mask.masked_fill(~chosen, torch.finfo(query.dtype).min)


def _refuse_context_mask(layout: Layout, q_length: int, local_size: int | None, plain: bool) -> None:
    """Raise ModelError where only a mask could say what a sequence-sharded forward attends to."""
    context = layout.context
    assert context is not None
    whole = q_length // len(context.held) * len(context.order)
    if local_size is not None and local_size < whole and not layout.windows_as_argument:
        refuse("its layers do not hand their sliding window to the attention function")
    if not plain:
        refuse("it lays a mask of its own over the causal one")


def _window(sliding_window: int | None, length: int) -> int | None:
    """The window where it cuts something off a sequence of ``length``, else None."""
    return sliding_window if sliding_window and sliding_window < length else None


def _written_mask(
    q_length: int, k_length: int, causal: bool, window: int | None, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor | None:
    """Bool mask [1, 1, S, K], True where attention is allowed; None where everything is."""
    if not causal and cu_seqlens is None:
        return None
    return written_mask(q_length, k_length, causal, window, cu_seqlens, device)[None, None]


def _same_document(cu_seqlens: Tensor, length: int) -> Callable[..., Any]:
    positions = torch.arange(length, device=cu_seqlens.device)
    document = torch.bucketize(positions, cu_seqlens, right=True)

    def inner(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return document[q_idx] == document[kv_idx]

    return inner
