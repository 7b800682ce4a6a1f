"""Every YAML under ``examples/`` runs as the recipe it is, on a tiny model of its family; so does the code in the docs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.builders import make_tokenizer, tiny_config
from tests.recipes.workspace import ROOT, make_workspace

EXAMPLES = sorted((ROOT / "examples/llm_finetune").rglob("*.yaml"))
GUIDE = (ROOT / "docs/write-your-own-recipe.md").read_text()
PATH_KEYS = ("dataset_name", "path_or_dataset", "path_or_dataset_id")

ROW = {
    "context": "Paris is the capital of France.",
    "question": "What is the capital of France?",
    "answers": {"text": ["Paris"], "answer_start": [0]},
    "ctx": "The quick brown fox",
    "endings": ["jumps over the dog", "does not", "two", "four"],
    "label": 0,
    "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "my name is Ada"}],
    "instruction": "name a colour",
    "response": "blue",
}


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    """A folder with a tiny model of each family and one data file that has every example's columns."""
    folder = tmp_path_factory.mktemp("materials")
    for family in ("llama", "qwen3"):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(folder / family)
        make_tokenizer("chatml").save_pretrained(folder / family)
    for name in ("rows.jsonl", "validation.jsonl"):  # a file has the split that its name says
        (folder / name).write_text((json.dumps(ROW) + "\n") * 48)
    return folder


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_runs(materials, tmp_path, example):
    from nemo_automodel.config import load
    from nemo_automodel.recipes.llm.finetune import main

    config = yaml.safe_load(example.read_text())
    if "quantization" in config:
        pytest.importorskip("bitsandbytes")
    family = "qwen3" if "qwen3" in str(example) else "llama"
    overrides = [
        f"--model.pretrained_model_name_or_path={materials / family}",
        f"--checkpoint.checkpoint_dir={tmp_path / 'out'}",
        "--step_scheduler.global_batch_size=2",
        "--step_scheduler.local_batch_size=1",
        "--step_scheduler.max_steps=2",
        "--loggers.progress=false",
    ]
    for name, file in (("dataset", "rows.jsonl"), ("validation_dataset", "validation.jsonl")):
        key = next((key for key in PATH_KEYS if key in config.get(name, {})), None)
        overrides += [f"--{name}.{key}={materials / file}"] if key else []
    if "packed_sequence" in config:
        overrides += ["--packed_sequence.packed_sequence_size=96", "--dataset.seq_length=96"]
    main(load(example, overrides))
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(0 < line["loss"] < 20 for line in lines)
    directory = tmp_path / "out/epoch_0_step_2/model"
    assert (directory / "model.safetensors").exists() or (directory / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short(example):
    lines = [line for line in example.read_text().splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) <= 25


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
