"""A loss or gradient that is not finite moves no weight, whichever way the optimizer is told; all else stays as it was.

Both ways are tried: the host reads the flag before the step, or the optimizer is told by a flag on the device
(``reads_late``, as on a GPU; here forced on the CPU's fused AdamW).
"""

import copy
import math

import pytest
import torch

from nemo_automodel.components.training.adamw import AdamW
from nemo_automodel.components.training.nonfinite import NonFiniteGuard
from nemo_automodel.errors import ConfigError, NonFiniteError
from nemo_automodel.types import TrainState
from tests.unit.checkpoint.runs import Schedule

ROWS = [[3, 1], [4, 1]]


class Run:
    """A linear model whose loss can be spoilt at a step, trained as the recipe does."""

    def __init__(self, late, bad_steps=(), optimizer=None, in_gradient=False, **options):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(4, 4)
        self.bad_steps, self.in_gradient = bad_steps, in_gradient
        make = optimizer or (lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True))
        opt = make(self.model.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: 1 / (1 + s))
        self.state = TrainState(self.model, None, None, opt, scheduler, Schedule(), None, {})
        self.saved = []
        self.guard = NonFiniteGuard(**options)
        self.guard.protect(self.state, save=lambda state: self.saved.append(self.snapshot()))
        self.guard.reads_late = late
        self.history = [self.snapshot()]

    def snapshot(self):
        state = self.state
        return copy.deepcopy(
            [
                self.model.state_dict(),
                state.optimizer.state_dict(),
                state.lr_scheduler.state_dict(),
                state.schedule.step,
            ]
        )

    def train(self, steps):
        for _ in range(steps):
            self.state.schedule.step += 1
            step = self.state.schedule.step
            bad = step in self.bad_steps
            losses = []
            for i in range(2):
                x = torch.full((2, 4), 0.1 * step + i)
                loss = (self.model(x) ** 2).sum() * (math.nan if bad and i == 1 and not self.in_gradient else 1)
                loss.backward()
                losses.append(loss.detach())
            if bad and self.in_gradient:
                self.model.weight.grad[0, 0] = math.inf
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            batches = [{"sample_ids": rows} for rows in ROWS]
            self.guard.step(sum(losses), norm, losses, batches)
            self.state.lr_scheduler.step()
            self.state.optimizer.zero_grad()
            self.history.append(self.snapshot())
        return self


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        if isinstance(x, dict):
            assert x.keys() == y.keys()
            assert_same(x.values(), y.values())
        elif isinstance(x, list | tuple):
            assert_same(x, y)
        elif isinstance(x, torch.Tensor):
            assert torch.equal(x, y)
        else:
            assert x == y


@pytest.mark.parametrize("late", [False, True])
def test_with_finite_numbers_training_is_that_of_a_bare_optimizer_bit_for_bit(late):
    class Bare(NonFiniteGuard):
        def step(self, *_):
            self._state.optimizer.step()

    run, bare = Run(late), Run(late)
    bare.guard.__class__ = Bare
    run.train(6), bare.train(6)
    run.guard.settle()
    assert_same(run.history, bare.history)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("in_gradient", [False, True])
def test_49_stop_keeps_the_state_before_the_step(late, step, in_gradient):
    run = Run(late, {step}, in_gradient=in_gradient)
    what = f"step {step}: " + (
        "loss .* and gradient norm inf, .* rows of the step: rank 0: 3, 1, 4, 1" if in_gradient else r"rank 0: loss nan in rows 4, 1;"
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match=what):
        run.train(6), run.guard.settle()
    assert len(run.history) - 1 == (step if late else step - 1), "the host reads late or not at all late"
    good = Run(False).train(step - 1).history[-1]
    if step == 1 and late:  # the moments exist already, as they would have begun
        state = run.saved[0][1]["state"]
        assert all(not value.any() for entry in state.values() for value in entry.values())
        run.saved[0][1]["state"] = {}
    assert_same(run.saved[0], good)


@pytest.mark.parametrize("late", [False, True])
def test_skip_leaves_the_step_out_and_goes_on(late, caplog):
    run = Run(late, {3}, policy="skip").train(6)
    run.guard.settle()
    assert run.guard.skipped == 1
    assert "step 3: rank 0: loss nan in rows 4, 1; no weight was changed (1 step(s) skipped so far)" in caplog.text
    assert_same(run.history[3][0].values(), run.history[2][0].values())
    assert not torch.equal(run.history[4][0]["weight"], run.history[3][0]["weight"])
    assert_same(run.history, Run(not late, {3}, policy="skip").train(6).history)


@pytest.mark.parametrize("late", [False, True])
def test_50_repeated_skips_stop_the_run(late):
    run = Run(late, {2, 4, 5, 6, 7}, policy="skip", max_skipped=2)
    with pytest.raises(NonFiniteError, match="step 6: rank 0: loss nan in rows 4, 1, as in the 2 step"):
        run.train(9)
    assert run.saved[0][3] == 5
    assert_same(run.saved[0][0].values(), run.history[3][0].values())


def test_an_optimizer_that_cannot_skip_is_not_stepped():
    run = Run(None, {2}, optimizer=lambda p: torch.optim.Rprop(p))
    with pytest.raises(NonFiniteError):
        run.train(3)
    assert_same(run.saved[0], run.history[1])


@pytest.mark.parametrize("late", [False, True])
def test_an_optimizer_with_small_state_skips_both_ways(late):
    run = Run(late, {3}, optimizer=lambda p: AdamW(p, lr=0.1, weight_decay=0.1), policy="skip").train(6)
    run.guard.settle()
    assert run.guard.skipped == 1
    assert_same(run.history[3][0].values(), run.history[2][0].values())
    bare = Run(late, {3}, policy="skip").train(6)  # torch's, with its other default of betas
    assert torch.equal(run.history[4][1]["state"][0]["step"], bare.history[4][1]["state"][0]["step"])
    other = Run(not late, {3}, optimizer=lambda p: AdamW(p, lr=0.1, weight_decay=0.1), policy="skip").train(6)
    for ours, theirs in zip(run.history, other.history, strict=True):
        assert_same(ours[0].values(), theirs[0].values())


def test_bad_settings_say_what_to_write():
    with pytest.raises(ConfigError, match=r"non_finite\.policy=ignore: unknown; write stop or skip"):
        NonFiniteGuard(policy="ignore")
    with pytest.raises(ConfigError, match="max_skipped=0"):
        NonFiniteGuard(max_skipped=0)


@pytest.mark.parametrize(("kept", "said"), [(None, "no weight was changed. "), ("out/x", "before it is in out/x. ")])
def test_the_error_says_what_is_kept(kept, said):
    run = Run(False, bad_steps=(1,))
    run.guard.protect(run.state, save=lambda state: kept)
    with pytest.raises(NonFiniteError, match=said):
        run.train(1)
