"""Saving while training goes on: copies of the state on the host, and the thread that writes them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemo_automodel.components.checkpoint.ranks import Ranks


class HostCopies:
    """Copies of tensors in host memory, which is used again by the next save. A tensor copied twice is copied once."""

    def __init__(self) -> None:
        self._free: dict[Any, list[Tensor]] = {}
        self._used: list[tuple[Any, Tensor]] = []
        self._made: dict[Any, Tensor] = {}
        self._sources: list[Tensor] = []  # kept, so that no address is used twice
        self._on_device = False

    def begin(self) -> None:
        """Forget the copies of the save before."""
        for key, buffer in self._used:
            self._free.setdefault(key, []).append(buffer)
        self._used, self._made, self._sources, self._on_device = [], {}, [], False

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor``, complete after ``end``."""
        tensor = tensor.detach()
        source = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and source in self._made:
            return self._made[source]
        key = (tensor.dtype, tensor.shape, tensor.device.type)
        free = self._free.get(key)
        pinned = tensor.device.type == "cuda"
        buffer = free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        buffer.copy_(tensor, non_blocking=pinned)
        self._on_device |= pinned
        self._used.append((key, buffer))
        self._made[source] = buffer
        self._sources.append(tensor)
        return buffer

    def end(self) -> None:
        """Wait for the copies."""
        if self._on_device:
            torch.cuda.synchronize()
        self._sources.clear()


class _Job(threading.Thread):
    """``error`` is what it raised."""

    def __init__(self, run: Callable[[], None]):
        # A daemon: a rank that fails must end, and not wait for others that may be gone (one alone does: recipes/ending.py)
        super().__init__(name="checkpoint", daemon=True)
        self._job = run
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._job()
        except BaseException as error:
            self.error = error


class Background:
    """One job at a time, on a thread and connections of its own.

    Args:
        env: The process environment, or None for a single process.
    """

    def __init__(self, env: Any | None) -> None:
        self._ranks = Ranks(env)
        self._thread: _Job | None = None

    def start(self, job: Callable[[Ranks], None]) -> None:
        """Run ``job``, whose ranks agree through connections of their own; every rank calls it, on the main thread."""
        self.wait()
        self._ranks.connect()
        self._thread = _Job(lambda: job(self._ranks))
        self._thread.start()

    def wait(self) -> None:
        """Wait for the job; raises what it raised, once."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def check(self) -> None:
        """Raise what the job has raised by now, once."""
        if self._thread is not None and not self._thread.is_alive():
            thread, self._thread = self._thread, None
            if thread.error is not None:
                raise thread.error
