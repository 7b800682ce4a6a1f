"""Cross-entropy over logits: the plain formula, for any model and any head."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nemo_automodel.types import IGNORE_INDEX


class MaskedCrossEntropy:
    """Sum of the cross-entropy over the labelled positions, in fp32.

    Args:
        ignore_index: label of a position that is not trained on.
    """

    takes_hidden_states = False

    def __init__(self, ignore_index: int = IGNORE_INDEX) -> None:
        self.ignore_index = ignore_index

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the fp32 sum over label tokens; 0 with a graph of zeros where every label is ignored.

        Args:
            logits: [B, S, V] (any leading shape).
            labels: [B, S] int64, pre-shifted: ``labels[b, t]`` is the token to predict at position t.
        """
        logits = logits.float().flatten(0, -2)
        return F.cross_entropy(logits, labels.flatten(), ignore_index=self.ignore_index, reduction="sum")
