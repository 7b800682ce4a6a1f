"""A folder with a tiny model, its tokenizer, data and a recipe, and ways to run that recipe as a user would."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.builders import CORPUS, make_tokenizer, tiny_config

ROOT = Path(__file__).parents[2]


@dataclass
class Workspace:
    """``path`` holds model/, data.jsonl and recipe.yaml; checkpoints go to ``path/out``."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def model_dir(self) -> Path:
        return self.path / "model"

    def command(self, *overrides: str, out: str = "out") -> list[str]:
        config = ["-c", str(self.recipe), f"--checkpoint.checkpoint_dir={self.path / out}", *overrides]
        return [sys.executable, "-m", "nemo_automodel.cli.app", "finetune", "llm", *config]

    def run(self, *overrides: str, out: str = "out") -> list[dict[str, Any]]:
        """Run in this process; returns the training lines of metrics.jsonl."""
        from nemo_automodel.config import load
        from nemo_automodel.recipes.llm.finetune import main

        main(load(self.recipe, [f"--checkpoint.checkpoint_dir={self.path / out}", *overrides]))
        return self.metrics(out)

    def spawn(self, *overrides: str, out: str = "out", check: bool = True, env: dict[str, str] | None = None):
        """Run through the real command in a process of its own."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        result = subprocess.run(
            self.command(*overrides, out=out),
            cwd=self.path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
        return result

    def metrics(self, out: str = "out") -> list[dict[str, Any]]:
        lines = (self.path / out / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if "loss" in line]


def make_workspace(
    path: Path, model_type: str = "llama", rows: int = 48, sections: dict[str, Any] | None = None, **config: Any
) -> Workspace:
    """Write a workspace: fp32 weights, ragged question/answer rows, a recipe of 12 steps at lr 1e-2."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer("plain")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **config))
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    rng = random.Random(0)
    words = " ".join(CORPUS).split()
    with open(path / "data.jsonl", "w") as f:
        for _ in range(rows):
            question, answer = (" ".join(rng.choices(words, k=rng.randint(2, n))) for n in (8, 12))
            f.write(json.dumps({"question": question, "answer": answer}) + "\n")
    recipe = {
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
            "pretrained_model_name_or_path": str(path / "model"),
            "dtype": "float32",
        },
        "dataset": {
            "_target_": "nemo_automodel.components.datasets.llm.column_mapped.make_instruction_dataset",
            "path_or_dataset_id": str(path / "data.jsonl"),
            "column_mapping": {"question": "question", "answer": "answer"},
        },
        "step_scheduler": {"global_batch_size": 8, "local_batch_size": 4, "max_steps": 12},
        "optimizer": {"lr": 0.01},
        "loggers": {"progress": False},
    }
    for name, section in (sections or {}).items():
        recipe[name] = {**recipe.get(name, {}), **section} if "_target_" not in section else section
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return Workspace(path)
