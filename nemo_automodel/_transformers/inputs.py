"""Moving a micro-batch to where the model is."""

from __future__ import annotations

from typing import cast

import torch

from nemo_automodel.types import Batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """``batch`` with its tensors on ``device``; the copy from pinned memory does not wait."""
    return cast(
        Batch,
        {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()},
    )
