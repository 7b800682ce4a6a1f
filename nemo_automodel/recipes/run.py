"""What every recipe script starts with: read the arguments, check the recipe, run ``main``, return an exit code.

``automodel finetune`` and the scripts (``torchrun .../finetune.py -c recipe.yaml``) come through here alike.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from nemo_automodel.components.distributed.placement import adopt_slurm
from nemo_automodel.config import Config, load
from nemo_automodel.config.overrides import split_options
from nemo_automodel.config.reference import help_text
from nemo_automodel.config.suggest import did_you_mean
from nemo_automodel.config.tree import dump
from nemo_automodel.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_PREEMPTED, AutoModelError, ConfigError, Terminated
from nemo_automodel.recipes.console import messages_shown, quiet_bars
from nemo_automodel.recipes.ending import run_to_end

DOMAINS = ("llm", "vlm")
_FLAGS = ("--help", "-h", "--print-config")
_OF_THE_COMMAND = ("--nproc-per-node", "--nnodes", "--rdzv-endpoint", "--rdzv-id")
_VALUED = {"-c": "recipe.yaml", "--config": "recipe.yaml", "--allow-target": "my_package", "--certificate": "strict"}


def run_recipe(domain: str, argv: Sequence[str], main: Callable[[Config], Any] | None = None) -> int:
    """Run the fine-tuning recipe of ``domain`` with command-line arguments ``argv``.

    Args:
        domain: ``llm`` or ``vlm``.
        argv: ``-c recipe.yaml`` and, as wanted, ``--section.key=value``, ``--allow-target``, ``--print-config``,
            ``--help``.
        main: What to call with the checked config. Default: ``main`` of the package's own recipe, imported only once
            the config is found right.

    Returns:
        The exit code. A user's mistake is printed (by rank 0), not raised.
    """
    adopt_slurm()
    code, config = check_recipe(domain, argv)
    if config is None:
        return code
    quiet_bars()
    with messages_shown():
        return guarded(lambda: run_to_end(main or _own_main(domain), config))


def check_recipe(domain: str, argv: Sequence[str]) -> tuple[int, Config | None]:
    """Check what ``run_recipe`` would run, without importing torch: the exit code, and the config if there is one.

    Without a config there is nothing to run: a mistake (printed), or arguments that asked for text only.
    """
    config: list[Config] = []
    code = guarded(lambda: config.extend(_prepare(domain, argv)), main_rank_only=True)
    return code, config[0] if code == EXIT_OK and config else None


def _prepare(domain: str, argv: Sequence[str]) -> list[Config]:
    """The checked config; empty where the arguments asked for text only, which is then printed."""
    _require_recipe(domain)
    options, overrides = split_options(argv, _FLAGS, _VALUED)
    if "--help" in options or "-h" in options:
        print(help_text(domain))
        return []
    if started := next((name for name in _OF_THE_COMMAND if name in {o.partition("=")[0] for o in overrides}), None):
        raise ConfigError(
            f"{started}: an option of `automodel finetune`; start a script as torchrun {started} ... script.py"
        )
    files = [*options.get("-c", []), *options.get("--config", [])]
    if len(files) != 1:
        problem = "given more than once" if files else "missing"
        raise ConfigError(f"automodel finetune {domain}: -c is {problem}; write -c recipe.yaml")
    overrides += [f"--certificate.mode={mode}" for mode in options.get("--certificate", ())]
    config = load(files[0], overrides, options.get("--allow-target", ()), recipe=domain)
    if "--print-config" in options:
        print(dump(config.resolved()), end="")
        return []
    return [config]


def _require_recipe(domain: str) -> None:
    if domain not in DOMAINS:
        hint = did_you_mean(domain, DOMAINS) or f"write one of {', '.join(DOMAINS)}"
        raise ConfigError(f"automodel finetune {domain}: unknown kind of model; {hint}")
    if not (Path(__file__).parent / domain / "finetune.py").is_file():
        raise ConfigError(
            f"automodel finetune {domain}: this version has no recipe for it; write automodel finetune llm"
        )


def _own_main(domain: str) -> Callable[[Config], Any]:
    return import_module(f"nemo_automodel.recipes.{domain}.finetune").main


def guarded(action: Callable[[], Any], main_rank_only: bool = False) -> int:
    """Run ``action``; print a mistake or an interruption as a message, never a traceback, and return the exit code.

    Args:
        action: What to run; an ``int`` it returns is the exit code.
        main_rank_only: Whether every rank is known to meet the same mistake, so that one message is enough.
    """
    rank = os.environ.get("RANK", "0")
    try:
        result = action()
    except AutoModelError as error:
        if rank == "0":
            print(_message(error), file=sys.stderr)
        elif not main_rank_only:
            print(f"rank {rank}: {_message(error)}", file=sys.stderr)
        return error.exit_code
    except Terminated as signal:
        if rank == "0":
            print(f"{signal} before the first step: nothing to save, run the same command again", file=sys.stderr)
        return EXIT_PREEMPTED
    except KeyboardInterrupt:
        if rank == "0":
            print(
                "interrupted; a training run goes on from its newest checkpoint with --checkpoint.restore_from=latest",
                file=sys.stderr,
            )
        return EXIT_INTERRUPTED
    return result if isinstance(result, int) else EXIT_OK


def _message(error: AutoModelError) -> str:
    return "error: " + str(error).replace("\n", "\n       ")
