"""The ``fp8`` section through the recipe: it trains and saves ordinary files, on one rank and two, and says what it cannot do."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.ranks.launch import on_ranks
from tests.recipes.workspace import ROOT, make_workspace

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


@pytest.mark.parametrize("grad_weight", ["bfloat16", "float8"])
def test_full_fine_tuning_follows_bf16_and_saves_an_ordinary_model(tmp_path, grad_weight):
    workspace = make_workspace(tmp_path, **SIZES)
    options = ["--model.dtype=bfloat16", "--step_scheduler.max_steps=8", "--optimizer.lr=0.003"]
    plain = workspace.run(*options, out="plain")
    fp8 = workspace.run(*options, "--fp8.min_features=16", f"--fp8.grad_weight={grad_weight}", out="fp8")
    losses, expected = [line["loss"] for line in fp8], [line["loss"] for line in plain]
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.01)
    saved = [next((tmp_path / out).glob("epoch_*_step_8")) / "model" for out in ("plain", "fp8")]
    models = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in saved]
    assert list(models[0]) == list(models[1])
    assert all(models[1][name].dtype == models[0][name].dtype for name in models[0])


@pytest.mark.parametrize("adapters", [[], ["--peft.match_all_linear=true"]], ids=["SFT", "LoRA"])
def test_two_ranks_compute_as_one(tmp_path, adapters):
    """One rank's LoRA has copies, two ranks quantise what they gather: the numbers are the same."""
    workspace = make_workspace(tmp_path, **SIZES)
    options = [
        "--model.dtype=bfloat16",
        "--step_scheduler.max_steps=4",
        "--fp8.min_features=16",
        "--optimizer.lr=0.003",
        *adapters,
    ]
    one = workspace.run(*options, out="one")
    target = str(ROOT / "nemo_automodel" / "recipes" / "llm" / "finetune.py")
    on_ranks(target, 2, "-c", workspace.recipe, f"--checkpoint.checkpoint_dir={tmp_path}/two", *options)
    assert [line["loss"] for line in workspace.metrics("two")] == pytest.approx(
        [line["loss"] for line in one], rel=2e-3
    )


def test_tensor_parallelism_is_refused(tmp_path):
    workspace = make_workspace(tmp_path, **SIZES)
    options = ["--model.dtype=bfloat16", "--fp8.min_features=16", "--distributed.tp_size=2"]
    result = workspace.spawn("--nproc-per-node=2", *options, check=False)
    assert result.returncode == 2
    assert "fp8: not together with tensor parallelism in this version; write distributed.tp_size: 1" in result.stderr
    assert "Traceback" not in result.stderr
