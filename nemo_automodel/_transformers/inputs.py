"""Moving a micro-batch to where the model is."""

from __future__ import annotations

from typing import cast

import torch

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
