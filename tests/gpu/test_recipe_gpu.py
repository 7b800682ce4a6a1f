"""The whole recipe on one CUDA device, through the real command: SFT and LoRA, from a checkpoint and from a bare config.

Claims: (1) the loss falls and what is saved loads in plain transformers (PEFT for adapters) with the trained loss;
(2) fp32 training on the device equals the CPU's losses to 1e-4; (3) with ``rng.deterministic`` a run resumed after step 6
leaves the losses of the uninterrupted one, bit for bit, over rows of many lengths, with adapters, packed, and compiled
where batches have one size; without it, in fp32, to 1e-4.
"""

import json
import random

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.recipes.workspace import make_workspace

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

KINDS = {
    "sft": ["--model.dtype=bfloat16"],
    "sft pure bf16": ["--model.dtype=bfloat16", "--model.master_dtype=bfloat16"],
    "lora": ["--model.dtype=bfloat16", "--peft.match_all_linear=true", "--optimizer.lr=0.03"],
    "lora triton": [
        "--model.dtype=bfloat16",
        "--peft.match_all_linear=true",
        "--peft.use_triton=true",
        "--optimizer.lr=0.03",
    ],
    "lora fp8": [
        "--model.dtype=bfloat16",
        "--peft.match_all_linear=true",
        "--fp8.min_features=16",
        "--optimizer.lr=0.03",
    ],
    "packed": [
        "--model.dtype=bfloat16",
        "--packed_sequence.packed_sequence_size=128",
        "--step_scheduler.global_batch_size=4",
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_trains_saves_and_reloads(tmp_path, kind):
    workspace = make_workspace(tmp_path, hidden_size=64, intermediate_size=128, head_dim=16)
    workspace.spawn(*KINDS[kind], "--step_scheduler.max_steps=40")
    losses = [line["loss"] for line in workspace.metrics()]
    assert sum(losses[-5:]) < 0.985 * sum(losses[:5])
    saved = next((tmp_path / "out").glob("epoch_*_step_40")) / "model"
    if "lora" in kind:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(workspace.model_dir), saved)
    else:
        model = AutoModelForCausalLM.from_pretrained(saved)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_a_bare_config_trains(tmp_path):
    config = {"model_type": "llama", "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    target = "nemo_automodel.NeMoAutoModelForCausalLM.from_config"
    workspace = make_workspace(tmp_path, sections={"model": {"_target_": target, "config": config}})
    workspace.spawn(f"--tokenizer.pretrained_model_name_or_path={workspace.model_dir}", "--step_scheduler.max_steps=30")
    losses = [line["loss"] for line in workspace.metrics()]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", [[], ["--peft.match_all_linear=true"]], ids=["sft", "lora"])
def test_fp32_equals_the_cpu(tmp_path, kind):
    workspace = make_workspace(tmp_path)
    args = [*kind, "--optimizer.lr=0.001", "--compile.enabled=false"]
    workspace.spawn(*args, out="cuda")
    workspace.spawn(*args, "--dist_env.device=cpu", out="cpu")
    cuda, cpu = ([line["loss"] for line in workspace.metrics(out)] for out in ("cuda", "cpu"))
    assert cuda == pytest.approx(cpu, rel=1e-4)


RESUMED = {
    "sft": [],
    "lora": ["--peft.match_all_linear=true", "--peft.dropout=0.1"],
    "packed": ["--packed_sequence.packed_sequence_size=512", "--step_scheduler.global_batch_size=4"],
    "compiled, one size": ["--compile.enabled=true", "--compile.dynamic=false", "--dataloader.pad_to_multiple_of=512"],
}


@pytest.mark.parametrize("kind", RESUMED)
def test_class_9_resume_is_bitwise_where_deterministic(tmp_path, kind):
    whole, resumed = resume(tmp_path, *RESUMED[kind], "--model.dtype=bfloat16", "--rng.deterministic=true")
    assert resumed == {step: line for step, line in whole.items() if step > 6}


@pytest.mark.parametrize("kind", [[], ["--peft.match_all_linear=true"]], ids=["sft", "lora without dropout"])
def test_class_9_resume_is_close_by_default(tmp_path, kind):
    whole, resumed = resume(tmp_path, *kind)  # without dropout: compiled for other shapes, it draws another mask
    assert {step: loss for step, (_, loss) in resumed.items()} == pytest.approx(
        {step: loss for step, (_, loss) in whole.items() if step > 6}, rel=1e-4
    )


def resume(path, *args):
    """(loss_hex, loss) by step of a run of 12 steps, and of one resumed from its checkpoint of step 6."""
    workspace = make_workspace(path, hidden_size=64, intermediate_size=128, head_dim=16, max_position_embeddings=2048)
    write_rows_of_many_lengths(workspace.path / "data.jsonl")
    args = [*args, "--step_scheduler.ckpt_every_steps=6"]
    workspace.spawn(*args, out="whole")
    checkpoint = next((path / "whole").glob("epoch_*_step_6"))
    workspace.spawn(*args, f"--checkpoint.restore_from={checkpoint}", out="resumed")
    return (
        {line["step"]: (line["loss_hex"], line["loss"]) for line in workspace.metrics(out)}
        for out in ("whole", "resumed")
    )


def write_rows_of_many_lengths(path):
    """Up to some 500 tokens: several tiles of an attention kernel, whose backward then sums in any order it likes."""
    rng = random.Random(1)
    words = ["what", "is", "the", "capital", "of", "France", "when", "a", "fox", "jumps", "over", "two", "lazy", "dogs"]
    with path.open("w") as f:
        for _ in range(48):
            question, answer = (" ".join(rng.choices(words, k=rng.randint(2, 60))) for _ in range(2))
            f.write(json.dumps({"question": question, "answer": answer}) + "\n")
