"""A run on several machines, as every kind of cluster is told of it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        name: The job's name.
        domain: ``llm`` or ``vlm``.
        recipe: The checked recipe, an absolute path.
        overrides: What else the recipe's command is given: ``--section.key=value`` and ``--allow-target``.
        nodes: Machines.
        gpus: GPUs of each; 0 trains on the CPU.
        nproc: Processes on each.
        checkpoint_dir: As the recipe says; None where it writes none.
        options: Those of this kind of cluster, as given.
    """

    name: str
    domain: str
    recipe: Path
    overrides: tuple[str, ...]
    nodes: int
    gpus: int
    nproc: int
    checkpoint_dir: str | None
    options: Mapping[str, str]

    def arguments(self, recipe: str | Path) -> list[str]:
        """What follows ``automodel`` on each machine, without where the machines meet."""
        device = ["--dist_env.device=cpu"] if not self.gpus else []
        restore = "--checkpoint.restore_from=latest"
        return ["finetune", self.domain, "-c", str(recipe), *device, *self.overrides, restore]

    @property
    def size(self) -> str:
        """The machines in words."""
        nodes = "1 node" if self.nodes == 1 else f"{self.nodes} nodes"
        if not self.gpus:
            return f"{nodes} x {self.nproc} CPU process" + ("es" if self.nproc > 1 else "")
        return f"{nodes} x {self.gpus} GPU" + ("s" if self.gpus > 1 else "")


class Launcher(Protocol):
    """A module of this package."""

    OPTIONS: Mapping[str, tuple[str, str]]  # name -> an example of its value, and what it means
    FLAGS: Mapping[str, str]
    SUFFIX: str  # of the file that is written
    CLIENT: str  # the program that submits it

    def render(self, job: Job) -> str:
        """The file's text."""
        ...

    def submit(self, job: Job, path: Path) -> int:
        """Hand the file to the client; returns an exit code."""
        ...


def shell_command(program: list[str], arguments: list[str], meeting: list[str]) -> str:
    """``program arguments`` for a script, an option a line; ``meeting`` is added as it is, for the shell to fill in."""
    head, options = arguments[:4], arguments[4:]  # finetune llm -c recipe.yaml
    lines = [shlex.join([*program, *head])]
    for word in options:
        is_value = not word.startswith("--") and len(lines) > 1
        if is_value:
            lines[-1] += " " + shlex.quote(word)
        else:
            lines.append(shlex.quote(word))
    return " \\\n    ".join([*lines, *meeting])
