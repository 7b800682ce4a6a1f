"""``automodel launch``: write what a cluster needs to run a recipe on several machines, and submit it."""

from __future__ import annotations

import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from nemo_automodel.cli.arguments import positive, take, whole
from nemo_automodel.cli.launchers.job import Job, Launcher
from nemo_automodel.config.suggest import did_you_mean
from nemo_automodel.errors import EXIT_OK, ConfigError
from nemo_automodel.recipes.run import DOMAINS, check_recipe

LAUNCHERS = ("slurm", "k8s", "skypilot")
_COMMON = {
    "--config": ("recipe.yaml", "the recipe (also: -c)"),
    "--nodes": ("2", "machines (default 1)"),
    "--gpus-per-node": ("8", "GPUs of each, a process for each; 0 trains on the CPU (default 8)"),
    "--nproc-per-node": ("8", "processes on each machine (default: one for each GPU; on the CPU 1)"),
    "--job-name": ("my-run", "name of the job (default: the recipe's)"),
}
_FLAGS = {"--dry-run": "only write the file", "--help": "this text"}
_DEFAULT_GPUS = 8


def launch(context: typer.Context) -> int:
    """Run a recipe on a cluster: write a script or manifest for it, and submit that where the client is installed."""
    kind, *arguments = context.args or ["--help"]
    if kind in ("--help", "-h"):
        print("\n\n".join(_help(name) for name in LAUNCHERS))
        return EXIT_OK
    if kind not in LAUNCHERS:
        hint = did_you_mean(kind, LAUNCHERS) or f"write one of {', '.join(LAUNCHERS)}"
        raise ConfigError(f"automodel launch {kind}: unknown kind of cluster; {hint}")
    launcher: Any = import_module(f"nemo_automodel.cli.launchers.{kind}")
    if "--help" in arguments or "-h" in arguments:
        print(_help(kind))
        return EXIT_OK
    domain = arguments.pop(0) if arguments and arguments[0] in DOMAINS else "llm"
    examples = {name: example for name, (example, _) in _options(launcher).items()}
    given, rest = take(_long(arguments), examples, (*_FLAGS, *launcher.FLAGS))
    _require_known(kind, rest, [*examples, *_FLAGS, *launcher.FLAGS])
    code, config = check_recipe(domain, [*(("-c", given["--config"]) if "--config" in given else ()), *rest])
    if config is None:
        return code
    return _write_and_submit(launcher, _job(domain, given, rest, config))


def _long(arguments: list[str]) -> list[str]:
    return ["--config" if argument == "-c" else argument for argument in arguments]


def _require_known(kind: str, rest: list[str], known: list[str]) -> None:
    """Name an option that is none: without a dot it cannot be one of the recipe's."""
    for argument in rest:
        name = argument.partition("=")[0]
        if name.startswith("--") and "." not in name and name not in ("--allow-target", "--certificate"):
            hint = did_you_mean(name.replace("_", "-"), known) or f"see automodel launch {kind} --help"
            raise ConfigError(f"automodel launch {kind} {argument}: unknown option; {hint}")


def _job(domain: str, given: dict[str, str], rest: list[str], config: Any) -> Job:
    restore = getattr(config.checkpoint, "restore_from", None)
    if restore not in (None, "latest"):
        raise ConfigError(
            f"checkpoint.restore_from={restore}: a launched run goes on from its newest checkpoint whenever it is started "
            "again; leave it out, or copy that checkpoint into checkpoint.checkpoint_dir"
        )
    gpus = whole(given, "--gpus-per-node", 0)
    gpus = _DEFAULT_GPUS if gpus is None else gpus
    nproc = positive(given, "--nproc-per-node") or max(1, gpus)
    if gpus and nproc > gpus:
        raise ConfigError(f"--nproc-per-node {nproc}: there are {gpus} on a node (--gpus-per-node); write at most that")
    recipe = Path(given["--config"]).expanduser().resolve()
    return Job(
        name=given.get("--job-name") or re.sub(r"[^a-z0-9]+", "-", recipe.stem.lower()).strip("-"),
        domain=domain,
        recipe=recipe,
        overrides=tuple(rest),
        nodes=positive(given, "--nodes") or 1,
        gpus=gpus,
        nproc=nproc,
        checkpoint_dir=getattr(config.checkpoint, "checkpoint_dir", None),
        options=given,
    )


def _write_and_submit(launcher: Launcher, job: Job) -> int:
    text = launcher.render(job)
    path = Path(job.options.get("--output") or f"{job.name}{launcher.SUFFIX}").expanduser()
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ConfigError(f"{path}: exists already and differs; remove it, or write another: --output FILE")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path}: {error.strerror or error}; write to another place") from error
    print(f"wrote {path}: {job.size}")
    if "--dry-run" in job.options:
        return EXIT_OK
    if shutil.which(launcher.CLIENT) is None:
        print(f"not submitted, since `{launcher.CLIENT}` is not installed here; take the file to where it is")
        return EXIT_OK
    return launcher.submit(job, path)


def _options(launcher: Any) -> dict[str, tuple[str, str]]:
    output = (f"my-run{launcher.SUFFIX}", "file to write (default: the job's name, in this folder)")
    return _COMMON | {"--output": output} | launcher.OPTIONS


def _help(kind: str) -> str:
    launcher = import_module(f"nemo_automodel.cli.launchers.{kind}")
    usage = f"usage: automodel launch {kind} -c recipe.yaml [options] [--section.key=value ...]"
    rows = [(f"  {name} {example}", meaning) for name, (example, meaning) in _options(launcher).items()]
    rows += [(f"  {name}", meaning) for name, meaning in {**launcher.FLAGS, **_FLAGS}.items()]
    width = max(len(row[0]) for row in rows)
    return "\n".join([usage, "", *(f"{name:<{width}}  {meaning}" for name, meaning in rows)])
