"""Instructions and answers in columns of any name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_automodel.components.datasets.chat_template import question_renderer
from nemo_automodel.components.datasets.rendering import Rendered, prompt_and_answer
from nemo_automodel.components.datasets.sources import field, open_source
from nemo_automodel.components.datasets.tokenized import TokenizedDataset, tokenize
from nemo_automodel.errors import DataError

ROLES = ("context", "question", "answer")


def make_instruction_dataset(
    tokenizer: Any,
    path_or_dataset_id: str | list[str],
    split: str = "train",
    column_mapping: dict[str, str] | None = None,
    answer_only_loss: bool = True,
    seq_length: int | None = None,
    limit_dataset_samples: int | None = None,
    use_chat_template: bool = False,
    separator: str = "\n",
    name: str | None = None,
    revision: str | None = None,
    num_proc: int | None = None,
) -> TokenizedDataset:
    """Context and question as the prompt, answer + EOS as what is learned.

    Args:
        tokenizer: a Hugging Face tokenizer.
        path_or_dataset_id: local file(s), glob or directory, or a Hub ID.
        split: split to read (default "train"); slices such as ``train[:1000]`` too.
        column_mapping: which column is the ``context`` (optional), ``question`` (optional) and ``answer``; default
            ``{question: question, answer: answer}``.
        answer_only_loss: train on the answer alone (default), or on the prompt too.
        seq_length: tokens kept of a row, cut from the right; null (default) = all.
        limit_dataset_samples: read only the first rows.
        use_chat_template: render question and answer as one turn of the tokenizer's chat template.
        separator: between context, question and answer (default a line break); not used by a chat template's answer.
        name: configuration (subset) of a Hub dataset.
        revision: branch, tag or commit of a Hub dataset.
        num_proc: processes that tokenise.

    Raises:
        DataError: the data cannot be read, or a mapped column is missing or not text.
    """
    mapping = dict(column_mapping or {"question": "question", "answer": "answer"})
    unknown = [role for role in mapping if role not in ROLES]
    if unknown or "answer" not in mapping or len(mapping) < 2:
        raise DataError(
            f"dataset.column_mapping={mapping}: map answer and at least one of context and question to a column, "
            "e.g. {question: instruction, answer: output}"
        )
    source = open_source(path_or_dataset_id, split, name, revision).take(limit_dataset_samples)
    render = _Columns(tokenizer, mapping, answer_only_loss, use_chat_template, separator)
    return tokenize(source, tokenizer, render, seq_length, num_proc)


@dataclass
class _Columns:
    tokenizer: Any
    mapping: dict[str, str]
    answer_only_loss: bool
    use_chat_template: bool
    separator: str

    def __post_init__(self) -> None:
        self._chat = question_renderer(self.tokenizer, self.answer_only_loss) if self.use_chat_template else None

    def __call__(self, row: dict[str, Any], where: str) -> Rendered:
        texts = {role: field(row, self.mapping[role], where) for role in ROLES if role in self.mapping}
        if not texts["answer"].strip():  # nothing to learn here, so dropped and counted
            return Rendered("", ())
        prompt = self.separator.join(text for role, text in texts.items() if role != "answer" and text)
        if self._chat is not None:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": texts["answer"]}]
            return self._chat(turns, where)
        return prompt_and_answer(prompt + self.separator, texts["answer"], self.answer_only_loss)
