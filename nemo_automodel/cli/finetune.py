"""``automodel finetune``: the recipe of a kind of model, on one rank or on as many as there are GPUs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import typer

from nemo_automodel.cli.arguments import positive, take
from nemo_automodel.components.distributed.placement import Nodes, find_nodes, started_as_rank
from nemo_automodel.config.reference import help_text
from nemo_automodel.config.suggest import did_you_mean
from nemo_automodel.config.tree import COMMAND_LINE
from nemo_automodel.errors import EXIT_OK, ConfigError
from nemo_automodel.recipes.run import check_recipe, run_recipe

_HELP = """
starting several processes:
  --nproc-per-node N         processes on this machine; default: one for every visible GPU, without GPUs one.
                             More than one are started with torchrun; its signals, output and exit code are passed on
  --nnodes M                 machines, on each of which this command is given (default: what Slurm or Kubernetes say, or 1)
  --rdzv-endpoint HOST:PORT  where they meet: one of them (under srun the first), and a free port there
  --rdzv-id NAME             what tells this meeting from another at the same place (default: automodel)
  Inside torchrun, or under srun with several tasks on a node, this process is one of them already.
"""
_OPTIONS = {"--nproc-per-node": "8", "--nnodes": "2", "--rdzv-endpoint": "node1:29400", "--rdzv-id": "my-run"}


def finetune(context: typer.Context) -> int:
    """Fine-tune a model as a recipe says."""
    domain, *arguments = context.args or ["--help"]
    if domain.startswith("-"):
        if domain in ("--help", "-h"):
            print(help_text() + _HELP)
            return EXIT_OK
        raise ConfigError(
            f"automodel finetune {domain}: say what kind of model first; write automodel finetune llm {domain} ..."
        )
    given, rest = take(arguments, _OPTIONS)
    _refuse_misspelt(rest)
    wanted = Ranks.read(given)
    rank_of = started_as_rank()
    if rank_of is not None or "--help" in rest or "-h" in rest:
        code = run_recipe(domain, rest)
        if rank_of is None and code == EXIT_OK:
            print(_HELP)
        return code
    code, config = check_recipe(domain, rest)
    if config is None:
        return code
    nproc = wanted.per_node(_device(config))
    if nproc == 1 and wanted.nodes is None:
        return run_recipe(domain, rest)
    from nemo_automodel.cli.ranks import run_ranks

    command = ["nemo_automodel.cli.app", "finetune", domain, *rest]
    return run_ranks(command, nproc, wanted.nodes, getattr(config.checkpoint, "checkpoint_dir", None))


def _refuse_misspelt(rest: list[str]) -> None:
    for name in (argument.partition("=")[0] for argument in rest):
        own = name.startswith("--n") and "." not in name  # no section does
        if own and (hint := did_you_mean(name.replace("_", "-"), _OPTIONS)):
            raise ConfigError(f"{COMMAND_LINE} {name}: unknown option; {hint}")


@dataclass(frozen=True)
class Ranks:
    """How many processes to start, as far as it was said: ``nproc`` a machine, None for one a GPU."""

    nproc: int | None
    nodes: Nodes | None

    @classmethod
    def read(cls, given: dict[str, str]) -> Ranks:
        """Read the options, and what the cluster says where they do not.

        Raises:
            ConfigError: A number that is none, options that do not go together, or ranks that exist already.
        """
        starter = started_as_rank()
        if starter is not None and given:
            raise ConfigError(
                f"{next(iter(given))}: this process is one of those that {starter} has started already; leave the "
                f"option out, or start one process a machine without {starter}"
            )
        nproc = positive(given, "--nproc-per-node")
        count = positive(given, "--nnodes")
        endpoint = given.get("--rdzv-endpoint")
        if (count or 1) > 1 and endpoint is None:
            raise ConfigError(
                f"--nnodes {count}: where do they meet? write --rdzv-endpoint HOST:PORT with the address of one of them"
            )
        if endpoint is None:
            if "--rdzv-id" in given:
                raise ConfigError("--rdzv-id: is for several machines; write --nnodes and --rdzv-endpoint too")
            return cls(nproc, None if count == 1 else find_nodes())
        host, colon, port = endpoint.rpartition(":")
        if not colon or not host or not port.isdecimal():
            raise ConfigError(f"--rdzv-endpoint {endpoint}: not an address and a port; write HOST:PORT")
        if count is None:
            raise ConfigError("--rdzv-endpoint: is for several machines; write how many: --nnodes 2")
        first = os.environ["SLURM_PROCID"] == "0" if "SLURM_STEP_ID" in os.environ else None
        nodes = Nodes(count, endpoint, given.get("--rdzv-id", "automodel"), first, "--rdzv-endpoint")
        return cls(nproc, nodes if count > 1 else None)

    def per_node(self, device: str | None) -> int:
        """Processes to start on this machine; asks torch for its GPUs, so only once the recipe is found right.

        Raises:
            ConfigError: More were asked for than there are GPUs.
        """
        if device == "cpu":
            return self.nproc or 1
        import torch

        gpus = torch.cuda.device_count()
        if gpus and self.nproc is not None and self.nproc > gpus:
            visible = "1 GPU is" if gpus == 1 else f"{gpus} GPUs are"
            raise ConfigError(
                f"--nproc-per-node {self.nproc}: {visible} visible; write at most {gpus}, or train on the CPU with "
                "--dist_env.device cpu"
            )
        return self.nproc or max(1, gpus)


def _device(config: Any) -> str | None:
    return getattr(config.dist_env, "device", None)
