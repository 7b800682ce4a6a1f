"""Planned steps are the executed steps; what is due is due when it says so (failure class 10)."""

import pytest

from nemo_automodel.components.training.schedule import StepScheduler
from nemo_automodel.errors import ConfigError


class CountingLoader:
    """Epochs of different lengths, as packing makes them."""

    def __init__(self, lengths):
        self.lengths = lengths

    def steps_per_epoch(self, epoch):
        return self.lengths[epoch % len(self.lengths)]

    def steps(self, epoch, first_step=0):
        for step in range(first_step, self.steps_per_epoch(epoch)):
            yield [{"sample_ids": [(epoch, step)]}]


def run(schedule, loader):
    return [
        (schedule.step, schedule.epoch, batches[0]["sample_ids"][0], schedule.should_save)
        for batches in schedule.iterate(loader)
    ]


@pytest.mark.parametrize(
    ("kwargs", "steps"),
    [
        ({}, 3),
        ({"num_epochs": 2}, 7),
        ({"max_steps": 5}, 5),
        ({"num_epochs": 1, "max_steps": 50}, 3),
        ({"max_steps": 12}, 12),
    ],
)
def test_class_10_planned_steps_are_executed_steps(kwargs, steps):
    loader = CountingLoader([3, 4])
    schedule = StepScheduler(global_batch_size=8, local_batch_size=8, **kwargs)
    schedule.plan(loader)
    trace = run(schedule, loader)
    assert schedule.total_steps == steps == len(trace)
    assert [t[0] for t in trace] == list(range(1, steps + 1))
    assert trace[-1][3], "the last step always saves"


def test_class_9_every_resume_point_continues_the_same_stream():
    loader = CountingLoader([3, 4])
    whole = StepScheduler(8, 8, num_epochs=3, ckpt_every_steps=2)
    whole.plan(loader)
    trace = run(whole, loader)
    for stop in range(len(trace)):
        first = StepScheduler(8, 8, num_epochs=3, ckpt_every_steps=2)
        first.plan(loader)
        stream = first.iterate(loader)
        for _ in range(stop):
            next(stream)
        second = StepScheduler(8, 8, num_epochs=3, ckpt_every_steps=2)
        second.plan(loader)
        second.load_state_dict(first.state_dict())
        assert run(second, loader) == trace[stop:]


def test_cadence_defaults_to_epoch_ends():
    loader = CountingLoader([3])
    schedule = StepScheduler(8, 8, num_epochs=2)
    schedule.plan(loader)
    assert [t[0] for t in run(schedule, loader) if t[3]] == [3, 6]


def test_what_is_saved_is_validated():
    schedule = StepScheduler(8, 8, max_steps=10, val_every_steps=3, ckpt_every_steps=5)
    schedule.plan(CountingLoader([10]))
    due = [
        (schedule.step, schedule.should_save)
        for _ in schedule.iterate(CountingLoader([10]))
        if schedule.should_validate
    ]
    assert due == [(3, False), (5, True), (6, False), (9, False), (10, True)]


def test_indivisible_batch_names_the_numbers():
    with pytest.raises(ConfigError, match=r"global_batch_size=10.*4 x 2.*= 8.*write global_batch_size: 8"):
        StepScheduler(global_batch_size=10, local_batch_size=4, dp_size=2)
