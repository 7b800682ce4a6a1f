"""The announcement's YAML, unchanged, through the real command, from a Hub over HTTP to files that others load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.hub import DATASET, MODEL, LocalHub, serving
from tests.ranks.launch import ROOT

RECIPE = ROOT / "examples/llm_finetune/llama3_2/llama3_2_1b_squad_peft.yaml"
SCRIPT = ROOT / "nemo_automodel/recipes/llm/finetune.py"
COMMANDS = {
    "automodel": [sys.executable, "-m", "nemo_automodel.cli.app", "finetune", "llm"],
    "python": [sys.executable, str(SCRIPT)],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)],
}


def run(
    hub: LocalHub, folder: Path, how: str, *overrides: str, token: str | None = None
) -> subprocess.CompletedProcess:
    env = {**hub.env(folder, token), "OMP_NUM_THREADS": "1"}
    command = [*COMMANDS[how], "-c", str(RECIPE), *overrides]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def hub():
    with serving() as hub:
        yield hub


def test_the_recipe_is_the_announcements():
    config = yaml.safe_load(RECIPE.read_text())
    assert set(config) == {"model", "distributed", "loss_fn", "dataset", "peft"}
    assert config["peft"] == {
        "_target_": "nemo_automodel.components._peft.lora.PeftConfig",
        "match_all_linear": True,
        "dim": 8,
        "alpha": 32,
        "use_triton": True,
    }


@pytest.mark.parametrize("how", COMMANDS)
def test_runs_as_it_stands_and_leaves_a_peft_adapter(hub, tmp_path, how):
    result = run(hub, tmp_path, how)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    lines = [json.loads(line) for line in (tmp_path / "checkpoints/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    directory = tmp_path / f"checkpoints/epoch_0_step_{len(lines)}/model"
    config = json.loads((directory / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 32, MODEL)
    assert "vllm serve" in result.stdout + result.stderr

    base_dir = next((tmp_path / "hf").rglob("model.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(base_dir.parent, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor([tokenizer("What is the capital of France?")["input_ids"]])
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, directory)(ids).logits
    assert (adapted - plain).norm() / plain.norm() > 1e-4, "the adapter must do something"


def test_overrides_overwrite_and_append(hub, tmp_path):
    result = run(
        hub, tmp_path, "automodel", "--step_scheduler.max_steps=2", "--peft.dim", "4", "--checkpoint.checkpoint_dir=there",
        "--dataset.limit_dataset_samples=128",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert len((tmp_path / "there/metrics.jsonl").read_text().splitlines()) == 2
    config = json.loads((tmp_path / "there/epoch_0_step_2/model/adapter_config.json").read_text())
    assert config["r"] == 4


@pytest.mark.parametrize(
    ("kind", "name", "overrides", "expected"),
    [
        ("gated", MODEL, (), "hf auth login"),
        ("missing", MODEL, ("--model.pretrained_model_name_or_path=meta-llama/Llama-9",), "meta-llama/Llama-9"),
        ("revision", MODEL, ("--model.revision=v9",), "v9"),
        ("dataset", DATASET, ("--dataset.dataset_name=rajpurkar/squat",), "rajpurkar/squat"),
        ("split", DATASET, ("--dataset.split=tain",), "tain"),
    ],
)
def test_what_the_hub_refuses_is_one_message(tmp_path, kind, name, overrides, expected):
    with serving() as hub:
        if kind == "gated":
            hub.repositories["models", name].gated = True
        result = run(hub, tmp_path, "automodel", *overrides)
    assert result.returncode == 2, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    message = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(message) == 1, result.stderr[-2000:]
    assert expected in message[0]


def test_bad_minutes_are_waited_out_in_a_whole_run(tmp_path):
    with serving() as hub:
        hub.fail(503, times=2, pattern="config.json")
        hub.cut("model.safetensors", after=20_000, times=1)
        result = run(hub, tmp_path, "automodel", "--step_scheduler.max_steps=1")
    assert result.returncode == 0, result.stderr[-3000:]
