"""Rows of token ids -> the tensors of one micro-batch (``types.Batch``).

What is padding is decided by lengths alone, never by comparing ids with the pad token: a tokenizer whose pad is its
EOS keeps every EOS it was given.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch

from nemo_automodel.types import IGNORE_INDEX, Batch, RowImages, VisionInputs

_MULTIPLE = 8
_CHECKED = 1000  # numbers of an input that a checksum covers, about
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
            A pack that was given more (a filler) is as long as that, rounded up to a multiple of 8.
        pad_id: any valid token id.

    Returns:
        input_ids, labels, position_ids [1, L*size] and cu_seq_lens_q/k [D+1].
    """
    lengths = packed_lengths([[len(ids) for ids, _ in documents] for documents in packs], size)
    total = sum(map(sum, lengths))
    input_ids = np.full((1, total), pad_id, dtype=np.int64)
    labels = np.full((1, total), IGNORE_INDEX, dtype=np.int64)
    num_tokens = start = 0
    for documents, parts in zip(packs, lengths, strict=True):
        at = start
        for ids, targets in documents:
            input_ids[0, at : at + len(ids)] = ids
            labels[0, at : at + len(ids)] = targets
            at += len(ids)
            num_tokens += len(ids)
        start += sum(parts)
    batch = _batch(input_ids, labels, sample_ids, num_tokens)
    return cast(Batch, {**batch, **boundaries([n for parts in lengths for n in parts])})


def packed_lengths(packs: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """The documents' lengths by pack, what is left of a pack of ``size`` tokens as one more."""
    found = []
    for lengths in packs:
        room = max(size, -(-sum(lengths) // _MULTIPLE) * _MULTIPLE if sum(lengths) > size else 0) - sum(lengths)
        found.append([*lengths, room] if room else list(lengths))
    return found


def boundaries(lengths: Sequence[int]) -> dict[str, Any]:
    """What tells a model where packed documents of ``lengths`` tokens lie in their row, by transformers' names."""
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    longest = max(lengths)
    return {
        "position_ids": torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


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
    return batch | _images_of(rows)


def collate_packed_vision(
    packs: Sequence[Sequence[VisionInputs]], lengths: Sequence[Sequence[int]], num_images: int
) -> dict[str, Any]:
    """``collate_vision`` for documents that share a row: their images one after the other, in the documents' order.

    What is one a row, however many images it has, is joined along its images; a single number stays one a document.

    Args:
        packs: L packs' documents' inputs.
        lengths: tokens of each of these documents, and what is left of a pack (``packed_lengths``).
        num_images: images of the rows that are not filler.
    """
    batch: dict[str, Any] = {"num_images": num_images}
    documents: list[VisionInputs] = []
    for inputs, parts in zip(packs, lengths, strict=True):
        documents += [*inputs, *[VisionInputs({}, {}, {})] * (len(parts) - len(inputs))]
    sizes = [n for parts in lengths for n in parts]
    for key in _keys(document.tokens for document in documents):
        shape = _largest([document.tokens[key].shape[1:] for document in documents if key in document.tokens])
        like = next(document.tokens[key] for document in documents if key in document.tokens)
        empty = like.new_zeros(0, *shape)
        padded = [_padded(d.tokens.get(key, empty), (n, *shape)) for d, n in zip(documents, sizes, strict=True)]
        batch[key] = torch.cat(padded)[None]
    for key in _keys(document.rows for document in documents):
        like = next(document.rows[key] for document in documents if key in document.rows)
        if like.ndim == 0:
            batch[key] = torch.stack([document.rows.get(key, torch.zeros_like(like)) for document in documents])
            continue
        batch[key] = joined([document.rows[key] for document in documents if key in document.rows])[None]
    return batch | _images_of(documents)


def images_of_row(inputs: VisionInputs) -> RowImages:
    """What of ``inputs`` is of images, to be found again in a micro-batch."""
    found = {**inputs.images, **{key: value for key, value in inputs.rows.items() if value.ndim}}
    checksum = 0
    for value in found.values():
        numbers = value.reshape(-1)
        some = numbers[:: max(len(numbers) // _CHECKED, 1)].contiguous()
        checksum = zlib.crc32(some.view(torch.uint8).numpy().tobytes(), checksum)
    return RowImages({key: len(value) for key, value in found.items()}, checksum)


def _images_of(rows: Sequence[VisionInputs]) -> dict[str, torch.Tensor]:
    return {
        key: joined([row.images[key] for row in rows if key in row.images]) for key in _keys(row.images for row in rows)
    }


def joined(parts: Sequence[torch.Tensor], axis: int = 0) -> torch.Tensor:
    """``parts`` one after the other along ``axis``, each as large as the largest in the other dimensions."""
    shape = _largest([part.shape for part in parts])
    padded = [_padded(part, (*shape[:axis], part.shape[axis], *shape[axis + 1 :])) for part in parts]
    return torch.cat(padded, axis)


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
