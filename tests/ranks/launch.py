"""Run a function of a test module, or a script, on real gloo ranks.

``torchrun`` starts them as a user's run would be started. ``on_ranks`` forks them from processes that have imported torch
and transformers already, which saves each rank seven seconds of a processor: for what is not about a run's start and end.
"""

import contextlib
import json
import os
import selectors
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
        streams = [Path(folder, "stdout"), Path(folder, "stderr")]
        for stream in streams:
            stream.touch()
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        for rank, origin in enumerate(origins):
            job = {
                "target": target,
                "args": [*map(str, args)],
                "cwd": str(ROOT),
                "streams": [*map(str, streams)],
                "env": _variables(rank, nproc, store.port) | {"TORCHELASTIC_ERROR_FILE": f"{folder}/error_{rank}.json"},
            }
            origin.stdin.write(json.dumps(job).encode() + b"\n")
        codes = _wait(origins, timeout)
        stdout, stderr = (stream.read_text() for stream in streams)
    if codes is None:
        raise subprocess.TimeoutExpired([target, *args], timeout, stdout, stderr)
    return _checked(subprocess.CompletedProcess([target, *args], int(any(codes)), stdout, stderr), check)


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


def _origins(count: int) -> list[subprocess.Popen]:
    """A process for each rank number, with the environment of now: libraries read theirs when imported."""
    wanted = _environment()
    if wanted != _started_with:
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


def _wait(origins: list[subprocess.Popen], timeout: float) -> list[int] | None:
    """Exit codes; the others are ended after one that fails, as torchrun does. None: not done in time, and killed."""
    pids = {origin: int(origin.stdout.readline()) for origin in origins}
    codes: dict[subprocess.Popen, int] = {}
    deadline, in_time = time.monotonic() + timeout, True
    try:
        with selectors.DefaultSelector() as selector:
            for origin in origins:
                selector.register(origin.stdout, selectors.EVENT_READ, origin)
            while len(codes) < len(origins):
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                for key, _ in ready:
                    selector.unregister(key.fileobj)
                    codes[key.data] = int(key.data.stdout.readline())
                    if codes[key.data] and list(codes.values()).count(0) == len(codes) - 1:
                        _signal(pids, codes, signal.SIGTERM)
                        deadline = min(deadline, time.monotonic() + _GRACE)
                if not ready:
                    in_time = any(codes.values())
                    break
    finally:
        _signal(pids, codes, signal.SIGKILL)
        for origin in origins:
            if origin not in codes:
                codes[origin] = int(origin.stdout.readline())
    return [codes[origin] for origin in origins] if in_time else None


def _signal(pids: dict[subprocess.Popen, int], codes: dict[subprocess.Popen, int], number: int) -> None:
    for origin, pid in pids.items():
        if origin not in codes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    environment.pop("PYTEST_CURRENT_TEST", None)
    return environment


def _checked(result: subprocess.CompletedProcess, check: bool) -> subprocess.CompletedProcess:
    assert not check or result.returncode == 0, result.stdout[-4000:] + result.stderr[-6000:]
    return result
