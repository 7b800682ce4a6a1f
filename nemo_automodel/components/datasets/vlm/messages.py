"""A row -> its conversation as parts of text and images, and the images in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nemo_automodel.components.datasets.chat_template import Message
from nemo_automodel.components.datasets.llm.chat import to_messages
from nemo_automodel.components.datasets.sources import field as field_of
from nemo_automodel.errors import DataError

PLACEHOLDER = "<image>"
"""Stands for the next image of the row's images column, in a text."""
IMAGE_COLUMNS = ("images", "image")
"""Where a row's images are looked for, unless a column is named."""
_LIKE_IMAGES = ("image_path", "image_paths", "img", "imgs", "img_path", "image_file", "image_url", "image_urls")
_SYSTEM = "system"
_MEDIA = ("video", "audio")
_SOURCES = ("image", "path", "url", "image_url", "bytes", "base64")


@dataclass
class Conversation:
    """Messages whose content is a list of ``{type: text, text}`` and ``{type: image}``, and the images they show."""

    messages: list[Message]
    images: list[Any] = field(default_factory=list)


def conversation_of(
    row: dict[str, Any], where: str, messages_column: str = "messages", images_column: str | None = None
) -> Conversation:
    """The conversation that ``row`` holds, in any of the forms in which they are passed around.

    Args:
        row: its messages as ``to_messages`` reads them, after what column ``system`` says, if there. An image is a part of a message (``{type: image, image: ...}``,
            also under ``path``, ``url`` or ``image_url``), or comes from the images column, in order: for each part
            without a source of its own, each ``<image>`` in a text; where there are neither, before the first user's text.
        where: where the row stands, for messages.
        messages_column: column of the conversation.
        images_column: column of the images, a list or a single one; None: ``images`` or ``image``, if there.

    Raises:
        DataError: no conversation, two system turns, videos or audio, a part of another kind, images and their places that do not match,
            or no image but a column that looks like one.
    """
    _refuse_media(row, where)
    column = _column_of_images(row, images_column, where)
    waiting = _as_list(row.get(column)) if column is not None else []
    found = Conversation([])
    placed = 0
    messages = to_messages({k: v for k, v in row.items() if k not in (column, _SYSTEM)}, where, messages_column)
    if not messages:
        return found
    messages = _with_system(messages, row, where)
    for message in messages:
        parts: list[dict[str, Any]] = []
        for part in _parts(message["content"], message["role"], where):
            if part["type"] == "image":
                source = _source_of(part)
                if source is None:
                    placed += 1
                    source = waiting[placed - 1] if placed <= len(waiting) else None
                found.images.append(source)
                part = {"type": "image"}
            parts.append(part)
        found.messages.append({**message, "content": parts})
    if waiting and not placed:
        _put_first(found, waiting, where)
    elif placed != len(waiting):
        count = (
            f"{placed} places for images ({PLACEHOLDER} or parts of type image without a source), but {len(waiting)} in"
        )
        if column is not None:
            raise DataError(f"{where}: {count} column {column!r}; give each place one image")
        raise DataError(f"{where}: {count} the row, {_no_column(row)}")
    elif not found.images and column is None and _likely(row):
        raise DataError(f"{where}: no image is read from the row, {_no_column(row)}")
    return found


