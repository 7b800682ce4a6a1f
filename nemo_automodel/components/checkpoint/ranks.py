"""Agreement between ranks: either every rank goes on, or every rank raises the same error."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from nemo_automodel.errors import AutoModelError, CheckpointError

T = TypeVar("T")

_TIMEOUT = timedelta(hours=24)


class Ranks:
    """The processes that save together.

    Args:
        env: The process environment (``.rank``, ``.world_size``, ``.barrier()``), or None for a single process.
    """

    def __init__(self, env: Any | None):
        self._env = env
        self.group: Any = None  # the process group that they agree through; None until ``connect``, or for one process
        self.rank: int = 0 if env is None else env.rank
        self.world_size: int = 1 if env is None else env.world_size
        self.is_main = self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        self.connect()
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def connect(self) -> None:
        """Make the ranks' own connections, unless they are there; every rank calls it, on the main thread.

        Through the hosts, apart from what training sends, and patient: a rank may be writing for long.
        """
        if self.group is None and self.world_size > 1:
            assert self._env is not None
            self._env.barrier()
            self.group = dist.new_group(backend="gloo", timeout=_TIMEOUT)

    def send(self, tensor: torch.Tensor, rank: int) -> Callable[[], None]:
        """Start sending ``tensor`` (contiguous, on the CPU) to ``rank``; the call that is returned waits for its end."""
        work = dist.isend(tensor, group=self.group, group_dst=rank)
        return lambda: _finish(work, tensor)

    def receive(self, tensor: torch.Tensor, rank: int) -> Callable[[], None]:
        """Start receiving into ``tensor``, as ``send``."""
        work = dist.irecv(tensor, group=self.group, group_src=rank)
        return lambda: _finish(work, tensor)

    def together(self, what: str, step: Callable[[], T]) -> T:
        """Run ``step`` on every rank; where it fails on one, all raise that rank's error.

        Raises:
            CheckpointError: ``what`` failed somewhere; the message names the cause and the rank.
        """
        result, error, cause = None, None, None
        try:
            result = step()
        except (Exception, CheckpointException) as caught:  # the latter is a BaseException
            error, cause = (_rank_of(caught, self.rank), _describe(caught)), caught
        for failed in self.gather(error):
            if failed is not None:
                where = f" on rank {failed[0]}" if self.world_size > 1 else ""
                raise CheckpointError(f"{what} failed{where}: {failed[1]}") from cause
        return result  # type: ignore[return-value]

    def on_main(self, what: str, step: Callable[[], T]) -> T:
        """Run ``step`` on rank 0 alone and hand its result (picklable) to every rank; its error is raised by all."""
        result = self.together(what, lambda: step() if self.is_main else None)
        return self.gather(result)[0] if self.world_size > 1 else result  # type: ignore[return-value]


def _finish(work: Any, tensor: torch.Tensor) -> None:
    """Wait for ``work``, which needs ``tensor`` until then."""
    work.wait()


def _rank_of(error: BaseException, here: int) -> int:
    """The rank at fault: DCP raises the same on all, and says in it where it was."""
    return min(error.failures, default=here) if isinstance(error, CheckpointException) else here


def _describe(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # one entry a failed rank; the first says it
        failures = [failure[0] if isinstance(failure, tuple) else failure for failure in error.failures.values()]
        return _describe(failures[0]) if failures else "the distributed checkpoint could not be written or read"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'file'}: {error.strerror}"
    if isinstance(error, AutoModelError):
        return str(error)
    return f"{type(error).__name__}: {error}"
