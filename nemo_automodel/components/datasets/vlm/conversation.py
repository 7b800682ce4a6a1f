"""Conversations with images: local files or the Hub, rendered by the model's own processor and chat template."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_automodel.components.datasets.sources import Source, open_source
from nemo_automodel.components.datasets.vlm.dataset import VisionDataset, build
from nemo_automodel.components.datasets.vlm.images import undecoded
from nemo_automodel.components.datasets.vlm.messages import IMAGE_COLUMNS, Conversation, conversation_of

logger = logging.getLogger(__name__)

_LOOKED_AT = 100  # rows whose columns are named where none has an image


def make_vlm_chat_dataset(
    processor: Any,
    path_or_dataset_id: str | list[str],
    split: str = "train",
    messages_column: str = "messages",
    images_column: str | None = None,
    train_on: str = "assistant",
    seq_length: int | None = None,
    on_bad_image: str = "error",
    limit_dataset_samples: int | None = None,
    template_kwargs: dict[str, Any] | None = None,
    name: str | None = None,
    revision: str | None = None,
    num_proc: int | None = None,
) -> VisionDataset:
    """Conversations with any number of images, none included; what the assistant says (and its stop token) is learned.

    Rows may be ``messages`` ([{role, content}], content a text or a list of {type: text | image, ...}) or ShareGPT and
    LLaVA ``conversations`` ([{from, value}]). Images are parts of messages, or stand in a column of their own and in
    the text as ``<image>``: paths (relative to the file of the row), bytes, or images of the ``datasets`` library.

    Args:
        processor: a Hugging Face processor with a chat template.
        path_or_dataset_id: local file(s), glob or directory, or a Hub ID.
        split: split to read (default "train"); slices such as ``train[:1000]`` too.
        messages_column: column of the conversation (default "messages").
        images_column: column of the images; null (default) = ``images`` or ``image``, where there is one.
        train_on: "assistant" (default: every assistant turn), "last" (the last one) or "all" (every token of text).
        seq_length: tokens kept of a row, cut from the right; a row of which an image would be cut is left out. null
            (default) = all.
        on_bad_image: "error" (default) stops at an image that is missing or damaged; "skip" decodes every image once
            before training and leaves such rows out, counted.
        limit_dataset_samples: read only the first rows.
        template_kwargs: variables for the template.
        name: configuration (subset) of a Hub dataset.
        revision: branch, tag or commit of a Hub dataset.
        num_proc: processes that measure the rows.

    Raises:
        DataError: no chat template, the data or an image cannot be read, or images and their places do not match.
    """
    source = open_source(path_or_dataset_id, split, name, revision).take(limit_dataset_samples)
    reads = _Chat(messages_column, images_column)
    data = build(source, processor, reads, train_on, template_kwargs, seq_length, on_bad_image, num_proc)
    if not data.stats.images and not data.stats.bad_images and not data.stats.images_cut:
        _say_text_only(source, [images_column] if images_column else IMAGE_COLUMNS)
    return data


def _say_text_only(source: Source, read: Sequence[str]) -> None:
    rows = replace(source, load=lambda: undecoded(source.dataset))
    there = dict.fromkeys(name for i in range(min(len(rows), _LOOKED_AT)) for name in rows[i])
    logger.warning(
        "%s: no row has an image, so this trains on text alone. Images are read from parts of messages and from column "
        "%s; there is %s. If there should be images, name their column as dataset.images_column",
        source.name,
        " or ".join(map(repr, read)),
        ", ".join(map(repr, there)),
    )


@dataclass
class _Chat:
    messages_column: str
    images_column: str | None

    def __call__(self, row: dict[str, Any], where: str) -> Conversation:
        return conversation_of(row, where, self.messages_column, self.images_column)
