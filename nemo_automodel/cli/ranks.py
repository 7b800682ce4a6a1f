"""Start the ranks of this machine with torchrun, hand signals on to them, and end with the run's own exit code.

Torchrun runs inside this process. It would answer a signal by ending the ranks within 30 seconds, and any failure with
a traceback of its own and exit code 1; so signals go past it, straight to the ranks, and its report becomes one line.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from nemo_automodel.cli.exit_status import ExitStatus
from nemo_automodel.cli.network import await_name, can_listen, interface_of, local_address
from nemo_automodel.components.distributed.placement import Nodes
from nemo_automodel.errors import EXIT_FAULT, EXIT_OK, AutoModelError

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_INTERRUPTS_BEFORE_KILL = 3
_TORCHRUN_LOGGERS = ("torch.distributed.run", "torch.distributed.elastic", "torch.distributed.launcher")
_STORE_SECONDS = 600
"""How long the other machines try to reach the first one: its image may still be on its way."""
_STATUS_SECONDS = 10.0
"""How long to wait for the status file of a run that ended on another machine."""


@dataclass
class _Signals:
    """Passes signals on to the ranks, which know how to save; a third Ctrl-C kills them."""

    interrupts: int = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        ranks = child_processes()
        if not ranks:  # still waiting for the other machines
            raise SystemExit(128 + number)
        self.interrupts += number == signal.SIGINT
        if self.interrupts >= _INTERRUPTS_BEFORE_KILL:
            number = signal.SIGKILL
        for pid in ranks:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    @contextmanager
    def passed_on(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle) for number in _FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_ranks(command: Sequence[str], nproc: int, nodes: Nodes | None, checkpoint_dir: str | Path | None) -> int:
    """Run ``python -m command`` as ``nproc`` ranks on this machine and wait for them.

    Args:
        command: A module and its arguments.
        nproc: Ranks on this machine.
        nodes: The other machines, each of which calls this too; None for a run on this one alone.
        checkpoint_dir: Where the run writes ``exit_status.json``.

    Returns:
        The run's exit code: the one it has written down, else the first failed rank's (128 + n for signal n).
    """
    from torch.distributed import DistError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    _prepare_environment(nodes, nproc)
    arguments = [f"--nproc-per-node={nproc}", "--max-restarts=0", "--signals-to-handle=SIGHUP,SIGQUIT"]
    parsed = torchrun.parse_args([*arguments, *_rendezvous(nodes), "--module", *command])
    if nodes is None:
        parsed.rdzv_backend, parsed.rdzv_endpoint, parsed.rdzv_id = "c10d", "localhost:0", f"local-{os.getpid()}"
    status = ExitStatus(checkpoint_dir)
    config, entrypoint, entrypoint_arguments = torchrun.config_from_args(parsed)
    with _Signals().passed_on():
        try:
            elastic_launch(config, entrypoint)(*entrypoint_arguments)
            failed = None
        except ChildFailedError as error:
            failed = min(error.failures.items(), key=lambda item: item[1].timestamp)
        except SignalException as error:  # the terminal was closed
            return 128 + error.sigval
        except (RendezvousError, DistError) as error:  # the machine that holds the meeting has ended before this one
            return _code_without(error, status, nodes)
    return _exit_code(failed, status, several_machines=nodes is not None)


def child_processes() -> list[int]:
    """Process ids of this process's children."""
    own, found = os.getpid(), []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # after the name, which may hold anything
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[1]) == own and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def _exit_code(failed: tuple[int, Any] | None, status: ExitStatus, several_machines: bool) -> int:
    code = EXIT_OK if failed is None else failed[1].exitcode
    written = status.read(_STATUS_SECONDS if several_machines and failed is not None else 0)
    if written is None:
        if failed is not None and code < 0:  # nobody else says it: a killed process cannot
            print(f"error: rank {failed[0]} was ended by {_signal_name(-code)}", file=sys.stderr)
        return 128 - code if code < 0 else code
    code = EXIT_FAULT if code < 0 else code
    return written["exit_code"] or code  # it cannot be fine where a rank has failed


def _code_without(error: Exception, status: ExitStatus, nodes: Nodes | None) -> int:
    """The run's code where torchrun has lost the other machines, or never found them."""
    written = status.read(_STATUS_SECONDS)
    if written is not None:
        return written["exit_code"]
    meeting = f"; {nodes.count} machines were to meet at {nodes.endpoint} ({nodes.source})" if nodes else ""
    raise AutoModelError(f"no connection to the other machines: {error}{meeting}") from error


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _rendezvous(nodes: Nodes | None) -> list[str]:
    if nodes is None:
        return []
    host, _, port = nodes.endpoint.rpartition(":")
    await_name(host, _STORE_SECONDS)
    is_host = can_listen(host, int(port)) if nodes.is_host is None else nodes.is_host
    own = local_address(host, int(port))
    return [
        f"--nnodes={nodes.count}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={nodes.endpoint}",
        f"--rdzv-id={nodes.run_id}",
        f"--rdzv-conf=is_host={str(is_host).lower()},read_timeout={_STORE_SECONDS}",
        *([f"--local-addr={own}"] if own else []),
    ]


def _prepare_environment(nodes: Nodes | None, nproc: int) -> None:
    """What the ranks inherit; a user's own variables go before."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))  # else torchrun says 1, and says it loudly
    if "LOGLEVEL" not in os.environ:
        for name in list(logging.root.manager.loggerDict):
            if name.startswith(_TORCHRUN_LOGGERS):
                logging.getLogger(name).setLevel(logging.CRITICAL)
    if nodes is None:
        return
    host, _, port = nodes.endpoint.rpartition(":")
    interface = interface_of(local_address(host, int(port)))
    if interface:  # gloo would take the one that the machine's name stands for, often the loopback
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
