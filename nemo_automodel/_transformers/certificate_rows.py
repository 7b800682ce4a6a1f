"""What a certificate is tried on: documents of the run's first micro-batch, made up ones, and rows with images.

Each kind gives the same rows twice: as plain transformers takes them, and as the data loader lays them out.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig

from nemo_automodel._transformers import compat
from nemo_automodel._transformers import twin_fields as names
from nemo_automodel._transformers.plain import plain_loss, shifted
from nemo_automodel._transformers.twin_batch import image_batch
from nemo_automodel.components.datasets import collate
from nemo_automodel.errors import ModelError
from nemo_automodel.types import IGNORE_INDEX

_MULTIPLE = 8  # padded rows are as wide as a run's: layers that choose keys may choose among equal ones by number
_SHORTEST = 3  # tokens of a document that is worth a try
_NUMBER = 3  # of documents: one in the middle, with one on each side


class Rows(Protocol):
    """Rows that a model is tried on; ``changed`` asks for what must make no difference, or must make one."""

    sees: bool

    def plain(self, changed: bool = False) -> dict[str, Any]:
        """The batch for transformers' own forward, ``labels`` unshifted."""
        ...

    def ours(self, packed: bool, changed: bool | None = None) -> Any:
        """The same as a ``types.Batch``."""
        ...


