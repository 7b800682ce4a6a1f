"""Render a conversation with the tokenizer's own chat template, and find the assistant's words in the result.

What is trained on in a turn is what the model has to write at inference: everything after the generation prompt, up to
and with the stop token. Three ways find it, each only where the one before does not apply:

1. the template marks it itself with ``{% generation %}``;
2. the rendering of the messages before the turn, plus the generation prompt, is a prefix of the whole rendering;
3. where a template renders earlier turns differently later (e.g. drops their reasoning), the turn is rendered once more
   with another text in its place, and what differs is the turn.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from nemo_automodel.components.datasets.rendering import Rendered, Span
from nemo_automodel.errors import DataError

logger = logging.getLogger(__name__)

Message = dict[str, Any]
_MARK = "\ue000"  # a private-use character: no text shares a prefix or suffix with it
TRAIN_ON = ("assistant", "last", "all")


class ChatRenderer:
    """Renders conversations with one tokenizer's template.

    Args:
        tokenizer: has a ``chat_template``.
        train_on: "assistant" (every assistant turn), "last" (the last one) or "all" (every token).
        template_kwargs: variables handed to the template (e.g. ``enable_thinking``).

    Raises:
        DataError: the tokenizer has no chat template, or ``train_on`` is not one of the three.
    """

    def __init__(
        self, tokenizer: Any, train_on: str = "assistant", template_kwargs: dict[str, Any] | None = None
    ) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template; set tokenizer.chat_template to a template or to a .jinja file, "
                "or use the tokenizer of the model's instruct version (tokenizer.pretrained_model_name_or_path)"
            )
        if train_on not in TRAIN_ON:
            raise DataError(f"train_on={train_on!r}: write one of {', '.join(TRAIN_ON)}")
        self.tokenizer, self.train_on, self.template_kwargs = tokenizer, train_on, template_kwargs or {}
        self._marks_turns = re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)) is not None
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        tokens = "|".join(re.escape(token) for token in sorted(added, key=len, reverse=True)) or r"(?!)"
        self._token = re.compile(tokens)
        self._last_token = re.compile(rf"(?:{tokens})(?=\s*\Z)")
        self._warned = False

    def __call__(self, messages: Sequence[Message], where: str, tools: list[Any] | None = None) -> Rendered:
        """The whole conversation, and the characters of it that are trained on.

        Raises:
            DataError: the template refuses the conversation or leaves its tools out, a weight is neither 0 nor 1, or
                where a turn begins cannot be told; names ``where``.
        """
        text = self._render(messages, tools, where)
        self._check_tools(text, messages, tools, where)
        if self.train_on == "all":
            return Rendered(text, ((0, len(text)),), complete=True)
        turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        spans = self._marked_spans(messages, tools, len(turns)) if self._marks_turns else None
        if spans is None:
            spans, floor = [], 0
            for turn in turns:
                spans.append(self._trim(text, self._find(text, messages, turn, tools, floor, where)))
                floor = spans[-1][1]
        wanted = turns[-1:] if self.train_on == "last" else turns
        kept = [
            span
            for span, turn in zip(spans, turns, strict=True)
            if _is_learned(messages[turn], where) and turn in wanted
        ]
        return Rendered(text, tuple(kept), complete=True)

    def _check_tools(self, text: str, messages: Sequence[Message], tools: Any, where: str) -> None:
        """Many templates know no tools, and leave out silently what a turn of calls has to say."""
        lost = "the tools offered" if tools and text == self._try(messages, None) else None
        for i, message in enumerate(messages):
            bare = {**message}
            if bare.pop("tool_calls", None) and text == self._try([*messages[:i], bare, *messages[i + 1 :]], tools):
                lost = lost or f"the tool_calls of message {i}"
        if lost:
            raise DataError(
                f"{where}: the chat template of {self.tokenizer.name_or_path or 'the tokenizer'} leaves out {lost}; set "
                "tokenizer.chat_template to a template with tools (Jinja text or a .jinja file), or take them out of the data"
            )

    def _render(self, messages: Sequence[Message], tools: Any, where: str, prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt, **self.template_kwargs
            )
        except Exception as error:  # a template raises what it likes
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise DataError(
                f"{where}: the chat template refuses this conversation (roles: {roles}): {error}"
            ) from error

    def _try(self, messages: Sequence[Message], tools: Any, prompt: bool = False) -> str | None:
        try:
            return self._render(messages, tools, "", prompt) if messages else None
        except DataError:
            return None

    def _marked_spans(self, messages: Sequence[Message], tools: Any, turns: int) -> list[Span] | None:
        """The template's own ``{% generation %}`` blocks, if there is one for each turn."""
        out = self.tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
            **self.template_kwargs,
        )
        text, spans, before = self._render(messages, tools, ""), [], 0
        for on, (start, end) in zip(out["assistant_masks"], out["offset_mapping"], strict=True):
            if on and not before:
                spans.append((start, end))
            elif on:
                spans[-1] = (spans[-1][0], end)
            before = on
        eos = self.tokenizer.eos_token or _MARK  # a block that leaves the stop token out would train endless answers
        spans = [(a, b + len(eos) if text.startswith(eos, b) and not text[a:b].endswith(eos) else b) for a, b in spans]
        return spans if len(spans) == turns else None

    def _find(self, text: str, messages: Sequence[Message], turn: int, tools: Any, floor: int, where: str) -> Span:
        head = self._try(messages[:turn], tools, prompt=True)
        whole = text if turn == len(messages) - 1 else self._try(messages[: turn + 1], tools)
        if head and whole and text.startswith(head) and text.startswith(whole) and floor <= len(head) < len(whole):
            return len(head), len(whole)
        for message in ({"role": "assistant", "content": _like(messages[turn].get("content"))}, None):
            stand_in = message or {**messages[turn], "content": _like(messages[turn].get("content"))}
            span = self._difference(text, whole, messages, turn, stand_in, tools)
            if span is not None and span[0] >= floor:
                return self._after_prompt(text, messages[:turn], tools, floor, span[0]), span[1]
        raise DataError(
            f"{where}: cannot tell where message {turn} (assistant) stands in the rendered conversation; mark it in the "
            "chat template with {% generation %}...{% endgeneration %}, or set dataset.train_on=all"
        )

    def _difference(
        self, text: str, whole: str | None, messages: Sequence[Message], turn: int, stand_in: Message, tools: Any
    ) -> Span | None:
        """Where ``text`` changes when ``stand_in`` takes the place of a turn, and the stop token behind that."""
        other = self._try([*messages[:turn], stand_in, *messages[turn + 1 :]], tools)
        if other is None or _MARK not in other:
            return None
        start = _common_prefix(text, other)
        end = max(start, len(text) - _common_suffix(text, other))
        shorter = self._try([*messages[:turn], stand_in], tools)
        if whole is None or shorter is None:
            return start, end
        behind = whole[len(whole) - _common_suffix(whole, shorter) :]
        return start, end + _common_prefix(behind, text[end:])

    def _after_prompt(self, text: str, before: Sequence[Message], tools: Any, floor: int, start: int) -> int:
        """Move ``start`` back to where the generation prompt ends: what stands between is for the model to write."""
        base, head = self._try(before, tools), self._try(before, tools, prompt=True)
        if base is None or head is None or not head.startswith(base):
            return start
        prompt = head[len(base) :]
        # A prompt may open the reasoning that the finished turn does not show: then its first lines are looked for.
        ends = {
            len(prompt),
            *(m.end() for m in re.finditer(r"\n+", prompt)),
            *(m.end() for m in self._token.finditer(prompt)),
        }
        for end in sorted(ends, reverse=True):
            at = text.rfind(prompt[:end], floor, start) if end else -1
            if at >= 0:
                return at + end
        return start

    def _trim(self, text: str, span: Span) -> Span:
        """Without the line break that a template puts behind the stop token: at inference nobody writes it."""
        start, end = span
        stop = self._last_token.search(text, start, end)
        if stop:
            return start, stop.end()
        if not self._warned:
            self._warned = True
            logger.warning("the chat template ends an assistant turn without a stop token: the model may never stop")
        return span


def _is_learned(message: Message, where: str) -> bool:
    """Whether the row does not say ``weight: 0``, or ``train: false`` as axolotl writes it."""
    for key in ("weight", "train"):
        if message.get(key) not in (0, 1, None):  # True and False among them
            raise DataError(
                f"{where}: {key} of a message must be 1 (learned) or 0 (shown but not learned), got {message[key]!r}"
            )
    return message.get("weight") != 0 and message.get("train") != 0


def question_renderer(tokenizer: Any, answer_only_loss: bool) -> ChatRenderer:
    """The renderer of a question and its answer as a chat; trained on from the answer on, or throughout."""
    return ChatRenderer(tokenizer, "assistant" if answer_only_loss else "all")


def _like(content: Any) -> Any:
    """Other content of the same form (text, or a list of parts)."""
    return [{"type": "text", "text": _MARK}] if isinstance(content, list) else _MARK


def _common_prefix(a: str, b: str) -> int:
    """How many characters ``a`` and ``b`` begin with alike; by halving, since slices compare fast."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _common_suffix(a: str, b: str) -> int:
    return _common_prefix(a[::-1], b[::-1])
