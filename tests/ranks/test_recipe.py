"""The recipe on N gloo ranks trains as on one: the same loss, gradient norm, checkpoint and metrics at every step.

Claims: (1) `torchrun ... nemo_automodel/recipes/llm/finetune.py -c recipe.yaml` runs with `dp_size: none`; (2) the logged
loss and gradient norm equal one process's to 1e-5 in fp32, SFT and LoRA, padded and packed; (3) what rank 0 saved
loads in plain transformers and resumes.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.ranks.launch import ROOT, on_ranks, torchrun
from tests.recipes.test_parity import plain_loop, rows_and_order
from tests.recipes.workspace import make_workspace

RECIPE = str(ROOT / "nemo_automodel/recipes/llm/finetune.py")
CASES = {
    "sft": [],
    "lora": ["--peft.match_all_linear=true", "--peft.dim=4"],
    "packed": ["--packed_sequence.packed_sequence_size=64", "--step_scheduler.local_batch_size=1"],
}


@pytest.mark.parametrize(
    ("case", "nproc"), [("sft", 2), ("lora", 2), ("packed", 2), pytest.param("sft", 4, marks=pytest.mark.full)]
)
def test_n_ranks_train_as_one(tmp_path, case, nproc):
    workspace = make_workspace(tmp_path)
    args = [
        *CASES[case],
        "--step_scheduler.max_steps=6",
        "--step_scheduler.ckpt_every_steps=3",
        "--distributed.dp_size=none",
    ]
    args += ["--step_scheduler.local_batch_size=2"] if case != "packed" else []
    one = workspace.run(*args, out="one")
    torchrun(RECIPE, nproc, "-c", workspace.recipe, f"--checkpoint.checkpoint_dir={tmp_path}/many", *args)
    many = workspace.metrics("many")
    assert [line["loss"] for line in many] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert [line["grad_norm"] for line in many] == pytest.approx([line["grad_norm"] for line in one], rel=1e-4)
    assert [line["num_label_tokens"] for line in many] == [line["num_label_tokens"] for line in one]

    on_ranks(RECIPE, nproc, "-c", workspace.recipe, f"--checkpoint.checkpoint_dir={tmp_path}/again", *args,
             f"--checkpoint.restore_from={next((tmp_path / 'many').glob('epoch_*_step_3'))}")  # fmt: skip
    again = workspace.metrics("again")
    assert [line["loss_hex"] for line in again] == [line["loss_hex"] for line in many[3:]]

    if case == "sft":
        models = [
            AutoModelForCausalLM.from_pretrained(
                next((tmp_path / out).glob("epoch_*_step_6")) / "model", dtype=torch.float32
            )
            for out in ("one", "many")
        ]
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            assert (p - q).norm() / q.norm() < 1e-4


def test_class_1_the_router_loss_is_the_mean_over_ranks(tmp_path):
    """Two ranks, one micro-batch each: rank r has every second row of the global batch, from r on."""
    workspace = make_workspace(tmp_path, "mixtral", output_router_logits=True, router_aux_loss_coef=1.0)
    args = ["--step_scheduler.max_steps=5", "--optimizer.lr=0.001", "--lr_scheduler.decay=constant",
            "--lr_scheduler.warmup_steps=0"]  # fmt: skip
    on_ranks(RECIPE, 2, "-c", workspace.recipe, f"--checkpoint.checkpoint_dir={tmp_path}/out", *args)
    ours = [line["loss"] for line in workspace.metrics()]
    data, order = rows_and_order(workspace, args)
    oracle, _ = plain_loop(workspace.model_dir, data, order[:5], 0.001, 1.0, lambda ids: [ids[0::2], ids[1::2]])
    assert ours == pytest.approx(oracle, rel=1e-5)


def test_class_20_a_users_mistake_on_rank_0_is_one_message_and_no_rank_hangs(tmp_path):
    workspace = make_workspace(tmp_path)
    result = torchrun(
        RECIPE, 2, "-c", workspace.recipe, f"--checkpoint.checkpoint_dir={tmp_path}/out", "--dataset.column_mapping={question: quest, answer: answer}", check=False, timeout=200
    )  # fmt: skip
    assert result.returncode != 0
    assert result.stderr.count("error: ") == 1
    assert "quest" in result.stderr.split("error: ")[1]
    status = json.loads((workspace.path / "out/exit_status.json").read_text())
    assert (status["exit_code"], status["reason"], status["rank"]) == (2, "bad_input", 0)
    assert 'finetune.py", line' not in result.stderr, result.stderr[-3000:]
