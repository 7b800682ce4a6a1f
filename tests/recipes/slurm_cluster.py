"""A real Slurm on this machine: a controller and two nodes, each a slurmd of its own, in a folder and on ports of their own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")  # Debian's slurm-wlm is these
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,sched_min_interval=0
KillWait=20
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 RealMemory=1000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def install() -> str | None:
    """Have Slurm's programs on this machine; returns why that cannot be, or None. One process of several installs."""
    with open(Path(tempfile.gettempdir()) / "automodel-slurm-install.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _install()


def _install() -> str | None:
    if all(map(shutil.which, PROGRAMS)):
        return None if os.geteuid() == 0 else "slurmd needs root"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "Slurm is not installed, and installing it needs root and apt-get"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    commands = (["apt-get", "update", "-q"], ["apt-get", "install", "-qy", "--no-install-recommends", *PACKAGES])
    for command in commands:
        try:
            result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            return f"{' '.join(command[:2])} took more than five minutes"
        if result.returncode:
            return f"{' '.join(command[:2])} failed: {result.stderr.strip()[-300:]}"
    return None


class Cluster:
    """Started in ``folder``; ``stop`` ends every daemon. ``environment`` is what its clients need."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        """Raises AssertionError, with the logs, where the nodes are not there in a minute."""
        for name in ("munge", "state", "n1", "n2"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge").chmod(0o700)
        key = self.folder / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        port = _free_ports(3)
        host = socket.gethostname().split(".")[0]
        config = _CONFIG.format(host=host, port=port, folder=self.folder, first=port + 1, last=port + 2)
        (self.folder / "slurm.conf").write_text(config)
        munge = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._spawn("munged", "--foreground", "--force",
                    *(f"--{name}={self.folder}/munge/{file}" for name, file in munge.items()))  # fmt: skip
        self._wait(lambda: (self.folder / "munge/socket").exists(), "munged")
        self._spawn("slurmctld", "-D", "-f", f"{self.folder}/slurm.conf")
        for node in ("n1", "n2"):
            self._spawn("slurmd", "-D", "-N", node, "-f", f"{self.folder}/slurm.conf")
        self._wait(lambda: self.run("sinfo", "-h", "-o", "%T %D", check=False).split() == ["idle", "2"], "the nodes")

    def run(self, *command: str, check: bool = True) -> str:
        """What a client prints."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert not check or result.returncode == 0, result.stderr
        return result.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        fields = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def stop(self) -> None:
        for number in self.run("squeue", "-h", "-o", "%i", check=False).split():
            self.run("scancel", "--full", "--signal=KILL", number, check=False)
            self.run("scancel", number, check=False)
        deadline = time.monotonic() + 10
        while self.run("squeue", "-h", check=False) and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()

    def _spawn(self, *command: str) -> None:
        log = open(self.folder / f"{command[0]}-{len(self._daemons)}.out", "w")  # noqa: SIM115
        self._daemons.append(subprocess.Popen(command, stdout=log, stderr=log))

    def _wait(self, ready, what: str) -> None:
        deadline = time.monotonic() + 60
        while not ready():
            said = "\n".join(path.read_text()[-1500:] for path in self.folder.glob("*.out"))
            assert time.monotonic() < deadline, f"{what} did not come up\n{said}"
            time.sleep(0.1)


def _free_ports(count: int) -> int:
    """The first of ``count`` free ports in a row."""
    for first in range(17000 + os.getpid() % 2000, 32000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")
