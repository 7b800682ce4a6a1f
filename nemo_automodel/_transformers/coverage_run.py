"""Many architectures checked, each in a process of its own with a limit on time and memory.

Processes are forked from one that has torch and transformers imported already: a start takes milliseconds, and what
one architecture breaks (a crash, a hang, a patched class) ends with it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

from nemo_automodel._transformers.coverage import check
from nemo_automodel._transformers.coverage_cells import LATER, Row

SECONDS = 90  # of a processor, an architecture
BYTES = 8 << 30  # of address space


def sweep(tasks: Sequence[tuple[str, str]], jobs: int) -> Iterator[Row]:
    """The ``Row`` of each (model_type, kind) of ``tasks`` as it is done, ``jobs`` at a time."""
    waiting = list(tasks)
    running: dict[int, tuple[tuple[str, str], int, float]] = {}
    while waiting or running:
        while waiting and len(running) < max(jobs, 1):
            task = waiting.pop(0)
            pid, end = _fork(functools.partial(check, *task))
            running[pid] = (task, end, time.monotonic())
        pid, status = os.waitpid(-1, 0)
        if pid not in running:
            continue
        task, end, start = running.pop(pid)
        row = _read(task, end, status)
        row.seconds = round(time.monotonic() - start, 1)
        yield row


def _fork(work: Callable[..., Row]) -> tuple[int, int]:
    end, other = os.pipe()
    pid = os.fork()
    if pid:
        os.close(other)
        return pid, end
    code = 1
    try:  # nothing of the parent may run on in the child
        os.close(end)
        _restrict()
        with os.fdopen(other, "w") as pipe:

            def report(row: Row) -> None:
                pipe.write(json.dumps(dataclasses.asdict(row)) + "\n")
                pipe.flush()

            report(work(report=report))
        code = 0
    finally:
        os._exit(code)


def _restrict() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    signal.alarm(10 * SECONDS)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)


def _read(task: tuple[str, str], end: int, status: int) -> Row:
    with os.fdopen(end) as pipe:
        text = pipe.read()
    lines = text.splitlines()
    row = Row(**json.loads(lines[-1])) if lines else Row(*task)
    if lines and status == 0:
        return row
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    slow = killed in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL)
    why = f"not done in {SECONDS} s" if slow else f"its process ended by itself (status {status})"
    if row.trains_plainly:  # it got as far as two ranks
        row.cells |= {column: why for column, cell in row.cells.items() if cell == LATER}
    else:
        row.cells["twin"] = why
    return row


__all__ = ["sweep"]
