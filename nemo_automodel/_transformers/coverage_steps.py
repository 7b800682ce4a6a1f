"""Training a twin for a few steps, by plain transformers and by this package, and what is compared afterwards."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nemo_automodel._transformers import compat
from nemo_automodel._transformers.coverage_cells import Differs
from nemo_automodel._transformers.forward import forward_loss
from nemo_automodel._transformers.plain import base_of, plain_loss, shifted
from nemo_automodel._transformers.twin_batch import image_batch, takes_images, text_batch
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from nemo_automodel.types import IGNORE_INDEX

STEPS = 3
TOLERANCE = 1e-4
"""Relative difference of losses, and of logits over their largest, that counts as the same in float32."""


def batch_for(model: Any, kind: str, seed: int = 0) -> dict[str, Any]:
    """Text, with images for a model that sees or that cannot do without them."""
    batch = _padded(text_batch(seed=seed))
    if kind == "causal" or not takes_images(model):
        try:
            with torch.no_grad():
                model(**batch)
            return batch
        except (RuntimeError, ValueError, TypeError):
            if "pixel_values" not in inspect.signature(type(model).forward).parameters:
                raise
    batch = image_batch(model, seed=seed)
    _require_sight(model, batch)
    return batch


@torch.no_grad()
def _require_sight(model: Any, batch: dict[str, Any]) -> None:
    """Raise Differs where other pixels leave the loss as it is."""
    model.eval()
    pixels = {k: v for k, v in batch.items() if v.is_floating_point()}
    other = {k: v + torch.linspace(-1, 1, v.numel()).reshape(v.shape) for k, v in pixels.items()}
    if plain_loss(model, batch) == plain_loss(model, {**batch, **other}):
        raise Differs("other pixels do not change the loss")


def _padded(batch: dict[str, Any]) -> dict[str, Any]:
    """The last quarter of the last row as padding."""
    end = batch["input_ids"].shape[1] * 3 // 4
    batch["attention_mask"][-1, end:] = 0
    batch["labels"][-1, end:] = IGNORE_INDEX
    return batch


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over what is trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-4)  # eps: rounding of a gradient that is 0 must not count


def train_plain(model: Any, batch: dict[str, Any]) -> list[float]:
    """The losses of three steps by transformers' own forward, or PEFT's; Differs where one is not a number."""
    model.train()
    optimizer, losses = optimizer_for(model), []
    for _ in range(STEPS):
        loss = plain_loss(model, batch)
        if loss is not None and not loss.requires_grad:  # reversible layers pass on only what their input asks for
            model.enable_input_require_grads()
            loss = plain_loss(model, batch)
        if loss is None or not torch.isfinite(loss):
            raise Differs(f"transformers' own loss is {loss}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def prepared(model: Any, batch: dict[str, Any]) -> Any:
    """``batch`` as the recipes hand it to ``forward_loss``."""
    decodes = compat.is_encoder_decoder(model)  # from what it is told so far: its labels are not shifted
    labels = batch["labels"] if decodes else shifted(batch["labels"])
    return with_labels({k: v for k, v in batch.items() if k != "labels"}, labels)


def train_ours(model: Any, batch: dict[str, Any]) -> list[float]:
    """The losses of three steps by ``forward_loss``."""
    model.train()
    ours = prepared(model, batch)
    optimizer, losses, loss_fn = optimizer_for(model), [], loss_function()
    for _ in range(STEPS):
        ce_sum, aux = forward_loss(model, ours, loss_fn)
        loss = ce_sum / ours["num_label_tokens"] + aux
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def loss_function() -> Any:
    """The recipes' default loss."""
    return FusedLinearCrossEntropy()


def with_labels(inputs: dict[str, Any], labels: Tensor) -> Any:
    """A ``types.Batch`` of ``inputs`` and shifted ``labels``."""
    indices = (labels.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)
    return {**inputs, "labels": labels, "label_indices": indices, "num_label_tokens": indices.numel()}


def sum_of_losses(model: Any, ids: Tensor) -> Tensor:
    """The loss of a document ``ids`` [1, S] by itself, summed over its tokens."""
    logits = model(input_ids=ids).logits.float()
    return F.cross_entropy(logits[0], shifted(ids)[0], ignore_index=IGNORE_INDEX, reduction="sum")


def same_losses(ours: list[float], plain: list[float]) -> None:
    """Raise Differs where a step's losses differ."""
    for step, (mine, theirs) in enumerate(zip(ours, plain, strict=True)):
        if not abs(mine - theirs) <= TOLERANCE * abs(theirs):
            raise Differs(f"loss of step {step}: {mine:.6f}, plain transformers {theirs:.6f}")


def same_tensors(ours: nn.Module, plain: nn.Module, what: str) -> None:
    """Raise Differs where a tensor has another name or is not bit for bit the same."""
    mine, theirs = ours.state_dict(), plain.state_dict()
    if mine.keys() != theirs.keys():
        raise Differs(
            f"{what}: other tensors than transformers' ({', '.join(sorted(mine.keys() ^ theirs.keys())[:3])})"
        )
    for name, tensor in mine.items():
        if not torch.equal(tensor, theirs[name]):
            raise Differs(f"{what}: {name} is not bit for bit what transformers has")


def adapter_of(model: nn.Module) -> dict[str, Tensor]:
    """The adapter tensors that PEFT's ``model`` holds, named as in its files."""
    return {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if ".lora_" in n}


def lost(stored: dict[str, Tensor], model: nn.Module) -> str | None:
    """The first of the adapter tensors ``stored`` that ``model`` does not hold as they are."""
    held = adapter_of(model)
    return next((name for name, t in stored.items() if name not in held or not torch.equal(held[name], t)), None)


def same_logits(ours: Any, plain: Any, batch: dict[str, Any]) -> None:
    """Raise Differs where the two models' logits differ."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if compat.is_encoder_decoder(ours):
        inputs["decoder_input_ids"] = batch["labels"].clamp(min=0)
    logits = []
    for model in (ours, plain):
        model.eval()
        with torch.no_grad():
            logits.append(base_of(model)(**inputs).logits.float())
    gap = ((logits[0] - logits[1]).abs().max() / logits[1].abs().max()).item()
    if not gap <= TOLERANCE:
        raise Differs(f"logits differ by {gap:.1e} of the largest")


__all__ = [
    "TOLERANCE",
    "adapter_of",
    "batch_for",
    "loss_function",
    "lost",
    "optimizer_for",
    "prepared",
    "same_logits",
    "same_losses",
    "same_tensors",
    "sum_of_losses",
    "train_ours",
    "train_plain",
    "with_labels",
]
