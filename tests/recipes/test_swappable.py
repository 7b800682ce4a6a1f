"""Principle 2: a user's own optimizer, LR scheduler, dataset, loss, checkpoint I/O and distributed manager from the YAML."""

import json
import textwrap

import pytest

from nemo_automodel.errors import ConfigError
from tests.recipes.workspace import make_workspace

MINE = textwrap.dedent(
    """
    import json, pathlib
    import torch
    from torch.nn import functional as F

    CALLS = []

    class SignSGD(torch.optim.Optimizer):
        def __init__(self, params, lr=1e-3):
            CALLS.append("optimizer")
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(p.grad.sign(), alpha=-group["lr"])

    def halving(optimizer, every=2):
        CALLS.append("lr_scheduler")
        return torch.optim.lr_scheduler.StepLR(optimizer, every, 0.5)

    def numbers(tokenizer, rows=16):
        CALLS.append("dataset")
        ids = tokenizer("one two three", add_special_tokens=False)["input_ids"]
        return [{"input_ids": ids, "labels": ids[1:] + [-100]} for _ in range(rows)]

    class SmoothedLoss:
        def __init__(self, smoothing=0.1):
            CALLS.append("loss_fn")
            self.smoothing = smoothing

        def __call__(self, logits, labels):
            return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="sum", label_smoothing=self.smoothing)

    class JsonCheckpointer:
        def __init__(self, checkpoint_dir):
            CALLS.append("checkpoint")
            self.dir = pathlib.Path(checkpoint_dir)

        def restore(self, state):
            return False

        def offer_best(self, val_loss):
            pass

        def check(self):
            pass

        def save(self, state):
            path = self.dir / f"mine_{state.schedule.step}.json"
            path.write_text(json.dumps({"norm": sum(p.detach().float().norm().item() for p in state.model.parameters())}))
            return path

        def finish(self, state):
            pass

    class OneProcess:
        def __init__(self, env):
            CALLS.append("distributed")
            self.device, self.dp_rank, self.dp_size = env.device, 0, 1

        def parallelize(self, model, blocks, compute_dtype):
            return model

        def sync_gradients(self, model, last_micro_batch):
            pass

        def shard_batch(self, batch):
            return batch

        def all_reduce_sum(self, value):
            return torch.as_tensor(value, dtype=torch.float64)
    """
)
SECTIONS = {
    "optimizer": {"_target_": "mine.py:SignSGD", "lr": 0.01},
    "lr_scheduler": {"_target_": "mine.py:halving", "every": 3},
    "dataset": {"_target_": "mine.py:numbers", "rows": 24},
    "loss_fn": {"_target_": "mine.py:SmoothedLoss", "smoothing": 0.2},
    "checkpoint": {"_target_": "mine.py:JsonCheckpointer", "checkpoint_dir": "out"},
    "distributed": {"_target_": "mine.py:OneProcess"},
}


@pytest.mark.parametrize("section", [*SECTIONS, "all"])
def test_a_users_component_takes_the_place_of_ours(tmp_path, section):
    chosen = SECTIONS if section == "all" else {section: SECTIONS[section]}
    workspace = make_workspace(tmp_path, sections=chosen)
    (tmp_path / "mine.py").write_text(
        MINE
        + f"\nimport atexit; atexit.register(lambda: open({str(tmp_path / 'calls')!r}, 'w').write(json.dumps(CALLS)))\n"
    )
    workspace.spawn("--allow-target", "./mine.py", "--step_scheduler.max_steps=4")
    assert set(json.loads((tmp_path / "calls").read_text())) == set(chosen)
    metrics = workspace.metrics()
    assert len(metrics) == 4
    if section == "lr_scheduler":
        assert [line["lr"] for line in metrics] == pytest.approx([0.01, 0.01, 0.01, 0.005])
    if "checkpoint" in chosen:
        assert (tmp_path / "out" / "mine_4.json").exists()


def test_user_code_needs_the_flag_and_the_error_says_which(tmp_path):
    workspace = make_workspace(tmp_path, sections={"loss_fn": SECTIONS["loss_fn"]})
    (tmp_path / "mine.py").write_text(MINE)
    with pytest.raises(ConfigError, match=r"recipe\.yaml:\d+.*mine\.py:SmoothedLoss.*--allow-target"):
        workspace.run()
