"""A run stopped on some ranks continues on others, or spread over them in another way.

Claims: (1) saved under one layout and restored under any other, weights and optimizer state are the same to the last
bit; (2) through the recipe, losses after the resume are the uninterrupted run's to 1e-5, and its own to the last bit
where the layout stays; every step has the same tokens; (3) what changes harmlessly is listed, and another model, adapter
or data is refused with what differs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.checkpoint.checkpointer import Checkpointer
from nemo_automodel.components.distributed.ddp import DDPManager
from nemo_automodel.components.distributed.env import DistEnv
from nemo_automodel.components.distributed.fsdp2 import FSDP2Manager
from nemo_automodel.types import TrainState
from tests.builders import tiny_config
from tests.ranks.launch import ROOT, on_ranks
from tests.recipes.workspace import make_workspace
from tests.unit.checkpoint.runs import GlobalRNG, Schedule

RECIPE = str(ROOT / "nemo_automodel/recipes/llm/finetune.py")
MANAGERS = {
    "FSDP4": lambda env: FSDP2Manager(env=env),  # or as many ranks as there are
    "FSDP2xTP2": lambda env: FSDP2Manager(env=env, tp_size=2),
    "TP4": lambda env: FSDP2Manager(env=env, tp_size=4),
    "HSDP": lambda env: FSDP2Manager(env=env, dp_replicate_size=2),
    "DDP": lambda env: DDPManager(env=env),
}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def build(manager, peft, seed, dtype="float32"):
    torch.manual_seed(seed)
    config = tiny_config("llama", num_key_value_heads=4, tie_word_embeddings=peft is None)
    model = NeMoAutoModelForCausalLM.from_config(config, dtype=dtype, peft=peft, distributed=manager)
    model.config._name_or_path = "acme/base"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    fingerprint = {"config": {}, "data": "d1"}
    return TrainState(model, None, peft, optimizer, scheduler, Schedule(), GlobalRNG(), fingerprint)


def step(state):
    torch.manual_seed(state.schedule.step)
    for parameter in state.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            local.copy_(torch.randn(local.shape))
    state.optimizer.step()
    state.lr_scheduler.step()
    state.optimizer.zero_grad()
    state.schedule.step += 1


def numbers(state):
    found = {}
    for name, parameter in state.model.named_parameters():
        found[name] = whole(parameter.detach()).clone()
        for key, value in state.optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = whole(value).clone()
    return found


def between_layouts(root: str, *sources: str) -> None:
    env = DistEnv()
    managers = {layout: make(env) for layout, make in MANAGERS.items()}  # each with threads for its process groups
    for peft in (None, PeftConfig(match_all_linear=True, dim=4)):
        for number, source in enumerate(sources):
            state = build(managers[source], peft, seed=1)
            step(state)
            step(state)
            path = f"{root}/{source}-{peft is not None}"
            checkpointer = Checkpointer(env, path, async_save=number % 2 == 1)
            checkpointer.save(state)
            saved = numbers(state)
            if number % 2:
                step(state)
            checkpointer._background and checkpointer._background.wait()
            for target in MANAGERS:
                again = build(managers[target], peft, seed=1 if peft is not None else 2)
                assert Checkpointer(env, path, restore_from="latest").restore(again)
                restored = numbers(again)
                assert restored.keys() == saved.keys()
                for name, tensor in saved.items():
                    assert torch.equal(restored[name], tensor), (source, target, name)
    env.shutdown()


@pytest.mark.parametrize(
    "sources",
    [
        pytest.param(("DDP", "FSDP2xTP2"), marks=pytest.mark.sample),
        pytest.param(tuple(MANAGERS), marks=pytest.mark.full),
    ],
    ids=["two", "all"],
)
def test_every_layout_restores_what_any_other_saved(tmp_path, sources):
    on_ranks("tests.ranks.test_elastic:between_layouts", 4, tmp_path, *sources, timeout=400)


def lora_in_bf16(root: str, stage: str) -> None:
    """fp32 adapters on a bf16 base: outside FSDP2 on one rank, sharded on more."""
    env, peft = DistEnv(), PeftConfig(match_all_linear=True, dim=3, use_dora=True)
    state = build(MANAGERS["FSDP4"](env), peft, seed=1, dtype="bfloat16")
    assert all(isinstance(p, DTensor) is (env.world_size > 1) for p in state.model.parameters() if p.requires_grad)
    if stage == "save":
        step(state)
        step(state)
        Checkpointer(env, root).save(state)
        saved = numbers(state)
        if env.rank == 0:
            torch.save(saved, f"{root}/numbers.pt")
    else:
        assert Checkpointer(env, root, restore_from="latest").restore(state)
        restored, saved = numbers(state), torch.load(f"{root}/numbers.pt")
        assert restored.keys() == saved.keys()
        for name, tensor in saved.items():
            assert torch.equal(restored[name], tensor), name
        step(state)
    env.shutdown()


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_adapters_move_between_one_rank_and_two(before, after, tmp_path):
    on_ranks("tests.ranks.test_elastic:lora_in_bf16", before, tmp_path, "save")
    on_ranks("tests.ranks.test_elastic:lora_in_bf16", after, tmp_path, "restore")


LAYOUTS = {
    "FSDP1": (1, []),
    "FSDP2": (2, []),
    "FSDP4": (4, []),
    "TP2": (2, ["--distributed.tp_size=2"]),
    "FSDP2xTP2": (4, ["--distributed.tp_size=2"]),
    "DDP2": (2, ["--distributed._target_=nemo_automodel.components.distributed.ddp.DDPManager"]),
    "FSDP2 async": (2, ["--checkpoint.async_save=true"]),
}
COMMON = [
    "--step_scheduler.max_steps=5",
    "--step_scheduler.ckpt_every_steps=2",
    "--step_scheduler.local_batch_size=2",
    "--optimizer.lr=0.001",
    "--checkpoint.keep_last=null",
]


def launch(workspace, layout: str, out: str, *more: str):
    nproc, args = LAYOUTS[layout]
    target = f"--checkpoint.checkpoint_dir={workspace.path / out}"
    return on_ranks(RECIPE, nproc, "-c", workspace.recipe, target, *COMMON, *args, *more)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Layout -> (the workspace, the checkpoint after two steps, the whole run's metrics), each run once."""
    workspace = make_workspace(tmp_path_factory.mktemp("elastic"), num_key_value_heads=4)
    done: dict[str, tuple] = {}

    def run(layout: str):
        if layout not in done:
            launch(workspace, layout, layout)
            kept = workspace.path / f"{layout}-kept"
            shutil.copytree(next((workspace.path / layout).glob("epoch_*_step_2")), kept / "epoch_0_step_2")
            done[layout] = (workspace, kept / "epoch_0_step_2", workspace.metrics(layout))
        return done[layout]

    return run