@dataclass(frozen=True)
class Documents:
    """Three documents of text: for each its ids [S] and, for each position, the token to predict there [S].

    ``decodes``: the model's decoder predicts the targets as they are, from those before.
    """

    ids: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    decodes: bool = False
    sees = False

    @classmethod
    def random(cls, model: Any, lengths: Sequence[int], seed: int) -> Documents:
        """Tokens that ``model`` knows, all of them predicted."""
        tables = (model.get_input_embeddings(), model.get_output_embeddings())
        rows = min(table.weight.shape[0] for table in tables if getattr(table, "weight", None) is not None)
        first, generator = min(8, rows // 4), torch.Generator().manual_seed(seed)
        ids = [torch.randint(first, max(rows // 2, first + 2), (n,), generator=generator) for n in lengths]
        return cls(tuple(ids), tuple(_ended(x.roll(-1)) for x in ids), compat.is_encoder_decoder(model))

    def and_random(self, model: Any, lengths: Sequence[int], seed: int) -> Documents:
        """These, with made up ones behind them where there are fewer than three."""
        more = Documents.random(model, lengths, seed)
        there = len(self.ids)
        return Documents((*self.ids, *more.ids[there:]), (*self.targets, *more.targets[there:]), more.decodes)

    def rolled(self) -> Documents:
        """The same tokens and lengths, each document begun in its middle."""
        return Documents(
            tuple(x.roll(len(x) // 2) for x in self.ids),
            tuple(_ended(x.roll(len(x) // 2)) for x in self.targets),
            self.decodes,
        )

    def mapped(self, numbers: dict[int, int]) -> Documents:
        """With the tokens called by other ``numbers``."""

        def rename(tokens: Tensor) -> Tensor:
            return torch.tensor([numbers.get(int(token), int(token)) for token in tokens])

        return Documents(tuple(map(rename, self.ids)), tuple(map(rename, self.targets)))

    def digest(self) -> str:
        """The same for the same documents."""
        return hashlib.sha256(repr([x.tolist() for x in (*self.ids, *self.targets)]).encode()).hexdigest()

    def plain(self, changed: bool = False) -> dict[str, Any]:
        """Rows padded on the right."""
        width = -(-max(map(len, self.ids)) // _MULTIPLE) * _MULTIPLE
        rows: dict[str, list[Tensor]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for ids, targets in zip(self.ids, self.targets, strict=True):
            gap = (0, width - len(ids))
            rows["input_ids"].append(F.pad(ids, gap))
            rows["attention_mask"].append(F.pad(torch.ones_like(ids), gap))
            labels = targets if self.decodes else F.pad(targets[:-1], (1, 0), value=IGNORE_INDEX)
            rows["labels"].append(F.pad(labels, gap, value=IGNORE_INDEX))
        return {key: torch.stack(found) for key, found in rows.items()}

    def ours(self, packed: bool, changed: bool | None = None) -> Any:
        """``changed`` True or False trains the outer documents only, with and without other tokens in the middle one."""
        ids, targets = list(self.ids), list(self.targets)
        if changed:
            ids[1] = ids[1].flip(0).roll(1)
        if changed is not None:
            targets[1] = torch.full_like(targets[1], IGNORE_INDEX)
        rows = [(x.numpy(), y.numpy()) for x, y in zip(ids, targets, strict=True)]
        numbers = list(range(len(rows)))
        if packed:
            return collate.collate_packed([rows], numbers, sum(map(len, ids)))
        return collate.collate_padded(rows, numbers)


class Pictures:
    """Two rows of text with an image each; ``changed`` has other pixels. Both are of numbers that ``dtype`` can hold.

    Raises what ``model`` raises on such rows, and ModelError where it does not look at them.
    """

    sees = True

    @torch.no_grad()
    def __init__(self, model: Any, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.batch = {k: _held(v, dtype) for k, v in image_batch(model, seed=seed).items()}
        device = next(model.parameters()).device
        batches = [{k: v.to(device) for k, v in self.plain(changed).items()} for changed in (False, True)]
        if plain_loss(model, batches[0]) == plain_loss(model, batches[1]):
            raise ModelError("other pixels leave transformers' own loss as it is")
        self.decodes = compat.is_encoder_decoder(model)  # from what it is told so far: its labels are not shifted

    def plain(self, changed: bool = False) -> dict[str, Any]:
        """Nothing is padded."""
        if not changed:
            return self.batch
        pixels = {k: v for k, v in self.batch.items() if v.is_floating_point()}
        other = {k: v + torch.linspace(-1, 1, v.numel()).reshape(v.shape) for k, v in pixels.items()}
        return {**self.batch, **{k: _held(v, self.dtype) for k, v in other.items()}}

    def ours(self, packed: bool, changed: bool | None = None) -> Any:
        """Never packed; in ``dtype``, as a sharded model is given it."""
        batch = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in self.plain(bool(changed)).items()}
        labels = batch.pop("labels")
        labels = labels if self.decodes else shifted(labels)
        indices = (labels.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)
        return {**batch, "labels": labels, "label_indices": indices, "num_label_tokens": indices.numel()}


def _held(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).float() if tensor.is_floating_point() else tensor


# --- the run's own rows ---------------------------------------------------------------------------------------------


def first_documents(loader: Any, config: PretrainedConfig, most: int) -> Documents | None:
    """Documents of the first micro-batch that ``loader`` gives, up to three of ``most`` tokens each.

    Each is cut to its first tokens, or to those around the first that is trained. What stands for an image is left out.
    None: no document has three tokens and one that is trained.
    """
    loader = copy.copy(loader)  # the order is a function: looking at it changes nothing; without worker processes
    if hasattr(loader, "num_workers"):
        loader.num_workers = 0
    (batch, *_) = next(iter(loader.steps(0)))
    unseen = torch.tensor(sorted(_placeholders(config)), dtype=torch.long)
    found = []
    for ids, targets in _documents_of(batch):
        text = ~torch.isin(ids, unseen)
        ids, targets = _cut(ids[text], targets[text], most)
        if len(ids) >= _SHORTEST and bool((targets != IGNORE_INDEX).any()):
            found.append((ids, targets))
    if not found:
        return None
    return Documents(tuple(ids for ids, _ in found[:_NUMBER]), tuple(targets for _, targets in found[:_NUMBER]))


def _documents_of(batch: Any) -> Iterable[tuple[Tensor, Tensor]]:
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    bounds = batch.get("cu_seq_lens_q")
    if bounds is not None:
        sizes = bounds.diff().tolist()
        return zip(ids[0].split(sizes), labels[0].split(sizes), strict=True)
    mask = batch.get("attention_mask")
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
    return [(row[:n], targets[:n]) for row, targets, n in zip(ids, labels, lengths, strict=True)]


def _cut(ids: Tensor, targets: Tensor, most: int) -> tuple[Tensor, Tensor]:
    trained = (targets != IGNORE_INDEX).nonzero()
    first = int(trained[0]) if len(trained) else 0
    start = 0 if first < most // 2 else first - most // 2
    return ids[start : start + most].clone(), _ended(targets[start : start + most])


def _ended(targets: Tensor) -> Tensor:
    """``targets`` without that of the last position, whose token is not there."""
    return torch.cat([targets[:-1], targets.new_full((1,), IGNORE_INDEX)])


def _placeholders(config: PretrainedConfig) -> set[int]:
    """Tokens that stand for images, videos or sound."""
    found = [item for part in names.parts_of(config) for item in names.fields_of(part).items()]
    return {value for name, value in found if names.IMAGE_TOKEN.search(name) and names.is_int(value)}


def compact_vocabulary(
    documents: Documents | None, special: dict[int, int], size: int, whole: int
) -> tuple[dict[int, int], Tensor]:
    """A vocabulary of ``size`` tokens that holds those of ``documents``, and of the ``whole`` one as many as fit.

    Args:
        documents: their tokens must be in it.
        special: where special tokens of the whole vocabulary must be in the small one.
        size: tokens of the small one, fewer than the documents have at no time.
        whole: tokens of the whole one.

    Returns:
        What each token is called now, and for each of the small vocabulary what it was called [size].
    """
    places = {place: token for token, place in special.items() if token < whole}
    wanted = [] if documents is None else torch.cat([*documents.ids, *documents.targets]).unique().tolist()
    moved = []
    for token in [*range(min(8, size)), *(t for t in wanted if t >= 0)]:
        if token in special or places.get(token) == token:
            continue
        if token < size and token not in places:
            places[token] = token
        else:
            moved.append(token)
    used = {*places.values(), *moved}
    others = iter([*moved, *(token for token in range(whole) if token not in used)])
    rows = [places[place] if place in places else next(others, 0) for place in range(size)]
    return {token: place for place, token in reversed(list(enumerate(rows)))}, torch.tensor(rows)


__all__ = ["Documents", "Pictures", "Rows", "compact_vocabulary", "first_documents"]
