"""A micro-batch on its way into the model: on its device, its padding told, without keys that a forward does not take."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import nn

from nemo_automodel._transformers import compat
from nemo_automodel._transformers.window_trial import passes_window
from nemo_automodel.components.attention.layout import Layout
from nemo_automodel.types import Batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """``batch`` with its tensors on ``device``; the copy from pinned memory does not wait.

    ``right_padded`` is added where the mask is still on the CPU, so that nobody has to ask the device for it.
    """
    moved = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    mask = batch.get("attention_mask")
    if "right_padded" not in batch and mask is not None and mask.device.type == "cpu":
        moved["right_padded"] = is_right_padded(mask)
    return cast(Batch, moved)


def is_right_padded(mask: torch.Tensor) -> bool:
    """Whether each row of ``mask`` [B, S] is tokens first, padding after; waits for the device it is on."""
    return mask.ndim == 2 and bool((mask[:, 1:] <= mask[:, :-1]).all())


def prepare_padded(model: nn.Module, inputs: dict[str, Any], right_padded: bool | None) -> Layout | None:
    """The layout of right-padded rows, None for any other; ``inputs``, a forward's, are completed in place.

    Causal attention of real tokens needs no mask, so none is built. The 2D mask itself stays (routers' balance leaves
    padding out by it). A mask on the device is not looked at: rows not known to be right padded get the real mask.
    """
    mask = inputs.get("attention_mask")
    if compat.attention_name(model) != "automodel" or (mask is not None and mask.ndim != 2):
        return None
    if mask is not None and right_padded is None:
        right_padded = mask.device.type == "cpu" and is_right_padded(mask)
    if mask is not None and not right_padded:
        return None
    if mask is None and "input_ids" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return Layout(None, passes_window(model), read_blocks=compat.read_blocks)


def accepted(base_forward: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """Those of ``inputs`` that ``base_forward`` takes."""
    names, open_ended = _parameters(base_forward)
    return inputs if open_ended else {k: v for k, v in inputs.items() if k in names}


@cache
def _parameters(forward: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    parameters = inspect.signature(forward).parameters
    return frozenset(parameters), any(p.kind is p.VAR_KEYWORD for p in parameters.values())
