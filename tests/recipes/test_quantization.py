"""The ``quantization`` section through the recipe: it trains, resumes to the bit and saves an ordinary adapter."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from nemo_automodel.config import load
from nemo_automodel.errors import ConfigError
from tests.ranks.launch import ROOT, on_ranks
from tests.recipes.workspace import make_workspace

functional = pytest.importorskip("bitsandbytes").functional

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
QLORA = ["--peft.match_all_linear=true", "--optimizer.lr=0.003", "--quantization.min_features=16"]


def test_trains_resumes_and_saves_an_ordinary_adapter(tmp_path):
    workspace = make_workspace(tmp_path, **SIZES)
    eight = [*QLORA, "--step_scheduler.max_steps=8", "--step_scheduler.ckpt_every_steps=4"]
    whole = [line["loss"] for line in workspace.run(*eight, out="whole")]
    plain = [line["loss"] for line in workspace.run(*QLORA[:2], "--step_scheduler.max_steps=8", out="plain")]
    assert whole != plain
    assert whole == pytest.approx(plain, rel=0.02)
    first = next((tmp_path / "whole").glob("epoch_*_step_4"))
    resumed = workspace.run(*eight, f"--checkpoint.restore_from={first}", out="resumed")
    assert [line["loss"] for line in resumed] == whole[4:]
    adapters = [next((tmp_path / out).glob("epoch_*_step_8")) / "model" for out in ("whole", "resumed")]
    tensors = [load_file(path / "adapter_model.safetensors") for path in adapters]
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    described = json.loads((adapters[0] / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(workspace.model_dir)

    base = AutoModelForCausalLM.from_pretrained(workspace.model_dir, dtype=torch.float32)
    for module in base.model.layers.modules():
        if isinstance(module, nn.Linear):
            packed = functional.quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
            module.weight.data = functional.dequantize_4bit(*packed)
    model = PeftModel.from_pretrained(base, adapters[0])
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--peft.match_all_linear=true", "--fp8.enabled=true"], "leave `fp8` out"),
        (["--peft.match_all_linear=true", "--checkpoint.save_merged=true"], "automodel merge afterwards"),
        ([], "add a `peft` section"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(tmp_path, options, message):
    workspace = make_workspace(tmp_path, **SIZES)
    with pytest.raises(ConfigError, match=message):
        load(workspace.recipe, ["--quantization.load_in_4bit=true", *options])


@pytest.mark.full
def test_two_ranks_share_the_work_over_whole_packed_bases(tmp_path):
    workspace = make_workspace(tmp_path, **SIZES)
    four = [
        *QLORA,
        "--step_scheduler.max_steps=4",
        "--step_scheduler.global_batch_size=4",
        "--step_scheduler.local_batch_size=2",
    ]
    one = workspace.run(*four, out="one")
    recipe = str(ROOT / "nemo_automodel/recipes/llm/finetune.py")
    on_ranks(recipe, 2, "-c", workspace.recipe, f"--checkpoint.checkpoint_dir={tmp_path / 'two'}", *four)
    two = workspace.metrics("two")
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-3)
