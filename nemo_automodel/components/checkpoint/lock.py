"""One run at a time saves in a directory: rank 0 holds a lock on its ``.lock``, which the kernel ends with the process."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
import weakref
from pathlib import Path
from weakref import WeakValueDictionary

from nemo_automodel.components.checkpoint.ranks import Ranks
from nemo_automodel.errors import DirectoryInUseError

logger = logging.getLogger(__name__)

_NAME = ".lock"
_WAIT_S = 10.0
"""How long a run that ends may still hold the directory: a requeued job may start before the old one is gone."""


class DirectoryLock:
    """What keeps the runs of other processes out of ``root``; within this process it is shared.

    Args:
        root: Where checkpoints are saved; the file in it stays there.
    """

    def __init__(self, root: Path):
        self._root = root
        self._taken = False
        self._held: _Held | None = None

    def take(self, ranks: Ranks, create: bool = True) -> None:
        """Hold ``root`` until ``release``, or until nothing refers to this; every rank calls it.

        Where the file system has no locks, that is said and the run goes on without. ``create``: where there is no
        ``root`` yet; else there is nothing to hold then.

        Raises:
            DirectoryInUseError: Another run holds it.
        """
        if self._taken:
            return
        problem = ranks.on_main(f"Locking {self._root}", lambda: self._take(create))
        if problem is not None:
            raise DirectoryInUseError(problem)
        self._taken = True

    def release(self) -> None:
        """Let other runs save there."""
        self._taken, self._held = False, None

    def _take(self, create: bool) -> str | None:
        file = self._root / _NAME
        if not create and not self._root.is_dir():
            return None
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._held = _hold(file)
        except BlockingIOError:
            return (
                f"another run is saving in {self._root}{_told_by(file)}; write another checkpoint.checkpoint_dir "
                f"(or remove {file} if that run's host is gone)"
            )
        except (OSError, ImportError) as error:
            reason = getattr(error, "strerror", None) or error
            logger.info("%s cannot be locked (%s): see to it that no other run saves there.", self._root, reason)
        return None


class _Held:
    """A locked file, unlocked when nothing refers to this."""

    def __init__(self, descriptor: int):
        self.close = weakref.finalize(self, os.close, descriptor)


_here: WeakValueDictionary[Path, _Held] = WeakValueDictionary()


def _close_in_child() -> None:
    """A forked worker that outlives its run must not hold what the run held."""
    for held in list(_here.values()):
        held.close()
    _here.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _hold(file: Path) -> _Held:
    """Raises BlockingIOError where another process holds ``file`` and keeps it."""
    import fcntl  # not on Windows

    file = file.resolve()
    held = _here.get(file)
    if held is not None:
        return held
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline = time.monotonic() + _WAIT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.2)
        with contextlib.suppress(OSError):  # a full disk: the lock holds, and does not say whose it is
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    held = _here[file] = _Held(descriptor)
    return held


def _told_by(file: Path) -> str:
    try:
        owner = file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        owner = ""
    return f" ({owner})" if owner else ""
