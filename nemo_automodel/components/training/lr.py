"""The learning-rate schedule: linear warm-up, then a decay that ends on its end value at the last step."""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from nemo_automodel.errors import ConfigError


def warmup_decay(
    optimizer: Optimizer,
    total_steps: int,
    decay: Literal["cosine", "linear", "constant"] = "cosine",
    warmup_steps: int | None = None,
    min_lr_ratio: float = 0.1,
) -> LambdaLR:
    """Linear warm-up to the optimizer's lr, then ``decay`` to ``min_lr_ratio`` of it.

    The last optimizer step runs at exactly ``lr * min_lr_ratio`` (for ``constant``, at ``lr``).

    Args:
        optimizer: Its ``lr`` is the peak.
        total_steps: Optimizer steps of the whole run (given by the recipe).
        decay: ``cosine`` (default), ``linear`` or ``constant``.
        warmup_steps: Steps until the peak. Default 3% of the run, rounded down.
        min_lr_ratio: End value over peak, in [0, 1]. Default 0.1.

    Raises:
        ConfigError: The warm-up is longer than the run.
    """
    warmup = int(0.03 * total_steps) if warmup_steps is None else warmup_steps
    if warmup > total_steps:
        raise ConfigError(
            f"lr_scheduler.warmup_steps={warmup}: longer than the run of {total_steps} steps; write at most {total_steps}"
        )

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup + 1) / max(1, total_steps - warmup))
        if decay == "constant":
            return 1.0
        shape = 0.5 * (1 + math.cos(math.pi * progress)) if decay == "cosine" else 1 - progress
        return min_lr_ratio + (1 - min_lr_ratio) * shape

    return LambdaLR(optimizer, factor)
