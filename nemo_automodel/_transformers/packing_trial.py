"""Trying packed documents on a model: two short ones, packed and by themselves, before training starts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from nemo_automodel._transformers import compat
from nemo_automodel._transformers.packed_images_trial import require_packed_images
from nemo_automodel._transformers.packing import FIX, PASSES_DOCUMENTS, refuse_packing
from nemo_automodel._transformers.window_trial import shrunk_windows
from nemo_automodel.components.attention import function
from nemo_automodel.components.datasets.collate import boundaries
from nemo_automodel.errors import AutoModelError, ModelError

logger = logging.getLogger(__name__)

_WINDOW = 4  # that every sliding window is shrunk to
_LENGTHS = (6, 18)  # of the two documents tried: both longer than the window


def require_packing(model: nn.Module, images: bool = False) -> None:
    """Raise ModelError, with the reason, where packed documents would see each other in ``model``.

    Call it on a whole model, before it is sharded; two short documents are run through it. With ``images``, documents
    with images are tried instead, on its tiny twin.
    """
    refuse_packing(model)
    if (longest := compat.rotates_by_length(model)) is not None:
        logger.warning(
            "%s: a document of more than %d tokens changes how positions are encoded in those packed beside it, as in "
            "transformers those of rows beside it; keep dataset.seq_length at %d or below to rule it out",
            type(model).__name__, longest, longest,
        )  # fmt: skip
    _try_two_documents(model, images)
    if images:
        require_packed_images(model)  # type: ignore[arg-type]


@torch.no_grad()
def _try_two_documents(model: nn.Module, images: bool) -> None:
    """Find out whether boundaries reach every attention call, or a mask must say them; raise where neither helps."""
    training = model.training
    model.eval()
    try:
        with _recorded_calls() as calls:
            model.__dict__[PASSES_DOCUMENTS] = True
            _packed_logits(model)
        model.__dict__[PASSES_DOCUMENTS] = bool(calls) and all(calls)
        if not all(calls):
            logger.warning(
                "%s: packed documents are kept apart by a dense mask, which is slower, because its layers do not hand "
                "their boundaries to the attention function",
                type(model).__name__,
            )
        with shrunk_windows(_WINDOW):
            apart = images or _apart(model)
        if not apart:
            raise ModelError(
                f"packed_sequence: {type(model).__name__} gives a packed document other logits than the same document "
                f"by itself; {FIX}"
            )
    except (RuntimeError, IndexError, ValueError) as error:  # its forward makes other lengths of a row
        if isinstance(error, (AutoModelError, torch.OutOfMemoryError)):
            raise
        first = str(error).splitlines()[0]
        raise ModelError(
            f"packed_sequence: {type(model).__name__} does not run on a row of packed documents ({first}); {FIX}"
        ) from error
    finally:
        model.train(training)


@contextmanager
def _recorded_calls() -> Iterator[list[bool]]:
    """For each call of our attention inside: did it get to know where documents end?"""
    calls: list[bool] = []

    def recorder(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        calls.append(attention_mask is not None or kwargs.get("cu_seq_lens_q") is not None)
        return function.attention(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(function.NAME, recorder)
    try:
        yield calls
    finally:
        function.register()


def _documents(model: nn.Module) -> list[Tensor]:
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows = embedding.weight.shape[0]
    ids = torch.arange(7, 7 + sum(_LENGTHS), device=embedding.weight.device) * 7919 % rows
    return [part[None] for part in ids.split(_LENGTHS)]


def _packed_logits(model: nn.Module) -> Tensor:
    ids = torch.cat(_documents(model), dim=1)
    packed = {k: v.to(ids.device) if isinstance(v, Tensor) else v for k, v in boundaries(_LENGTHS).items()}
    return model(input_ids=ids, use_cache=False, **packed).logits.float()


def _apart(model: nn.Module) -> bool:
    """Whether the tokens of both documents have the logits they have alone, to what the dtype can tell.

    All of them in float32; most in 16 bit, where an expert may be chosen otherwise by a hair. A leak or a lost window
    would change at least two thirds.
    """
    packed = _packed_logits(model)
    alone = torch.cat([model(input_ids=ids, use_cache=False).logits.float() for ids in _documents(model)], dim=1)
    exact = next(model.parameters()).dtype == torch.float32
    off = (packed - alone).square().mean(-1).sqrt() > (1e-3 if exact else 5e-2) * alone.std()
    return bool(off.float().mean() <= (0.0 if exact else 0.3))
