"""``Loggers``: one line per step whatever happens to the run, exact losses, and trackers that cannot stop it."""

from __future__ import annotations

import json
import sys
import time
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from torch import nn

from nemo_automodel.components.datasets.loader import DataLoader
from nemo_automodel.components.datasets.packing import PackedSequence
from nemo_automodel.components.distributed.env import DistEnv
from nemo_automodel.components.training.metrics import Loggers, count_tokens, open_jsonl, peak_memory_gib
from nemo_automodel.components.training.schedule import StepScheduler
from nemo_automodel.errors import MissingExtraError
from nemo_automodel.types import Batch

STEPS = 4


class TwoRowLoader:
    """Every step: one padded micro-batch of 2 x 4 positions, 6 of them tokens, 3 of them labels."""

    dp_size = 1

    def steps_per_epoch(self, epoch: int) -> int:
        return STEPS

    def steps(self, epoch: int, first_step: int = 0):
        for _ in range(first_step, STEPS):
            mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
            yield [Batch(input_ids=torch.ones_like(mask), attention_mask=mask, num_label_tokens=3)]


@pytest.fixture(scope="module")
def env():
    env = DistEnv(device="cpu")
    yield env
    env.shutdown()


def run(env: DistEnv, directory: Path, first_step: int = 0, stop_after: int = STEPS, **options) -> None:
    """Log steps ``first_step + 1`` to ``stop_after`` with loss 1 / (3 * step); finish only if all are done."""
    loader, schedule = TwoRowLoader(), StepScheduler()
    schedule.plan(loader)
    schedule.step = first_step
    log = Loggers(env, schedule=schedule, output_dir=str(directory), **options)
    log.start(nn.Linear(2, 3), nn.CrossEntropyLoss())
    for batches in schedule.iterate(loader):
        loss = torch.tensor(1 / (3 * schedule.step), dtype=torch.float64)
        log.train_step(loss, torch.tensor(2.0), 1e-3, count_tokens(batches), batches[0]["num_label_tokens"])
        if schedule.step == stop_after:
            break
    if schedule.step == STEPS:
        log.validation(val_loss=0.5)
        log.checkpoint(directory / "epoch_0_step_4")
        log.finish()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_exact_line_per_step(env, tmp_path):
    run(env, tmp_path)
    logged = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    for line in logged:
        expected = 1 / (3 * line["step"])
        assert float.fromhex(line["loss_hex"]) == line["loss"] == expected
        assert (line["num_tokens"], line["num_label_tokens"], line["epoch"]) == (6, 3, 0)
        assert (line["grad_norm"], line["lr"]) == (2.0, 1e-3)
        assert line["tokens_per_s"] == pytest.approx(6 / line["step_time_s"], rel=0.2)
        assert 0.01 < line["mem_gib"] < 100
        assert abs(line["time"] - time.time()) < 60
    (validation,) = lines(tmp_path / "validation.jsonl")
    assert (validation["step"], validation["val_loss"]) == (4, 0.5)


