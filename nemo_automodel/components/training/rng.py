"""Randomness as a function: what a step draws depends on (seed, step, rank) and on nothing that ran before it."""

from __future__ import annotations

import os
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
        deterministic: Use only algorithms that give the same bits each time, so that a run resumed on a GPU repeats the
            uninterrupted one bit for bit; an operation that has none fails. Blocks are then not compiled unless
            ``compile.enabled`` says so, and attention's backward is slower. Default false.
        rank: This process's rank (given by the recipe).
    """

    def __init__(self, seed: int = 42, ranked: bool = True, deterministic: bool = False, rank: int = 0):
        self.seed = seed
        self._stream = rank if ranked else 0
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product runs on a GPU
            torch.use_deterministic_algorithms(True)
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
