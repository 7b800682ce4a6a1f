"""``automodel finetune``: the recipe of a kind of model, by name."""

from __future__ import annotations

import typer

from nemo_automodel.config.reference import help_text
from nemo_automodel.errors import EXIT_OK, ConfigError
from nemo_automodel.recipes.run import run_recipe


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
