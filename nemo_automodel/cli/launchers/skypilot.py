"""SkyPilot: a task that any cloud it knows can run, on spot machines too."""

from __future__ import annotations

import re
import subprocess
import textwrap
from pathlib import Path

import yaml

from nemo_automodel.cli.launchers.job import Job, shell_command
from nemo_automodel.components.distributed.placement import RENDEZVOUS_PORT
from nemo_automodel.errors import ConfigError

SUFFIX = ".sky.yaml"
CLIENT = "sky"
OPTIONS = {
    "--accelerator": ("H100", "which GPU (required with GPUs)"),
    "--infra": ("aws/us-east-1", "cloud, region or Kubernetes context (default: the cheapest that SkyPilot finds)"),
    "--image": ("docker:my-registry/automodel:1", "image with automodel in it"),
    "--setup": ('"pip install git+https://..."', "what installs automodel on a bare machine (this or --image is required)"),
    "--bucket": ("s3://my-bucket:/checkpoints", "a bucket and where it is mounted; checkpoints there outlive the machines"),
}  # fmt: skip
FLAGS = {
    "--spot": "machines that can be taken away at any time, as a managed job that is started again (needs --bucket)"
}

_RECIPE = "/tmp/automodel/recipe.yaml"
_TASK = """\
# {name}: {size}. Written by `automodel launch skypilot`; start it with `{start}`.
name: "{name}"
num_nodes: {nodes}
{head}
{setup}\
# On every node: torchrun over c10d rendezvous at the first one. Its exit code is the one that the run has written down.
run: |
  head_ip=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
  {command}
"""


def render(job: Job) -> str:
    """The task.

    Raises:
        ConfigError: GPUs of no kind, a name that SkyPilot would refuse, or spot machines without a bucket that holds
            the checkpoints.
    """
    if not re.fullmatch(r"[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?", job.name):
        raise ConfigError(f"--job-name {job.name}: SkyPilot takes letters, digits and hyphens, a letter first")
    if job.gpus and "--accelerator" not in job.options:
        raise ConfigError("automodel launch skypilot: which GPUs? write --accelerator H100, or --gpus-per-node 0")
    bucket = _bucket(job)
    kept = bucket is not None and job.checkpoint_dir and Path(job.checkpoint_dir).is_relative_to(bucket[1])
    if "--spot" in job.options and not kept:
        raise ConfigError(
            "--spot: checkpoints are lost with the machine; write --bucket s3://NAME:/checkpoints and "
            f"--checkpoint.checkpoint_dir /checkpoints/{job.name}"
        )
    setup = job.options.get("--setup")
    if setup is None and "--image" not in job.options:
        raise ConfigError(
            "automodel launch skypilot: how does automodel get onto the machines? write --setup 'pip install ...', or "
            "--image docker:REGISTRY/NAME:TAG that has it"
        )
    meeting = [
        f'--nnodes "$SKYPILOT_NUM_NODES" --nproc-per-node {job.nproc}',
        f'--rdzv-endpoint "$head_ip:{RENDEZVOUS_PORT}" --rdzv-id "$SKYPILOT_TASK_ID"',
    ]
    return _TASK.format(
        name=job.name,
        size=job.size,
        start=" ".join(_start(job, "FILE")),
        nodes=job.nodes,
        head=yaml.safe_dump(_head(job, bucket), sort_keys=False),
        setup=f"setup: |\n{textwrap.indent(setup.strip(), '  ')}\n\n" if setup else "",
        command=shell_command(["automodel"], job.arguments(_RECIPE), meeting),
    )


def submit(job: Job, path: Path) -> int:
    """Give the task to sky, which asks before it rents machines."""
    return subprocess.run(_start(job, str(path))).returncode


def _start(job: Job, path: str) -> list[str]:
    return [CLIENT, "jobs", "launch", path] if "--spot" in job.options else [CLIENT, "launch", "-c", job.name, path]


def _head(job: Job, bucket: tuple[str, str] | None) -> dict:
    resources: dict = {}
    if job.gpus:
        resources["accelerators"] = f"{job.options['--accelerator']}:{job.gpus}"
    resources |= {key: job.options[f"--{option}"] for key, option in (("infra", "infra"), ("image_id", "image"))
                  if f"--{option}" in job.options}  # fmt: skip
    if "--spot" in job.options:
        resources["use_spot"] = True
    head: dict = {"resources": resources} if resources else {}
    mounts: dict = {_RECIPE: str(job.recipe)}
    if bucket is not None:
        mounts[bucket[1]] = {"source": bucket[0], "mode": "MOUNT_CACHED"}
    return {**head, "file_mounts": mounts}


def _bucket(job: Job) -> tuple[str, str] | None:
    if "--bucket" not in job.options:
        return None
    source, _, mount = job.options["--bucket"].rpartition(":")
    if "://" not in source or not mount.startswith("/"):
        raise ConfigError(f"--bucket {job.options['--bucket']}: not a bucket and a path; write s3://NAME:/checkpoints")
    return source, mount
