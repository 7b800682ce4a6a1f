"""The command: verbs, exit codes, messages instead of tracebacks, one message over all ranks, and recipe scripts."""

import os
import re
import subprocess
import sys
import textwrap

import pytest

from nemo_automodel import __version__
from nemo_automodel.cli.app import main
from nemo_automodel.errors import DataError
from nemo_automodel.recipes.run import run_recipe
from tests.unit.config.mutations import ANNOUNCED, FULL, ROOT


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "r.yaml").write_text(FULL)
    return str(tmp_path / "r.yaml")


def test_help_lists_the_verbs(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in ("finetune", "launch", "demo", "merge"))
    assert main([]) == 0


def test_version(capsys):
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["finetune", "llm", "--help"], ["finetune", "llm", "-h"], ["finetune", "--help"], ["finetune"]]
)
def test_help_lists_every_section_with_types_and_defaults(arguments, capsys):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    from nemo_automodel.config.sections import LLM

    assert all(f"\n{section}:" in shown for section in LLM)
    assert re.search(r"global_batch_size +int +.*= 64", shown)
    assert "--print-config" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["finetun"], "did you mean `automodel finetune`?"),
        (["nothing-like-it"], "the verbs are finetune, launch, demo, merge"),
        (["finetune", "lm", "-c", "x"], "did you mean `llm`?"),
        (["finetune", "-c", "x"], "write automodel finetune llm -c"),
        (["finetune", "llm"], "-c is missing; write -c recipe.yaml"),
        (["finetune", "llm", "-c", "a", "-c", "b"], "-c is given more than once"),
        (["finetune", "llm", "-c"], "-c: no value; write -c recipe.yaml"),
        (["finetune", "llm", "-c", "absent.yaml"], "absent.yaml: no such file"),
        (["merge", "--no-such-option"], "--no-such-option"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_mistakes_exit_with_2_and_one_message(arguments, says, capsys, recipe):
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert "Traceback" not in shown


def test_vlm_says_that_it_is_not_there_yet_or_runs(capsys, recipe):
    if (ROOT / "nemo_automodel/recipes/vlm/finetune.py").exists():
        pytest.skip("there is a recipe for it")
    assert main(["finetune", "vlm", "-c", recipe]) == 2
    assert "this version has no recipe for it" in capsys.readouterr().err


def test_print_config_shows_overrides_and_defaults(recipe, capsys):
    assert main(["finetune", "llm", "-c", recipe, "--print-config", "--optimizer.lr", "3e-4", "--rng.seed=9"]) == 0
    shown = capsys.readouterr().out
    assert "lr: 0.0003" in shown
    assert "seed: 9" in shown
    assert "log_every_steps: 1" in shown


def test_main_gets_the_config_and_its_return_is_the_exit_code(recipe):
    assert run_recipe("llm", ["-c", recipe, "--rng.seed=5"], main=lambda cfg: cfg.rng.seed) == 5
    assert run_recipe("llm", ["-c", recipe], main=lambda cfg: None) == 0


def test_errors_of_the_run_are_messages_and_faults_are_not_hidden(recipe, capsys, monkeypatch):
    def bad_data(cfg):
        raise DataError("data.jsonl:3: not JSON; correct that line")

    def fault(cfg):
        raise RuntimeError("a bug")

    assert run_recipe("llm", ["-c", recipe], main=bad_data) == 2
    assert capsys.readouterr().err == "error: data.jsonl:3: not JSON; correct that line\n"
    with pytest.raises(RuntimeError, match="a bug"):
        run_recipe("llm", ["-c", recipe], main=fault)
    monkeypatch.setenv("RANK", "3")  # one rank's own trouble is shown, and said to be its own
    assert run_recipe("llm", ["-c", recipe], main=bad_data) == 2
    assert capsys.readouterr().err.startswith("rank 3: error: data.jsonl:3")


def test_only_rank_0_reports_a_mistake_that_all_ranks_meet(recipe, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run_recipe("llm", ["-c", recipe, "--rng.sed=1"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert run_recipe("llm", ["-c", recipe, "--rng.sed=1"]) == 2
    assert "did you mean `seed`" in capsys.readouterr().err


def test_interruption_is_130(recipe, capsys):
    def interrupted(cfg):
        raise KeyboardInterrupt

    assert run_recipe("llm", ["-c", recipe], main=interrupted) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_copied_recipe_script_runs_its_own_main(tmp_path, recipe):
    script = tmp_path / "my_recipe.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys

            def main(cfg):
                print("mine", cfg.rng.seed)

            if __name__ == "__main__":
                from nemo_automodel.recipes.run import run_recipe

                sys.exit(run_recipe("llm", sys.argv[1:], main))
            """
        )
    )
    command = [sys.executable, str(script), "-c", recipe, "--rng.seed=11"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (result.returncode, result.stdout) == (0, "mine 11\n"), result.stderr


def test_our_recipe_script_takes_the_same_options(tmp_path):
    script = ROOT / "nemo_automodel/recipes/llm/finetune.py"
    command = [sys.executable, str(script), "-c", str(ANNOUNCED), "--peft.dimm=4"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert "command line peft.dimm=4" in result.stderr
    assert "did you mean `dim`?" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_installed_command_is_this_one():
    from importlib.metadata import entry_points

    (command,) = [entry for entry in entry_points(group="console_scripts") if entry.name == "automodel"]
    assert command.load() is main
