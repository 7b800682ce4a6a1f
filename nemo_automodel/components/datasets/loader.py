"""The order of the data, as a pure function of (seed, epoch, position), and its micro-batches.

rows -> permutation of the epoch -> packs (if asked) -> global batches -> this rank's strided slice of each micro-batch.
Nothing here remembers a position: ``steps(epoch, first_step)`` starts anywhere at no cost, so a resume with another
number of ranks or workers, or another micro-batch size, sees the same global batches.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, cast

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader as TorchDataLoader

from nemo_automodel.components.datasets.collate import (
    Row,
    collate_packed,
    collate_packed_vision,
    collate_padded,
    collate_vision,
    images_of_row,
    packed_lengths,
)
from nemo_automodel.components.datasets.packing import PackedSequence, pack, without_overlong
from nemo_automodel.components.datasets.workers import outlive_signals
from nemo_automodel.errors import AutoModelError, DataError
from nemo_automodel.types import IGNORE_INDEX, Batch, Sample, VisionInputs

logger = logging.getLogger(__name__)

_ROWS_HASHED = 200_000
FILLER = -1
"""Stands in the order for a fully masked row that only makes ranks equally long; counted nowhere."""


class DataLoader:
    """Micro-batches of a dataset for one rank (a ``types.Loader``).

    Args:
        dataset: anything with ``len`` and integer indexing that returns ``types.Sample`` rows; ``arrays(index)``, where it is
            there, returns a row's ids and labels as two arrays and is used instead.
        tokenizer: gives the pad id and the vocabulary size that ids are checked against; optional.
        packing: a ``PackedSequence``, or None for padded rows.
        seed: of the order (default 0); the same for every rank.
        dp_rank, dp_size: which of how many data-parallel ranks this is.
        global_batch_size: rows (packed: packs) in an optimizer step, over all ranks.
        local_batch_size: rows (packed: packs) in a micro-batch of one rank.
        shuffle: another order every epoch (default true).
        drop_last: leave out the rows that do not fill the last step (default true); with false the last step is
            smaller, and filled with masked rows until all ranks have equally many micro-batches.
        num_workers: processes that prepare batches ahead (default 0: in this process). Never changes the order.
        prefetch_factor: micro-batches each worker prepares ahead (default 2).
        timeout: seconds to wait for a worker before an error (default 0: for ever).
        pin_memory: put batches in page-locked memory, for a copy to a GPU that does not block.
        pad_to_multiple_of: padded rows are as long as the longest, rounded up to this (default 8).

    Raises:
        DataError: fewer rows than a global batch, a batch that does not divide, or a row that cannot be trained on.
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: Any = None,
        packing: PackedSequence | None = None,
        seed: int = 0,
        dp_rank: int = 0,
        dp_size: int = 1,
        global_batch_size: int = 1,
        local_batch_size: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        timeout: float = 0,
        pin_memory: bool = False,
        pad_to_multiple_of: int = 8,
    ) -> None:
        if global_batch_size < 1 or local_batch_size < 1 or global_batch_size % (local_batch_size * dp_size):
            raise DataError(
                f"step_scheduler.global_batch_size={global_batch_size}: must be a multiple of local_batch_size × "
                f"data-parallel ranks = {local_batch_size} × {dp_size}"
            )
        if len(dataset) == 0:
            raise DataError("the dataset has no rows")
        self.dataset, self.packing, self.seed = dataset, packing, seed
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.global_batch_size, self.local_batch_size = global_batch_size, local_batch_size
        self.shuffle, self.drop_last = shuffle, drop_last
        self.num_workers, self.prefetch_factor, self.timeout = num_workers, prefetch_factor, timeout
        self.pin_memory = pin_memory
        self._size = packing.packed_sequence_size if packing is not None else 0
        self._lengths = _lengths(dataset) if self._size else None
        self._rows = (
            range(len(dataset))
            if self._lengths is None or packing is None
            else without_overlong(self._lengths, packing)
        )
        self._micro_batches = _MicroBatches(dataset, tokenizer, self._size, pad_to_multiple_of)
        self._order = lru_cache(maxsize=2)(self._make_order)
        self._check_enough()

    @property
    def fingerprint(self) -> str:
        """What must not change for a resumed run to see the same rows in the same order.

        The content is the dataset's own ``fingerprint``; of a list or ``datasets.Dataset`` without one, up to 200,000
        rows, every token. Other content is not read: then the result starts with ``partial:``.
        """
        content = getattr(self.dataset, "fingerprint", None) or self._hash_of_rows()
        facts = [content, len(self.dataset), self.seed, self.shuffle, self._size, len(self._rows)]
        digest = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]
        return digest if content is not None else f"partial:{digest}"

    def _hash_of_rows(self) -> str | None:
        """None where reading every row may be slow, or give something else the next time (a transform, a class)."""
        dataset = self.dataset
        stored = isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
        if not (stored or isinstance(dataset, list | tuple)) or len(dataset) > _ROWS_HASHED:
            return None
        digest = hashlib.sha256()
        for index in self._rows:
            ids, labels = self._micro_batches.row(index)
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes() + labels.tobytes())
        return digest.hexdigest()

    @property
    def rows_dropped(self) -> int:
        """Rows that no pack can hold (``packed_sequence.overlong: drop``)."""
        return len(self.dataset) - len(self._rows)

    def items_left_over(self, epoch: int = 0) -> int:
        """Rows (packed: packs) of ``epoch`` that ``drop_last`` leaves out."""
        return len(self._order(epoch)) % self.global_batch_size if self.drop_last else 0

    def steps_per_epoch(self, epoch: int) -> int:
        """How many optimizer steps epoch ``epoch`` (from 0) has; packing makes it differ between epochs."""
        items = len(self._order(epoch))
        return items // self.global_batch_size if self.drop_last else -(-items // self.global_batch_size)

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """This rank's micro-batches of every optimizer step of ``epoch``, from its step ``first_step`` on."""
        keys = [self._keys(epoch, step) for step in range(first_step, self.steps_per_epoch(epoch))]
        try:
            stream = iter(self._stream([key for step in keys for key in step]))
            for step in keys:
                yield [_sound(next(stream)) for _ in step]
        except RuntimeError as error:
            message = str(error).splitlines()[0] if str(error) else ""
            if not message.startswith("DataLoader"):
                raise
            raise AutoModelError(
                f"a data worker stopped: {message}; if it was killed for memory, set dataloader.num_workers=0"
            ) from error

    def global_batch(self, epoch: int, step: int) -> list[Any]:
        """The rows (packed: packs, as lists of rows) of one optimizer step over all ranks, in order."""
        start = step * self.global_batch_size
        return list(self._order(epoch)[start : start + self.global_batch_size])

    def _make_order(self, epoch: int) -> Sequence[Any]:
        order: Sequence[int] = self._rows
        if self.shuffle:
            # Its own generator, seeded by (seed, epoch) alone: the global one belongs to dropout.
            mixed = hashlib.sha256(f"order:{self.seed}:{epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "big"))
            permutation = torch.randperm(len(self._rows), generator=generator)
            order = (torch.as_tensor(self._rows)[permutation] if self.rows_dropped else permutation).tolist()
        return pack(order, self._lengths, self._size) if self._lengths is not None else order

    def _keys(self, epoch: int, step: int) -> list[list[Any]]:
        """One list of rows (packs) per micro-batch of this rank."""
        items = self.global_batch(epoch, step)
        stride = self.local_batch_size * self.dp_size
        items += [FILLER] * (-len(items) % stride)
        return [items[at : at + stride][self.dp_rank :: self.dp_size] for at in range(0, len(items), stride)]

    def _stream(self, keys: list[list[Any]]) -> TorchDataLoader:
        return TorchDataLoader(
            self._micro_batches,  # type: ignore[arg-type]  # map-style; a key is a micro-batch
            sampler=keys,
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            timeout=self.timeout if self.num_workers else 0,
            pin_memory=self.pin_memory,
            collate_fn=_as_is,
            worker_init_fn=outlive_signals,
            generator=torch.Generator().manual_seed(self.seed % 2**63),  # else iter() draws from the global RNG
        )

    def _check_enough(self) -> None:
        items = len(self._order(0))
        what = f"packs of {self._size} tokens (from {len(self._rows)} rows)" if self._size else "rows"
        if self.drop_last and items < self.global_batch_size:
            raise DataError(
                f"the dataset gives {items} {what}, fewer than step_scheduler.global_batch_size={self.global_batch_size}, "
                f"so an epoch would have no step; set step_scheduler.global_batch_size to {items} or less, or dataloader.drop_last=false"
            )
        if self.rows_dropped:
            logger.warning("%d rows longer than packed_sequence_size=%d are left out", self.rows_dropped, self._size)
        if left := self.items_left_over():
            logger.info("drop_last: %d of %d %s of an epoch do not fill a step and are left out", left, items, what)


_NO_IMAGES = VisionInputs({}, {}, {})


class _MicroBatches:
    """Maps the rows of a micro-batch to its tensors; what the workers run."""

    def __init__(self, dataset: Any, tokenizer: Any, size: int, multiple: int) -> None:
        self.dataset, self.size, self.multiple = dataset, size, multiple
        self.vocab_size = len(tokenizer) if tokenizer is not None else None
        self.pad_id = getattr(tokenizer, "pad_token_id", None) or 0
        # Looked for without being made, which takes time, and in which an AttributeError would read as its absence.
        missing = object()
        self.has_filler = inspect.getattr_static(dataset, "filler", missing) is not missing or hasattr(
            dataset, "filler"
        )

    def __getitem__(self, items: list[Any]) -> Batch | AutoModelError:
        try:
            if self.size:
                ids = [index for documents in items if documents != FILLER for index in documents]
                packs = [documents if documents != FILLER else [] for documents in items]
                return self._packed(packs, ids)
            ids = [index for index in items if index != FILLER]
            samples = [self._sample(index) for index in ids]
            rows = [self._checked(index, sample) for index, sample in zip(ids, samples, strict=True)]
            if self._sees(samples):
                return self._with_images(rows, samples, ids, len(items) - len(ids))
            rows += [self.row(FILLER)] * (len(items) - len(ids))
            return collate_padded(rows, ids, self.pad_id, self.multiple)
        except AutoModelError as error:
            return error

    def _sees(self, samples: Sequence[Sample]) -> bool:
        return self.has_filler or any("vision" in sample for sample in samples)

    def _filler(self, num_images: int) -> Sample | None:
        """A masked row with an image, for a micro-batch without one."""
        return self.dataset.filler if self.has_filler and not num_images else None

    def _packed(self, packs: list[list[int]], ids: list[int]) -> Batch:
        """Packs of whole rows; those of one without any image get a masked document that has one, as padded rows do."""
        samples = {index: self._sample(index) for index in ids}
        rows = [[self._checked(index, samples[index]) for index in documents] for documents in packs]
        if not self._sees(list(samples.values())):
            return collate_packed(rows, ids, self.size, self.pad_id)
        vision = [[samples[index].get("vision", _NO_IMAGES) for index in documents] for documents in packs]
        num_images = sum(inputs.num_images for documents in vision for inputs in documents)
        filler = self._filler(num_images)
        if filler is not None:
            used = [sum(len(row_ids) for row_ids, _ in documents) for documents in rows]
            emptiest = used.index(min(used))
            rows[emptiest].append(self._checked(FILLER, filler))
            vision[emptiest].append(filler["vision"])
        batch = collate_packed(rows, ids, self.size, self.pad_id)
        batch["num_tokens"] -= len(filler["input_ids"]) if filler is not None else 0
        batch["image_rows"] = [images_of_row(samples[index].get("vision", _NO_IMAGES)) for index in ids]
        lengths = packed_lengths([[len(row_ids) for row_ids, _ in documents] for documents in rows], self.size)
        return cast(Batch, {**batch, **collate_packed_vision(vision, lengths, num_images)})

    def _with_images(self, rows: list[Row], samples: list[Sample], ids: list[int], fillers: int) -> Batch:
        """A padded micro-batch with images; one without any gets a masked row that has one.

        A sharded vision tower gathers its weights on all ranks together, so none may leave it out.
        """
        vision = [sample.get("vision", _NO_IMAGES) for sample in samples]
        num_images = sum(inputs.num_images for inputs in vision)
        filler = self._filler(num_images)
        if filler is not None:
            rows = [*rows, self._checked(FILLER, filler)]
            vision.append(filler["vision"])
            fillers = max(fillers - 1, 0)
        rows += [self.row(FILLER)] * fillers
        batch = collate_padded(rows, ids, self.pad_id, self.multiple)
        batch["image_rows"] = [images_of_row(sample.get("vision", _NO_IMAGES)) for sample in samples]
        extra = collate_vision([*vision, *[_NO_IMAGES] * fillers], batch["input_ids"].shape[1], num_images)
        return cast(Batch, {**batch, **extra})

    def row(self, index: int) -> Row:
        """One checked row."""
        if index == FILLER:  # one visible token, so that no attention row is empty
            return np.array([self.pad_id]), np.array([IGNORE_INDEX])
        return self._checked(index, self._sample(index))

    def _sample(self, index: int) -> Any:
        """A row as the dataset gives it, its ids as arrays where it has them."""
        if (arrays := getattr(self.dataset, "arrays", None)) is None:
            return self.dataset[index]
        ids, labels = arrays(index)
        return {"input_ids": ids, "labels": labels}

    def _checked(self, index: int, sample: Any) -> Row:
        try:
            ids, labels = (np.asarray(sample[name], dtype=np.int64) for name in ("input_ids", "labels"))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"dataset row {index}: expected input_ids and labels, two lists of token ids; got {_shape(sample)}"
            ) from error
        if ids.ndim != 1 or ids.shape != labels.shape or not len(ids):
            raise DataError(
                f"dataset row {index}: input_ids and labels must be non-empty lists of one length, got {ids.shape} and {labels.shape}"
            )
        self._check_ids(index, ids, labels)
        return ids, labels

    def _check_ids(self, index: int, ids: np.ndarray, labels: np.ndarray) -> None:
        high = int(max(ids.max(), labels.max()))
        low = int(min(ids.min(), labels[labels != IGNORE_INDEX].min(initial=0)))
        if low < 0:
            raise DataError(
                f"dataset row {index}: token id {low} is negative; a label that is not trained on is {IGNORE_INDEX}"
            )
        if self.vocab_size is not None and high >= self.vocab_size:
            raise DataError(
                f"dataset row {index}: token id {high} is outside the tokenizer's vocabulary of {self.vocab_size}; "
                "the rows were made with another tokenizer"
            )


def _shape(sample: Any) -> str:
    if not hasattr(sample, "keys"):
        return type(sample).__name__
    return "{" + ", ".join(f"{key}: {type(sample[key]).__name__}" for key in sample) + "}"


def _lengths(dataset: Any) -> list[int]:
    """Tokens of every row; from the dataset's own ``lengths`` if it has them, else by reading it once."""
    known = getattr(dataset, "lengths", None)
    if known is not None:
        return [int(n) for n in known]
    return [len(dataset[index]["input_ids"]) for index in range(len(dataset))]


def _sound(batch: Any) -> Batch:
    if isinstance(batch, AutoModelError):  # sent as a value, because torch rewrites the text of a worker's exception
        raise batch
    return batch


def _as_is(batch: Any) -> Any:
    return batch


__all__ = ["DataLoader"]
