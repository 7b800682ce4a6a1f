"""Trying packed documents with images on a model: whether its tiny twin gives each the logits it has by itself.

Two documents with an image and one without share a row, put together as the loader does it. The reference is each
of them alone, by transformers' own attention. Which models pass is found out here, never told by a name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_automodel._transformers import compat
from nemo_automodel._transformers.packing import FIX, PASSES_DOCUMENTS
from nemo_automodel._transformers.plain import sharpen, without_chance
from nemo_automodel._transformers.tiny_twin import tiny_twin
from nemo_automodel._transformers.trial import build
from nemo_automodel._transformers.twin_batch import image_batch, text_batch
from nemo_automodel._transformers.window_trial import PASSES_WINDOW
from nemo_automodel.components.datasets import collate
from nemo_automodel.errors import ModelError, first_line

Document = dict[str, Any]
_LENGTHS = (11, 9, 17)  # of the documents' texts; the middle one has no image
_EXACT = 1e-3  # of the spread of logits, in float32


def require_packed_images(model: PreTrainedModel) -> None:
    """Raise ModelError, with the reason, where images in packed rows would not be what they are in rows of their own.

    ``model`` was tried for packing before; a small copy of it, in float32 on the CPU, runs here.
    """
    name = type(model).__name__
    try:
        reason = _objection(_small(model), compat.attention_name(model))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind: it is the model's own code, in a way it may not expect
        reason = f"cannot be tried with packed images ({type(error).__name__}: {first_line(error)})"
    if reason is not None:
        raise ModelError(f"packed_sequence: {name} {reason}; {FIX}")


def _small(model: PreTrainedModel) -> PreTrainedModel:
    config = tiny_twin(model.config)
    without_chance(config)
    small = build(type(model), config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sharpen(small)
    small.__dict__.update({k: model.__dict__[k] for k in (PASSES_DOCUMENTS, PASSES_WINDOW) if k in model.__dict__})
    return small.eval()


@torch.no_grad()
def _objection(model: PreTrainedModel, attention: str) -> str | None:
    model.set_attn_implementation("eager")
    documents = documents_with_images(model)
    for document in documents:
        del document["labels"]
    alone = [model(**document, use_cache=False).logits.float()[0] for document in documents]
    wanted = torch.cat(alone)
    model.set_attn_implementation(attention)
    error: Exception | None = None
    ran = False
    for axis in (0, 1):  # images one after the other, or as one row's
        try:
            found = model(**pack_documents(documents, axis), use_cache=False).logits.float()[0]
        except Exception as raised:
            error = error or raised
            continue
        if found.shape == wanted.shape and _same(found, wanted):
            return None
        ran = True
    if not ran and error is not None:
        first = (str(error).splitlines() or [""])[0][:200]
        return f"does not run on a packed row with images ({type(error).__name__}: {first})"
    return "gives a packed document beside images other logits than the same document by itself"


def _same(found: Tensor, wanted: Tensor) -> bool:
    return bool(((found - wanted).square().mean(-1).sqrt() <= _EXACT * wanted.std()).all())


@torch.no_grad()
def documents_with_images(model: PreTrainedModel) -> list[Document]:
    """What the model's forward takes of three documents, each a row of its own; the second has no image."""
    seeing = [image_batch(model, rows=1, length=n, seed=seed) for seed, n in enumerate(_LENGTHS) if seed != 1]
    blind = text_batch(rows=1, length=_LENGTHS[1], seed=1)
    for key in _of_tokens(seeing[0]):
        if key not in blind:  # what a processor writes for a text: none of it is an image
            like = seeing[0][key]
            blind[key] = like.new_zeros(1, _LENGTHS[1], *like.shape[2:])
    try:
        model(**blind)
    except Exception:  # a model that takes no row without an image
        return seeing
    return [seeing[0], blind, seeing[1]]


def pack_documents(documents: list[Document], axis: int = 0) -> Document:
    """One packed row of ``documents``, each the inputs of a row by itself; their images are joined along ``axis``."""
    packed: Document = collate.boundaries([document["input_ids"].shape[1] for document in documents])
    of_tokens = _of_tokens(documents[0])
    for key in dict.fromkeys(key for document in documents for key in document):
        if key == "attention_mask":
            continue
        parts = [document[key] for document in documents if key in document]
        along = axis if parts[0].ndim > axis else 0
        packed[key] = torch.cat(parts, 1) if key in of_tokens else collate.joined(parts, along)
    return packed


def _of_tokens(document: Document) -> list[str]:
    shape = document["input_ids"].shape
    return [key for key, value in document.items() if value.shape[:2] == shape]


__all__ = ["documents_with_images", "pack_documents", "require_packed_images"]
