"""Activation checkpointing: what a block's backward computes again instead of keeping it from forward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nemo_automodel.errors import ConfigError

MODES = ("off", "selective", "full")
_DEAR = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm", "convolution")
_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
)


def require_mode(mode: str) -> None:
    """Raise ConfigError where ``mode`` is none of ``MODES`` and not ``auto``."""
    if mode not in (*MODES, "auto"):
        raise ConfigError(f"distributed.activation_checkpointing={mode}: write one of {', '.join(MODES)}, auto")


def checkpoint_activations(blocks: Sequence[nn.Module], mode: str) -> None:
    """Let the forward of each of ``blocks`` keep less for its backward, in place; names of parameters stay.

    Args:
        blocks: Decoder blocks, not yet compiled or sharded.
        mode: ``off``; ``selective`` keeps the outputs of matrix products and attention and computes the rest again;
            ``full`` keeps a block's inputs only (Chen et al. 2016, arXiv 1604.06174).
    """
    if mode == "off":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in blocks:
        block.forward = _Recomputed(block, options)


def keep_activations(blocks: Sequence[nn.Module]) -> None:
    """Undo ``checkpoint_activations`` on each of ``blocks``, in place."""
    for block in blocks:
        if isinstance(block.__dict__.get("forward"), _Recomputed):
            del block.forward


class _Recomputed:
    """The forward of a block's class, whichever that is by then, run again in backward where gradients are wanted."""

    def __init__(self, block: nn.Module, options: dict[str, Any]):
        self.block, self.options = block, options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.block).forward
        if not torch.is_grad_enabled():
            return forward(self.block, *args, **kwargs)
        return checkpoint(forward, self.block, *args, **self.options, **kwargs)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keeps(op) else CheckpointPolicy.PREFER_RECOMPUTE


def keeps(op: Any) -> bool:
    """Whether selective checkpointing keeps what operator ``op`` makes."""
    name = getattr(op, "_schema", None)
    parts = str(name.name).split("::") if name is not None else ("", "")
    if parts[0] == "aten" and parts[-1] in (*_DEAR, *_ATTENTION):
        return True
    return parts[0] in ("automodel", "torch_attn")  # our own operators and the variable-length attention kernel
