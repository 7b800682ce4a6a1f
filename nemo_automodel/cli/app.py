"""``automodel VERB ...``: find the verb, run it, and turn what goes wrong into one message and an exit code."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from nemo_automodel.config.suggest import nearest
from nemo_automodel.errors import ConfigError
from nemo_automodel.recipes.run import guarded

VERBS = {
    "finetune": ("nemo_automodel.cli.finetune", "Fine-tune a model as a recipe says: automodel finetune llm -c recipe.yaml"),
    "launch": ("nemo_automodel.cli.launch", "Run a recipe on a cluster: automodel launch slurm -c recipe.yaml --nodes 2"),
    "demo": ("nemo_automodel.cli.demo", "Train a tiny model here and now, offline and on a CPU."),
    "merge": ("nemo_automodel.cli.merge", "Merge a LoRA adapter into its base model."),
    "coverage": ("nemo_automodel.cli.coverage", "Try every architecture of the installed transformers, each as a tiny twin."),
}  # fmt: skip
"""Verb -> module with a function of the same name, and a line of help. Nothing is imported before it is used."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command ``argv`` (default: the process's own) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _dispatch(arguments))


def _dispatch(arguments: list[str]) -> Any:
    verb = arguments[0] if arguments else "--help"
    if not verb.startswith("-") and verb not in VERBS:
        close = nearest(verb, VERBS)
        fix = f"did you mean `automodel {close}`?" if close else f"the verbs are {', '.join(VERBS)}"
        raise ConfigError(f"automodel {verb}: unknown verb; {fix}")
    return _typer_app(verb)(arguments or ["--help"], standalone_mode=False)


def _typer_app(verb: str) -> Callable[..., Any]:
    """A typer application in which only ``verb`` is the real function; the others are there for ``--help``."""
    import typer

    from nemo_automodel import __version__

    app = typer.Typer(
        name="automodel",
        help="Fine-tune any Hugging Face model, and get an ordinary Hugging Face checkpoint.",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )

    def show_version(value: bool) -> None:
        if value:
            print(f"automodel {__version__}")
            raise typer.Exit

    @app.callback()
    def options(version: bool = typer.Option(False, "--version", callback=show_version, is_eager=True)) -> None:
        """Fine-tune any Hugging Face model, and get an ordinary Hugging Face checkpoint."""

    for name, (module, text) in VERBS.items():
        function = getattr(import_module(module), name) if name == verb else _unused
        summary = inspect.cleandoc(function.__doc__).split("\n\n")[0] if name == verb and function.__doc__ else text
        if name in ("finetune", "launch"):  # they read their own: overrides are not options that typer could know
            settings = {"allow_extra_args": True, "ignore_unknown_options": True}
            app.command(name, help=summary, add_help_option=False, context_settings=settings)(function)
        else:
            app.command(name, help=summary)(function)
    return functools.partial(_run, app)


def _run(app: Any, arguments: list[str], standalone_mode: bool) -> Any:
    """Call the application; typer's own usage errors become ours."""
    import typer

    try:
        return app(arguments, prog_name="automodel", standalone_mode=standalone_mode)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except typer.Exit as stop:
        return stop.exit_code
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's usage errors
            raise ConfigError(
                f"automodel {arguments[0]}: {error.format_message()}; see automodel {arguments[0]} --help"
            ) from None
        raise


def _unused() -> None:
    raise AssertionError("a verb that was not asked for")


if __name__ == "__main__":
    sys.exit(main())
