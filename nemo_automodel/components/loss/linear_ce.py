"""Cross-entropy fused with the output head: the logits of a whole batch never exist."""

from __future__ import annotations

from typing import Any

import torch

from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.errors import ConfigError
from nemo_automodel.kernels.linear_ce import LinearCrossEntropyOptions, linear_cross_entropy
from nemo_automodel.types import IGNORE_INDEX


class FusedLinearCrossEntropy:
    """Sum of the cross-entropy of ``hidden_states @ weight.T`` over the labelled positions, in chunks of rows.

    Equal to ``MaskedCrossEntropy`` on the model's own logits, at a fraction of the memory: logits of one chunk at a
    time, none at all for ignored positions, no gradient for a frozen head, fp32 accumulation of the head's gradient.

    Args:
        ignore_index: label of a position that is not trained on.
        chunk_size: rows whose logits exist at a time; None chooses it so that they take at most 1 GiB.

    Raises:
        ConfigError: ``chunk_size`` is not a positive number.
    """

    takes_hidden_states = True

    def __init__(self, ignore_index: int = IGNORE_INDEX, chunk_size: int | None = None) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise ConfigError(
                f"loss_fn.chunk_size={chunk_size}: must be at least 1 row; leave it out to have it chosen"
            )
        self.ignore_index = ignore_index
        self.chunk_size = chunk_size

    def __call__(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        label_indices: torch.Tensor | None = None,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        tp_group: Any = None,
    ) -> torch.Tensor:
        """Return the fp32 sum over label tokens; 0 with a graph of zeros where every label is ignored.

        The logits are ``softcap(logit_scale * (hidden_states @ weight.T + bias))``. Under autocast the head runs in
        autocast's dtype, as a linear layer would.

        Args:
            hidden_states: [..., H], what the model gives to its output head.
            labels: [...] int64, pre-shifted, same leading shape.
            weight: [V, H], the head's weight (the unsharded one under FSDP2).
            bias: [V] or None.
            label_indices: [n] int64, distinct flat positions whose label is trained. Without them a GPU runs the head
                on ignored positions too, because finding them would make it wait.
            logit_scale: factor on the logits.
            logit_softcap: c in ``c * tanh(logits / c)``; None = no soft-cap.
            tp_group: process group whose ranks share the vocabulary: ``weight`` and ``bias`` are this rank's equal
                share of it, everything else is the same on each. No rank makes logits of the whole vocabulary.
        """
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        options = LinearCrossEntropyOptions(self.ignore_index, self.chunk_size, logit_scale, logit_softcap, tp_group)
        if label_indices is not None:
            label_indices = label_indices.to(hidden_states.device, non_blocking=True)
        with torch.autocast(device, enabled=False):
            hidden = hidden_states.reshape(-1, hidden_states.shape[-1]).to(dtype)
            return linear_cross_entropy(hidden, weight.to(dtype), bias, labels.reshape(-1), label_indices, options)

    def from_logits(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The same sum from ``logits`` [..., V] and ``labels`` [...], for a model that does not let its head be fused."""
        return MaskedCrossEntropy(self.ignore_index)(logits, labels)
