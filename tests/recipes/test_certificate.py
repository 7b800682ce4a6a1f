"""The certificate as a user meets it: a line at start-up, a file beside the metrics, a flag, and a run that goes on right.

A fault is planted by a script that is the recipe with one broken function, as a broken kernel would be in an installation.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks.launch import ROOT, torchrun
from tests.recipes.workspace import make_workspace

PLANTED = str(ROOT / "tests" / "recipes" / "planted.py")
CUT = "--step_scheduler.max_steps=3"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("certificate"))


def planted(workspace, fault, *args, out, check=True):
    command = [
        sys.executable,
        PLANTED,
        "-c",
        str(workspace.recipe),
        CUT,
        f"--checkpoint.checkpoint_dir={workspace.path / out}",
    ]
    command += [f"--certificate.cache_dir={workspace.path / out}-cache", *args]
    environment = {
        "FAULT": fault,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
        "HOME": str(Path.home()),
    }
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, cwd=workspace.path)
    assert not check or result.returncode == 0, result.stderr[-4000:]
    return result


def losses(workspace, out):
    return [line["loss"] for line in workspace.metrics(out)]


def test_adapters_kept_in_bfloat16_are_no_fault(workspace):
    done = workspace.spawn(
        CUT, "--peft.match_all_linear=true", "--peft.lora_dtype=bfloat16", "--certificate", "strict", out="bf16"
    )
    assert "agree with plain transformers" in done.stdout + done.stderr


def test_a_sound_run_says_so_in_a_line_and_keeps_the_evidence(workspace):
    cache = f"--certificate.cache_dir={workspace.path / 'kept'}"
    first = workspace.spawn(CUT, cache, "--packed_sequence.packed_sequence_size=64", "--step_scheduler.local_batch_size=1", "--certificate", "strict", out="sound")  # fmt: skip
    said = first.stdout + first.stderr
    assert "certificate: attention, packing, fused loss agree with plain transformers (worst gradient" in said
    record = json.loads((workspace.path / "sound" / "certificate.json").read_text())
    assert record["agree"] == ["attention", "packing", "fused loss"]
    assert max(record["worst"].values()) < 1e-5
    assert record["seconds"] < 10
    tried = record["tried"]["real width, float32"]
    assert tried.startswith("documents of the first micro-batch (")
    assert tried.endswith("; the model's own weights")
    again = workspace.spawn(CUT, cache, "--packed_sequence.packed_sequence_size=64", "--step_scheduler.local_batch_size=1", out="again")  # fmt: skip
    assert "cached)" in again.stdout + again.stderr
    assert json.loads((workspace.path / "again" / "certificate.json").read_text()) == record


def test_a_run_with_a_broken_attention_trains_as_one_without_it(workspace):
    result = planted(workspace, "attention", out="broken")
    assert "certificate: attention is off, transformers' own attention (sdpa) is used" in result.stdout + result.stderr
    workspace.run(CUT, "--model.attn_implementation=sdpa", out="own")
    assert losses(workspace, "broken") == pytest.approx(losses(workspace, "own"), rel=1e-6)
    unproved = planted(workspace, "attention", "--certificate", "off", out="unproved")
    assert "certificate: off" in unproved.stdout + unproved.stderr
    wrong = zip(losses(workspace, "unproved"), losses(workspace, "own"), strict=True)
    assert max(abs(a - b) / b for a, b in wrong) > 1e-5, "the fault must matter"


def test_strict_stops_before_the_first_step_with_one_message(workspace):
    result = planted(workspace, "attention", "--certificate=strict", out="strict", check=False)
    assert result.returncode == 2
    assert "error: certificate: attention: " in result.stderr
    assert "Traceback" not in result.stderr
    assert not (workspace.path / "strict" / "metrics.jsonl").exists() or not losses(workspace, "strict")


def test_packing_that_leaks_is_refused(workspace):
    packed = ["--packed_sequence.packed_sequence_size=64", "--step_scheduler.local_batch_size=1"]
    result = planted(workspace, "leak", *packed, out="leak", check=False)
    assert result.returncode == 2
    assert "error: certificate: packing does not compute what plain transformers does" in result.stderr
    assert "packed_sequence_size: 0" in result.stderr


def test_a_mode_that_there_is_not_is_a_mistake(workspace):
    result = workspace.spawn("--certificate", "srtict", check=False)
    assert result.returncode == 2
    assert "certificate.mode" in result.stderr
    assert "strict" in result.stderr


def test_two_ranks_act_alike_on_what_rank_0_finds(workspace):
    """Attention switched off on both: the same losses as one process without it."""
    args = ["-c", workspace.recipe, CUT, "--step_scheduler.local_batch_size=2"]
    args += [f"--checkpoint.checkpoint_dir={workspace.path}/two", f"--certificate.cache_dir={workspace.path}/two-cache"]
    torchrun(PLANTED, 2, *args, env={"FAULT": "attention"})
    workspace.run(CUT, "--model.attn_implementation=sdpa", out="one")
    assert losses(workspace, "two") == pytest.approx(losses(workspace, "one"), rel=1e-5)
    record = json.loads((workspace.path / "two" / "certificate.json").read_text())
    assert list(record["off"]) == ["attention"]
    assert record["tried"]["real width, float32"].endswith("; the model's own weights"), "gathered from both ranks"


def test_a_wrong_tensor_parallel_plan_is_never_trained_with(workspace):
    """A row-parallel layer left as columns: the plan that comes with the model is refused, and one that holds is used."""
    args = ["-c", workspace.recipe, CUT, "--distributed.tp_size=2", f"--checkpoint.checkpoint_dir={workspace.path}/tp"]
    result = torchrun(PLANTED, 2, *args, env={"FAULT": "tp"})
    assert "fused loss, TP plan agree" in result.stdout + result.stderr
    record = json.loads((workspace.path / "tp" / "certificate.json").read_text())
    assert record["tried"]["real width, float32"].endswith("; the model's own weights"), "whole, not a shard"
    workspace.run(CUT, out="untp")
    assert losses(workspace, "tp") == pytest.approx(losses(workspace, "untp"), rel=1e-5)
