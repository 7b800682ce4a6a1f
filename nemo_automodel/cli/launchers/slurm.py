"""Slurm: a batch script that starts torchrun on every node, saves before it must end, and has itself requeued."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from nemo_automodel.cli.launchers.follow import follow
from nemo_automodel.cli.launchers.job import Job, shell_command
from nemo_automodel.errors import EXIT_OK, EXIT_PREEMPTED, AutoModelError, ConfigError

SUFFIX = ".sbatch"
CLIENT = "sbatch"
OPTIONS = {
    "--partition": ("gpu", "partition to submit to"),
    "--account": ("my-project", "account to charge"),
    "--qos": ("high", "quality of service"),
    "--time": ("08:00:00", "time limit; a run that reaches it saves, is requeued and goes on"),
    "--warn-seconds": ("120", "how long before the limit it is told to save (default 120)"),
    "--cpus-per-node": ("64", "CPU cores on each node (default: 8 for each GPU; on the CPU, 1 for each process)"),
    "--sbatch": ('"constraint=h100 mem=0"', "any other options of sbatch, without their dashes"),
    "--image": ("nvcr.io#my/image", "container to run in (needs pyxis); without it, this Python, on a shared file system"),
}  # fmt: skip
FLAGS = {"--follow": "show the job's output until it ends, and end with its exit code"}

_SCRIPT = """\
#!/bin/bash
# {name}: {size}. Written by `automodel launch slurm`; submit it with sbatch.
# Submitted again, it goes on from the newest complete checkpoint in checkpoint_dir.
{directives}

restarts=${{SLURM_RESTART_COUNT:-0}}
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
head_address=$(scontrol show node "$head_node" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
rendezvous=$head_address:$((20000 + SLURM_JOB_ID % 10000))

# On every node: torchrun over c10d rendezvous. Its exit code is the one that the run has written down.
srun --kill-on-bad-exit=0 --wait=120 --cpus-per-task={cpus}{container} \\
    {command} &
run=$!

# Before the time limit Slurm sends USR1 here. The ranks save after their current step and end with {preempted}.
# TERM comes with scancel and with preemption; then Slurm itself decides whether the job is run again.
stopped=no
trap 'kill -USR1 "$run"' USR1
trap 'stopped=yes; kill -TERM "$run"' TERM

wait "$run"; code=$?
while kill -0 "$run" 2>/dev/null; do  # a signal has ended the wait, not the run
    wait "$run"; code=$?
done

if [ "$code" -eq {preempted} ] && [ "$stopped" = no ]; then
    echo "saved before the time limit; requeued"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def render(job: Job) -> str:
    """The batch script."""
    cpus = job.options.get("--cpus-per-node") or str(job.nproc * (8 if job.gpus else 1))
    image = job.options.get("--image")
    program = ["automodel"] if image else [sys.executable, "-m", "nemo_automodel.cli.app"]
    meeting = [
        f'--nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node {job.nproc}',
        '--rdzv-endpoint "$rendezvous" --rdzv-id "slurm-$SLURM_JOB_ID-$restarts"',
    ]
    return _SCRIPT.format(
        name=job.name,
        size=job.size,
        directives="\n".join(_directives(job, cpus)),
        cpus=cpus,
        container=_container(image, job) if image else "",
        command=shell_command(program, job.arguments(job.recipe), meeting),
        preempted=EXIT_PREEMPTED,
    )


def _directives(job: Job, cpus: str) -> list[str]:
    options = job.options
    lines = [
        _word(f"--job-name={job.name}"),
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1                # torchrun, which starts the processes of its node",
        f"--cpus-per-task={cpus}",
        *([f"--gpus-per-node={job.gpus}"] if job.gpus else []),
        *(
            _word(f"{name}={options[name]}")
            for name in ("--partition", "--account", "--qos", "--time")
            if name in options
        ),
        _word(f"--chdir={Path.cwd()}"),
        "--output=%x-%j.log",
        "--open-mode=append                 # a requeued job goes on in the same log",
        "--requeue                          # after preemption, and after a node has failed",
        f"--signal=B:USR1@{options.get('--warn-seconds', '120')}               # seconds before the time limit",
        *(_word(f"--{option.lstrip('-')}") for option in _split(options.get("--sbatch", ""))),
    ]
    return [f"#SBATCH {line}" for line in lines]


def _split(options: str) -> list[str]:
    try:
        return shlex.split(options)
    except ValueError as error:
        raise ConfigError(
            f"--sbatch {options}: {str(error).lower()}; quote a value with spaces: 'comment=\"two words\" mem=0'"
        ) from error


def _word(text: str) -> str:
    """``text`` as one word of an ``#SBATCH`` line: quoted as in a shell, but a backslash escapes within quotes too."""
    return shlex.quote(text.replace("\\", "\\\\"))


def _container(image: str, job: Job) -> str:
    folders = [Path.cwd(), job.recipe.parent]
    if job.checkpoint_dir:
        folders += _places(job.checkpoint_dir, "checkpoint.checkpoint_dir")
    if os.environ.get("HF_HOME"):
        folders += _places(os.path.expandvars(os.environ["HF_HOME"]), "$HF_HOME")
    mounts = ",".join(f"{folder}:{folder}" for folder in dict.fromkeys(folders))
    words = [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={Path.cwd()}"]
    return f" \\\n    {shlex.join(words)}"


def _places(folder: str, what: str) -> list[Path]:
    """What to mount so that ``folder`` is there in a container: the nearest that exists, and where links lead from it.

    Raises:
        ConfigError: Nothing of it exists, and the whole file system cannot be mounted over the container's.
    """
    path = Path(folder).expanduser().absolute()
    places = [next(p for p in (place, *place.parents) if p.is_dir()) for place in (path, path.resolve())]
    if Path("/") in places:
        raise ConfigError(
            f"{what}={folder}: nothing of it exists here, so it cannot be mounted in the container of --image and what is "
            "written there would be lost; create it, or write another folder"
        )
    return places


def submit(job: Job, path: Path) -> int:
    """Give the script to sbatch; with ``--follow``, stay until the job ends and return its exit code."""
    result = subprocess.run([CLIENT, "--parsable", str(path)], capture_output=True, text=True)
    if result.returncode:
        raise AutoModelError(f"sbatch refused {path}: {result.stderr.strip() or result.stdout.strip()}")
    number = result.stdout.strip().split(";")[0]
    log = Path.cwd() / f"{job.name}-{number}.log"
    print(f"submitted as job {number}; its output: {log}")
    return follow(number, log) if "--follow" in job.options else EXIT_OK
