"""``automodel finetune``: load and check a recipe, then hand it to the recipe's ``main``.

The recipe scripts come through here too, so that ``torchrun .../finetune.py -c recipe.yaml`` takes the same options.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from nemo_automodel.cli.app import guarded
from nemo_automodel.config import Config, load
from nemo_automodel.config.overrides import split_options
from nemo_automodel.config.reference import help_text
from nemo_automodel.config.suggest import did_you_mean
from nemo_automodel.config.tree import dump
from nemo_automodel.errors import EXIT_OK, ConfigError

DOMAINS = ("llm", "vlm")
_FLAGS = ("--help", "-h", "--print-config")
_VALUED = {"-c": "recipe.yaml", "--config": "recipe.yaml", "--allow-target": "my_package"}


def finetune(context: typer.Context) -> int:
    """Fine-tune a model as a recipe says."""
    domain, *rest = context.args or ["--help"]
    if domain.startswith("-"):
        if domain in ("--help", "-h"):
            print(help_text("llm"))
            return EXIT_OK
        raise ConfigError(
            f"automodel finetune {domain}: say what kind of model first; write automodel finetune llm {domain} ..."
        )
    return run_recipe(domain, rest)


def run_recipe(domain: str, argv: Sequence[str], main: Callable[[Config], Any] | None = None) -> int:
    """Run the fine-tuning recipe of ``domain`` with command-line arguments ``argv``.

    Args:
        domain: ``llm`` or ``vlm``.
        argv: ``-c recipe.yaml`` and, as wanted, ``--section.key=value``, ``--allow-target``, ``--print-config``,
            ``--help``.
        main: What to call with the checked config; by default the ``main`` of the script that is running, where that
            is a recipe, else of the package's own recipe.

    Returns:
        The exit code. A user's mistake is printed (by rank 0), not raised.
    """
    config: list[Config] = []

    def prepare() -> None:
        config.extend(_prepare(domain, argv))

    code = guarded(prepare, main_rank_only=True)
    if code != EXIT_OK or not config:
        return code
    return guarded(lambda: (main or _main_of(domain))(config[0]))


def _prepare(domain: str, argv: Sequence[str]) -> list[Config]:
    """The checked config; empty where the arguments asked for text only, which is then printed."""
    _require_recipe(domain)
    options, overrides = split_options(argv, _FLAGS, _VALUED)
    if "--help" in options or "-h" in options:
        print(help_text(domain))
        return []
    files = [*options.get("-c", []), *options.get("--config", [])]
    if len(files) != 1:
        problem = "given more than once" if files else "missing"
        raise ConfigError(f"automodel finetune {domain}: -c is {problem}; write -c recipe.yaml")
    config = load(files[0], overrides, options.get("--allow-target", ()), recipe=domain)
    if "--print-config" in options:
        print(dump(config.resolved()), end="")
        return []
    return [config]


def _require_recipe(domain: str) -> None:
    if domain not in DOMAINS:
        hint = did_you_mean(domain, DOMAINS) or f"write one of {', '.join(DOMAINS)}"
        raise ConfigError(f"automodel finetune {domain}: unknown kind of model; {hint}")
    folder = Path(__file__).parents[1] / "recipes" / domain
    if not (folder / "finetune.py").is_file():
        raise ConfigError(
            f"automodel finetune {domain}: this version has no recipe for it; write automodel finetune llm"
        )


def _main_of(domain: str) -> Callable[[Config], Any]:
    """``main`` of the running script if that is a recipe (a copy included), else of our own."""
    script = sys.modules["__main__"]
    ran_here = getattr(script, "run_recipe", None) is run_recipe
    found = getattr(script, "main", None)
    if ran_here and callable(found):
        return found
    return import_module(f"nemo_automodel.recipes.{domain}.finetune").main
