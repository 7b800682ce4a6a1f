"""Sentence completion: a context and its right ending, in the format of HellaSwag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_automodel.components.datasets.rendering import Rendered, prompt_and_answer
from nemo_automodel.components.datasets.sources import field, open_source
from nemo_automodel.components.datasets.tokenized import TokenizedDataset, tokenize
from nemo_automodel.errors import DataError


def make_hellaswag_dataset(
    tokenizer: Any,
    path_or_dataset: str | list[str] = "Rowan/hellaswag",
    split: str = "train",
    seq_length: int | None = None,
    limit_dataset_samples: int | None = None,
    answer_only_loss: bool = True,
    revision: str | None = None,
    num_proc: int | None = None,
) -> TokenizedDataset:
    """The context as the prompt, the ending that ``label`` names + EOS as what is learned.

    Args:
        tokenizer: a Hugging Face tokenizer.
        path_or_dataset: a Hub ID (default "Rowan/hellaswag") or local files with columns ctx, endings and label.
        split: split to read (default "train"); slices such as ``train[:1000]`` too.
        seq_length: tokens kept of a row, cut from the right; null (default) = all.
        limit_dataset_samples: read only the first rows.
        answer_only_loss: train on the ending alone (default), or on the context too.
        revision: branch, tag or commit of a Hub dataset.
        num_proc: processes that tokenise.

    Raises:
        DataError: the data cannot be read, or a label names no ending.
    """
    source = open_source(path_or_dataset, split, revision=revision).take(limit_dataset_samples)
    return tokenize(source, tokenizer, _HellaSwag(answer_only_loss), seq_length, num_proc)


@dataclass
class _HellaSwag:
    answer_only_loss: bool

    def __call__(self, row: dict[str, Any], where: str) -> Rendered:
        context, endings = field(row, "ctx", where), field(row, "endings", where, list)
        label = field(row, "label", where, (str, int))
        if label == "":  # the test split: its labels are not published
            return Rendered("", ())
        if not str(label).isdigit() or int(label) >= len(endings):
            raise DataError(
                f"{where}: label {label!r} names none of the {len(endings)} endings (0 to {len(endings) - 1})"
            )
        return prompt_and_answer(context, f" {endings[int(label)]}", self.answer_only_loss)
