"""What the environment says about this process: a rank already, one of several nodes, or alone.

Torchrun makes ranks and says so in ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE``. ``srun`` makes them too where it starts
several tasks on a node. A cluster that starts one process on each node (``srun`` with a task a node, a PyTorchJob or an
Indexed Job of Kubernetes) leaves it to that process to start the ranks. Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from nemo_automodel.errors import ConfigError

RENDEZVOUS_PORT = 29400
"""Where torchrun meets when nobody says otherwise (torchrun's own default)."""


@dataclass(frozen=True)
class Nodes:
    """Several machines, on each of which one process starts the ranks.

    Attributes:
        count: How many machines there are.
        endpoint: ``host:port`` where they meet; the host is one of them.
        run_id: What tells this run's meeting from another's.
        is_host: Whether this machine is the one that the others connect to; None: to be found out.
        source: What said so, for messages.
    """

    count: int
    endpoint: str
    run_id: str
    is_host: bool | None
    source: str


def started_as_rank(environ: Mapping[str, str] | None = None) -> str | None:
    """``torchrun`` or ``srun``, whichever has started this process as one rank of a run; None if none has."""
    environ = os.environ if environ is None else environ
    if "RANK" in environ and "LOCAL_RANK" in environ:
        return "torchrun"
    return "srun" if _slurm_tasks(environ) > max(1, _number(environ, "SLURM_STEP_NUM_NODES", 1)) else None


def find_nodes(environ: Mapping[str, str] | None = None) -> Nodes | None:
    """The machines among which the cluster has started this process, one on each; None on a single one.

    Raises:
        ConfigError: A variable that must be a number is none, or the address to meet at is missing.
    """
    environ = os.environ if environ is None else environ
    if started_as_rank(environ):
        return None
    if _slurm_tasks(environ) > 1:
        host, port = _slurm_master(environ)
        is_host = environ["SLURM_PROCID"] == "0"
        return Nodes(_slurm_tasks(environ), f"{host}:{port}", _slurm_run_id(environ), is_host, "srun")
    count = _number(environ, "PET_NNODES", 0) or _number(environ, "WORLD_SIZE", 1)
    rank = next((_number(environ, name, 0) for name in _NODE_RANKS if name in environ), None)
    if count <= 1 or rank is None:
        return None
    address = environ.get("MASTER_ADDR") or environ.get("PET_MASTER_ADDR")
    if not address:
        raise ConfigError(
            f"this is node {rank} of {count}, and MASTER_ADDR is not set; set it to the address of node 0"
        )
    port = _number(environ, "MASTER_PORT", RENDEZVOUS_PORT)
    run_id = environ.get("PET_RDZV_ID", "automodel")
    return Nodes(count, f"{address}:{port}", run_id, rank == 0, "MASTER_ADDR and WORLD_SIZE")


_NODE_RANKS = ("PET_NODE_RANK", "RANK", "JOB_COMPLETION_INDEX")  # of a PyTorchJob, and of an Indexed Job


def adopt_slurm(environ: MutableMapping[str, str] | None = None) -> None:
    """Where ``srun`` started several tasks, set the variables that torchrun would have set, for torch to read.

    Does nothing under torchrun, outside Slurm, in a batch script or for a single task.
    """
    environ = os.environ if environ is None else environ
    if "RANK" in environ or _slurm_tasks(environ) <= 1:
        return
    host, port = _slurm_master(environ)
    environ.update(
        RANK=environ["SLURM_PROCID"],
        LOCAL_RANK=environ["SLURM_LOCALID"],
        WORLD_SIZE=str(_slurm_tasks(environ)),
    )
    environ.setdefault("MASTER_ADDR", host)
    environ.setdefault("MASTER_PORT", str(port))


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list: ``gpu[03-07,9],login`` is ``gpu03``."""
    first = re.split(r",(?![^\[]*\])", node_list)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    """Tasks of the step that this process is in; 0 in a batch script, whose variables only look as if it were in one."""
    if not {"SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID"} <= set(environ):
        return 0
    return _number(environ, "SLURM_STEP_NUM_TASKS", 0) or _number(environ, "SLURM_NTASKS", 0)


def _slurm_master(environ: Mapping[str, str]) -> tuple[str, int]:
    host = first_host(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "localhost"))
    # the same on every task, and not that of another job or step on these nodes
    job, step = _number(environ, "SLURM_JOB_ID", 0), _number(environ, "SLURM_STEP_ID", 0)
    return host, 20000 + (job * 7 + step) % 10000


def _slurm_run_id(environ: Mapping[str, str]) -> str:
    restarts = environ.get("SLURM_RESTART_COUNT", "0")
    return f"slurm-{environ.get('SLURM_JOB_ID', '0')}-{restarts}-{environ['SLURM_STEP_ID']}"


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "")
    if not text:
        return default
    if not text.lstrip("-").isdecimal():
        raise ConfigError(f"the environment variable {name}={text} is not a number; unset it or correct it")
    return int(text)
