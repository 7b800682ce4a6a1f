"""Finding out, before training starts, whether a model's layers hand their sliding window to the attention function.

Where they do, and it is the window of the mask they ask for, no mask is made; where they do not, the mask is all there
is to say the window. What transformers declares (``_supports_flash_attn``) does not tell the two apart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from nemo_automodel._transformers import compat
from nemo_automodel.components.attention import function

logger = logging.getLogger(__name__)

PASSES_WINDOW = "_automodel_passes_window"
"""Set on a model that was tried for windows: whether every layer hands its own on."""
_TOKENS = 4


def passes_window(model: nn.Module) -> bool:
    """What ``find_window`` found; False, which is always right, for a model that was not tried."""
    return bool(model.__dict__.get(PASSES_WINDOW, False))


def find_window(model: nn.Module) -> None:
    """Run a few tokens through a model that has windows and keep what its attention calls were given.

    Call it on a whole model, before it is sharded or compiled.
    """
    model.__dict__[PASSES_WINDOW] = False
    if compat.window_size(model) is None or compat.attention_name(model) != function.NAME:
        return
    try:
        calls = _tried(model)
    except Exception as error:  # any model may want more than token ids; dense masks are right for it
        logger.info("%s: its windows are put into dense masks (a trial failed: %s)", type(model).__name__, error)
        return
    passes = model.__dict__[PASSES_WINDOW] = bool(calls) and all(asked == given for asked, given in calls)
    if not passes:
        logger.warning(
            "%s: sliding windows are kept by a dense mask, which is slower, because its layers do not hand them to the "
            "attention function",
            type(model).__name__,
        )


@contextmanager
def shrunk_windows(size: int) -> Iterator[None]:
    """Every window of a model that uses our attention is ``size`` tokens inside, in masks and in arguments."""

    def attention(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("sliding_window") is not None:
            kwargs["sliding_window"] = min(kwargs["sliding_window"], size)
        return function.attention(*args, **kwargs)

    def mask(**kwargs: Any) -> Tensor | None:
        if (kwargs.get("local_size") or 0) > size:
            kwargs |= {"local_size": size, "mask_function": _narrowed(kwargs["mask_function"], size)}
        return function.attention_mask(**kwargs)

    with _in_place(attention, mask):
        yield


@torch.no_grad()
def _tried(model: nn.Module) -> list[tuple[int | None, int | None]]:
    """For each attention call: the window of the mask its layer asked for, and the window it was handed."""
    calls: list[tuple[int | None, int | None]] = []
    asked: dict[int, int] = {}  # by identity of the mask
    kept: list[Tensor] = []  # so that no identity is used twice

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        window = asked.get(_identity(mask)) if mask is not None else None
        calls.append((window, kwargs.get("sliding_window")))
        return function.attention(module, query, key, value, mask, *args, **kwargs)

    def make_mask(**kwargs: Any) -> Tensor | None:
        if kwargs.get("local_size") is None:
            return None
        made = function.attention_mask(**{**kwargs, "allow_is_causal_skip": False})
        assert made is not None
        kept.append(made)
        asked[_identity(made)] = kwargs["local_size"]
        return made

    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.arange(1, _TOKENS + 1, device=embedding.weight.device)[None] % embedding.weight.shape[0]
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with _in_place(attention, make_mask):
            model(input_ids=ids, use_cache=False)
    finally:
        for module, was in training.items():
            module.training = was
    return calls


def _identity(mask: Tensor) -> int:
    return mask.data_ptr() or id(mask)


def _narrowed(mask_function: Callable[..., Any], size: int) -> Callable[..., Any]:
    def inner(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return mask_function(batch_idx, head_idx, q_idx, kv_idx) & (kv_idx > q_idx - size)

    return inner


@contextmanager
def _in_place(attention: Callable[..., Any], mask: Callable[..., Any]) -> Iterator[None]:
    """``attention`` and ``mask`` under our attention's name inside."""
    AttentionInterface.register(function.NAME, attention)
    AttentionMaskInterface.register(function.NAME, mask)
    try:
        yield
    finally:
        function.register()
