"""Tiny models in pairs: ours, and the plain transformers one with the same weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.types import IGNORE_INDEX, Batch
from tests.builders import tiny_config

FAMILIES = ("llama", "qwen3", "gemma3_text", "mixtral", "qwen3_moe", "gpt2")


def pair(model_type: str, **over: Any) -> tuple[Any, PreTrainedModel]:
    """(ours, plain transformers with eager attention) in float32, the same weights, no dropout."""
    if model_type == "gpt2":
        over = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **over}
    config = tiny_config(model_type, **over)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager")
    ours = NeMoAutoModelForCausalLM.from_config(config, dtype="float32")
    ours.load_state_dict(plain.state_dict())
    with torch.no_grad():  # logits of some size, so that a wrong scale or mask shows
        for model in (ours, plain):
            model.get_output_embeddings().weight.mul_(5.0)
    return ours, plain


def documents(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Random ids [1, length] for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 384, (1, length), generator=generator) for length in lengths]


def packed_inputs(ids: list[Tensor]) -> dict[str, Any]:
    """The model's inputs for ``ids`` packed into one row."""
    lengths = [x.shape[1] for x in ids]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.cat(ids, dim=1),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def padded_inputs(ids: list[Tensor], left: bool = False) -> dict[str, Tensor]:
    """``ids`` as rows, padded on the right (or left) with token 2."""
    longest = max(x.shape[1] for x in ids)
    gaps = [longest - x.shape[1] for x in ids]
    sides = [(gap, 0) if left else (0, gap) for gap in gaps]
    rows = [F.pad(x, side, value=2) for x, side in zip(ids, sides, strict=True)]
    masks = [F.pad(torch.ones_like(x), side) for x, side in zip(ids, sides, strict=True)]
    return {"input_ids": torch.cat(rows), "attention_mask": torch.cat(masks)}


def with_labels(inputs: dict[str, Any], labels: Tensor) -> Batch:
    """A micro-batch as the loader makes it; ``labels`` [B, S] pre-shifted."""
    indices = (labels.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)
    extra = {"labels": labels, "label_indices": indices, "num_label_tokens": indices.numel()}
    return {**inputs, **extra}  # type: ignore[typeddict-item,return-value]


def shifted(ids: Tensor, mask: Tensor | None = None, answers_from: int = 3) -> tuple[Tensor, Tensor]:
    """(transformers' labels, pre-shifted labels) of ``ids`` [B, S], trained from ``answers_from`` on."""
    labels = ids.clone()
    labels[:, :answers_from] = IGNORE_INDEX
    if mask is not None:
        labels[mask == 0] = IGNORE_INDEX
    return labels, F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].contiguous()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient, by name; clears them."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
