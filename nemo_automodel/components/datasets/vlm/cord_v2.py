"""Receipts and what stands on them, in the columns of ``naver-clova-ix/cord-v2``: ``image`` and ``ground_truth`` (JSON)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from nemo_automodel.components.datasets.sources import field, open_source
from nemo_automodel.components.datasets.vlm.dataset import VisionDataset, build
from nemo_automodel.components.datasets.vlm.messages import Conversation, about_an_image
from nemo_automodel.errors import DataError

ANSWERS = ("tokens", "json")


def make_cord_v2_dataset(
    processor: Any,
    path_or_dataset: str | list[str] = "naver-clova-ix/cord-v2",
    split: str = "train",
    prompt: str = "Describe this image.",
    answer: str = "tokens",
    seq_length: int | None = None,
    on_bad_image: str = "error",
    limit_dataset_samples: int | None = None,
    revision: str | None = None,
    num_proc: int | None = None,
) -> VisionDataset:
    """The receipt and ``prompt`` as the question, its parse as what is learned.

    Args:
        processor: a Hugging Face processor.
        path_or_dataset: a Hub ID (default "naver-clova-ix/cord-v2"), or local files.
        split: split to read (default "train"); slices such as ``train[:1000]`` too.
        prompt: what is asked about every receipt.
        answer: how the parse is written: "tokens" (default), ``<s_menu><s_nm>...</s_nm></s_menu>`` as Donut (Kim et al.
            2022) has it, keys in reverse alphabetical order; or "json".
        seq_length: tokens kept of a row, cut from the right; a row of which an image would be cut is left out. null
            (default) = all.
        on_bad_image: "error" (default), or "skip" to leave out rows whose image cannot be read.
        limit_dataset_samples: read only the first rows.
        revision: branch, tag or commit of a Hub dataset.
        num_proc: processes that measure the rows.

    Raises:
        DataError: the data or an image cannot be read, or a row's ``ground_truth`` holds no parse.
    """
    if answer not in ANSWERS:
        raise DataError(f"answer={answer!r}: write one of {', '.join(ANSWERS)}")
    source = open_source(path_or_dataset, split, revision=revision).take(limit_dataset_samples)
    return build(
        source, processor, _Receipt(prompt, answer), seq_length=seq_length, on_bad_image=on_bad_image, num_proc=num_proc
    )


def as_tokens(parse: Any) -> str:
    """A JSON value as a sequence of field tags; the items of a list are parted by ``<sep/>``."""
    if isinstance(parse, dict):
        return "".join(f"<s_{key}>{as_tokens(parse[key])}</s_{key}>" for key in sorted(parse, reverse=True))
    if isinstance(parse, list):
        return "<sep/>".join(as_tokens(item) for item in parse)
    return str(parse)


@dataclass
class _Receipt:
    prompt: str
    answer: str

    def __call__(self, row: dict[str, Any], where: str) -> Conversation:
        parse = _parse_of(field(row, "ground_truth", where, (str, dict)), where)
        text = as_tokens(parse) if self.answer == "tokens" else json.dumps(parse, ensure_ascii=False)
        return about_an_image(row, "image", self.prompt, text, where)


def _parse_of(truth: str | dict[str, Any], where: str) -> Any:
    """``gt_parse``, or the first of ``gt_parses`` where a receipt has several: order is a function of the row alone."""
    try:
        content = json.loads(truth) if isinstance(truth, str) else truth
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: column 'ground_truth' is not valid JSON ({error.msg}): {str(truth)[:60]!r}"
        ) from None
    found = (
        content.get("gt_parse") or next(iter(content.get("gt_parses") or ()), None)
        if isinstance(content, dict)
        else None
    )
    if found is None:
        raise DataError(f"{where}: column 'ground_truth' has neither gt_parse nor gt_parses: {str(truth)[:60]!r}")
    return found
