"""Many architectures checked, each in a process of its own with a limit on time and memory.

Processes are forked from one that has torch and transformers imported already: a start takes milliseconds, and what
one architecture breaks (a crash, a hang, a patched class) ends with it.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import logging
import os
import re
import resource
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple

import torch

from nemo_automodel._transformers.coverage import check
from nemo_automodel._transformers.coverage_cells import LATER, Row

SECONDS = 90  # of a processor, an architecture
BYTES = 8 << 30  # of address space


class _Child(NamedTuple):
    task: tuple[str, str]
    pipe: int
    """Where its rows are read."""
    stacks: IO[str]
    """What it was doing when a limit ended it."""
    start: float


def sweep(tasks: Sequence[tuple[str, str]], jobs: int) -> Iterator[Row]:
    """The ``Row`` of each (model_type, kind) of ``tasks`` as it is done, ``jobs`` at a time."""
    waiting = list(tasks)
    running: dict[int, _Child] = {}
    while waiting or running:
        while waiting and len(running) < max(jobs, 1):
            pid, child = _fork(waiting.pop(0))
            running[pid] = child
        pid, status = os.waitpid(-1, 0)
        if pid not in running:
            continue
        child = running.pop(pid)
        row = _read(child, status)
        row.seconds = round(time.monotonic() - child.start, 1)
        yield row


def _fork(task: tuple[str, str]) -> tuple[int, _Child]:
    end, other = os.pipe()
    stacks = tempfile.TemporaryFile("w+")  # noqa: SIM115 - the child writes it, closed when read
    pid = os.fork()
    if pid:
        os.close(other)
        return pid, _Child(task, end, stacks, time.monotonic())
    code = 1
    try:  # nothing of the parent may run on in the child
        os.close(end)
        _restrict(stacks)
        with os.fdopen(other, "w") as pipe:

            def report(row: Row) -> None:
                pipe.write(json.dumps(dataclasses.asdict(row)) + "\n")
                pipe.flush()

            report(check(*task, report=report))
        code = 0
    finally:
        os._exit(code)


def _restrict(stacks: IO[str]) -> None:
    for limit in (signal.SIGXCPU, signal.SIGALRM):
        faulthandler.register(limit, stacks, all_threads=False, chain=True)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 10))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    signal.alarm(10 * SECONDS)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)


def _read(child: _Child, status: int) -> Row:
    with os.fdopen(child.pipe) as pipe, child.stacks as stacks:
        lines = pipe.read().splitlines()
        stacks.seek(0)
        stack = stacks.read()
    row = Row(**json.loads(lines[-1])) if lines else Row(*child.task)
    if lines and status == 0:
        return row
    why = f"its process ended by itself (status {status})"
    if os.WIFSIGNALED(status):
        killer = signal.Signals(os.WTERMSIG(status))
        slow = killer in (signal.SIGXCPU, signal.SIGALRM)
        why = f"not done in {SECONDS} s{_innermost(stack)}" if slow else f"its process was ended by {killer.name}"
    if row.trains_plainly:  # it got as far as two ranks
        row.cells |= {column: why for column, cell in row.cells.items() if cell == LATER}
    else:
        row.cells["twin"] = why
    return row


def _innermost(stacks: str) -> str:
    """Where the last of the stacks was that ``faulthandler`` wrote (the second rank's may stand before it)."""
    _, _, last = stacks.rpartition("Stack (most recent call first)")
    frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', last)
    ours = [frame for frame in frames if "nemo_automodel" in frame[0]]
    shown = [f"{os.path.basename(path)}:{line} in {name}" for path, line, name in frames[:1] + ours[:1]]
    return f" ({', below '.join(dict.fromkeys(shown))})" if shown else ""


__all__ = ["sweep"]
