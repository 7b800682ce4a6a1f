"""The ``fp8`` section through the recipe: it trains and saves an ordinary adapter, and says what it cannot do."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from nemo_automodel.errors import ConfigError
from tests.recipes.workspace import make_workspace

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
LORA = ["--model.dtype=bfloat16", "--peft.match_all_linear=true", "--optimizer.lr=0.03"]


def test_trains_and_saves_an_ordinary_adapter(tmp_path):
    workspace = make_workspace(tmp_path, **SIZES)
    plain = workspace.run(*LORA, "--step_scheduler.max_steps=8", out="plain")
    fp8 = workspace.run(*LORA, "--step_scheduler.max_steps=8", "--fp8.min_features=16", out="fp8")
    losses, expected = [line["loss"] for line in fp8], [line["loss"] for line in plain]
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.01)
    saved = [next((tmp_path / out).glob("epoch_*_step_8")) / "model" for out in ("plain", "fp8")]
    assert sorted(p.name for p in saved[0].iterdir()) == sorted(p.name for p in saved[1].iterdir())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(workspace.model_dir), saved[1])
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_full_fine_tuning_says_that_nothing_is_frozen(tmp_path):
    workspace = make_workspace(tmp_path, **SIZES)
    with pytest.raises(ConfigError, match="add a peft section"):
        workspace.run("--model.dtype=bfloat16", "--fp8.enabled=true")
