"""Kubernetes: an Indexed Job with a pod for each node, a headless Service for their names, and the recipe as a ConfigMap.

Plain Kubernetes (1.29 or newer), no operator.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from nemo_automodel.cli.arguments import positive, whole
from nemo_automodel.cli.launchers.job import Job
from nemo_automodel.components.distributed.placement import RENDEZVOUS_PORT
from nemo_automodel.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, ConfigError

SUFFIX = ".k8s.yaml"
CLIENT = "kubectl"
OPTIONS = {
    "--image": ("my-registry/automodel:1", "container image with automodel in it (required; see the Dockerfile)"),
    "--claim": ("my-volume:/data", "a PersistentVolumeClaim that all pods can write, and where it is mounted (required: checkpoints)"),
    "--namespace": ("training", "namespace (default: the client's own)"),
    "--gpu-resource": ("nvidia.com/gpu", "what the cluster calls a GPU (default nvidia.com/gpu)"),
    "--secret": ("hf-token", "a Secret whose keys become environment variables, such as HF_TOKEN"),
    "--retries": ("3", "how often each node may fail before the job does; preemption does not count (default 3)"),
    "--grace-seconds": ("120", "how long a pod that must go has to save (default 120)"),
}  # fmt: skip
FLAGS: dict[str, str] = {}

_RECIPE_DIR = "/etc/automodel"
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?")


def render(job: Job) -> str:
    """The manifest.

    Raises:
        ConfigError: No image or claim, checkpoints outside the claim, or a name that Kubernetes would refuse.
    """
    if "--image" not in job.options:
        raise ConfigError("automodel launch k8s: which container? write --image REGISTRY/NAME:TAG")
    if not _NAME.fullmatch(job.name):
        raise ConfigError(
            f"--job-name {job.name}: Kubernetes takes small letters, digits and hyphens, a letter first; write another"
        )
    _, mount = _claim(job)
    if not job.checkpoint_dir or not Path(job.checkpoint_dir).is_relative_to(mount):
        raise ConfigError(
            f"checkpoint.checkpoint_dir={job.checkpoint_dir}: lost with its pod; put it into the volume at {mount}: "
            f"--checkpoint.checkpoint_dir {mount}/{job.name}"
        )
    documents = [_config_map(job), _service(job), _job(job)]
    for document in documents:
        if "--namespace" in job.options:
            document["metadata"]["namespace"] = job.options["--namespace"]
    head = (
        f"# {job.name}: {job.size}. Written by `automodel launch k8s`; apply it with `kubectl apply -f`.\n"
        "# Each pod runs torchrun, which meets the others over c10d rendezvous at pod 0. A pod that was preempted or has\n"
        "# failed is started again, and the run goes on from the newest complete checkpoint.\n"
    )
    return head + "---\n".join(
        yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=120) for document in documents
    )


def submit(job: Job, path: Path) -> int:
    """Give the manifest to kubectl."""
    code = subprocess.run([CLIENT, "apply", "-f", str(path)]).returncode
    if not code:
        namespace = f" -n {job.options['--namespace']}" if "--namespace" in job.options else ""
        print(f"follow it:  kubectl logs{namespace} -f -l batch.kubernetes.io/job-name={job.name} --prefix --tail=-1")
    return code


def _claim(job: Job) -> tuple[str, str]:
    name, _, mount = job.options.get("--claim", "").partition(":")
    if not name or not mount.startswith("/"):
        raise ConfigError(
            "automodel launch k8s: where do checkpoints live on? write --claim NAME:/PATH, a PersistentVolumeClaim that "
            "all pods can write (ReadWriteMany) and where it is mounted"
        )
    return name, mount


def _config_map(job: Job) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{job.name}-recipe"},
        "data": {"recipe.yaml": job.recipe.read_text(encoding="utf-8")},
    }


def _service(job: Job) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job.name},
        "spec": {
            "clusterIP": "None",  # each pod has a name of its own
            "publishNotReadyAddresses": True,
            "selector": {"batch.kubernetes.io/job-name": job.name},
            "ports": [{"name": "rendezvous", "port": RENDEZVOUS_PORT}],
        },
    }


def _job(job: Job) -> dict[str, Any]:
    exits = [("FailJob", EXIT_BAD_INPUT), ("Ignore", EXIT_PREEMPTED)]  # a mistake stays one; preemption is no failure
    rules: list[dict[str, Any]] = [
        {"action": action, "onExitCodes": {"containerName": "automodel", "operator": "In", "values": [code]}}
        for action, code in exits
    ]
    retries, grace = whole(job.options, "--retries", 0), positive(job.options, "--grace-seconds")
    rules.append({"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]})
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.name},
        "spec": {
            "completionMode": "Indexed",
            "completions": job.nodes,
            "parallelism": job.nodes,
            "backoffLimit": (3 if retries is None else retries) * job.nodes,
            "podFailurePolicy": {"rules": rules},
            "template": {
                "spec": {
                    "subdomain": job.name,
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": grace or 120,
                    "containers": [_container(job)],
                    "volumes": _volumes(job),
                }
            },
        },
    }


def _container(job: Job) -> dict[str, Any]:
    program = ["automodel", *job.arguments(f"{_RECIPE_DIR}/recipe.yaml"), f"--nproc-per-node={job.nproc}"]
    if job.nodes > 1:
        program += [
            f"--nnodes={job.nodes}",
            f"--rdzv-endpoint={job.name}-0.{job.name}:{RENDEZVOUS_PORT}",
            f"--rdzv-id={job.name}",
        ]
    container: dict[str, Any] = {"name": "automodel", "image": job.options["--image"], "command": program}
    if "--secret" in job.options:
        container["envFrom"] = [{"secretRef": {"name": job.options["--secret"]}}]
    if job.gpus:
        container["resources"] = {"limits": {job.options.get("--gpu-resource", "nvidia.com/gpu"): job.gpus}}
    container["volumeMounts"] = [
        {"name": "recipe", "mountPath": _RECIPE_DIR},
        {"name": "shared", "mountPath": _claim(job)[1]},
        {"name": "shm", "mountPath": "/dev/shm"},  # between the processes of a pod; 64 MiB by default
    ]
    return container


def _volumes(job: Job) -> list[dict[str, Any]]:
    return [
        {"name": "recipe", "configMap": {"name": f"{job.name}-recipe"}},
        {"name": "shared", "persistentVolumeClaim": {"claimName": _claim(job)[0]}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as lines."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
