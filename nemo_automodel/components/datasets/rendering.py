"""What a row says, and which characters of it are trained on; and how both become token ids.

Text is tokenised once, as a whole, and the trained-on characters are mapped to tokens by their offsets: so the ids are
those that inference sees, and no boundary is found by counting the tokens of pieces.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from nemo_automodel.errors import DataError
from nemo_automodel.types import IGNORE_INDEX

Span = tuple[int, int]  # characters [start, end)


@dataclass(frozen=True)
class Rendered:
    """One row as text.

    Args:
        text: all of it.
        spans: the characters that are trained on.
        complete: a chat template wrote the text, BOS and stop tokens included. If false, the ids get the BOS that the
            tokenizer itself puts in front, and one trained-on EOS behind.
    """

    text: str
    spans: tuple[Span, ...]
    complete: bool = False


def prompt_and_answer(prompt: str, answer: str, answer_only_loss: bool) -> Rendered:
    """Plain text; trained on from ``answer`` on (from the start, if not ``answer_only_loss``)."""
    text = prompt + answer
    return Rendered(text, ((len(prompt) if answer_only_loss else 0, len(text)),))


def encode(tokenizer: Any, rows: Sequence[Rendered]) -> list[tuple[list[int], list[int]]]:
    """Token ids and pre-shifted labels of each row, both untruncated.

    Raises:
        DataError: an EOS is needed and the tokenizer has none, or a slow tokenizer's tokens straddle a boundary.
    """
    ids_of, offsets_of = _tokens(tokenizer, rows)
    front = bos_ids(tokenizer)
    encoded = []
    for row, ids, offsets in zip(rows, ids_of, offsets_of, strict=True):
        trained = trained_tokens(offsets, row.spans)
        if not row.complete and row.spans:  # a row with nothing to learn stays so
            if front and ids[: len(front)] != front:
                ids, trained = front + ids, [False] * len(front) + trained
            ids, trained = _with_eos(tokenizer, ids, trained)
        targets = [token if on else IGNORE_INDEX for token, on in zip(ids, trained, strict=True)]
        encoded.append((ids, [*targets[1:], IGNORE_INDEX]))
    return encoded


def bos_ids(tokenizer: Any) -> list[int]:
    """The ids that ``tokenizer`` puts in front of a text by itself: [BOS] or []."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return list(dressed[:start])
    return []


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of everything that decides which ids a text becomes: vocabulary, added tokens, specials, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content.pop("truncation", None)  # left behind by earlier calls; no effect on ours
        content.pop("padding", None)
    else:
        content = [sorted(tokenizer.get_vocab().items()), type(tokenizer).__name__]
    added = sorted((index, repr(token)) for index, token in tokenizer.added_tokens_decoder.items())
    facts = [content, added, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _tokens(tokenizer: Any, rows: Sequence[Rendered]) -> tuple[list[list[int]], list[list[Span]]]:
    if not tokenizer.is_fast:
        return _tokens_without_offsets(tokenizer, rows)
    out = tokenizer(
        [row.text for row in rows],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,  # its warning about model_max_length: seq_length is ours to apply
    )
    return out["input_ids"], out["offset_mapping"]


def _tokens_without_offsets(tokenizer: Any, rows: Sequence[Rendered]) -> tuple[list[list[int]], list[list[Span]]]:
    """A slow tokenizer: a boundary is where the tokens of the text before it end, if those begin the whole."""
    ids_of, offsets_of = [], []
    for row in rows:
        ids = tokenizer(row.text, add_special_tokens=False, verbose=False)["input_ids"]
        offsets, done = [(0, 0)] * len(ids), 0
        bounds = sorted({0, len(row.text), *(at for span in row.spans for at in span)})
        for start, end in pairwise(bounds):
            head = tokenizer(row.text[:end], add_special_tokens=False, verbose=False)["input_ids"]
            if head != ids[: len(head)]:
                raise DataError(
                    f"this tokenizer has no fast version, and a token of it crosses from prompt to answer "
                    f"near {row.text[max(0, end - 20) : end + 20]!r}; use a fast tokenizer, or end the prompt with a line break"
                )
            offsets[done : len(head)] = [(start, end)] * (len(head) - done)
            done = len(head)
        ids_of.append(ids)
        offsets_of.append(offsets)
    return ids_of, offsets_of


def trained_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens hold at least one trained-on character (or are empty and stand among them)."""
    trained, remaining = [], sorted(spans, reverse=True)
    for start, end in offsets:
        while remaining and remaining[-1][1] <= start:
            remaining.pop()
        trained.append(bool(remaining) and max(end, start + 1) > remaining[-1][0])
    return trained


def _with_eos(tokenizer: Any, ids: list[int], trained: list[bool]) -> tuple[list[int], list[bool]]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            "the tokenizer has no EOS token, so the model would never learn to stop; set tokenizer.eos_token"
        )
    if ids and ids[-1] == eos:  # the text ended in it
        return ids, [*trained[:-1], True]
    return [*ids, eos], [*trained, True]
