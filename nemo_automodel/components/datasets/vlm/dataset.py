"""Rows with images -> a sequence of ``types.Sample``: texts are measured once and cached, pixels made when asked for."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image

from nemo_automodel.components.datasets.rendering import Rendered, tokenizer_fingerprint
from nemo_automodel.components.datasets.sources import Source, read
from nemo_automodel.components.datasets.tokenized import MAX_DROPPED, map_cached
from nemo_automodel.components.datasets.vlm.images import BadImageError, load_image, local_path, size_of, undecoded
from nemo_automodel.components.datasets.vlm.messages import Read
from nemo_automodel.components.datasets.vlm.processing import Encoded, Processing
from nemo_automodel.errors import DataError
from nemo_automodel.types import IGNORE_INDEX, Sample

logger = logging.getLogger(__name__)

CODE_VERSION = 4
"""Part of the cache key; raise it whenever the same row and options would give other texts or lengths."""
ON_BAD_IMAGE = ("error", "skip")

_FEATURES = datasets.Features(
    {
        "text": datasets.Value("large_string"),
        "spans": datasets.Sequence(datasets.Value("int64")),
        "length": datasets.Value("int32"),
        "full_length": datasets.Value("int32"),
        "labelled": datasets.Value("int32"),
        "images": datasets.Value("int32"),
        "state": datasets.Value("string"),  # why the row is left out: "bad image", "image cut", or ""
    }
)
_FILES = datasets.Features({"files": datasets.Sequence(datasets.Value("large_string"))})


@dataclasses.dataclass(frozen=True)
class VisionStats:
    """What became of the rows: those read, those left out by reason, those truncated, and counts of what is left."""

    rows: int
    dropped: int
    bad_images: int
    images_cut: int
    truncated: int
    tokens: int
    label_tokens: int
    images: int

    def __str__(self) -> str:
        share = 100 * self.label_tokens / max(self.tokens, 1)
        left = self.rows - self.dropped - self.bad_images - self.images_cut
        return (
            f"{left} of {self.rows} rows, {self.images} images, {self.tokens} tokens ({share:.0f}% trained on); "
            f"{self.dropped} rows dropped with nothing to train on, {self.bad_images} for an image that cannot be read, "
            f"{self.images_cut} because seq_length would cut an image; {self.truncated} truncated"
        )


class VisionDataset:
    """A sequence of ``types.Sample`` with ``lengths``, ``stats``, ``fingerprint`` and a masked ``filler`` with an image.

    The filler goes into a micro-batch without any image: a sharded vision tower has to run on every rank alike.
    """

    def __init__(
        self,
        raw: datasets.Dataset,
        table: datasets.Dataset,
        kept: np.ndarray,
        rows: Rows,
        stats: VisionStats,
        fingerprint: str,
    ) -> None:
        self._raw, self._table, self._kept, self._rows = raw, table, kept, rows
        self.stats, self.fingerprint = stats, fingerprint
        self.lengths = np.asarray(table.with_format("numpy")["length"][:])[kept]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        at = self.source_row(index)
        stored = self._table[at]
        rendered = Rendered(stored["text"], tuple(zip(stored["spans"][::2], stored["spans"][1::2], strict=True)))
        return self._rows.sample(self._raw[at], at, rendered, stored["length"])

    def source_row(self, index: int) -> int:
        """Which row of the source sample ``index`` was made from."""
        return int(self._kept[index])

    @cached_property
    def filler(self) -> Sample | None:
        """A row with a blank image in which nothing is trained on; None where no row has an image."""
        return self._rows.blank() if self.stats.images else None


def build(
    source: Source,
    processor: Any,
    reads: Read,
    train_on: str = "assistant",
    template_kwargs: dict[str, Any] | None = None,
    seq_length: int | None = None,
    on_bad_image: str = "error",
    num_proc: int | None = None,
) -> VisionDataset:
    """Render and measure every row, or take the result of an earlier run from the cache.

    Args:
        source: the rows.
        processor: a Hugging Face processor.
        reads: a dataclass instance that turns a row into a ``Conversation``; its fields enter the cache key.
        train_on: "assistant", "last" or "all".
        template_kwargs: variables for the template.
        seq_length: tokens kept of a row, cut from the right; a row of which an image would be cut is left out.
        on_bad_image: "error", or "skip" to decode every image once beforehand and leave out rows where that fails.
        num_proc: processes (default: this one).

    Raises:
        DataError: a row or image cannot be read, or more than half of the rows are left out.
    """
    if seq_length is not None and seq_length < 2:
        raise DataError(f"seq_length={seq_length}: must be at least 2 tokens, or null for no limit")
    if on_bad_image not in ON_BAD_IMAGE:
        raise DataError(f"on_bad_image={on_bad_image!r}: write one of {', '.join(ON_BAD_IMAGE)}")
    raw = undecoded(source.dataset)
    source = dataclasses.replace(source, load=lambda: raw)
    rows = Rows(Processing(processor, train_on, template_kwargs), reads, seq_length, on_bad_image, source.name)
    facts = [CODE_VERSION, source.identity, _fingerprint_of(processor), type(reads).__qualname__]
    facts += [dataclasses.asdict(reads), train_on, template_kwargs, seq_length, on_bad_image]  # type: ignore[call-overload]
    desc, images = f"Measuring {source.name}", _state_of_images(source, reads, num_proc)
    table, fingerprint = map_cached(source, rows, _FEATURES, facts, num_proc, desc, batch_size=100, here=images)
    columns = table.remove_columns(["text", "spans"]).with_format("numpy")[:]
    kept = np.flatnonzero((columns["labelled"] > 0) & (columns["state"] == ""))
    stats = _stats(columns, kept)
    _check(stats, source.name, seq_length, columns)
    # By what the images were measured to be, not by where and how old they are: a dataset may be moved.
    measured = hashlib.sha256(fingerprint.encode() + columns["length"].tobytes() + kept.tobytes()).hexdigest()[:32]
    return VisionDataset(raw, table, kept, rows, stats, measured)


def _state_of_images(source: Source, reads: Read, num_proc: int | None) -> str:
    """A hash of the files that rows name as images: where they lie, how large they are and when they were written."""
    facts = [CODE_VERSION, source.identity, type(reads).__qualname__, dataclasses.asdict(reads)]  # type: ignore[call-overload]
    folders = "\n".join([source.name, str(Path.cwd()), *source.files])
    desc = f"Looking for the images of {source.name}"
    table, _ = map_cached(
        source, _Files(reads, source.name), _FILES, facts, num_proc, desc, batch_size=100, here=folders
    )
    digest = hashlib.sha256(folders.encode())
    for path in pc.unique(pc.list_flatten(table.data.column("files"))).to_pylist():
        digest.update(f"{path}:{_stamp(path)}\n".encode())
    return digest.hexdigest()


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


class _Files:
    """The files on this machine that a row's images are; for ``datasets.map``."""

    def __init__(self, reads: Read, name: str) -> None:
        self.reads, self.name = reads, name

    def __call__(self, columns: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        files = []
        for at, index in enumerate(indices):
            row, where = read({name: values[at] for name, values in columns.items()}, index, self.name)
            folder = folder_of(where)
            paths = [local_path(image, folder) for image in self.reads(row, where).images]
            files.append([str(path.absolute()) for path in paths if path is not None])
        return {"files": files}


def _fingerprint_of(processor: Any) -> list[Any]:
    return [tokenizer_fingerprint(processor.tokenizer), processor.chat_template, processor.to_dict()]


def _stats(columns: dict[str, Any], kept: np.ndarray) -> VisionStats:
    state, labelled = columns["state"], columns["labelled"]
    cut = (columns["full_length"] > columns["length"])[kept]
    return VisionStats(
        rows=len(state),
        dropped=int(((labelled == 0) & (state == "")).sum()),
        bad_images=int((state == "bad image").sum()),
        images_cut=int((state == "image cut").sum()),
        truncated=int(cut.sum()),
        tokens=int(columns["length"][kept].sum()),
        label_tokens=int(labelled[kept].sum()),
        images=int(columns["images"][kept].sum()),
    )


def _check(stats: VisionStats, name: str, seq_length: int | None, columns: dict[str, Any]) -> None:
    out = stats.dropped + stats.bad_images + stats.images_cut
    if out > MAX_DROPPED * stats.rows:
        raise DataError(
            f"{name}: {out} of {stats.rows} rows are left out: {stats.dropped} have nothing to train on, {stats.bad_images} "
            f"an image that cannot be read, and of {stats.images_cut} seq_length={seq_length} would cut an image (the "
            f"longest row has {int(columns['full_length'].max())} tokens); raise dataset.seq_length, or look at the columns"
        )
    logger.log(logging.WARNING if out else logging.INFO, "%s: %s", name, stats)


class Rows:
    """What is done with a row, before training (``__call__``, for ``datasets.map``) and in it (``sample``)."""

    def __init__(
        self, processing: Processing, reads: Read, seq_length: int | None, on_bad_image: str, name: str
    ) -> None:
        self.processing, self.reads, self.seq_length = processing, reads, seq_length
        self.on_bad_image, self.name = on_bad_image, name

    def __call__(self, columns: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """Columns of raw rows -> their texts, lengths and what becomes of them, without pixels."""
        out: dict[str, list[Any]] = {name: [] for name in _FEATURES}
        for at, index in enumerate(indices):
            row, where = read({name: values[at] for name, values in columns.items()}, index, self.name)
            for key, value in self._measured(row, where).items():
                out[key].append(value)
        return out

    def _measured(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        conversation = self.reads(row, where)
        blank = {"text": "", "spans": [], "length": 0, "full_length": 0, "labelled": 0, "images": 0, "state": ""}
        if not conversation.messages:
            return blank
        folder = folder_of(where)
        try:
            if self.on_bad_image == "skip":
                sizes = [load_image(image, folder, where).size for image in conversation.images]
            else:
                sizes = [size_of(image, folder, where) for image in conversation.images]
        except BadImageError:
            if self.on_bad_image == "error":
                raise
            return {**blank, "state": "bad image"}
        rendered = self.processing.render(conversation.messages, len(sizes), where)
        encoded = self.processing.measure(rendered, sizes, where)
        full = len(encoded.ids)
        state = "image cut" if encoded.end_of_images > (self.seq_length or full) else ""
        cut = self._cut(encoded)
        return {
            "text": rendered.text,
            "spans": [at for span in rendered.spans for at in span],
            "length": len(cut.ids),
            "full_length": full,
            "labelled": sum(label != IGNORE_INDEX for label in cut.labels),
            "images": len(sizes),
            "state": state,
        }

    def sample(self, raw: dict[str, Any], index: int, rendered: Rendered, length: int) -> Sample:
        """The whole row, images decoded now."""
        row, where = read(raw, index, self.name)
        folder = folder_of(where)
        pictures = [load_image(image, folder, where) for image in self.reads(row, where).images]
        sample = self._sample(rendered, pictures, where)
        if len(sample["input_ids"]) != length:
            raise DataError(
                f"{where}: {len(sample['input_ids'])} tokens, but {length} when the rows were measured; if its images have changed "
                "since this run began, start it again (they are then measured anew); if not, its processor counts tokens by "
                "more than images' sizes, and cannot be used"
            )
        return sample

    def blank(self) -> Sample:
        """A row with a small blank image, without labels."""
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "."}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "."}]}
        rendered = self.processing.render([message, answer], 1, "filler")
        sample = self._sample(rendered, [Image.new("RGB", (32, 32))], "filler")
        return {**sample, "labels": [IGNORE_INDEX] * len(sample["labels"])}

    def _sample(self, rendered: Rendered, pictures: list[Image.Image], where: str) -> Sample:
        encoded = self.processing.encode(rendered, pictures, where)
        encoded.features["_length"] = torch.tensor(len(encoded.ids))
        cut = self._cut(encoded)
        return Sample(input_ids=cut.ids, labels=cut.labels, vision=self.processing.inputs(cut, len(pictures)))

    def _cut(self, encoded: Encoded) -> Encoded:
        size = self.seq_length
        if size is None or len(encoded.ids) <= size or encoded.end_of_images > size:
            return encoded
        # As in ``tokenized``: the last kept position is not trained on, so that its next token stays unknown.
        labels = [*encoded.labels[: size - 1], IGNORE_INDEX]
        return dataclasses.replace(encoded, ids=encoded.ids[:size], labels=labels)


def folder_of(where: str) -> Path | None:
    """The folder of the file that ``where`` ("file:line", "file row N") stands in; None where it is no file."""
    path = Path(re.sub(r"(:\d+| row \d+)$", "", where)).expanduser()
    return path.parent if path.is_file() else path if path.is_dir() else None
