"""Run a function of a test module, or a script, on real gloo ranks.

``torchrun`` starts them as a user's run would be started. ``on_ranks`` forks them from processes that have imported torch
and transformers already, which saves each rank seven seconds of a processor: for what is not about a run's start and end.
"""

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]
_GRACE = 30  # seconds that ranks have to end after another has failed


def torchrun(target: str, nproc: int, *args: object, timeout: float = 240, check: bool = True, env: dict | None = None):
    """Start ``target`` (a file, or ``module:function``) on ``nproc`` ranks; fails with the whole output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    if target.endswith(".py"):
        command += [target, *map(str, args)]
    else:
        module, function = target.split(":")
        command += [
            "--no-python",
            sys.executable,
            "-c",
            f"import os, sys; from {module} import {function}; {function}(*sys.argv[1:]); "
            "sys.stdout.flush(); sys.stderr.flush(); os._exit(0)",  # gloo's threads may abort an interpreter that ends
        ]
        command += [*map(str, args)]
    environment = {**_environment(), **(env or {})}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    return _checked(result, check)


def on_ranks(target: str, nproc: int, *args: object, timeout: float = 240, check: bool = True):
    """As ``torchrun``, in forked ranks: each with the variables, the store and the end that torchrun would give it.

    Ranks of different numbers come from different processes, so they differ in the order of sets as ranks do.
    """
    origins = _origins(nproc)
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder, "stdout"), Path(folder, "stderr")
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        ranks = []
        for rank, origin in enumerate(origins):
            env = {**_variables(rank, nproc, store.port), "TORCHELASTIC_ERROR_FILE": f"{folder}/error_{rank}.json"}
            ranks.append(Forked(origin, target, args, ROOT, streams, env))
        try:
            in_time = _wait(ranks, timeout)
        finally:
            for rank in ranks:
                rank.kill()
        stdout, stderr = (stream.read_text() for stream in streams)
    if not in_time:
        raise subprocess.TimeoutExpired([target, *args], timeout, stdout, stderr)
    failed = any(rank.poll() for rank in ranks)
    return _checked(subprocess.CompletedProcess([target, *args], int(failed), stdout, stderr), check)


def fork(target: str, *args: object, cwd: Path, streams: tuple[Path, Path], env: dict | None = None) -> "Forked":
    """``python target args``, or ``-m target``, in the background. One at a time, and not beside ``on_ranks``."""
    return Forked(_origins(1, env)[0], target, args, cwd, streams, {})


def automodel(*args: object, cwd: Path, env: dict | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
    """The command in a forked process: for what it trains, not for how it starts."""
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder, "stdout"), Path(folder, "stderr")
        process = fork("nemo_automodel.cli.app", *args, cwd=cwd, streams=streams, env=env)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        stdout, stderr = (stream.read_text() for stream in streams)
    if code is None:
        raise subprocess.TimeoutExpired(["automodel", *args], timeout, stdout, stderr)
    return subprocess.CompletedProcess(["automodel", *args], code, stdout, stderr)


class Forked:
    """A process that ``origin`` forks. What it prints is added to the files of ``streams``: stdout, stderr."""

    def __init__(self, origin: subprocess.Popen, target: str, args, cwd: Path, streams: tuple[Path, Path], env: dict):
        for stream in streams:
            stream.touch()
        job = {
            "target": target,
            "args": [*map(str, args)],
            "cwd": str(cwd),
            "streams": [*map(str, streams)],
            "env": env,
        }
        self._answers, self._code = origin.stdout, None
        origin.stdin.write(json.dumps(job).encode() + b"\n")

    @functools.cached_property
    def pid(self) -> int:
        line = self._answers.readline()
        assert line, "the process to fork from has ended; the reason is in what pytest captured of stderr"
        return int(line)

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self.wait(0)

    def wait(self, seconds: float) -> int | None:
        """Its exit code; None if it still runs after ``seconds``."""
        if self._code is None and self.pid and select.select([self._answers], [], [], seconds)[0]:
            self._code = int(self._answers.readline())
        return self._code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        self.wait(60)


def _wait(ranks: list[Forked], timeout: float) -> bool:
    """Whether all ended in time; the others are told to after one that fails, as torchrun tells them."""
    deadline, failed = time.monotonic() + timeout, False
    while any(rank.poll() is None for rank in ranks):
        if not failed and any(rank.poll() for rank in ranks):
            failed, deadline = True, time.monotonic() + _GRACE
            for rank in ranks:
                rank.send_signal(signal.SIGTERM)
        if time.monotonic() > deadline:
            return failed
        time.sleep(0.01)
    return True


def _variables(rank: int, nproc: int, port: int) -> dict[str, str]:
    places = dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), rank)
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), nproc)
    others = {
        "GROUP_RANK": 0,
        "GROUP_WORLD_SIZE": 1,
        "ROLE_NAME": "default",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
        "TORCHELASTIC_RUN_ID": f"forked-{port}",
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": 1,
    }
    return {name: str(value) for name, value in {**places, **sizes, **others}.items()}


_started: list[subprocess.Popen] = []
_started_with: dict[str, str] = {}


def _origins(count: int, env: dict | None = None) -> list[subprocess.Popen]:
    """A process for each rank number, started anew for another environment: libraries read theirs when imported."""
    wanted = _environment(env)
    if wanted != _started_with or any(origin.poll() is not None for origin in _started):
        for origin in _started:
            origin.stdin.close()
            origin.wait()
        _started.clear()
        _started_with.clear()
        _started_with.update(wanted)
    while len(_started) < count:
        command = [sys.executable, "-m", "tests.ranks.forked_rank"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        _started.append(subprocess.Popen(command, cwd=ROOT, env=wanted, start_new_session=True, **pipes))
    return _started[:count]


def _environment(env: dict | None = None) -> dict[str, str]:
    given = os.environ if env is None else env
    path = os.pathsep.join(filter(None, (str(ROOT), given.get("PYTHONPATH"))))
    environment = {**given, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    environment.pop("PYTEST_CURRENT_TEST", None)
    return environment


def _checked(result: subprocess.CompletedProcess, check: bool) -> subprocess.CompletedProcess:
    assert not check or result.returncode == 0, result.stdout[-4000:] + result.stderr[-6000:]
    return result