def test_every_line_is_on_disk_before_the_next_step(env, tmp_path):
    run(env, tmp_path, stop_after=2)  # never finished: as if it had been killed
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_resume_drops_what_an_aborted_run_wrote_after_the_checkpoint(env, tmp_path):
    run(env, tmp_path, stop_after=3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in mid-line
    run(env, tmp_path, first_step=2)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_fresh_run_moves_older_metrics_aside(env, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 99}\n')
    run(env, tmp_path)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    (older,) = tmp_path.glob("metrics.2*.jsonl")
    assert lines(older) == [{"step": 99}]


def test_open_jsonl_keeps_an_earlier_run_that_ended_at_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    open_jsonl(path, first_step=2).close()
    assert lines(path) == [{"step": 1}, {"step": 2}]


def test_a_resumed_run_goes_on_in_its_own_file(tmp_path):
    """The run, another one in its place, a dry run in the same second, and the first again from its second step."""
    path = tmp_path / "metrics.jsonl"

    def write(first_step, run, steps):
        with open_jsonl(path, first_step, run) as file:
            file.writelines(json.dumps({"step": step, "run": run}) + "\n" for step in steps)

    write(0, "first", range(1, 5))
    write(0, "other", range(1, 3))
    write(0, "dry", range(1, 5))
    write(2, "first", [3])
    assert lines(path) == [{"step": step, "run": "first"} for step in (1, 2, 3)]
    aside = [lines(p) for p in tmp_path.glob("metrics.2*.jsonl")]
    assert sorted((found[0]["run"], len(found)) for found in aside) == [("dry", 4), ("other", 2)]
    write(3, "elsewhere", [4])  # resumed from another directory: nothing here is its own
    assert lines(path) == [{"step": 4, "run": "elsewhere"}]


def test_every_line_says_whose_it_is(env, tmp_path):
    log = Loggers(env, schedule=StepScheduler(), output_dir=str(tmp_path), progress=False)
    log.start(nn.Linear(2, 3), nn.CrossEntropyLoss(), run="a1")
    log.train_step(1.0, 1.0, 1.0, 4, 3)
    log.validation(val_loss=1.0)
    log.checkpoint(None)
    assert [lines(tmp_path / name)[0]["run"] for name in ("metrics.jsonl", "validation.jsonl")] == ["a1", "a1"]


def test_validation_and_saving_count_for_no_step(env, tmp_path):
    loader, schedule = TwoRowLoader(), StepScheduler()
    schedule.plan(loader)
    log = Loggers(env, schedule=schedule, output_dir=str(tmp_path), progress=False)
    log.start(nn.Linear(2, 3), nn.CrossEntropyLoss())
    for batches in schedule.iterate(loader):
        log.train_step(1.0, 1.0, 1.0, count_tokens(batches), 3)
        time.sleep(0.3)
        log.validation(val_loss=1.0)
    assert max(line["step_time_s"] for line in lines(tmp_path / "metrics.jsonl")) < 0.2


class SlowLoader(TwoRowLoader):
    def steps(self, epoch, first_step=0):
        for batches in super().steps(epoch, first_step):
            time.sleep(0.05)
            yield batches


def waiting_for_data(env, tmp_path):
    loader, schedule = SlowLoader(), StepScheduler()
    schedule.plan(loader)
    log = Loggers(env, schedule=schedule, output_dir=str(tmp_path), progress=False)
    log.start(nn.Linear(2, 3), nn.CrossEntropyLoss())
    return loader, schedule, log


@pytest.mark.parametrize("event", ["validation", "checkpoint"])
def test_a_step_logged_after_validation_or_saving_is_timed_over_the_steps_since(env, tmp_path, event):
    loader, schedule, log = waiting_for_data(env, tmp_path)
    for batches in schedule.iterate(loader):
        time.sleep(0.1)
        if schedule.step == STEPS:
            log.train_step(1.0, 1.0, 1.0, count_tokens(batches), 3)
        elif schedule.step == STEPS - 1:
            time.sleep(0.5)
            log.validation(1.0) if event == "validation" else log.checkpoint(tmp_path)
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert 0.15 <= line["step_time_s"] < 0.5  # a step's, however slow the machine, and not what came before it
    assert 0.05 <= line["data_wait_s"] < 0.15
    assert line["tokens_per_s"] == pytest.approx(6 / line["step_time_s"], rel=0.01)


def test_waiting_for_data_is_told_apart_from_the_step(env, tmp_path):
    loader, schedule, log = waiting_for_data(env, tmp_path)
    for batches in schedule.iterate(loader):
        time.sleep(0.1)
        log.train_step(1.0, 1.0, 1.0, count_tokens(batches), 3)
    for line in lines(tmp_path / "metrics.jsonl"):
        assert 0.05 <= line["data_wait_s"] < 0.14
        assert line["step_time_s"] >= line["data_wait_s"] + 0.1


def test_start_says_what_runs(env, tmp_path, capsys):
    (tmp_path / "epoch_0_step_4").mkdir()
    run(env, tmp_path)
    shown = capsys.readouterr().err
    assert "Linear, 9 parameters, 9 trainable (100.00%) in float32" in shown
    assert "loss CrossEntropyLoss" in shown
    assert "4 optimizer steps" in shown
    assert "step 4/4  loss 0.0833" in shown
    assert f"saved {tmp_path / 'epoch_0_step_4'}" in shown


def test_progress_false_prints_nothing(env, tmp_path, capsys):
    run(env, tmp_path, progress=False)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    other = types.SimpleNamespace(is_main=False, world_size=1, device=torch.device("cpu"))
    run(other, tmp_path / "run")
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
    assert not (tmp_path / "run").exists()


def test_tensorboard_events_equal_the_jsonl(env, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(env, tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in lines(tmp_path / "metrics.jsonl")]
    assert logged == expected
    assert [event.value for event in events.Scalars("validation/val_loss")] == [0.5]


@pytest.mark.parametrize("extra", ["wandb", "mlflow"])
def test_a_missing_tracker_names_the_command_that_installs_it(env, tmp_path, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'nemo-automodel\[{extra}\]'"):
        Loggers(env, output_dir=str(tmp_path), **{extra: {}})


@pytest.mark.parametrize("broken_call", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_reported_once_and_training_goes_on(env, tmp_path, broken_call, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise ConnectionError("api.wandb.ai: connection refused")

    calls = {name: fail if name == broken_call else (lambda *args, **kwargs: None) for name in ("log", "finish")}
    tracked_run = types.SimpleNamespace(define_metric=lambda *args, **kwargs: None, **calls)
    client = types.ModuleType("wandb")  # stands for the service, which cannot be had here
    client.__spec__ = ModuleSpec("wandb", None)
    client.init = fail if broken_call == "init" else lambda **kwargs: tracked_run
    monkeypatch.setitem(sys.modules, "wandb", client)
    run(env, tmp_path, wandb={"project": "p"})
    assert len(lines(tmp_path / "metrics.jsonl")) == STEPS
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "loggers.wandb failed" in warning.getMessage()
    assert "connection refused" in warning.getMessage()


def test_count_tokens_of_padded_and_packed_batches():
    assert (
        count_tokens([Batch(input_ids=torch.ones(2, 4), attention_mask=torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]))])
        == 4
    )
    assert count_tokens([Batch(input_ids=torch.ones(1, 7))]) == 7


@pytest.mark.parametrize("packed_sequence_size", [0, 16])
def test_an_epoch_counts_the_tokens_of_its_rows_and_neither_padding_nor_filler(packed_sequence_size):
    lengths = [3, 9, 5, 12, 7]
    rows = [{"input_ids": list(range(1, n + 1)), "labels": list(range(1, n + 1))} for n in lengths]
    loader = DataLoader(
        rows,
        packing=PackedSequence(packed_sequence_size),
        global_batch_size=4,
        local_batch_size=4,
        drop_last=False,
    )
    batches = [batch for step in loader.steps(0) for batch in step]
    assert sum(batch["input_ids"].numel() for batch in batches) > sum(lengths)
    assert count_tokens(batches) == sum(lengths)


def test_peak_memory_never_falls():
    before = peak_memory_gib(torch.device("cpu"))
    block = torch.ones(64 * 2**20)  # 256 MiB
    during = peak_memory_gib(torch.device("cpu"))
    del block
    assert before <= during <= peak_memory_gib(torch.device("cpu"))


def test_a_tilde_is_the_home_directory(env, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = types.SimpleNamespace(checkpoint=types.SimpleNamespace(checkpoint_dir="~/runs/a"))
    assert Loggers(env, config, StepScheduler()).output_dir == tmp_path / "runs/a"
    assert Loggers(env, config, StepScheduler(), output_dir="~/logs").output_dir == tmp_path / "logs"
