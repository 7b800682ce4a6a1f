"""The process this rank is: its place among the others, its device, and the process group between them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nemo_automodel.components.distributed.placement import adopt_slurm
from nemo_automodel.components.distributed.signals import StopSignals
from nemo_automodel.components.distributed.watch import Watch
from nemo_automodel.errors import EXIT_FAULT, EXIT_PREEMPTED, AutoModelError, ConfigError, StoppedError, Terminated

logger = logging.getLogger(__name__)

_HOST_TIMEOUT = timedelta(hours=24)
"""How long ranks wait for rank 0 to download and tokenise: a host-side wait, not a collective that should trip."""


class DistEnv:
    """Joins (or makes, for a single process) the process group and picks this rank's device.

    Ranks come from the variables that torchrun sets (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``), or from those of
    ``srun`` with a task for each rank. Without them the process is rank 0 of 1 and still gets a process group, so that
    one device runs the code of many.

    Args:
        backend: torch.distributed backend. Default: ``nccl`` on CUDA, ``gloo`` on the CPU.
        timeout_minutes: How long a collective may take before the run is declared stuck. Default 10.
        device: ``cuda`` or ``cpu``. Default: CUDA where it is available.
        stop_signals: Signals that end training after the running step, which is then saved. Default SIGTERM, SIGUSR1
            and SIGINT (Ctrl-C); an empty list leaves every signal its own meaning.

    Attributes:
        rank, local_rank, world_size: This process among all, on its host, and how many there are.
        device: Where this rank computes.
        is_main: Whether this is rank 0, the one that prints and writes.
    """

    def __init__(
        self,
        backend: str | None = None,
        timeout_minutes: float = 10.0,
        device: str | None = None,
        stop_signals: Sequence[str] = ("SIGTERM", "SIGUSR1", "SIGINT"),
    ):
        adopt_slurm()
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.is_main = self.rank == 0
        self.device = self._pick_device(device)
        backend = backend or ("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        self._owns_group = not dist.is_initialized()
        if self._owns_group:
            timeout = timedelta(minutes=timeout_minutes)
            if "RANK" in os.environ:
                dist.init_process_group(backend, timeout=timeout)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        self._host_group = dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT)
        self._signals = StopSignals(stop_signals, announce=self.is_main)
        self._stopping = False
        self._watch = Watch(self.rank, self.world_size, timeout_minutes * 60)
        if self.world_size > 1:
            self._flag_group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
            self._watch.connect(self.broadcast)

    def _pick_device(self, requested: str | None) -> torch.device:
        kind = requested or ("cuda" if torch.cuda.is_available() else "cpu")
        if kind == "cpu":
            return torch.device("cpu")
        if kind != "cuda":
            raise ConfigError(f"dist_env.device={requested}: unknown device; write cuda or cpu")
        index = self.local_rank
        if torch.cuda.device_count() == 1 and os.environ.get("SLURM_LOCALID") == str(index):
            index = 0  # a rank that srun has started may be shown its own GPU alone
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"dist_env.device=cuda: local rank {self.local_rank} has no GPU, {torch.cuda.device_count()} visible; "
                "start fewer processes per node, or set dist_env.device: cpu"
            )
        if self.world_size == 1 and torch.cuda.device_count() > 1:
            logger.warning(
                "1 of %d visible GPUs is used; `automodel finetune` uses all of them (or as many as --nproc-per-node says)",
                torch.cuda.device_count(),
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)

    def barrier(self) -> None:
        """Wait for every rank, on the host and for as long as it takes."""
        dist.barrier(group=self._host_group)

    @contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Rank 0 runs the body first (it downloads and fills caches), then all others at once; each may take its time.

        Raises:
            StoppedError: On the other ranks, where the body failed on rank 0; with rank 0's exit code.
        """
        self._watch.patient = True
        yield from self._rank_zero_first()
        self.barrier()  # on the host: a rank that is slower here must not use up the time of the next collective
        self._watch.patient = False

    def _rank_zero_first(self) -> Iterator[None]:
        if self.is_main:
            failure: int | None = EXIT_FAULT
            try:
                yield
                failure = None
            except AutoModelError as error:
                failure = error.exit_code
                raise
            except Terminated:
                failure = EXIT_PREEMPTED
                raise
            finally:
                self.broadcast(failure)
            return
        exit_code = self.broadcast(None)
        if exit_code is not None:
            stopped = StoppedError("stopped, because rank 0 failed; its message says why")
            stopped.exit_code = exit_code
            raise stopped
        yield

    def broadcast(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank (any picklable object)."""
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self._host_group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value`` (any picklable object), in rank order, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._host_group)
        return values

    def defer_signals(self) -> None:
        """From now on a stop signal waits for ``stop_requested``; until then it ends the program."""
        self._signals.defer()

    def stop_requested(self, step: int | None = None) -> bool:
        """Whether some rank got a stop signal: the same answer on all, which call this together, at a step's end.

        They agree on the host, which costs less than a millisecond and does not wait for the device.

        Args:
            step: Optimizer steps done, for what is said of a rank that fails.
        """
        if step is not None:
            self._watch.step = step
        if not self._stopping:
            self._stopping = self._signals.received is not None
            if self.world_size > 1:
                flag = torch.tensor(int(self._stopping))
                dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._flag_group)
                self._stopping = bool(flag)
        return self._stopping

    def shutdown(self) -> None:
        """Leave the process group, if this object joined it, and give the signals their meaning back."""
        self._watch.finish()
        if not self._stopping:  # else a second one could still cut off what the exit does
            self._signals.restore()
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()
