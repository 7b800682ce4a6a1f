"""Rows of token ids -> the tensors of one micro-batch (``types.Batch``).

What is padding is decided by lengths alone, never by comparing ids with the pad token: a tokenizer whose pad is its
EOS keeps every EOS it was given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from nemo_automodel.types import IGNORE_INDEX, Batch, VisionInputs

Row = tuple[np.ndarray, np.ndarray]  # input_ids [S], labels [S]; both int64


def collate_padded(rows: Sequence[Row], sample_ids: list[int], pad_id: int = 0, pad_to_multiple_of: int = 8) -> Batch:
    """Right-pad ``rows`` to the longest, rounded up.

    Args:
        rows: B pairs of input_ids [S_i] and pre-shifted labels [S_i]; those beyond ``sample_ids`` are filler.
        sample_ids: dataset rows that are in the batch.
        pad_id: any valid token id; it is masked out.
        pad_to_multiple_of: S is rounded up to a multiple of this many tokens (default 8).

    Returns:
        input_ids, labels [B, S], and attention_mask [B, S] where some row is shorter than S.
    """
    longest = max(len(ids) for ids, _ in rows)
    width = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORE_INDEX, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for i, (ids, targets) in enumerate(rows):
        input_ids[i, : len(ids)] = ids
        labels[i, : len(ids)] = targets
        mask[i, : len(ids)] = 1
    num_tokens = sum(len(ids) for ids, _ in rows[: len(sample_ids)])
    batch = _batch(input_ids, labels, sample_ids, num_tokens)
    if not mask.all():
        batch["attention_mask"] = torch.from_numpy(mask)
    return batch


def collate_packed(packs: Sequence[Sequence[Row]], sample_ids: list[int], size: int, pad_id: int = 0) -> Batch:
    """Lay the documents of every pack one after the other in a single row.

    Args:
        packs: L packs, each a list of documents (input_ids, labels) of at most ``size`` tokens together.
        sample_ids: dataset rows that are in the batch.
        size: tokens in a pack; what is left of it becomes a masked document of its own, so that shapes never change.
        pad_id: any valid token id.

    Returns:
        input_ids, labels, position_ids [1, L*size] and cu_seq_lens_q/k [D+1].
    """
    total = len(packs) * size
    input_ids = np.full((1, total), pad_id, dtype=np.int64)
    labels = np.full((1, total), IGNORE_INDEX, dtype=np.int64)
    lengths: list[int] = []
    num_tokens = 0
    for start, documents in zip(range(0, total, size), packs, strict=True):
        at = start
        for ids, targets in documents:
            input_ids[0, at : at + len(ids)] = ids
            labels[0, at : at + len(ids)] = targets
            at += len(ids)
            lengths.append(len(ids))
            num_tokens += len(ids)
        if at < start + size:
            lengths.append(start + size - at)
    batch = _batch(input_ids, labels, sample_ids, num_tokens)
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = bounds
    batch["max_length_q"] = batch["max_length_k"] = max(lengths)
    return batch


def collate_vision(rows: Sequence[VisionInputs], width: int, num_images: int) -> dict[str, Any]:
    """What rows give a model beside ids, put together by kind; nothing here knows a model.

    Args:
        rows: B rows' inputs, those of filler rows included.
        width: S of the batch; inputs of each token are padded with zeros to it.
        num_images: images of the rows that are not filler.
    """
    batch: dict[str, Any] = {"num_images": num_images}
    for key in _keys(row.tokens for row in rows):
        like = next(row.tokens[key] for row in rows if key in row.tokens)
        empty = like.new_zeros(0, *like.shape[1:])
        batch[key] = torch.stack([_padded(row.tokens.get(key, empty), (width, *like.shape[1:])) for row in rows])
    for key in _keys(row.rows for row in rows):
        shape = _largest([row.rows[key].shape for row in rows if key in row.rows])
        like = next(row.rows[key] for row in rows if key in row.rows)
        batch[key] = torch.stack([_padded(row.rows.get(key, like.new_zeros([0] * like.ndim)), shape) for row in rows])
    for key in _keys(row.images for row in rows):
        parts = [row.images[key] for row in rows if key in row.images]
        shape = _largest([part.shape[1:] for part in parts])
        batch[key] = torch.cat([_padded(part, (len(part), *shape)) for part in parts])
    return batch


def _keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _largest(shapes: Sequence[torch.Size]) -> tuple[int, ...]:
    return tuple(max(sizes) for sizes in zip(*shapes, strict=True))


def _padded(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """``tensor`` with zeros behind it in every dimension, up to ``shape``."""
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    whole = tensor.new_zeros(shape)
    whole[tuple(slice(size) for size in tensor.shape)] = tensor
    return whole


def _batch(input_ids: np.ndarray, labels: np.ndarray, sample_ids: list[int], num_tokens: int) -> Batch:
    indices = np.flatnonzero(labels.reshape(-1) != IGNORE_INDEX)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        label_indices=torch.from_numpy(indices.astype(np.int64)),
        num_label_tokens=len(indices),
        num_tokens=num_tokens,
        sample_ids=sample_ids,
    )
