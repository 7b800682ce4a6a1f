"""When a run steps, logs, validates and saves; the data position is the number of steps done."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from nemo_automodel.errors import ConfigError, DataError
from nemo_automodel.types import Batch, Loader


class StepScheduler:
    """Counts optimizer steps and epochs, and says what is due after each.

    Args:
        global_batch_size: Samples (or packs) per optimizer step, over all ranks. Default 64.
        local_batch_size: Samples (or packs) per micro-batch on one rank. Default 8.
        num_epochs: Passes over the data. Default 1, or as many as ``max_steps`` needs where that is given.
        max_steps: Stop after this many optimizer steps. Default: when the epochs end.
        ckpt_every_steps: Save every so many steps, and at the last. Default: at the end of each epoch.
        val_every_steps: Validate every so many steps, at the last, and wherever a checkpoint is saved, so that BEST names
            the best of them all. Default: at the end of each epoch.
        log_every_steps: Write metrics every so many steps, and at the first and last. Default 1.
        dp_size: Data-parallel ranks (given by the recipe).

    Raises:
        ConfigError: The global batch is not a multiple of ``local_batch_size * dp_size``.

    Attributes:
        step: Optimizer steps done, the running one included.
        epoch: The running epoch, from 0.
        total_steps: Planned optimizer steps; known after ``plan``.
        data_wait_s: Seconds so far that ``iterate`` waited for micro-batches.
    """

    def __init__(
        self,
        global_batch_size: int = 64,
        local_batch_size: int = 8,
        num_epochs: int | None = None,
        max_steps: int | None = None,
        ckpt_every_steps: int | None = None,
        val_every_steps: int | None = None,
        log_every_steps: int = 1,
        dp_size: int = 1,
    ):
        if global_batch_size % (local_batch_size * dp_size):
            raise ConfigError(
                f"step_scheduler.global_batch_size={global_batch_size}: not a multiple of local_batch_size "
                f"{local_batch_size} x {dp_size} data-parallel rank(s) = {local_batch_size * dp_size}; write "
                f"global_batch_size: {max(1, global_batch_size // (local_batch_size * dp_size)) * local_batch_size * dp_size}"
            )
        self.global_batch_size = global_batch_size
        self.local_batch_size = local_batch_size
        self.num_epochs = num_epochs if num_epochs is not None or max_steps is not None else 1
        self.max_steps = max_steps
        self.ckpt_every_steps = ckpt_every_steps
        self.val_every_steps = val_every_steps
        self.log_every_steps = log_every_steps
        self.step = 0
        self.epoch = 0
        self.total_steps = 0
        self.data_wait_s = 0.0
        self._epoch_starts = [0]

    def plan(self, loader: Loader) -> None:
        """Count the steps of every epoch, packing included, so that the planned steps are those executed.

        Raises:
            ConfigError: ``loader`` is not a ``types.Loader``.
            DataError: An epoch has no step.
        """
        if not (hasattr(loader, "steps") and hasattr(loader, "steps_per_epoch")):
            raise ConfigError(
                f"dataloader._target_: a {type(loader).__name__} is not a nemo_automodel.types.Loader (no steps, "
                "steps_per_epoch), which is what makes the order of the data resumable; leave _target_ out"
            )
        while self.num_epochs is None or len(self._epoch_starts) <= self.num_epochs:
            if self.max_steps is not None and self._epoch_starts[-1] >= self.max_steps:
                break
            steps = loader.steps_per_epoch(len(self._epoch_starts) - 1)
            if steps < 1:
                raise DataError(
                    f"epoch {len(self._epoch_starts) - 1} of the data has no whole global batch to train on"
                )
            self._epoch_starts.append(self._epoch_starts[-1] + steps)
        self.total_steps = min(self._epoch_starts[-1], self.max_steps or self._epoch_starts[-1])

    def iterate(self, loader: Loader) -> Iterator[list[Batch]]:
        """This rank's micro-batches, one optimizer step at a time, from ``step`` to ``total_steps``."""
        for epoch in range(self.epoch, len(self._epoch_starts) - 1):
            if self.step >= self.total_steps:
                return
            self.epoch = epoch
            for batches in self._timed(loader.steps(epoch, first_step=self.step - self._epoch_starts[epoch])):
                self.step += 1
                yield batches
                if self.step >= self.total_steps:
                    return

    def _timed(self, epoch: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
        steps = iter(epoch)
        while True:
            asked = time.monotonic()
            batches = next(steps, None)
            self.data_wait_s += time.monotonic() - asked
            if batches is None:
                return
            yield batches

    @property
    def is_last_step(self) -> bool:
        """Whether no step follows the running one."""
        return self.step >= self.total_steps

    @property
    def is_last_step_of_epoch(self) -> bool:
        """Whether the running step is its epoch's last, or the run's."""
        return self.is_last_step or self.step == self._epoch_starts[self.epoch + 1]

    @property
    def should_log(self) -> bool:
        """Whether the running step's metrics are written."""
        return self.step == 1 or self._due(self.log_every_steps)

    @property
    def should_validate(self) -> bool:
        """Whether validation follows the running step."""
        return self._due(self.val_every_steps) or self.should_save

    @property
    def should_save(self) -> bool:
        """Whether a checkpoint follows the running step."""
        return self._due(self.ckpt_every_steps)

    def _due(self, every: int | None) -> bool:
        return self.is_last_step or (self.is_last_step_of_epoch if every is None else self.step % every == 0)

    def state_dict(self) -> dict[str, Any]:
        """Steps done and the epoch they ended in."""
        return {"step": self.step, "epoch": self.epoch, "total_steps": self.total_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the step that was saved."""
        self.step, self.epoch = state_dict["step"], state_dict["epoch"]
