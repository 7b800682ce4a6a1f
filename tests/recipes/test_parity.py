"""The recipe against a plain transformers + torch.optim loop in fp32 on the same data: every step's loss to 1e-5.

The oracle uses nothing of ours but the order of the rows: its own padding, mask, shift, loss and clipping.
"""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from nemo_automodel.config import load
from tests.recipes.workspace import make_workspace

STEPS = 20


def rows_and_order(workspace, overrides):
    """The tokenised rows and, per step, the row numbers of the global batch."""
    cfg = load(workspace.recipe, overrides)
    tokenizer = cfg.tokenizer.instantiate(model_name=cfg.model_name)
    data = cfg.dataset.instantiate(tokenizer=tokenizer)
    loader = cfg.dataloader.instantiate(
        dataset=data, tokenizer=tokenizer, packing=None, seed=cfg.rng.seed, dp_rank=0, dp_size=1,
        global_batch_size=8, local_batch_size=8, pin_memory=False,
    )  # fmt: skip
    order, epoch = [], 0
    while len(order) < STEPS:
        order += [batches[0]["sample_ids"] for batches in loader.steps(epoch)]
        epoch += 1
    return data, order[:STEPS]


def plain_loop(model_dir, data, order, lr, aux_coef=0.0, split=lambda ids: [ids]):
    """``split`` cuts a step's rows into micro-batches; a router's loss is the mean over them of transformers' own."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for ids in order:
        micro_batches = split(ids)
        count = sum(label != -100 for i in ids for label in data[i]["labels"])
        total = 0.0
        for micro in micro_batches:
            rows = [data[i] for i in micro]
            length = max(len(row["input_ids"]) for row in rows)
            pads = [length - len(row["input_ids"]) for row in rows]
            input_ids = torch.tensor([row["input_ids"] + [0] * n for row, n in zip(rows, pads, strict=True)])
            labels = torch.tensor([row["labels"] + [-100] * n for row, n in zip(rows, pads, strict=True)])
            mask = torch.tensor([[1] * (length - n) + [0] * n for n in pads])
            out = model(input_ids=input_ids, attention_mask=mask, use_cache=False)
            ce = F.cross_entropy(out.logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
            (ce / count + aux_coef * (out.aux_loss if aux_coef else 0.0) / len(micro_batches)).backward()
            total += ce.item() / count
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, model


CASES = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma3_text": {"final_logit_softcapping": 5.0},
    "mixtral": {},
    "mixtral router loss": {"output_router_logits": True, "router_aux_loss_coef": 0.1},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss_fn", ["linear_ce.FusedLinearCrossEntropy", "masked_ce.MaskedCrossEntropy"])
def test_twenty_steps_equal_plain_transformers(tmp_path, case, loss_fn):
    if loss_fn.startswith("masked") and case != "llama":
        pytest.skip("the unfused loss is compared on one architecture")
    workspace = make_workspace(tmp_path, case.split()[0], **CASES[case])
    overrides = [
        f"--step_scheduler.max_steps={STEPS}", "--optimizer.lr=0.001", "--step_scheduler.local_batch_size=8",
        "--lr_scheduler.decay=constant", "--lr_scheduler.warmup_steps=0",
        f"--loss_fn._target_=nemo_automodel.components.loss.{loss_fn}",
    ]  # fmt: skip
    ours = [line["loss"] for line in workspace.run(*overrides)]
    data, order = rows_and_order(workspace, overrides)
    coef = CASES[case].get("router_aux_loss_coef", 0.0)
    oracle, trained = plain_loop(workspace.model_dir, data, order, 0.001, coef)
    assert len(ours) == STEPS
    assert ours == pytest.approx(oracle, rel=1e-5)
    assert oracle[-1] < 0.97 * oracle[0]

    saved = next((tmp_path / "out").glob(f"epoch_*_step_{STEPS}")) / "model"
    reloaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    ref, got = trained.eval()(ids).logits, reloaded.eval()(ids).logits
    assert (ref - got).norm() / ref.norm() < 1e-3


def test_class_1_the_router_loss_is_the_mean_over_micro_batches(tmp_path):
    workspace = make_workspace(tmp_path, "mixtral", output_router_logits=True, router_aux_loss_coef=1.0)
    overrides = ["--step_scheduler.max_steps=6", "--step_scheduler.local_batch_size=2", "--optimizer.lr=0.001",
                 "--lr_scheduler.decay=constant", "--lr_scheduler.warmup_steps=0"]  # fmt: skip
    ours = [line["loss"] for line in workspace.run(*overrides)]
    data, order = rows_and_order(workspace, overrides)
    oracle, _ = plain_loop(
        workspace.model_dir, data, order[:6], 0.001, 1.0, lambda ids: [ids[i : i + 2] for i in range(0, 8, 2)]
    )
    assert ours == pytest.approx(oracle, rel=1e-5)
    without, _ = plain_loop(workspace.model_dir, data, order[:6], 0.001, 0.25)
    assert max(abs(a - b) / b for a, b in zip(ours, without, strict=True)) > 1e-4, "the coefficient must matter"


EQUIVALENT = {
    "eight micro-batches of one": ["--step_scheduler.local_batch_size=1"],
    "two micro-batches of four": ["--step_scheduler.local_batch_size=4"],
    "workers": ["--dataloader.num_workers=2"],
}


@pytest.mark.parametrize("variant", EQUIVALENT)
def test_class_1_equal_training_for_every_split_of_the_batch(tmp_path, variant):
    """Ragged rows, answer-only labels: accumulation changes nothing (fp32, 12 steps)."""
    workspace = make_workspace(tmp_path)
    whole = workspace.run("--step_scheduler.local_batch_size=8", out="whole")
    split = workspace.run(*EQUIVALENT[variant], out="split")
    assert [line["loss"] for line in split] == pytest.approx([line["loss"] for line in whole], rel=1e-5)
    assert [line["grad_norm"] for line in split] == pytest.approx([line["grad_norm"] for line in whole], rel=1e-4)


def test_class_2_packed_rows_train_as_separate_rows_do(tmp_path):
    """One step over all rows, packed and padded: the same mean loss and gradient norm."""
    workspace = make_workspace(tmp_path, rows=16)
    padded = workspace.run("--step_scheduler.global_batch_size=16", "--step_scheduler.max_steps=1", out="padded")
    packed_size = ["--packed_sequence.packed_sequence_size=2048", "--step_scheduler.global_batch_size=1"]
    packed = workspace.run(
        *packed_size, "--step_scheduler.local_batch_size=1", "--step_scheduler.max_steps=1", out="packed"
    )
    assert padded[0]["num_label_tokens"] == packed[0]["num_label_tokens"]
    assert packed[0]["loss"] == pytest.approx(padded[0]["loss"], rel=1e-5)
    assert packed[0]["grad_norm"] == pytest.approx(padded[0]["grad_norm"], rel=1e-4)
