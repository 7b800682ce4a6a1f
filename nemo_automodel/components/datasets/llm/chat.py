"""Conversations, in the forms in which they are passed around, rendered with the tokenizer's own chat template."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from typing import Any

from nemo_automodel.components.datasets.chat_template import ChatRenderer, Message
from nemo_automodel.components.datasets.rendering import Rendered
from nemo_automodel.components.datasets.sources import field as column
from nemo_automodel.components.datasets.sources import open_source
from nemo_automodel.components.datasets.tokenized import TokenizedDataset, tokenize
from nemo_automodel.errors import DataError

logger = logging.getLogger(__name__)

_NAMES = {  # the templates' names of roles, and what others call them
    "system": (),
    "developer": (),
    "user": ("human", "prompter"),
    "assistant": ("gpt", "chatgpt", "bing", "bard", "bot", "chatbot", "model", "function_call", "tool_call"),
    "tool": ("observation", "function", "function_response", "tool_response"),
}
_ROLE_OF = {other: role for role, others in _NAMES.items() for other in others}
_CALLS = ("function_call", "tool_call")  # roles whose content is the call, as JSON
_FUNCTIONS = "functions"  # where OpenAI wrote tools before there was "tools"
_DEFAULT = "messages"
_ALPACA = ("instruction", "input", "output", "history")
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("input", "output"))


def make_chat_dataset(
    tokenizer: Any,
    path_or_dataset_id: str | list[str],
    split: str = "train",
    messages_column: str = _DEFAULT,
    train_on: str = "assistant",
    tools_column: str = "tools",
    seq_length: int | None = None,
    limit_dataset_samples: int | None = None,
    template_kwargs: dict[str, Any] | None = None,
    name: str | None = None,
    revision: str | None = None,
    num_proc: int | None = None,
) -> TokenizedDataset:
    """Conversations; what the assistant says (and its stop token) is learned.

    Rows may be ``messages`` ([{role, content}]), ShareGPT ``conversations`` ([{from, value}]), Alpaca
    (instruction, input, output), or a pair such as prompt and completion: the columns tell. A column ``system`` is put
    in front. A message with ``weight: 0`` (or ``train: false``) is not trained on.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        path_or_dataset_id: local file(s), glob or directory, or a Hub ID.
        split: split to read (default "train"); slices such as ``train[:1000]`` too.
        messages_column: column of the conversation (default "messages").
        train_on: "assistant" (default: every assistant turn), "last" (the last one) or "all" (every token).
        tools_column: column of the tools offered, a list of JSON schemas or its JSON text (default "tools"); optional.
        seq_length: tokens kept of a row, cut from the right; null (default) = all.
        limit_dataset_samples: read only the first rows.
        template_kwargs: variables for the template, e.g. ``{enable_thinking: false}``.
        name: configuration (subset) of a Hub dataset.
        revision: branch, tag or commit of a Hub dataset.
        num_proc: processes that tokenise.

    Raises:
        DataError: no chat template, the data cannot be read, or the template refuses a conversation (names the row).
    """
    render = _Chat(tokenizer, messages_column, train_on, tools_column, template_kwargs or {})
    source = open_source(path_or_dataset_id, split, name, revision).take(limit_dataset_samples)
    return tokenize(source, tokenizer, render, seq_length, num_proc)


def to_messages(row: dict[str, Any], where: str, messages_column: str = _DEFAULT) -> list[Message]:
    """The conversation that ``row`` holds, as [{role, content, ...}]; [] for a pair with an empty answer.

    Raises:
        DataError: no known column, a message without role or content, or two system turns that differ.
    """
    columns = _columns(row, where, messages_column)
    if len(columns) == 1:
        turns = column(row, columns[0], where, list)
        messages = [_message(turn, f"{where}: {columns[0]}[{i}]") for i, turn in enumerate(turns)]
    elif columns == _ALPACA:
        prompt, extra = column(row, "instruction", where), row.get("input") or ""
        pair = _pair(f"{prompt}\n\n{extra}" if extra else prompt, column(row, "output", where))
        messages = [*_history(row, where), *pair] if pair else []
    else:
        asked, answered = (column(row, name, where, (str, list)) for name in columns)
        if isinstance(asked, list) and isinstance(answered, list):
            messages = [_message(turn, where) for turn in [*asked, *answered]]
        else:
            messages = _pair(column(row, columns[0], where), column(row, columns[1], where))
    if not messages or any(map(_says_nothing, messages)):  # nothing to learn here, so dropped and counted
        return []
    return _with_system(messages, row, where)


def _columns(row: dict[str, Any], where: str, messages_column: str) -> tuple[str, ...]:
    """The columns that hold the conversation of ``row``."""
    there = ", ".join(map(repr, row)) or "nothing"
    if messages_column in row:
        return (messages_column,)
    if messages_column != _DEFAULT:
        raise DataError(f"{where}: no column {messages_column!r} (dataset.messages_column); there is {there}")
    if "conversations" in row:
        return ("conversations",)
    if "instruction" in row and "output" in row:
        return _ALPACA
    for pair in _PAIRS:
        if pair[0] in row and pair[1] in row:
            return pair
    raise DataError(
        f"{where}: no conversation found; there is {there}. Expected {messages_column!r}, "
        "'conversations', 'instruction' and 'output', or 'prompt' and 'completion'; set dataset.messages_column, or use "
        "make_instruction_dataset with a column_mapping"
    )


def _with_system(messages: list[Message], row: dict[str, Any], where: str) -> list[Message]:
    """``messages`` behind the system turn that column ``system`` holds, if it does."""
    if not row.get("system"):
        return messages
    system = column(row, "system", where)
    own = next((message["content"] for message in messages if message["role"] == "system"), system)
    if own != system:
        raise DataError(
            f"{where}: column 'system' says {system[:40]!r}, the conversation's own system turn {str(own)[:40]!r}; keep one of them"
        )
    return (
        messages if any(message["role"] == "system" for message in messages) else [_said("system", system), *messages]
    )


def _history(row: dict[str, Any], where: str) -> list[Message]:
    """Alpaca's earlier turns, [[what the user said, what the assistant said], ...]."""
    messages: list[Message] = []
    for pair in column(row, "history", where, list) if row.get("history") else []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(
                f"{where}: column 'history' must hold pairs [user, assistant] of text, got {str(pair)[:60]!r}"
            )
        messages += [_said("user", pair[0]), _said("assistant", pair[1])]
    return messages


