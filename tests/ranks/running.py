"""A recipe running on real gloo ranks, to send signals to: torchrun in the background, each rank by its process id."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.ranks.launch import ROOT

RECIPE = ROOT / "nemo_automodel/recipes/llm/finetune.py"


class Running:
    """``torchrun`` of ``script`` on ``nproc`` ranks, its output in a file; ``agent=False`` starts the ranks alone."""

    def __init__(self, workspace, *overrides, nproc=2, out="out", agent=True, script=RECIPE, env=None):
        self.directory = workspace.path / out
        self.log = workspace.path / f"{out}.log"
        self.agent = agent
        arguments = [str(script), "-c", str(workspace.recipe), f"--checkpoint.checkpoint_dir={self.directory}"]
        arguments += overrides
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
        self._file = self.log.open("w")
        self._processes = []
        if agent:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
            self._start([*launcher, *arguments], environment)
            return
        port = 20000 + os.getpid() % 20000
        for rank in range(nproc):
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": nproc,
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": port,
            }
            self._start(arguments, environment | {key: str(value) for key, value in place.items()})

    def _start(self, arguments, environment):
        command = [sys.executable, *arguments]
        self._processes.append(
            subprocess.Popen(command, cwd=self.directory.parent, env=environment, stdout=self._file, stderr=self._file)
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in [*self.ranks().values(), *(process.pid for process in self._processes)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()
        self._file.close()

    @property
    def output(self):
        return self.log.read_text()

    def ranks(self):
        """Rank -> process id, of those that live."""
        if not self.agent:
            return {rank: process.pid for rank, process in enumerate(self._processes) if process.poll() is None}
        found = {}
        for pid in children(self._processes[0].pid):
            variables = dict(
                item.split("=", 1) for item in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in item
            )
            found[int(variables["RANK"])] = pid
        return found

    def steps(self):
        """Optimizer steps that ``metrics.jsonl`` has."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def wait_for_step(self, step, seconds=150):
        self.wait_until(lambda: self.steps() >= step, seconds)

    def wait_until(self, condition, seconds=150):
        deadline = time.monotonic() + seconds
        while not condition():
            assert all(process.poll() is None for process in self._processes), self.output[-6000:]
            assert time.monotonic() < deadline, self.output[-6000:]
            time.sleep(0.02)

    def send(self, number, rank):
        os.kill(self.ranks()[rank], number)

    def end(self, seconds=60):
        """Wait for all processes; returns (codes, seconds it took)."""
        start = time.monotonic()
        codes = [process.wait(max(0.1, start + seconds - time.monotonic())) for process in self._processes]
        return codes, time.monotonic() - start

    def status(self):
        """``exit_status.json``, as (exit code, reason, rank, step) and the message."""
        content = json.loads((self.directory / "exit_status.json").read_text())
        assert set(content) == {"exit_code", "reason", "step", "rank", "message", "time", "run"}
        return (content["exit_code"], content["reason"], content["rank"], content["step"]), content["message"]


def children(pid):
    """Direct children of a process."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
