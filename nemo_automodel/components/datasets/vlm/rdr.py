"""Pictures of items and their descriptions, in the columns of ``quintend/rdr-items``: ``image`` and ``text``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_automodel.components.datasets.sources import field, open_source
from nemo_automodel.components.datasets.vlm.dataset import VisionDataset, build
from nemo_automodel.components.datasets.vlm.messages import Conversation, about_an_image


def make_rdr_dataset(
    processor: Any,
    path_or_dataset: str | list[str] = "quintend/rdr-items",
    split: str = "train",
    prompt: str = "Describe this image.",
    seq_length: int | None = None,
    on_bad_image: str = "error",
    limit_dataset_samples: int | None = None,
    revision: str | None = None,
    num_proc: int | None = None,
) -> VisionDataset:
    """The image and ``prompt`` as the question, the description as what is learned.

    Args:
        processor: a Hugging Face processor.
        path_or_dataset: a Hub ID (default "quintend/rdr-items"), or local files.
        split: split to read (default "train"); slices such as ``train[:1000]`` too.
        prompt: what is asked about every image.
        seq_length: tokens kept of a row, cut from the right; a row of which an image would be cut is left out. null
            (default) = all.
        on_bad_image: "error" (default), or "skip" to leave out rows whose image cannot be read.
        limit_dataset_samples: read only the first rows.
        revision: branch, tag or commit of a Hub dataset.
        num_proc: processes that measure the rows.

    Raises:
        DataError: the data or an image cannot be read, or a row has no image or text.
    """
    source = open_source(path_or_dataset, split, revision=revision).take(limit_dataset_samples)
    return build(
        source, processor, _Described(prompt), seq_length=seq_length, on_bad_image=on_bad_image, num_proc=num_proc
    )


@dataclass
class _Described:
    prompt: str

    def __call__(self, row: dict[str, Any], where: str) -> Conversation:
        return about_an_image(row, "image", self.prompt, field(row, "text", where), where)
