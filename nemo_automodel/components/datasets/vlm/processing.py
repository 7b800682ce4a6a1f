"""A conversation and its images -> what a model is given, by its processor; and which tokens are trained on.

The processor does everything itself: it expands the text of an image, tokenises, and prepares the pixels. It is only
watched: what it replaced (to carry trained-on characters over the expansion), and the tokens' offsets.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from nemo_automodel.components.datasets.chat_template import ChatRenderer, Message
from nemo_automodel.components.datasets.rendering import Rendered, Span, trained_tokens
from nemo_automodel.components.datasets.vlm.messages import text_only
from nemo_automodel.errors import DataError
from nemo_automodel.types import IGNORE_INDEX, VisionInputs

_PROBE = "\ue000"
_NOT_FOR_THE_MODEL = ("input_ids", "labels", "attention_mask", "offset_mapping", "text_replacement_offsets")


@dataclass
class Encoded:
    """One row: ids and pre-shifted labels, and how far its images reach."""

    ids: list[int]
    labels: list[int]
    end_of_images: int  # the position after the last token of an image; a cut before it would lose a part of one
    features: dict[str, torch.Tensor] = field(default_factory=dict)


class Template:
    """A processor's chat template, as ``ChatRenderer`` uses a tokenizer's."""

    def __init__(self, processor: Any):
        self._processor, self._tokenizer = processor, processor.tokenizer
        template = getattr(processor, "chat_template", None) or self._tokenizer.chat_template
        self.chat_template = template.get("default") if isinstance(template, dict) else template
        self._takes_parts = bool(self.chat_template) and self._renders_parts()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_tokenizer"], name)

    def apply_chat_template(self, messages: Sequence[Message], **options: Any) -> Any:
        """As a tokenizer's: text, or ids of the text in which each image is one placeholder."""
        if not self._takes_parts:
            parted = [m if isinstance(m.get("content"), list) else {**m, "content": _text(m)} for m in messages]
            messages = text_only(parted, getattr(self._processor, "image_token", None))
        elif any(isinstance(message.get("content"), str) for message in messages):
            messages = [{**m, "content": _text(m)} if isinstance(m.get("content"), str) else m for m in messages]
        return self._tokenizer.apply_chat_template(list(messages), chat_template=self.chat_template, **options)

    def _renders_parts(self) -> bool:
        """Whether the template goes through a message's parts, rather than taking its content for text."""
        parts = [{"type": "text", "text": _PROBE}]
        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": parts}], chat_template=self.chat_template, tokenize=False
            )
        except Exception:  # a template raises what it likes
            return False
        return _PROBE in text and "'text'" not in text


def _text(message: Message) -> list[dict[str, Any]]:
    return [{"type": "text", "text": message.get("content") or ""}]