def _says_nothing(message: Message) -> bool:
    """Whether the assistant would learn here to say nothing."""
    if message["role"] != "assistant" or message.get("weight") == 0 or message.get("train") == 0:
        return False
    content = message["content"]
    texts = [part.get("text", "-") if isinstance(part, dict) else str(part) for part in content] if isinstance(content, list) else [content]  # fmt: skip
    thoughts = [message.get(key) for key in ("tool_calls", "reasoning_content", "reasoning", "thinking")]
    return not any(thoughts) and not "".join(map(str, texts)).strip()


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _pair(prompt: str, answer: str) -> list[Message]:
    if not answer.strip():
        return []
    return [_said("user", prompt), _said("assistant", answer)]


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{where}: a message must be an object with role and content, got {str(turn)[:60]!r}")
    if "from" in turn and "value" in turn:
        turn = {
            **{k: v for k, v in turn.items() if k not in ("from", "value")},
            "role": turn["from"],
            "content": turn["value"],
        }
    turn = {**turn}
    called = turn.pop("function_call", None)  # how OpenAI wrote a single call before tool_calls
    if called and not turn.get("tool_calls"):
        turn["tool_calls"] = [_wrapped(called)]
    role = turn.get("role")
    if isinstance(role, str) and role.lower() in _CALLS:
        calls = _parsed(turn.get("content"), f"{where}: content of {role}")
        turn |= {
            "content": "",
            "tool_calls": [_wrapped(call) for call in (calls if isinstance(calls, list) else [calls])],
        }
    content = turn.get("content")
    if not isinstance(role, str):
        raise DataError(
            f"{where}: a message needs a role (such as user or assistant); it has {', '.join(turn) or 'nothing'}"
        )
    if not isinstance(content, str | list) and not (content is None and turn.get("tool_calls")):
        raise DataError(f"{where}: content must be text, got {type(content).__name__}")
    message = {
        **turn,
        "role": _ROLE_OF.get(role.lower(), role.lower()),
        "content": content if content is not None else "",
    }
    if turn.get("tool_calls"):
        message["tool_calls"] = [_call(call, where) for call in column(turn, "tool_calls", where, list)]
    return message


