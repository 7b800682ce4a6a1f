"""Optimizers with small state through the recipe: pure bf16 full fine-tuning, resumed to the bit, on one rank and on two."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks.launch import ROOT, on_ranks
from tests.recipes.workspace import make_workspace

SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
OURS = "--optimizer._target_=nemo_automodel.components.training.adamw.AdamW"
COMMON = [
    "--model.dtype=bfloat16", "--model.master_dtype=bfloat16", "--optimizer.lr=1e-3", "--optimizer.betas=[0.9, 0.95]",
    "--step_scheduler.max_steps=4", "--step_scheduler.ckpt_every_steps=2", "--step_scheduler.global_batch_size=4",
    "--step_scheduler.local_batch_size=2",
]  # fmt: skip
HAVE_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


def weights(directory):
    return load_file(next(directory.glob("epoch_*_step_4")) / "model/model.safetensors")


@pytest.mark.parametrize(
    ("state_dtype", "nproc"),
    [
        ("bfloat16", 1),
        ("int8", 1),
        pytest.param("bfloat16", 2, marks=pytest.mark.full),
        pytest.param("int8", 2, marks=pytest.mark.full),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, state_dtype, nproc):
    if state_dtype == "int8" and not HAVE_BITSANDBYTES:
        pytest.skip("needs bitsandbytes")
    workspace = make_workspace(tmp_path, **SIZES)
    options = [*COMMON, OURS, f"--optimizer.state_dtype={state_dtype}"]

    def run(out, *more):
        if nproc == 1:
            return workspace.run(*options, *more, out=out)
        recipe = ROOT / "nemo_automodel/recipes/llm/finetune.py"
        on_ranks(
            str(recipe), nproc, "-c", workspace.recipe, f"--checkpoint.checkpoint_dir={tmp_path / out}", *options, *more
        )
        return workspace.metrics(out)

    whole = [line["loss"] for line in run("whole")]
    assert len(whole) == 4
    first = next((tmp_path / "whole").glob("epoch_*_step_2"))
    stored = json.loads((first / "resume/tensors/index.json").read_text())
    kept = {name.rsplit("/", 1)[1]: entry["dtype"] for name, entry in stored.items() if "q_proj" in name}
    wanted = {"bfloat16": "bfloat16", "int8": "uint8"}[state_dtype]
    assert kept["exp_avg"] == kept["exp_avg_sq"] == wanted
    resumed = [line["loss"] for line in run("resumed", f"--checkpoint.restore_from={first}")]
    assert resumed == whole[2:]
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_it_learns_as_fp32_masters_do(tmp_path):
    workspace = make_workspace(tmp_path, **SIZES)
    eight = ["--step_scheduler.max_steps=8", "--optimizer.lr=1e-3", "--step_scheduler.global_batch_size=4"]
    masters = workspace.run("--model.dtype=bfloat16", *eight, out="masters")
    small = workspace.run(*COMMON[:2], OURS, *eight, out="small")
    assert masters[-1]["loss"] < 0.95 * masters[0]["loss"]
    for ours, theirs in zip(small, masters, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01)