def about_an_image(row: dict[str, Any], column: str, question: str, answer: str, where: str) -> Conversation:
    """One question about the image in ``column``, and its answer; DataError where there is no such column."""
    if row.get(column) is None:
        raise DataError(
            f"{where}: no column {column!r} with an image; there is {', '.join(map(repr, row)) or 'nothing'}"
        )
    asked = [{"type": "image"}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return Conversation(turns, [row[column]])


def text_only(messages: list[Message], token: str | None) -> list[Message]:
    """Messages whose content is plain text, images as ``token``: for templates that know no parts."""
    return [{**m, "content": "".join(p["text"] if p["type"] == "text" else token or "" for p in m["content"])} for m in messages]  # fmt: skip


def _with_system(messages: list[Message], row: dict[str, Any], where: str) -> list[Message]:
    if not row.get(_SYSTEM):
        return messages
    system = {"role": "system", "content": field_of(row, _SYSTEM, where)}
    if any(message["role"] == "system" for message in messages):
        raise DataError(
            f"{where}: column {_SYSTEM!r} has a system turn and the conversation has one too; keep one of them"
        )
    return [system, *messages]


def _column_of_images(row: dict[str, Any], asked: str | None, where: str) -> str | None:
    if asked is not None:
        if asked not in row:
            raise DataError(
                f"{where}: no column {asked!r} (dataset.images_column); there is {', '.join(map(repr, row))}"
            )
        return asked
    there = [name for name in IMAGE_COLUMNS if name in row]
    return next((name for name in there if _filled(row[name])), there[0] if there else None)


def _filled(value: Any) -> bool:
    return value is not None and (not isinstance(value, str | bytes | list | tuple | dict) or bool(value))


def _likely(row: dict[str, Any]) -> list[str]:
    return [name for name in _LIKE_IMAGES if isinstance(row.get(name), str | bytes | list | dict) and row[name]]


def _no_column(row: dict[str, Any]) -> str:
    """What is said of a row without an images column, and what to write."""
    fix = (
        f"set dataset.images_column: {likely[0]}, or rename that column to 'images'"
        if (likely := _likely(row))
        else f"put the images in one of them, or name theirs as dataset.images_column; an image that is a part of a message "
        f"needs no {PLACEHOLDER}"
    )
    return (
        f"which has no images column (read are {' and '.join(map(repr, IMAGE_COLUMNS))}, there is "
        f"{', '.join(map(repr, row))}); {fix}"
    )


def _refuse_media(row: dict[str, Any], where: str) -> None:
    for kind in _MEDIA:
        for name in (f"{kind}s", kind):
            if _filled(row.get(name)):
                raise DataError(
                    f"{where}: column {name!r} is not empty, but {kind} is not supported, only images are; take the row out, "
                    "or rename the column if its words say everything without it"
                )


def _parts(content: Any, role: str, where: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for part in [content] if isinstance(content, str) else content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            asked = [f"<{media}>" for media in _MEDIA if role == "user" and f"<{media}>" in part["text"]]
            if asked:
                raise DataError(
                    f"{where}: {asked[0]} in what the user says, but only images are supported; take the row out"
                )
            parts += _of_text(part["text"])
        elif kind in ("image", "image_url"):
            parts.append({**part, "type": "image"})
        elif isinstance(kind, str) and any(media in kind for media in _MEDIA):
            raise DataError(f"{where}: a part of type {kind}, but only text and images are supported; take the row out")
        else:
            raise DataError(
                f"{where}: a part of a message must be {{type: text, text: ...}} or {{type: image, ...}}, got {str(part)[:80]}"
            )
    return parts


def _of_text(text: str) -> list[dict[str, Any]]:
    """``text`` with an image part for each placeholder (LLaVA's line break beside one goes with it)."""
    if PLACEHOLDER not in text:
        return [{"type": "text", "text": text}]
    pieces = text.split(PLACEHOLDER)
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        parts += [{"type": "image"}] if number else []
        piece = piece.removeprefix("\n") if number else piece
        piece = piece.removesuffix("\n") if number < len(pieces) - 1 else piece
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _source_of(part: dict[str, Any]) -> Any:
    for key in _SOURCES:
        value = part.get(key)
        if isinstance(value, dict) and "url" in value:
            value = value["url"]
        if value is not None:
            return {"bytes": value} if key == "bytes" else value
    return None


def _put_first(found: Conversation, images: list[Any], where: str) -> None:
    for message in found.messages:
        if message["role"] == "user":
            message["content"] = [{"type": "image"} for _ in images] + message["content"]
            found.images = [*images, *found.images]
            return
    raise DataError(
        f"{where}: {len(images)} images, but no {PLACEHOLDER} and no message of role user to put them in front of; there is "
        f"{', '.join(message['role'] for message in found.messages)}"
    )


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


Read = Callable[[dict[str, Any], str], Conversation]
"""(row, where it stands) -> its conversation; a dataclass, whose fields are the options that enter the cache key."""
