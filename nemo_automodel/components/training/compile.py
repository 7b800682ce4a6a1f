"""torch.compile, one decoder block at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class CompileConfig:
    """How decoder blocks are compiled. Blocks of one shape share one compilation, so that start-up stays short.

    Args:
        enabled: None = on where the device is CUDA, unless deterministic algorithms were asked for
            (``rng.deterministic``): what is compiled depends on the shapes seen before, and a resumed run starts anew.
        mode: torch.compile's ``mode``; None is its default.
        fullgraph: raise where a block cannot be captured as one graph, instead of splitting it.
        dynamic: torch.compile's ``dynamic``; None lets sizes become dynamic once they change.
    """

    enabled: bool | None = None
    mode: str | None = None
    fullgraph: bool = False
    dynamic: bool | None = None

    def wanted(self, device: torch.device) -> bool:
        """Whether blocks on ``device`` are compiled."""
        if self.enabled is None:
            return device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()
        return self.enabled

    def function(self, forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        """``forward`` compiled as blocks on ``device`` are; as it is where they are not."""
        if not self.wanted(device):
            return forward
        return torch.compile(forward, mode=self.mode, fullgraph=self.fullgraph, dynamic=self.dynamic)

    def apply(self, blocks: Sequence[nn.Module], device: torch.device) -> bool:
        """Compile each of ``blocks`` in place (parameter names stay); return whether it was done."""
        if not self.wanted(device):
            return False
        for block in blocks:
            block.compile(mode=self.mode, fullgraph=self.fullgraph, dynamic=self.dynamic)
        return True
