"""Text and tokenizer of ``automodel demo``: questions about the Python standard library, answered by its docstrings.

Every machine that runs this package has that text, so the demo downloads nothing and still trains on real English.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MODULES = (
    "bisect",
    "copy",
    "glob",
    "heapq",
    "json",
    "math",
    "os.path",
    "random",
    "shutil",
    "statistics",
    "string",
    "textwrap",
    "time",
)
"""Modules with no side effect on import and docstrings that say what a function does: about 170 functions."""

QUESTIONS = ("What does {name} do?", "Explain {name}.", "Tell me about {name}.", "What is {name} for?")
"""The ways in which each function is asked about: the model must learn to answer whatever the wording."""

PROBE = "What does shutil.copytree do?"
"""The question that the demo asks before and after training; this wording of it is never trained on."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
END, PAD = "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (END, PAD, "<|system|>", "<|user|>", "<|assistant|>")

_SHORTEST, _LONGEST = 20, 120  # characters of an answer


def first_sentence(docstring: str) -> str | None:
    """The first sentence of ``docstring`` on one line, or None where it is no plain sentence of a usable length."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z(])", paragraph)[0]
    if not _SHORTEST <= len(sentence) <= _LONGEST or not sentence.isascii():
        return None
    if not sentence[0].isupper() or "->" in sentence or re.match(r"[\w.]+\(", sentence):  # a signature, not a sentence
        return None
    return sentence if sentence.endswith(".") else sentence + "."


def documented_functions() -> Iterator[tuple[str, str]]:
    """``(dotted name, first sentence of its docstring)`` of the public callables of ``MODULES``, each object once."""
    seen: set[int] = set()
    answers: set[str] = set()
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
        for name in sorted(names):
            member = getattr(module, name, None)
            own_docstring = inspect.isroutine(member) or (inspect.isclass(member) and "__doc__" in vars(member))
            if not own_docstring or id(member) in seen or getattr(member, "__module__", None) == "typing":
                continue
            seen.add(id(member))
            answer = first_sentence(inspect.getdoc(member) or "")
            if answer and answer not in answers:
                answers.add(answer)
                yield f"{module_name}.{name}", answer


def conversations() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and validation rows ``{"messages": [user, assistant]}``.

    Each function is asked about in every wording of ``QUESTIONS``; one wording of each, ``PROBE`` among them, is kept
    for validation, so that a right answer there shows more than a repeated row.
    """
    train: list[dict[str, Any]] = []
    validation: list[dict[str, Any]] = []
    for index, (name, answer) in enumerate(documented_functions()):
        asked = [question.format(name=name) for question in QUESTIONS]
        held_out = asked.index(PROBE) if PROBE in asked else index % len(asked)
        for number, question in enumerate(asked):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            (validation if number == held_out else train).append({"messages": messages})
    return train, validation


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write ``rows`` to ``path``, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_tokenizer(rows: Sequence[dict[str, Any]], directory: Path, vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer on ``rows``, save it to ``directory`` as HF does, and return it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((message["content"] for row in rows for message in row["messages"]), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(directory)
    return tokenizer