class Processing:
    """Turns conversations into model inputs with one processor.

    Args:
        processor: a Hugging Face processor with ``image_processor`` and ``tokenizer``.
        train_on: "assistant", "last" or "all", as ``ChatRenderer``.
        template_kwargs: variables for the template.

    Raises:
        DataError: the processor has no chat template (nor makes labels of a ``suffix`` itself), or no fast tokenizer.
    """

    def __init__(self, processor: Any, train_on: str = "assistant", template_kwargs: dict[str, Any] | None = None):
        self.processor = processor
        if not processor.tokenizer.is_fast:
            raise DataError(
                f"the tokenizer of {type(processor).__name__} has no fast version, which says where each token stands; "
                "use a fast tokenizer"
            )
        template = Template(processor)
        self.by_suffix = not template.chat_template and "labels" in getattr(processor, "model_input_names", ())
        if not template.chat_template and not self.by_suffix:
            raise DataError(
                f"{type(processor).__name__} has no chat template; set processor.chat_template to a template or to a "
                ".jinja file, or use the model's instruct version"
            )
        self._render = None if self.by_suffix else ChatRenderer(template, train_on, template_kwargs)
        self._placeholder = getattr(processor, "image_token", None)
        self._image_ids = _image_ids(processor)
        self._replacements: dict[Any, list[str]] = {}
        self._per_row = self._find_row_features()

    # --- text ---------------------------------------------------------------------------------------------------
    def render(self, messages: Sequence[Message], num_images: int, where: str) -> Rendered:
        """The conversation as the processor takes it, each image one placeholder, and what of it is trained on.

        Raises:
            DataError: the template refuses it, or a text holds the placeholder itself.
        """
        token = self._placeholder
        texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        if token and any(token in text for text in texts):
            raise DataError(
                f"{where}: a text holds {token!r}, which stands for an image in this model, but belongs to none of the "
                f"row's {num_images} images; write images as parts of a message, or <image> and an images column"
            )
        if self._render is None:
            return self._prefix_and_suffix(messages, where)
        rendered = self._render(messages, where)
        places = rendered.text.count(token) if token else num_images
        if places != num_images:
            raise DataError(
                f"{where}: the chat template writes {places} of the row's {num_images} images ({token!r}); check "
                "processor.chat_template, and which roles it lets show images"
            )
        return rendered

    def _prefix_and_suffix(self, messages: Sequence[Message], where: str) -> Rendered:
        """For a processor without turns: the images and the question, then the answer."""
        *before, last = messages
        if not before or last["role"] != "assistant" or any(message["role"] == "assistant" for message in before):
            raise DataError(
                f"{where}: {type(self.processor).__name__} has no chat template and takes one question and its answer, "
                f"got roles {', '.join(str(m['role']) for m in messages)}"
            )
        texts = [part.get("text") for message in before for part in message["content"]]
        prompt = (self._placeholder or "") * texts.count(None) + "\n".join(text for text in texts if text)
        answer = "".join(part.get("text", "") for part in last["content"])
        return Rendered(prompt + answer, ((len(prompt), len(prompt + answer)),), complete=True)

    # --- tokens and pixels --------------------------------------------------------------------------------------
    def encode(self, rendered: Rendered, images: Sequence[Image.Image], where: str) -> Encoded:
        """What the model is given for a rendered row with these images."""
        watch = _Watch(self.processor)
        arguments: dict[str, Any] = {"images": [list(images)] if images else None, "return_tensors": "pt"}
        try:
            if self.by_suffix:
                at = rendered.spans[0][0]
                features = watch.processor(
                    text=[rendered.text[:at]],
                    suffix=[rendered.text[at:]],
                    **{**arguments, "images": list(images) or None},
                )
            else:
                features = watch.processor(text=[rendered.text], add_special_tokens=False, **arguments)
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{where}: {type(self.processor).__name__} refuses this row with {len(images)} image(s): "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        ids = np.asarray(features["input_ids"]).reshape(-1).tolist()
        if self.by_suffix:
            second = np.asarray(features["token_type_ids"]).reshape(-1).tolist()
            encoded = self._encoded(ids, [bool(kind) for kind in second], [])
        else:
            encoded = self._labelled(rendered, ids, watch, where)
        encoded.features = {
            key: value if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))
            for key, value in features.items()
            if key not in _NOT_FOR_THE_MODEL
        }
        return encoded

    def measure(self, rendered: Rendered, sizes: Sequence[tuple[int, int]], where: str) -> Encoded:
        """``encode`` without pixels: what images of these sizes (width, height) make of the text."""
        if not sizes and self.by_suffix:
            raise DataError(
                f"{where}: {type(self.processor).__name__} takes no row without an image; take such rows out"
            )
        replaced = None if self.by_suffix else self._replacements_for(tuple(sizes), where)
        if replaced is None:
            return self.encode(rendered, [_blank(size) for size in sizes], where)
        text, done, replacements = "", 0, []
        for new in replaced:
            at = rendered.text.index(self._placeholder, done)  # type: ignore[arg-type]
            text += rendered.text[done:at]
            done = at + len(self._placeholder)  # type: ignore[arg-type]
            replacements.append(_Replacement(at, done, len(text), len(text) + len(new)))
            text += new
        text += rendered.text[done:]
        tokens = self.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return self._with_offsets(rendered.spans, tokens["input_ids"], tokens["offset_mapping"], replacements)

    def inputs(self, encoded: Encoded, num_images: int) -> VisionInputs:
        """The features of a row by how they are put together with other rows', cut to the row's length."""
        tokens, rows, images = {}, {}, {}
        whole = encoded.features.get("_length", len(encoded.ids))
        for key, value in encoded.features.items():
            if key == "_length":
                continue
            if value.ndim >= 2 and value.shape[:2] == (1, int(whole)):
                tokens[key] = value[0, : len(encoded.ids)]
            elif key in self._per_row:
                rows[key] = value[0]
            else:
                images[key] = value
        return VisionInputs(tokens, rows, images, num_images)

    def _labelled(self, rendered: Rendered, ids: list[int], watch: _Watch, where: str) -> Encoded:
        replacements = watch.replacements
        if replacements is None:
            replacements = _found_again(rendered.text, watch.text, self._placeholder, where)
        return self._with_offsets(rendered.spans, ids, watch.offsets, replacements)

    def _with_offsets(
        self, spans: Sequence[Span], ids: list[int], offsets: Sequence[Span], replacements: Sequence[_Replacement]
    ) -> Encoded:
        shifted = [(_moved(start, replacements), _moved(end, replacements)) for start, end in spans]
        inside = trained_tokens(offsets, [(r.new_start, r.new_end) for r in replacements])
        return self._encoded(ids, trained_tokens(offsets, shifted), inside)

    def _encoded(self, ids: list[int], trained: Sequence[bool], inside: Sequence[bool]) -> Encoded:
        """Labels of the trained tokens, none of which is a part of an image."""
        of_image = [token in self._image_ids for token in ids]
        if inside:
            of_image = [a or b for a, b in zip(of_image, inside, strict=True)]
        targets = [t if on and not seen else IGNORE_INDEX for t, on, seen in zip(ids, trained, of_image, strict=True)]
        last = max((at for at, seen in enumerate(of_image) if seen), default=-1)
        return Encoded(ids, [*targets[1:], IGNORE_INDEX], last + 1)

    # --- what is found out once ---------------------------------------------------------------------------------
    def _replacements_for(self, sizes: tuple[tuple[int, int], ...], where: str) -> list[str] | None:
        """The texts that images of these sizes, together in a row, are expanded to; None where only a run tells."""
        if not sizes:
            return []
        if sizes not in self._replacements:
            if self._placeholder is None:
                return None
            watch = _Watch(self.processor)
            text = _PROBE.join([self._placeholder] * len(sizes))
            try:
                watch.processor(text=[text], images=[[_blank(size) for size in sizes]], return_tensors="pt")
            except Exception as error:
                raise DataError(
                    f"{where}: {type(self.processor).__name__} refuses images of {sizes}: {' '.join(str(error).split())[:300]}"
                ) from error
            if watch.replacements is None:
                return None
            self._replacements[sizes] = [watch.text[r.new_start : r.new_end] for r in watch.replacements]
        return self._replacements[sizes]

    def _find_row_features(self) -> frozenset[str]:
        """Features with one entry a row, however many images it has: those that two images do not make longer."""
        shapes = []
        for count in (1, 2):
            text = (self._placeholder or "") * count
            try:
                found = _Watch(self.processor).processor(
                    text=[text], images=[[_blank((64, 64))] * count], return_tensors="pt"
                )
            except Exception:  # a processor that takes one image only: nothing to tell apart
                return frozenset()
            shapes.append({k: np.asarray(v).shape for k, v in found.items() if k not in _NOT_FOR_THE_MODEL})
        return frozenset(k for k in shapes[0] if all(len(s.get(k, ())) and s[k][0] == 1 for s in shapes))


