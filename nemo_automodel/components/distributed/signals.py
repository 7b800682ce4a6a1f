"""Signals that ask a run to stop: from the first training step on they are noted, and obeyed at a step's end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from nemo_automodel.errors import ConfigError, Terminated


class StopSignals:
    """Notes the first of some signals; further ones change nothing, so that none can break the save that follows.

    Args:
        names: Such as ``SIGTERM``. Until ``defer`` is called each ends the program at once, as there is nothing to save.
        announce: Whether this process says that it has noticed.

    Attributes:
        received: The first signal's name, or None.

    Raises:
        ConfigError: A name that is no signal, or one that cannot be caught.
    """

    _installed: StopSignals | None = None

    def __init__(self, names: Sequence[str], announce: bool = True):
        self.received: str | None = None
        self._announce = announce
        self._deferred = False
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}
        if StopSignals._installed is not None:  # of a run that failed in this process
            StopSignals._installed.restore()
        StopSignals._installed = self
        for name in names:
            number = _number(name)
            if threading.current_thread() is threading.main_thread():  # elsewhere Python cannot set handlers
                self._before[number] = signal.signal(number, self._handle)

    def defer(self) -> None:
        """From now on only note a signal."""
        self._deferred = True

    def restore(self) -> None:
        """Give every signal the meaning it had before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a copy of it, such as a process that tokenises, whose parent wants it to end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        name = signal.Signals(number).name
        if not self._deferred:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated(name)
        if self._announce:
            again = "already stopping" if self.received else "stopping after this step, which is then saved"
            _write(f"{name}: {again}" + (" (Ctrl-\\ quits at once, unsaved)\n" if number == signal.SIGINT else "\n"))
        self.received = self.received or name


def _number(name: str) -> signal.Signals:
    number = getattr(signal, str(name), None)
    if not isinstance(number, signal.Signals) or number in (signal.SIGKILL, signal.SIGSTOP):
        raise ConfigError(
            f"dist_env.stop_signals={name}: not a signal that can be caught; write names such as SIGTERM, SIGUSR1, SIGINT"
        )
    return number


def _write(text: str) -> None:
    """Straight to the descriptor: ``print`` may be what the signal has interrupted."""
    with suppress(OSError):
        os.write(2, text.encode())
