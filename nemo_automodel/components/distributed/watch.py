"""Who failed first: every rank keeps a line to rank 0, and when one fails all of them end, within seconds.

A collective only notices that somebody does not answer, after the time-out of collectives, and cannot say who. Here each
rank holds one TCP connection to rank 0 and says on it, every second, that it lives and how many steps it has done. A rank
that fails says why; the line of one that is killed is closed by its kernel; one that is stopped falls silent. Rank 0 picks
the first cause, tells all, and each process ends: from its main thread if that has failed too, else from the thread that
listens here, for the main one may wait in a collective for ever. If rank 0 itself is gone, each rank knows that by itself.

Threads and sockets only: no torch, no device, nothing to wait for in a step.
"""

from __future__ import annotations

import json
import logging
import os
import re
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 1.0
_SILENT_SECONDS = 10.0  # after which a rank is suspected, where something has failed already
_SETTLE_SECONDS = 1.5  # how long an effect (a collective that broke) waits for its cause to be heard of
_CONNECT_SECONDS = 60.0

ERROR, DIED, SILENT, COLLECTIVE, SIGNAL = "error", "died", "silent", "collective", "signal"
_EFFECTS = (COLLECTIVE, SIGNAL)


@dataclass(frozen=True)
class Failure:
    """Why a run ended on a rank.

    Attributes:
        kind: ``error`` (raised there), ``died`` (the process is gone), ``silent`` (it does not answer), ``collective``
            (a collective broke: somebody else's fault, unless nobody has another) or ``signal``.
        message: What happened, for the user.
        rank: Whose fault it is; None where that is not known.
        step: Optimizer steps that rank had done, if it said so.
        exit_code: With which every rank ends.
        own_directory: False where the checkpoint directory is another run's, which nothing is written to then.
    """

    kind: str
    message: str
    rank: int | None
    step: int | None = None
    exit_code: int = 1
    own_directory: bool = True


@dataclass
class _Line:
    """A connection to another rank, and what is known of that rank."""

    rank: int
    socket: socket.socket
    heard: float = field(default_factory=time.monotonic)
    step: int | None = None
    finished: bool = False
    received: bytes = b""

    def send(self, message: dict[str, Any]) -> None:
        with suppress(OSError):  # its end is noticed where this line is read
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None at the end of the line."""
        try:
            received = self.socket.recv(65536)
        except OSError:
            received = b""
        if not received:
            return None
        self.heard = time.monotonic()
        *whole, self.received = (self.received + received).split(b"\n")
        return [json.loads(line) for line in whole]


on_end: Callable[[Failure], None] | None = None
"""Called with the first failure, in the listening thread, before that ends the process."""
_current: Watch | None = None


def current() -> Watch | None:
    """The watch of this process's run, once there is one: for what ends a run from outside it."""
    return _current