@dataclass(frozen=True)
class _Replacement:
    start: int
    end: int
    new_start: int
    new_end: int


class _Watch:
    """A processor that does the same, and keeps what its tokenizer was given and what stood in for each image."""

    def __init__(self, processor: Any):
        self.processor = copy.copy(processor)
        self.replacements: list[_Replacement] | None = None
        self.text, self.offsets = "", []  # type: ignore[var-annotated]
        self._tokenizer = processor.tokenizer
        self.processor.tokenizer = _WatchedTokenizer(processor.tokenizer, self)
        if (replace := getattr(processor, "get_text_with_replacements", None)) is not None:
            self.processor.get_text_with_replacements = lambda *args, **kwargs: self._replaced(replace(*args, **kwargs))

    def _replaced(self, result: Any) -> Any:
        if result[1]:
            self.replacements = [_Replacement(*found["span"], *found["new_span"]) for found in result[1][0]]
        return result


class _WatchedTokenizer:
    def __init__(self, tokenizer: Any, watch: _Watch):
        self._tokenizer, self._watch = tokenizer, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_tokenizer"], name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        kept = kwargs.pop("return_offsets_mapping", False)
        tokens = self._tokenizer(text, *args, **kwargs, return_offsets_mapping=True)
        self._watch.text = text if isinstance(text, str) else text[0]
        offsets = tokens["offset_mapping"] if kept else tokens.pop("offset_mapping")
        self._watch.offsets = [tuple(pair) for pair in np.asarray(offsets).reshape(-1, 2).tolist()]
        return tokens


def _moved(at: int, replacements: Sequence[_Replacement]) -> int:
    """Where character ``at`` stands once the replacements that end before it are made."""
    before = [r for r in replacements if r.end <= at]
    return at + before[-1].new_end - before[-1].end if before else at


def _found_again(text: str, expanded: str, placeholder: str | None, where: str) -> list[_Replacement]:
    """The replacements, from the texts between them: they stand in the expanded text as they were, in order."""
    pieces = text.split(placeholder) if placeholder else [text]
    found, done, at = [], len(pieces[0]), len(pieces[0])
    right = expanded.startswith(pieces[0])
    for number, piece in enumerate(pieces[1:], 1):
        last = number == len(pieces) - 1
        start = len(expanded) - len(piece) if last else expanded.find(piece, at)
        right = right and start >= at and expanded.startswith(piece, start)
        found.append(_Replacement(done, done + len(placeholder or ""), at, start))
        done, at = found[-1].end + len(piece), start + len(piece)
    if not right or at != len(expanded):
        raise DataError(
            f"{where}: the processor changes the text between images, so what is trained on cannot be found"
        )
    return found


def _image_ids(processor: Any) -> set[int]:
    """The ids that stand for (parts of) images in what ``processor`` returns."""
    owners = (processor, processor.tokenizer)
    found: list[Any] = []
    for value in (getattr(owner, name, None) for owner in owners for name in ("image_token_id", "image_token_ids")):
        found += value if isinstance(value, list | tuple) else [value]
    return {token for token in found if isinstance(token, int)}


def _blank(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size)