def _wrapped(function: Any) -> Any:
    """OpenAI's form of a bare {name, ...}."""
    return (
        function
        if isinstance(function, dict) and "function" in function
        else {"type": "function", "function": function}
    )


def _call(call: Any, where: str) -> Any:
    """A tool call with its arguments as a mapping: templates write JSON themselves, and would quote a text again."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict):
        raise DataError(
            f"{where}: a tool call must be an object such as {{function: {{name, arguments}}}}, got {str(call)[:60]!r}"
        )
    if not isinstance(inner.get("arguments"), str):
        return call
    inner = {**inner, "arguments": _parsed(inner["arguments"], f"{where}: tool call arguments")}
    return {**call, "function": inner} if "function" in call else inner


def _parsed(value: Any, what: str) -> Any:
    """``value``, which may be given as its JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{what}: not valid JSON ({error.msg}): {value[:60]!r}") from None


@dataclass
class _Chat:
    tokenizer: Any
    messages_column: str
    train_on: str
    tools_column: str
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._said_unread = False
        self._renderer = ChatRenderer(self.tokenizer, self.train_on, self.template_kwargs)

    def __call__(self, row: dict[str, Any], where: str) -> Rendered:
        messages = self._messages(row, where)
        self._say_unread(row, where)
        if not messages:
            return Rendered("", (), complete=True)
        self._check_roles(messages, where)
        return self._renderer(messages, where, self._tools(row, where))

    def _tools(self, row: dict[str, Any], where: str) -> list[Any] | None:
        name = self.tools_column if self.tools_column in row else _FUNCTIONS
        tools = _parsed(row.get(name) or None, f"{where}: column {name!r}")
        if tools is not None and not isinstance(tools, list):
            raise DataError(f"{where}: column {name!r} must be a list of tools, got {str(tools)[:60]!r}")
        tools = [_parsed(tool, f"{where}: a tool of column {name!r}") for tool in tools or []]
        return [_wrapped(tool) if name == _FUNCTIONS else tool for tool in tools] or None

    def _say_unread(self, row: dict[str, Any], where: str) -> None:
        if self._said_unread:
            return
        read = {*_columns(row, where, self.messages_column), "system", self.tools_column}
        unread = [name for name in row if name not in read and (name != _FUNCTIONS or self.tools_column in row)]
        if unread:
            self._said_unread = True
            logger.info("%s: columns that are not read: %s", where, ", ".join(unread))

    def _check_roles(self, messages: list[Message], where: str) -> None:
        template = str(self.tokenizer.chat_template)
        for role in (message["role"] for message in messages):
            if role not in _NAMES and f"'{role}'" not in template and f'"{role}"' not in template:
                known = "; ".join(
                    f"{name} ({', '.join(others)})" if others else name for name, others in _NAMES.items()
                )
                raise DataError(
                    f"{where}: unknown role {role!r}, which the chat template does not name either; write one of {known}"
                )

    def roles(self, row: dict[str, Any], where: str) -> list[str]:
        """Who speaks in ``row``: for an error that says why there is nothing to train on."""
        return [message["role"] for message in self._messages(row, where)]

    def _messages(self, row: dict[str, Any], where: str) -> list[Message]:
        return to_messages(row, where, self.messages_column)
