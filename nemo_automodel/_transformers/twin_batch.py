"""A small valid batch for a tiny model of any architecture."""

from __future__ import annotations

from typing import Any

import torch


def text_batch(*, rows: int = 2, length: int = 24, vocab_size: int = 128, seed: int = 0) -> dict[str, Any]:
    """``input_ids``, ``attention_mask`` and ``labels`` (the same ids, unshifted), each [rows, length], for a causal model."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, vocab_size // 2, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


__all__ = ["text_batch"]
