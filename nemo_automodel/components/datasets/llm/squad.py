"""Question answering on a passage, in the format of SQuAD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_automodel.components.datasets.chat_template import question_renderer
from nemo_automodel.components.datasets.rendering import Rendered, prompt_and_answer
from nemo_automodel.components.datasets.sources import field, open_source
from nemo_automodel.components.datasets.tokenized import TokenizedDataset, tokenize
from nemo_automodel.errors import DataError


def make_squad_dataset(
    tokenizer: Any,
    dataset_name: str | list[str] = "rajpurkar/squad",
    split: str = "train",
    seq_length: int | None = None,
    limit_dataset_samples: int | None = None,
    use_chat_template: bool = False,
    answer_only_loss: bool = True,
    revision: str | None = None,
    num_proc: int | None = None,
) -> TokenizedDataset:
    """``Context: … Question: … Answer:`` as the prompt, the first answer + EOS as what is learned.

    Args:
        tokenizer: a Hugging Face tokenizer.
        dataset_name: a Hub ID (default "rajpurkar/squad"), or local files in the flat or the nested SQuAD format.
        split: split to read (default "train"); slices such as ``train[:1000]`` too.
        seq_length: tokens kept of a row, cut from the right; null (default) = all.
        limit_dataset_samples: read only the first rows.
        use_chat_template: render question and answer as one turn of the tokenizer's chat template.
        answer_only_loss: train on the answer alone (default), or on the prompt too.
        revision: branch, tag or commit of a Hub dataset.
        num_proc: processes that tokenise.

    Raises:
        DataError: the data cannot be read, or a row has no context, question or answers.
    """
    source = open_source(dataset_name, split, revision=revision).take(limit_dataset_samples)
    return tokenize(source, tokenizer, _Squad(tokenizer, use_chat_template, answer_only_loss), seq_length, num_proc)


@dataclass
class _Squad:
    tokenizer: Any
    use_chat_template: bool
    answer_only_loss: bool

    def __post_init__(self) -> None:
        self._chat = question_renderer(self.tokenizer, self.answer_only_loss) if self.use_chat_template else None

    def __call__(self, row: dict[str, Any], where: str) -> Rendered:
        context, question = field(row, "context", where), field(row, "question", where)
        answers = field(row, "answers", where, dict)
        texts = field(answers, "text", f"{where}, answers", list)
        if not texts:  # SQuAD 2's unanswerable questions: nothing to learn here, so dropped and counted
            return Rendered("", ())
        if not isinstance(texts[0], str):
            raise DataError(f"{where}: answers.text must hold strings, got {texts[0]!r}")
        answer = texts[0].strip()
        if self._chat is not None:
            prompt = f"Context: {context} Question: {question}"
            return self._chat([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], where)
        return prompt_and_answer(
            f"Context: {context} Question: {question} Answer:", f" {answer}", self.answer_only_loss
        )
