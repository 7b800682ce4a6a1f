"""What goes wrong on one rank ends all of them, soon, saved where it can be, and says what was first.

Claims: (1) a stop signal on any rank, whenever, is a checkpoint of the step, code 75 and a resume that repeats every bit;
(2) a rank that raises, is killed, is stopped, hangs or leaves ends every rank within 30 s of being noticed, with torchrun
and without, and is named; (3) a loss that is not finite on one rank moves no weight on any; (4) slow preprocessing trips no
time-out; (5) a disk that fails on one rank is one error of all; (6) kills at random moments lose no complete checkpoint.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_automodel.components.checkpoint import publish
from nemo_automodel.components.checkpoint.ranks import Ranks
from tests.ranks.launch import ROOT
from tests.ranks.running import Running
from tests.recipes.workspace import make_workspace

FAULTY = Path(__file__).with_name("faulty.py")
LONG = "--step_scheduler.max_steps=20000"
GO_ON = "to go on, run the same command with --checkpoint.restore_from=latest"
full = pytest.mark.full


def trace(path):
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss_hex"] for line in lines}


def running(workspace, *overrides, fault=None, rank=1, slow=None, **options):
    wanted = {"FAULT": fault, "FAULT_RANK": str(rank), "SLOW": slow}
    env = {name: value for name, value in wanted.items() if value is not None}
    return Running(workspace, *overrides, script=FAULTY, env=env, **options)


def finished(workspace, *overrides, **options):
    """Run to the end; returns the trace of losses."""
    with running(workspace, *overrides, **options) as run:
        codes, _ = run.end(240)
        assert set(codes) == {0}, run.output[-5000:]
        assert run.status()[0][:3] == (0, "done", None)
    return trace(run.directory)


def saved_steps(run):
    found = publish.find_checkpoints(run.directory)
    assert all(publish.damage(checkpoint.path, Ranks(None)) == [] for checkpoint in found)
    return sorted(checkpoint.step for checkpoint in found)


# --- signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nproc", "agent"), [(2, False), pytest.param(2, True, marks=full)])
def test_41_a_signal_on_one_rank_saves_on_all_and_the_resume_repeats_every_bit(tmp_path, nproc, agent):
    workspace = make_workspace(tmp_path)
    options = {"nproc": nproc, "agent": agent}
    whole = finished(workspace, out="whole", **options)
    with running(workspace, fault="usr1", **options) as run:  # in the middle of step 5, on rank 1
        codes, _ = run.end(240)
        assert codes == ([1] if agent else [75] * nproc)  # torchrun makes it 1: hence the file
        assert run.status() == ((75, "preempted", None, 5), None)
        assert GO_ON in run.output
        assert "Traceback" not in run.output.split("torch/distributed")[0]
        assert saved_steps(run) == [5]
    assert finished(workspace, "--checkpoint.restore_from=latest", **options) == whole


@pytest.mark.parametrize("place", ["save", pytest.param("validation", marks=full)])
def test_42_signals_during_a_save_or_a_validation_and_a_second_one(tmp_path, place):
    workspace = make_workspace(tmp_path)
    validation = {**workspace_section(workspace, "dataset")}
    arguments = [f"--validation_dataset={json.dumps(validation)}", "--step_scheduler.val_every_steps=3"]
    arguments += ["--step_scheduler.ckpt_every_steps=2"] if place == "save" else []
    with running(workspace, *arguments, slow=place, agent=False) as run:
        run.wait_until(lambda: f"slow {place}" in run.output)
        run.send(signal.SIGTERM, 0)
        run.wait_until(lambda: "SIGTERM: stopping after this step, which is then saved" in run.output)
        run.send(signal.SIGINT, 0)
        run.send(signal.SIGTERM, 1)
        codes, seconds = run.end()
        assert codes == [75, 75], run.output[-5000:]
        assert seconds < 30
        step = 2 if place == "save" else 3
        assert run.status() == ((75, "preempted", None, step), None)
        assert saved_steps(run) == [step]
        assert "SIGINT: already stopping" in run.output
        validations = (run.directory / "validation.jsonl").read_text()
        assert validations == ""  # one that is cut short has no loss


def workspace_section(workspace, name):
    import yaml

    return yaml.safe_load(workspace.recipe.read_text())[name]


@full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_41_one_process_and_its_data_workers_get_the_signal(tmp_path, number):
    """To the whole process group, as Slurm and a terminal do: the workers must live until the step is done."""
    workspace = make_workspace(tmp_path)
    log = (tmp_path / "log").open("w")
    command = workspace.command(LONG, "--dataloader.num_workers=2")
    process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    probe = Running.__new__(Running)
    probe.directory, probe.log, probe._processes = tmp_path / "out", tmp_path / "log", [process]
    try:
        probe.wait_for_step(3)
        os.killpg(process.pid, number)
        assert process.wait(60) == 75, probe.output
        assert probe.status()[0][:3] == (75, "preempted", None)
        assert saved_steps(probe) == [probe.status()[0][3]]
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)  # no worker is left
    finally:
        process.kill()
        log.close()


def test_a_signal_before_the_first_step_saves_nothing_and_is_75(tmp_path):
    workspace = make_workspace(
        tmp_path, sections={"dataset": {"_target_": "tests.ranks.slow_data.slow", "seconds": 60}}
    )
    with Running(workspace, "--allow-target", "tests", nproc=1, agent=False) as run:
        run.wait_until(lambda: "slow data" in run.output)
        run.send(signal.SIGTERM, 0)
        assert run.end()[0] == [75]
        assert run.status()[0] == (75, "preempted", 0, None)
        assert "SIGTERM before the first step: nothing to save, run the same command again" in run.output
        assert "Traceback" not in run.output


# --- a rank that fails ----------------------------------------------------------------------------------------------


CASES = {  # fault, rank, torchrun -> what exit_status.json says, in part
    ("error", 1, True): ("error", 1, "ValueError: a fault of the user's code"),
    ("error", 0, False): ("error", 0, "ValueError: a fault of the user's code"),
    ("vanish", 1, False): ("rank_died", 1, "its process is gone"),
    ("vanish", 0, False): ("rank_died", 0, "its process is gone"),
    ("leave", 1, True): ("error", 1, "the program left early, with 0"),
    ("stop", 1, False): ("rank_silent", 1, "no sign of life for"),
    ("stop", 0, True): ("rank_silent", 0, "no sign of life for"),
    ("hang", 1, False): ("rank_silent", 1, "did not take part in a collective that rank 0 waited for"),
}
SAMPLE = [("error", 1, True)]


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in SAMPLE else full) for case in CASES])
def test_44_to_47_one_rank_fails_and_all_end_and_it_is_named(tmp_path, case):
    fault, rank, agent = case
    reason, named, text = CASES[case]
    limit = 30  # seconds that a collective may take
    workspace = make_workspace(tmp_path)
    with running(
        workspace, LONG, f"--dist_env.timeout_minutes={limit / 60}", fault=fault, rank=rank, agent=agent
    ) as run:
        run.wait_for_step(4)
        if fault == "stop" and not agent:  # nobody else would end a process that is stopped
            run.wait_until(lambda: "failed first" in run.output, seconds=limit + 30)
            run.send(signal.SIGKILL, rank)
        codes, seconds = run.end(2 * limit + 30)
        assert 0 not in codes or fault == "vanish"
        assert seconds < 30 if fault in ("error", "vanish", "leave") else seconds < limit + 31 + (30 if agent else 0)
        found, message = run.status()
        assert found[:3] == (1, reason, named)
        assert text in message
        assert f"rank {named} failed first" in run.output or named == 0
        assert text in run.output
        assert run.ranks() == {}


def test_44_kill_9_of_a_rank_under_torchrun(tmp_path):
    workspace = make_workspace(tmp_path)
    with Running(workspace, LONG, "--step_scheduler.ckpt_every_steps=2") as run:
        run.wait_for_step(3)
        run.send(signal.SIGKILL, 1)
        codes, seconds = run.end()
        assert codes == [1]
        assert seconds < 30
        assert run.status()[0][:3] == (1, "rank_died", 1)
        assert run.output.count("error: rank 1 failed first") == 1
        assert 2 in saved_steps(run)


# --- a loss that is not finite ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["infinite", pytest.param("nan", marks=full)])
def test_49_a_bad_loss_on_one_rank_moves_no_weight_on_any(tmp_path, fault):
    """Infinite with finite gradients: rank 0 could not know, and rank 1's gradients alone do not tell."""
    workspace = make_workspace(tmp_path)
    with running(workspace, fault=fault, agent=False) as run:
        codes, _ = run.end(240)
        assert codes == [1, 1]
        found, message = run.status()
        assert found == (1, "error", None, 4)
        assert message.startswith(f"step 5: rank 1: loss {fault[:3]} in rows ")
        assert run.output.count("error: step 5") == 1
        assert saved_steps(run) == [4]
    rows = [int(row) for row in message.split("in rows ")[1].split(";")[0].split(",")]
    assert rows == rows_of(workspace, step=5, rank=1)
    if fault == "infinite":
        return
    with running(workspace, "--step_scheduler.ckpt_every_steps=4", out="good", agent=False) as good:
        assert good.end(240)[0] == [0, 0]
    ours, theirs = (load_file(d / "epoch_0_step_4/model/model.safetensors") for d in (run.directory, good.directory))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def rows_of(workspace, step, rank):
    """The oracle: the loader alone, in this process."""
    from nemo_automodel.config import load

    cfg = load(workspace.recipe)
    tokenizer = cfg.tokenizer.instantiate(model_name=cfg.model_name)
    data = cfg.dataset.instantiate(tokenizer=tokenizer)
    seed = cfg.rng.instantiate(rank=0).seed
    loader = cfg.dataloader.instantiate(dataset=data, tokenizer=tokenizer, packing=None, seed=seed, dp_rank=rank,
                                        dp_size=2, global_batch_size=8, local_batch_size=4)  # fmt: skip
    steps = list(loader.steps(0))
    return [row for batch in steps[step - 1] for row in batch["sample_ids"]]


