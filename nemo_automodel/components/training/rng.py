"""Randomness as a function: what a step draws depends on (seed, step, rank) and on nothing that ran before it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class StatefulRNG:
    """Seeds Python, NumPy and torch (every device), once for building and again before each step.

    Everything that is built (weights, adapters) is drawn from ``seed`` alone and so is equal on every rank. Before
    each optimizer step ``seed_step`` starts the generators anew from (seed, step, rank): a resumed run draws what the
    uninterrupted one would have drawn, on any number of steps before it.

    Args:
        seed: The seed of the run: weights, data order, dropout. Default 42.
        ranked: Whether ranks draw different dropout masks. Default true.
        rank: This process's rank (given by the recipe).
    """

    def __init__(self, seed: int = 42, ranked: bool = True, rank: int = 0):
        self.seed = seed
        self._stream = rank if ranked else 0
        _seed_all(seed)

    def seed_step(self, step: int) -> None:
        """Start the generators of optimizer step ``step`` (from 1)."""
        _seed_all(int(np.random.SeedSequence([self.seed, step, self._stream]).generate_state(1)[0]))

    def state_dict(self) -> dict[str, Any]:
        """The seed; there is no other state."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the saved run's seed."""
        self.seed = state_dict["seed"]


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
