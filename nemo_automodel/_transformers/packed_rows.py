"""The forward of a packed row: where its documents end, for the language model alone; positions that start anew at each.

Positions that follow images are the model's own function's, of the documents as the rows of a batch. What stands
outside the language model (towers, projectors) has sequences of its own, so that neither the boundaries among its
arguments nor the announced layout are for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nemo_automodel._transformers import compat
from nemo_automodel._transformers.packing import PASSES_DOCUMENTS, refuse_packing
from nemo_automodel._transformers.parts import outside_language_model
from nemo_automodel._transformers.window_trial import passes_window
from nemo_automodel.components.attention.layout import Layout, unannounced

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_OUTSIDE, _COUNTER = "_nemo_automodel_outside", "_nemo_automodel_position_counter"


def prepare_packed(model: nn.Module, inputs: dict[str, Any]) -> Layout | None:
    """The layout of a packed batch, None for any other; ``inputs``, its forward's, are completed in place.

    They get positions that follow images, and a mask of ones, so that transformers does not look for documents itself.
    """
    cu_seqlens = inputs.get("cu_seq_lens_q")
    if cu_seqlens is None:
        return None
    if PASSES_DOCUMENTS not in model.__dict__:  # not loaded with packed=True: dense masks, which are always right
        refuse_packing(model)
        model.__dict__[PASSES_DOCUMENTS] = False
    positions = inputs.get("position_ids")
    of_images = _document_positions(model, inputs) if positions is None or positions.ndim == 2 else None
    if of_images is not None:
        inputs["position_ids"] = of_images
    if compat.attention_name(model) != "automodel":
        return None
    if inputs.get("attention_mask") is None and positions is not None:
        inputs["attention_mask"] = torch.ones_like(positions)
    return Layout(
        cu_seqlens,
        passes_window(model),
        documents_as_argument=model.__dict__[PASSES_DOCUMENTS],
        read_blocks=compat.read_blocks,
    )


def _document_positions(model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
    """Positions [K, 1, T] of a packed row with images in a model that counts them in K dimensions; None for any other.

    ``inputs`` are the forward's: ``input_ids`` [1, T] and ``cu_seq_lens_q`` [D+1]; what else is [1, T, ...] is split
    among documents, and what is of images goes to the model's function as it is, because it takes them in order.
    """
    ids, bounds = inputs.get("input_ids"), inputs["cu_seq_lens_q"]
    count = _once(model, _COUNTER, compat.position_counter)
    if ids is None or count is None:
        return None
    names = [name for name in inspect.signature(count).parameters if name != "attention_mask"]
    given = {name: value for name in names if isinstance(value := inputs.get(name), Tensor)}
    of_tokens = {name for name, value in given.items() if value.shape[:2] == ids.shape}
    if of_tokens == given.keys():  # no images: ordinary positions are right
        return None
    lengths = torch.diff(bounds).tolist()
    arguments = {name: _as_rows(value, lengths) if name in of_tokens else value for name, value in given.items()}
    tokens = _as_rows(torch.ones_like(ids), lengths)
    found = count(**arguments, attention_mask=tokens)
    positions: Tensor = found[0] if isinstance(found, tuple) else found  # [K, D, longest document]
    return positions[:, tokens.bool()][:, None]


def _as_rows(row: Tensor, lengths: list[int]) -> Tensor:
    """[1, T, ...] -> [D, longest document, ...], padded with zeros."""
    return pad_sequence(list(row[0].split(lengths)), batch_first=True)


@contextmanager
def towers_apart(model: nn.Module, packed: bool) -> Iterator[None]:
    """Keep packed documents' boundaries from what runs outside the language model."""
    outside = _once(model, _OUTSIDE, outside_language_model) if packed else ()
    with ExitStack() as stack:
        for module in outside:
            stack.enter_context(_unaware(module))
        yield


@contextmanager
def _unaware(module: nn.Module) -> Iterator[None]:
    left = ExitStack()

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        left.enter_context(unannounced())
        return args, {name: value for name, value in kwargs.items() if name not in BOUNDARIES}

    def leave(*_: Any) -> None:
        left.close()

    before = module.register_forward_pre_hook(enter, with_kwargs=True)
    after = module.register_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _once(model: nn.Module, name: str, find: Callable[[nn.Module], Any]) -> Any:
    """What ``find`` finds in ``model``, which takes too long for every step; kept on the model as ``name``."""
    if name not in model.__dict__:
        model.__dict__[name] = find(model)
    return model.__dict__[name]


__all__ = ["BOUNDARIES", "prepare_packed", "towers_apart"]
