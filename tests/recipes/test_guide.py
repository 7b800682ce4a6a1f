"""The code in the guide to writing a recipe of one's own runs as it is printed (examples: test_examples.py)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.recipes.workspace import ROOT, make_workspace

GUIDE = (ROOT / "docs/write-your-own-recipe.md").read_text()


def fenced(language: str, text: str = GUIDE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("snippet", [s for s in fenced("yaml") if "_target_" in s], ids=lambda s: s.split(":")[0])
def test_the_guides_components_run_as_printed(tmp_path, snippet):
    workspace = make_workspace(tmp_path, sections=yaml.safe_load(snippet))
    (tmp_path / "mine.py").write_text("\n".join(fenced("python")))
    workspace.spawn("--allow-target", "./mine.py", "--step_scheduler.max_steps=2")
    assert [line["step"] for line in workspace.metrics()] == [1, 2]


def test_a_copy_of_the_recipe_runs_its_own_main(tmp_path):
    workspace = make_workspace(tmp_path)
    copy = tmp_path / "my_recipe.py"
    shutil.copy(ROOT / "nemo_automodel/recipes/llm/finetune.py", copy)
    text = copy.read_text()
    assert text.count("        lr_scheduler.step()\n") == 1
    copy.write_text(
        text.replace("        lr_scheduler.step()\n", "        lr_scheduler.step()\n        print('my own loop')\n")
    )
    command = [sys.executable, str(copy), "-c", str(workspace.recipe), "--step_scheduler.max_steps=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(ROOT))}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("my own loop") == 2


def test_the_guides_average_is_saved_and_restored(tmp_path):
    """The class and the three lines of the guide, put into a copy of the recipe where their comments say."""
    workspace = make_workspace(tmp_path)
    text = (ROOT / "nemo_automodel/recipes/llm/finetune.py").read_text()
    average = next(snippet for snippet in fenced("python") if "class Average" in snippet)
    build, keep, update = (line.split("#")[0].strip() for line in fenced("py")[0].splitlines())
    for anchor, line in (
        ("    params = [", build),
        ("    state = TrainState(", keep),
        ("        guard.step(", update),
    ):
        start = text.index(anchor)
        end = text.index("\n", start) + 1
        text = text[:end] + " " * (len(anchor) - len(anchor.lstrip())) + line + "\n" + text[end:]
    text = text.replace("def main(", average + "\n\ndef main(", 1)
    text = text.replace(
        "    env.shutdown()",
        "    print('average', sum(a.double().sum().item() for a in ema.average))\n    env.shutdown()",
    )
    (tmp_path / "my_recipe.py").write_text(text)

    def run(*overrides):
        command = [
            sys.executable,
            "my_recipe.py",
            "-c",
            str(workspace.recipe),
            "--step_scheduler.ckpt_every_steps=6",
            *overrides,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
        return re.search(r"average (\S+)", result.stdout)[1]

    whole = run("--checkpoint.checkpoint_dir=whole")
    first = next((tmp_path / "whole").glob("epoch_*_step_6"))
    assert run("--checkpoint.checkpoint_dir=resumed", f"--checkpoint.restore_from={first}") == whole
