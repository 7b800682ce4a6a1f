"""On a GPU: a bad step is left out without waiting for the device, and finite ones are a bare optimizer's, bit for bit."""

import pytest
import torch

from nemo_automodel.components.training.nonfinite import NonFiniteGuard
from nemo_automodel.errors import NonFiniteError
from nemo_automodel.types import TrainState
from tests.unit.checkpoint.runs import Schedule

pytestmark = pytest.mark.gpu


def train(steps, bad=(), guarded=True, **options):
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s))
    state = TrainState(model, None, None, optimizer, scheduler, Schedule(), None, {})
    guard, saved = NonFiniteGuard(**options), []
    guard.protect(state, save=lambda s: saved.append((s.schedule.step, model.weight.detach().clone())))
    assert guard.reads_late
    weights = [model.weight.detach().clone()]
    x = torch.ones(2, 64, device="cuda")
    spoilt, whole = torch.full((), float("nan"), device="cuda"), torch.ones((), device="cuda")
    torch.cuda.synchronize()
    # Whatever waits for the device raises; only saying what was wrong with a bad step may wait.
    torch.cuda.set_sync_debug_mode("default" if bad else "error")
    try:
        for step in range(1, steps + 1):
            state.schedule.step = step
            loss = (model(x) ** 2).mean() * (spoilt if step in bad else whole)
            loss.backward()
            norm = torch.stack(torch._foreach_norm([p.grad for p in model.parameters()])).norm()
            if guarded:
                guard.step(loss.detach(), norm, [loss.detach()], [{"sample_ids": [step]}])
            else:
                optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            weights.append(model.weight.detach().clone())
    except NonFiniteError as error:
        return weights, saved, str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return weights, saved, None


def test_finite_steps_wait_for_nothing_and_are_bitwise_those_of_the_bare_optimizer():
    ours, _, _ = train(8)
    bare, _, _ = train(8, guarded=False)
    assert all(torch.equal(a, b) for a, b in zip(ours, bare, strict=True))


def test_a_bad_step_moves_nothing_and_the_state_before_it_is_saved():
    good, _, _ = train(4)
    weights, saved, message = train(9, bad={5})
    assert message.startswith("step 5: rank 0: loss nan in rows 5")
    ((step, kept),) = saved
    assert step == 4
    assert torch.equal(kept, good[4])
    assert len(weights) == 6, "known at step 6, before its update"