SAMPLE = [("FSDP4", "FSDP1"), ("FSDP4", "FSDP2xTP2"), ("FSDP4", "DDP2")]
PAIRS = [pytest.param(a, b, marks=[] if (a, b) in SAMPLE else [pytest.mark.full]) for a in LAYOUTS for b in LAYOUTS]


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_run_continues_on_other_ranks(before, after, stopped):
    workspace, checkpoint, expected = stopped(before)
    out = f"{before}-to-{after}"
    result = launch(workspace, after, out, f"--checkpoint.restore_from={checkpoint}")
    found = workspace.metrics(out)
    assert [line["step"] for line in found] == [3, 4, 5]
    for ours, theirs in zip(found, expected[2:], strict=True):
        assert (ours["num_tokens"], ours["num_label_tokens"]) == (theirs["num_tokens"], theirs["num_label_tokens"])
        assert ours["lr"] == theirs["lr"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        if LAYOUTS[before][0] == LAYOUTS[after][0] and "TP" not in before + after and "DDP" not in before + after:
            assert ours["loss_hex"] == theirs["loss_hex"]
    if LAYOUTS[before][0] != LAYOUTS[after][0]:
        assert f"world_size: {LAYOUTS[before][0]} -> {LAYOUTS[after][0]}" in result.stdout + result.stderr


REFUSED = {  # what is changed, and what the message says of it
    "another adapter": ("--peft.match_all_linear=true", "peft: absent -> {"),
    "other data": ("--dataset.seq_length=24", "dataset.seq_length: "),
    "another optimizer": ("--optimizer.weight_decay=0.5", "optimizer.weight_decay: 0.0 -> 0.5"),
}


@pytest.mark.parametrize(
    "change", [pytest.param(c, marks=[] if c == "other data" else [pytest.mark.full]) for c in REFUSED]
)
def test_another_run_is_refused_with_what_differs(change, stopped):
    workspace, checkpoint, _ = stopped("FSDP4")
    override, said = REFUSED[change]
    target = [f"--checkpoint.checkpoint_dir={workspace.path / 'refused'}", f"--checkpoint.restore_from={checkpoint}"]
    result = on_ranks(RECIPE, 2, "-c", workspace.recipe, *target, *COMMON, override, check=False)
    assert result.returncode != 0
    assert "belongs to another run" in result.stderr
    assert said in result.stderr
    assert 'finetune.py", line' not in result.stderr
    assert not Path(workspace.path / "refused").exists() or not list((workspace.path / "refused").glob("epoch_*"))
