"""Plain transformers as the reference: its own loss on a batch, with nothing left to chance."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nemo_automodel._transformers import compat
from nemo_automodel._transformers import twin_fields as names
from nemo_automodel.types import IGNORE_INDEX

_DEAR = 2**20  # numbers drawn on a CPU; wider weights are of that size from the start


def without_chance(config: Any) -> None:
    """Switch off, in place, what draws random numbers while training: two runs could not be compared."""
    for part in names.parts_of(config):
        part.use_cache = False
        for name, value in names.fields_of(part).items():
            if name == "hash_seed":
                part.hash_seed = 0
            if isinstance(value, float) and any(word in name for word in ("drop", "pdrop", "jitter", "mask_time_prob")):
                setattr(part, name, 0.0)


@torch.no_grad()
def away_from_symmetry(model: nn.Module, spread: float = 0.02) -> None:
    """Move every parameter a little: zeros and ones of a fresh model hide errors, and tie what is chosen by size."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * spread)


@torch.no_grad()
def sharpen(model: nn.Module, but: Collection[str] = ()) -> None:
    """Give fresh weights the size that trained ones have, so that attention attends and a wrong scale or mask shows.

    Those called ``but`` are left as they are.
    """
    for name, parameter in model.named_parameters():
        if name not in but and parameter.is_floating_point() and (parameter.is_cuda or parameter.numel() <= _DEAR):
            spread = 0.7 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn_like(parameter) * spread)


def plain_loss(model: Any, batch: dict[str, Any], outputs: Any = None) -> Tensor | None:
    """The model's own mean loss of ``batch`` (unshifted labels), auxiliary losses included.

    Of the few models that compute it by hand, not shifting labels, the loss of the next token. ``outputs`` are those of
    its forward on the batch, where that was run already.
    """
    base = base_of(model)
    outputs = base(**batch) if outputs is None else outputs
    logits, labels = outputs.logits, shifted(batch["labels"])
    if compat.calls_loss_function(type(base)) or getattr(outputs, "aux_loss", None) is not None:
        return outputs.loss
    if logits.shape[:2] != labels.shape or compat.is_encoder_decoder(base):
        return outputs.loss
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX)


def base_of(model: Any) -> Any:
    """The model that PEFT wraps, whose own forward adds arguments; others are themselves."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def shifted(labels: Tensor) -> Tensor:
    """``labels`` [B, S] of each position as those to predict at it."""
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].contiguous()


__all__ = ["away_from_symmetry", "base_of", "plain_loss", "sharpen", "shifted", "without_chance"]
