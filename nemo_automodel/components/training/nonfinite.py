"""A loss or a gradient that is NaN or infinite moves no weight, on any rank: the step is left out, or the run stops.

The mean loss and the gradient norm are sums over all ranks, so all of them decide alike. On a GPU, an optimizer that can
leave a step out by itself (torch's fused ones: the ``found_inf`` of mixed-precision training) is told by a flag that
never leaves the device, and the host reads that flag one step later, when it is there already: nothing waits. Any other
optimizer is stepped only when the host has read the flag, which costs the lead it has over the GPU, once a step.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nemo_automodel.errors import ConfigError, NonFiniteError
from nemo_automodel.types import Batch, TrainState

logger = logging.getLogger(__name__)

_ROWS_SHOWN = 16


@dataclass
class _Step:
    """A step whose flag the host has not read yet, and what was before it."""

    number: int
    flags: torch.Tensor  # [2]: mean loss and gradient norm, on their way to the host
    copied: torch.cuda.Event | None
    losses: list[torch.Tensor]
    rows: list[list[int]]
    schedule: Any
    lr_scheduler: Any
    groups: list[dict[str, Any]]

    def values(self) -> tuple[float, float]:
        if self.copied is not None:
            self.copied.synchronize()
        loss, grad_norm = self.flags.tolist()
        return loss, grad_norm


class NonFiniteGuard:
    """Steps the optimizer, but never with a loss or a gradient that is not finite.

    Args:
        policy: ``stop`` saves the state before that step and ends the run with an error that names the step and the
            rows; ``skip`` leaves the step out, says so, and goes on. Default ``stop``.
        max_skipped: With ``skip``: how many steps in a row; one more stops the run. Default 10.
        env: The process environment (given by the recipe); None for a single process.

    Raises:
        ConfigError: An unknown policy, or ``max_skipped`` less than 1.
    """

    def __init__(self, policy: Literal["stop", "skip"] = "stop", max_skipped: int = 10, env: Any = None):
        if policy not in ("stop", "skip"):
            raise ConfigError(f"non_finite.policy={policy}: unknown; write stop or skip")
        if max_skipped < 1:
            raise ConfigError(f"non_finite.max_skipped={max_skipped}: at least one step is skipped; write 1 or more")
        self.may_skip = max_skipped if policy == "skip" else 0
        self.skipped = 0
        self._in_a_row = 0
        self._env = env
        self._unread: _Step | None = None

    def protect(self, state: TrainState, save: Callable[[TrainState], Any]) -> None:
        """Say what is trained, after it is restored, and how to save it when a run has to stop (returns where, if it is)."""
        self._state, self._save = state, save
        self._schedule_before = copy.deepcopy(state.schedule.state_dict())
        optimizer = state.optimizer
        devices = {p.device.type for group in optimizer.param_groups for p in group["params"]}
        self.reads_late = devices == {"cuda"} and bool(getattr(optimizer, "_step_supports_amp_scaling", False))

    def step(
        self, loss: torch.Tensor, grad_norm: torch.Tensor, losses: list[torch.Tensor], batches: Sequence[Batch]
    ) -> None:
        """``optimizer.step()``, unless ``loss`` or ``grad_norm`` is NaN or infinite; every rank calls it.

        Args:
            loss, grad_norm: Scalars, the same on all ranks.
            losses: This rank's micro-batches: a scalar each.
            batches: The micro-batches, for the rows in them.

        Raises:
            NonFiniteError: One was not, in this step or the one before, and the policy is to stop.
        """
        optimizer = self._state.optimizer
        grad_norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
        values = torch.stack([loss.double(), grad_norm.to(loss.device).double()])
        if self.reads_late:
            self.settle()
            self._unread = self._describe(values, losses, batches)
            optimizer.found_inf = (~values.isfinite()).any().float()  # type: ignore[attr-defined]
            optimizer.step()
        else:
            self._unread = self._describe(values, losses, batches)
            if self.settle():
                optimizer.step()
        for name in ("grad_scale", "found_inf"):  # of this step: the former from the clipping
            vars(optimizer).pop(name, None)
        self._schedule_before = copy.deepcopy(self._state.schedule.state_dict())

    def settle(self) -> bool:
        """Wait until the last step is known to be sound, before its result is kept; returns whether it was.

        Raises:
            NonFiniteError: As ``step`` does.
        """
        step, self._unread = self._unread, None
        if step is None:
            return True
        values = torch.tensor(step.values())
        if bool(values.isfinite().all()):
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        text = f"step {step.number}: {self._where(step)}"
        if self._in_a_row > self.may_skip:
            self._stop(step, text)
        self.skipped += 1
        logger.warning("%s; no weight was changed (%d step(s) skipped so far)", text, self.skipped)
        return False

    def _describe(self, values: torch.Tensor, losses: list[torch.Tensor], batches: Sequence[Batch]) -> _Step:
        state, copied = self._state, None
        if values.is_cuda:
            values = torch.empty(2, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        return _Step(
            number=state.schedule.step,  # type: ignore[attr-defined]
            flags=values,
            copied=copied,
            losses=losses,
            rows=[list(batch.get("sample_ids", [])) for batch in batches],
            schedule=self._schedule_before,
            lr_scheduler=copy.deepcopy(state.lr_scheduler.state_dict()),
            groups=[_own(group) for group in state.optimizer.param_groups],
        )

    def _stop(self, step: _Step, text: str) -> None:
        """Put the run back before ``step``, whose update was left out, save it, and end it."""
        state = self._state
        state.schedule.load_state_dict(step.schedule)
        state.lr_scheduler.load_state_dict(step.lr_scheduler)
        for group, before in zip(state.optimizer.param_groups, step.groups, strict=True):
            group.update(before)
        state.optimizer.zero_grad()
        kept = self._save(state)
        times = f", as in the {self._in_a_row - 1} step(s) before it" if self._in_a_row > 1 else ""
        raise NonFiniteError(
            f"{text}{times}; no weight was changed{f' and the state before it is in {kept}' if kept else ''}. Look at "
            "those rows; train with a lower clip_grad_norm.max_norm, or with non_finite.policy: skip to leave such steps "
            "out; or start anew with a lower optimizer.lr"
        )

    def _where(self, step: _Step) -> str:
        """What was not finite, and in which rows of which rank."""
        loss, grad_norm = step.values()
        bad = [not bool(value.isfinite()) for value in step.losses]
        mine = [
            (float(value), rows) for value, rows, at_fault in zip(step.losses, step.rows, bad, strict=True) if at_fault
        ]
        found = self._gather(mine)
        if any(found):
            where = [f"rank {r}: loss {v:g} in rows {_shown(rows)}" for r, part in enumerate(found) for v, rows in part]
            return "; ".join(where[:_ROWS_SHOWN])
        rows = self._gather([row for part in step.rows for row in part])
        where = [f"rank {rank}: {_shown(part)}" for rank, part in enumerate(rows)]
        return (
            f"loss {loss:g} and gradient norm {grad_norm:g}, though each micro-batch's loss is finite; rows of the step: "
            + "; ".join(where[:_ROWS_SHOWN])
        )

    def _gather(self, value: Any) -> list[Any]:
        return [value] if self._env is None or self._env.world_size == 1 else self._env.gather(value)


def _own(group: dict[str, Any]) -> dict[str, Any]:
    """The settings of a parameter group, which an lr_scheduler may change."""
    settings = {key: value for key, value in group.items() if key != "params"}
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in settings.items()}


def _shown(rows: list[int]) -> str:
    more = f" and {len(rows) - _ROWS_SHOWN} more" if len(rows) > _ROWS_SHOWN else ""
    return ", ".join(map(str, rows[:_ROWS_SHOWN])) + more