class Watch:
    """This rank's end of the line (rank 0: of all lines).

    Args:
        rank, world_size: This process among how many.
        timeout_seconds: How long a rank may be silent: as long as a collective may take.

    Attributes:
        step: Optimizer steps done here; tell it, for the messages.
        patient: Set while other ranks may be silent for as long as they want.
    """

    def __init__(self, rank: int, world_size: int, timeout_seconds: float):
        self.rank, self.world_size, self.timeout_seconds = rank, world_size, timeout_seconds
        self.step: int | None = None
        self.patient = False
        self._lines: dict[int, _Line] = {}
        self._failures: list[tuple[float, Failure]] = []
        self._verdict: Failure | None = None
        self._decided = threading.Event()
        self._closing = threading.Event()
        self._main_waits = False
        self._lock = threading.Lock()
        self._wakened, self._waker = socket.socketpair()
        self._thread: threading.Thread | None = None
        global _current
        _current = self

    def connect(self, broadcast: Callable[[Any], Any]) -> None:
        """Open the lines; every rank calls it.

        Args:
            broadcast: Gives rank 0's argument to every rank.
        """
        try:
            self._listen(broadcast) if self.rank == 0 else self._dial(broadcast)
        except OSError as error:
            logger.warning("rank %d has no line to rank 0 (%s): a rank's failure may go unnamed", self.rank, error)
            return
        os.register_at_fork(after_in_child=self._close_sockets)  # a data worker must not hold its parent's line open
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def _listen(self, broadcast: Callable[[Any], Any]) -> None:
        token = os.urandom(16).hex()
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        backlog = self.world_size
        with socket.create_server(
            ("", 0), family=family, backlog=backlog, dualstack_ipv6=family == socket.AF_INET6
        ) as server:
            broadcast((server.getsockname()[1], token))
            deadline = time.monotonic() + _CONNECT_SECONDS
            while len(self._lines) < self.world_size - 1 and time.monotonic() < deadline:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    break
                connection.settimeout(_CONNECT_SECONDS / 2)
                rank = _greeting(connection, token)
                if rank is None:
                    connection.close()
                else:
                    connection.settimeout(5)
                    self._lines[rank] = _Line(rank, connection)
        if missing := sorted(set(range(1, self.world_size)) - self._lines.keys()):
            logger.warning("no line to rank(s) %s: their failure may go unnamed", ", ".join(map(str, missing)))

    def _dial(self, broadcast: Callable[[Any], Any]) -> None:
        port, token = broadcast(None)
        host = os.environ.get("MASTER_ADDR", "localhost")  # rank 0 is there, or the process that started it
        connection = socket.create_connection((host, port), timeout=_CONNECT_SECONDS / 2)
        connection.settimeout(5)
        connection.sendall(f"{token} {self.rank}\n".encode())
        self._lines[0] = _Line(0, connection)

    # --- what the main thread says --------------------------------------------------------------------------------

    def fail(self, failure: Failure) -> Failure:
        """Say that this rank has failed; returns what failed first anywhere, when that is known (in seconds)."""
        if self._thread is None or not self._thread.is_alive():
            return self._verdict or failure
        with self._lock:
            self._main_waits = True
        self._heard_of(failure)
        if self.rank != 0 and 0 in self._lines:
            self._lines[0].send({"fail": asdict(failure)})
        self._wake()
        self._decided.wait(_SETTLE_SECONDS * 4)
        return self._verdict or failure

    def finish(self) -> None:
        """Close the lines of a run that has ended well; every rank calls it."""
        if self._thread is not None:
            self._closing.set()
            self._wake()
            self._thread.join(_SETTLE_SECONDS * 4)

    # --- the listening thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wakened, selectors.EVENT_READ)
            for line in self._lines.values():
                selector.register(line.socket, selectors.EVENT_READ, line)
            next_beat = 0.0
            while not self._is_over():
                now = time.monotonic()
                if now >= next_beat:
                    next_beat = now + _BEAT_SECONDS
                    self._tell({"step": self.step, "finished": self._closing.is_set()})
                for key, _ in selector.select(timeout=0.2):
                    if key.data is None:
                        self._wakened.recv(4096)
                        next_beat = 0.0
                    elif not self._read(key.data):
                        selector.unregister(key.data.socket)
                if self._verdict is None and (first := self._first()) is not None:
                    self._conclude(first)
        self._close_sockets()

    def _is_over(self) -> bool:
        if self._verdict is not None:
            return True
        return self._closing.is_set() and all(line.finished for line in self._lines.values())

    def _read(self, line: _Line) -> bool:
        """Take in what ``line`` has; false at its end."""
        messages = line.read()
        if messages is None:
            if not line.finished:
                text = "its process is gone (killed, crashed or left early)"
                self._heard_of(Failure(DIED, text, line.rank, line.step or self.step))
            line.finished = True
            return False
        for message in messages:
            if "fail" in message:
                self._heard_of(Failure(**message["fail"]))
            elif "verdict" in message:
                self._conclude(Failure(**message["verdict"]))
            else:
                line.step, line.finished = message["step"], message["finished"]
        return True

    def _heard_of(self, failure: Failure) -> None:
        with self._lock:
            self._failures.append((time.monotonic(), failure))

    def _first(self) -> Failure | None:
        """The first cause, once it is known; rank 0 decides, and another rank where rank 0 cannot."""
        with self._lock:
            failures = list(self._failures)
        now = time.monotonic()
        silent = self._silent(now, bool(failures))
        waited = now - failures[0][0] if failures else 0.0
        if self.rank != 0:
            gone = [f for _, f in failures if f.kind == DIED]
            patience = _SETTLE_SECONDS * 2
        else:
            gone = [f for _, f in failures if f.kind not in _EFFECTS]
            patience = _SETTLE_SECONDS
        if silent is not None and (not failures or waited > patience):
            return silent
        if gone and waited > 0.5:
            first = gone[0]
            agreed = first.kind == ERROR and sum(f.message == first.message for _, f in failures) > 1
            return replace(first, rank=None) if agreed else first  # an error that all raise together is nobody's own
        if failures and waited > patience:
            return self._blame(failures[0][1], {f.rank for _, f in failures})
        return None

    def _silent(self, now: float, failed: bool) -> Failure | None:
        limit = min(_SILENT_SECONDS, self.timeout_seconds / 2) if failed else self.timeout_seconds
        if self.patient and not failed:
            return None
        quiet = [line for line in self._lines.values() if not line.finished and now - line.heard > limit]
        if not quiet:
            return None
        worst = min(quiet, key=lambda line: line.heard)
        seconds = now - worst.heard
        text = f"no sign of life for {seconds:.0f} s (stopped, out of memory, or its host is out of reach)"
        return Failure(SILENT, text, worst.rank, worst.step)

    def _blame(self, failure: Failure, reported: set[int | None]) -> Failure:
        """A collective broke and nobody says why: who has not come to it?"""
        ranks = {self.rank, *self._lines}
        absent = sorted(ranks - reported) if failure.kind == COLLECTIVE and self.rank == 0 else []
        if not absent or len(absent) == len(ranks) - 1 > 1:
            return failure
        names = ", ".join(map(str, absent[:8]))
        text = f"did not take part in a collective that rank {failure.rank} waited for ({_brief(failure.message)})"
        if len(absent) > 1:
            return Failure(SILENT, f"ranks {names} {text}", None, failure.step)
        return Failure(SILENT, text, absent[0], self._lines[absent[0]].step if absent[0] in self._lines else self.step)

    def _conclude(self, verdict: Failure) -> None:
        if self.rank == 0:
            self._tell({"verdict": asdict(verdict)})
        with self._lock:
            self._verdict = verdict
            main_waits = self._main_waits
        self._decided.set()
        if main_waits:
            return
        try:
            if on_end is not None:
                on_end(verdict)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(verdict.exit_code)  # the main thread may wait for a rank that is gone

    def _tell(self, message: dict[str, Any]) -> None:
        for line in self._lines.values():
            line.send(message)

    def _wake(self) -> None:
        with suppress(OSError):  # the thread has concluded and closed it
            self._waker.send(b"!")

    def _close_sockets(self) -> None:
        for line in self._lines.values():
            line.socket.close()
        self._wakened.close()
        self._waker.close()


def _brief(message: str) -> str:
    """Without the place in somebody's source."""
    return re.sub(r"\[/\S+\] ", "", message)


def _greeting(connection: socket.socket, token: str) -> int | None:
    """The rank at the other end, if it knows the token."""
    try:
        text = b""
        while not text.endswith(b"\n") and len(text) < 100:
            received = connection.recv(1)  # no more: the first beat may have come with it
            if not received:
                return None
            text += received
        given, rank = text.decode().split()
        return int(rank) if given == token else None
    except (OSError, ValueError):
        return None