@full
def test_49_skipping_a_bad_step_goes_on(tmp_path):
    workspace = make_workspace(tmp_path)
    bad = finished(workspace, "--non_finite.policy=skip", fault="nan", out="bad", agent=False)
    good = finished(workspace, out="good", agent=False)
    assert {step: bad[step] == good[step] for step in good} == {step: step < 5 for step in good}
    assert "step 5: rank 1: loss nan" in (tmp_path / "bad.log").read_text()


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_full_device_is_one_message_that_says_what_to_write(tmp_path, nproc):
    workspace = make_workspace(tmp_path)
    with running(workspace, fault="memory", rank=nproc - 1, nproc=nproc, agent=False) as run:
        codes, _ = run.end(240)
    assert codes == [1] * nproc, run.output[-5000:]
    (code, reason, _, _), message = run.status()
    assert (code, reason) == (1, "error")
    assert message.startswith(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.25 GiB is free\n"
    )
    for key in (
        "step_scheduler.local_batch_size: half",
        "distributed.activation_checkpointing: full",
        "  dataset.seq_length",
        "packed_sequence.packed_sequence_size",
    ):
        assert run.output.count(key) == 1
    assert "Traceback" not in run.output


# --- slow, uneven, full ---------------------------------------------------------------------------------------------


@full
def test_slow_preprocessing_on_rank_0_trips_no_time_out(tmp_path):
    """Rank 0 takes twice as long as a collective may; then rank 1 does."""
    slow = {"_target_": "tests.ranks.slow_data.slow", "seconds": 25, "path": str(tmp_path / "data.jsonl")}
    workspace = make_workspace(tmp_path, sections={"dataset": slow})
    trained = finished(workspace, "--allow-target", "tests", "--dist_env.timeout_minutes=0.35",
                       "--step_scheduler.max_steps=2", agent=False)  # fmt: skip
    assert len(trained) == 2


@full
def test_uneven_shards_of_data_finish(tmp_path):
    """27 rows over 2 ranks: the last step has 3 rows, so ranks have 2 and 1, and a filler."""
    workspace = make_workspace(tmp_path, rows=27)
    arguments = ["--dataloader.drop_last=false", "--step_scheduler.max_steps=null", "--step_scheduler.num_epochs=2"]
    losses = finished(workspace, *arguments, agent=False)
    assert len(losses) == 8
    one = workspace.run(*arguments, out="one")
    ours = [float.fromhex(losses[line["step"]]) for line in one]
    assert ours == pytest.approx([line["loss"] for line in one], rel=1e-5)


@pytest.mark.parametrize("kills", [pytest.param(2, marks=pytest.mark.sample), pytest.param(20, marks=full)])
def test_1_2_kills_at_random_moments_of_a_sharded_run(kills, tmp_path):
    """One rank or both; the other must end by itself, name the dead one, and no complete checkpoint is ever lost."""
    command = [sys.executable, "-m", "tests.ranks.kills", str(tmp_path), str(kills), "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["slowest"] < 30
    assert result["in_a_save"] >= kills // 10
