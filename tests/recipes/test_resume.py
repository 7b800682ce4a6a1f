"""Failure class 9: a run killed at any moment and resumed leaves the loss trace of the uninterrupted run, bit for bit."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml

from nemo_automodel.errors import CheckpointError, DataError
from nemo_automodel.recipes.llm import finetune
from tests.ranks.launch import ROOT, fork
from tests.recipes.workspace import make_workspace

RECIPE = str(ROOT / "nemo_automodel/recipes/llm/finetune.py")
CASES = {
    "sft": [],
    "lora with dropout": ["--peft.match_all_linear=true", "--peft.dropout=0.2"],
    "packed": ["--packed_sequence.packed_sequence_size=64", "--step_scheduler.global_batch_size=4"],
    "workers": ["--dataloader.num_workers=2"],
    "bf16 masters": ["--model.dtype=bfloat16"],
    "pure bf16": ["--model.dtype=bfloat16", "--model.master_dtype=bfloat16"],
}


def trace(metrics):
    return {line["step"]: (line["loss_hex"], line["lr"], line["num_tokens"]) for line in metrics}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stop", [3, 6, 9])  # mid-epoch, epoch end (48 rows / 8), epoch 2
def test_class_9_resume_is_bitwise(tmp_path, case, stop):
    if stop != 9 and case not in ("sft", "packed"):
        pytest.skip("every stop point is tried with full and packed training")
    workspace = make_workspace(tmp_path)
    args = [*CASES[case], f"--step_scheduler.ckpt_every_steps={stop}", "--checkpoint.keep_last=null"]
    whole = trace(workspace.run(*args, out="whole"))
    assert len(whole) == 12
    checkpoint = next((tmp_path / "whole").glob(f"epoch_*_step_{stop}"))
    resumed = trace(workspace.run(*args, f"--checkpoint.restore_from={checkpoint}", out="resumed"))
    assert resumed == {step: line for step, line in whole.items() if step > stop}


def kill_and_resume(workspace, start, kills, rng):
    """Start the run, kill it at a random moment, start it again from ``latest``; returns how many kills hit it."""
    hits = 0
    for _ in range(kills):
        process = start(workspace)
        before = (workspace.path / "killed" / "metrics.jsonl").exists() and len(workspace.metrics("killed"))
        deadline = time.time() + 120
        while process.poll() is None and time.time() < deadline:  # until it makes progress, then a random while
            if (workspace.path / "killed" / "metrics.jsonl").exists() and len(workspace.metrics("killed")) > (
                before or 0
            ):
                break
            time.sleep(0.02)
        time.sleep(rng.random() * 0.4)
        process.send_signal(signal.SIGKILL)
        code = process.wait(60)
        assert code in (0, -signal.SIGKILL), (workspace.path / "errors").read_text()[-3000:]
        hits += code == -signal.SIGKILL
    return hits


def command(workspace):
    """The real command."""
    with (workspace.path / "errors").open("a") as errors:
        return subprocess.Popen(
            workspace.command(*ARGS, out="killed"), cwd=workspace.path, stdout=subprocess.DEVNULL, stderr=errors
        )


def forked(workspace):
    """The recipe in a process that needs no seconds for its imports: more kills in the same time."""
    options = ["-c", workspace.recipe, f"--checkpoint.checkpoint_dir={workspace.path / 'killed'}", *ARGS]
    return fork(RECIPE, *options, cwd=workspace.path, streams=(Path(os.devnull), workspace.path / "errors"))


ARGS = ("--step_scheduler.ckpt_every_steps=1", "--step_scheduler.max_steps=60", "--checkpoint.restore_from=latest")


@pytest.mark.parametrize(("start", "kills"), [(command, 3), pytest.param(forked, 20, marks=pytest.mark.full)])
def test_class_9_killed_at_random_points_and_resumed(tmp_path, start, kills):
    """``kill -9`` while stepping or saving (a save follows every step); nothing is lost but steps since the last save."""
    workspace = make_workspace(tmp_path)
    whole = trace(workspace.run(*ARGS, out="whole"))
    hits = kill_and_resume(workspace, start, kills, random.Random(kills))
    assert hits >= kills // 2
    workspace.spawn(*ARGS, out="killed")
    assert trace(workspace.metrics("killed")) == whole
    saved = sorted((tmp_path / "killed").glob("epoch_*_step_60/manifest.json"))
    assert saved
    assert json.loads(saved[0].read_text())


def test_an_incompatible_change_is_refused_with_a_diff(tmp_path):
    workspace = make_workspace(tmp_path)
    workspace.run("--step_scheduler.ckpt_every_steps=6")
    for change, name in {"--step_scheduler.global_batch_size=4": "global_batch_size", "--rng.seed=1": "seed"}.items():
        with pytest.raises(CheckpointError, match=name):
            workspace.run(change, "--checkpoint.restore_from=latest")
    longer = workspace.spawn("--step_scheduler.max_steps=18", "--checkpoint.restore_from=latest", check=False)
    assert longer.returncode == 2
    assert "step_scheduler.max_steps: 12 -> 18" in longer.stderr
    assert "schedule.total_steps" not in longer.stderr, "one change is told once"
    assert "write checkpoint.extend: true" in longer.stderr


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_an_extended_run_goes_on_under_the_new_plan(tmp_path, decay):
    workspace = make_workspace(tmp_path)
    args = [f"--lr_scheduler.decay={decay}", "--lr_scheduler.warmup_steps=2", "--step_scheduler.max_steps=null"]
    short, long = ([*args, f"--step_scheduler.num_epochs={n}"] for n in (1, 3))
    first = trace(workspace.run(*short))
    whole = trace(workspace.run(*long, out="whole"))
    assert (len(first), len(whole)) == (6, 18)
    extended = trace(workspace.run(*long, "--checkpoint.restore_from=latest", "--checkpoint.extend=true"))
    assert extended.keys() == whole.keys()
    later = range(7, 19)
    assert {step: extended[step][1] for step in later} == {step: whole[step][1] for step in later}, "learning rates"
    if decay == "constant":
        assert extended == whole
    with pytest.raises(CheckpointError, match="has done 18 steps, and this recipe plans 6"):
        workspace.run(*short, "--checkpoint.restore_from=latest", "--checkpoint.extend=true")


def test_moments_may_move_to_the_host_at_a_resume(tmp_path):
    workspace = make_workspace(tmp_path)
    own = ["--optimizer._target_=nemo_automodel.components.training.adamw.AdamW", "--optimizer.state_dtype=bfloat16"]
    args = [*own, "--step_scheduler.ckpt_every_steps=3", "--checkpoint.keep_last=null"]
    whole = trace(workspace.run(*args, out="whole"))
    checkpoint = next((tmp_path / "whole").glob("epoch_*_step_3"))
    moved = trace(workspace.run(*args, "--optimizer.offload=true", f"--checkpoint.restore_from={checkpoint}"))
    assert moved == {step: line for step, line in whole.items() if step > 3}


def test_resume_reads_no_pickle_of_the_users(tmp_path, monkeypatch):
    """``torch.load`` is never reached: it is replaced by a function that fails, in a real resume."""
    workspace = make_workspace(tmp_path)
    workspace.run("--step_scheduler.ckpt_every_steps=6")

    def refuse(*args, **kwargs):
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", refuse)
    workspace.run(
        "--step_scheduler.ckpt_every_steps=6", "--checkpoint.restore_from=latest", "--step_scheduler.max_steps=12"
    )


def validating(workspace, *cadence):
    section = json.dumps(yaml.safe_load(workspace.recipe.read_text())["dataset"])
    return [f"--validation_dataset={section}", *(f"--step_scheduler.{key}" for key in cadence)]


def test_an_error_in_the_validation_loses_no_step(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise DataError("validation_dataset: a bad image")

    monkeypatch.setattr(finetune, "validate", fails)
    workspace = make_workspace(tmp_path)
    with pytest.raises(DataError, match="a bad image"):
        workspace.run(*validating(workspace, "max_steps=6"))
    assert [path.name for path in (tmp_path / "out").glob("epoch*")] == ["epoch_0_step_6"]
    assert not (tmp_path / "out/BEST").exists()


def test_best_is_the_best_of_all_that_are_saved(tmp_path, monkeypatch):
    losses = iter([0.1, 1.0, 0.2, 2.0])  # of steps 2, 3, 4 and 5, the saved ones the second and the last
    monkeypatch.setattr(finetune, "validate", lambda *args, **kwargs: next(losses))
    workspace = make_workspace(tmp_path)
    workspace.run(*validating(workspace, "max_steps=5", "val_every_steps=2", "ckpt_every_steps=3"))
    assert next(losses, None) is None
    assert (tmp_path / "out/BEST").read_text() == "epoch_0_step_3\n"
