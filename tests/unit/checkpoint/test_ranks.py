"""Checkpoints of real FSDP2 ranks.

Claims: (1) two ranks save one HF directory, bitwise what one process would have written, right after a validation pass
too; (2) two ranks resume bit for bit; (3) weights, optimizer state and a recipe's own sharded state are equal on another
number of ranks, both ways; (4) an error on one rank is raised by all, and what was saved before is intact.
"""

import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.checkpoint import publish
from nemo_automodel.components.checkpoint.checkpointer import Checkpointer
from nemo_automodel.components.checkpoint.ranks import Ranks
from nemo_automodel.components.distributed.env import DistEnv
from nemo_automodel.components.distributed.fsdp2 import FSDP2Manager
from nemo_automodel.errors import CheckpointError
from tests.ranks.launch import on_ranks
from tests.unit.checkpoint.runs import Average, Schedule, logits, make_state, train

TIED = {"tie_word_embeddings": True, "vocab_size": 385, "intermediate_size": 65}  # shards of unequal size


def optimizer(params):
    return torch.optim.AdamW(params, lr=1e-2)


def sharded(env, **make):
    state = make_state(optimizer=optimizer, **{**TIED, **make})
    state.model = FSDP2Manager(env=env).parallelize(state.model, list(state.model.model.layers), torch.float32)
    params = [p for p in state.model.parameters() if p.requires_grad]
    state.optimizer = optimizer(params)
    state.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(state.optimizer, lambda s: 1 / (1 + s))
    torch.manual_seed(100 + env.rank)  # each rank its own dropout and data
    return state


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def numbers(state):
    """Weights and optimizer state, whole, by name."""
    got = {}
    for name, p in state.model.named_parameters():
        got[name] = whole(p.detach()).clone()
        for key, value in state.optimizer.state[p].items():
            got[f"{name}/{key}"] = whole(value).clone()
    return got


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def two_ranks(root):
    env = DistEnv()
    state = sharded(env)
    checkpointer = Checkpointer(env, f"{root}/ckpt")
    state.extra = {"ema": Average(state.model.parameters())}
    checkpointer.restore(state)
    train(state, 2)
    state.extra["ema"].update()
    logits(state.model)  # leaves the root's parameters gathered, as a validation pass does
    checkpointer.save(state)
    saved = numbers(state)
    expected = train(state, 2)

    again = sharded(env, seed=9)
    again.fingerprint = state.fingerprint
    train(again, 1)
    again.extra = {"ema": Average(again.model.parameters())}
    assert Checkpointer(env, f"{root}/ckpt", restore_from="latest").restore(again)
    average = [whole(t) for t in again.extra["ema"].average]
    assert all(torch.equal(a, whole(b)) for a, b in zip(average, state.extra["ema"].average, strict=True))
    if env.is_main:
        torch.save(average, f"{root}/average.pt")
    assert_equal(numbers(again), saved)
    assert train(again, 2) == expected
    if env.is_main:
        torch.save(saved, f"{root}/saved.pt")

    state.rng.state_dict = (lambda: {"bad": print}) if env.rank == 1 else state.rng.state_dict
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"on rank 1: state 'rng.bad' is a builtin_function_or_method"):
        checkpointer.save(state)
    assert time.monotonic() - start < 20
    env.barrier()
    assert sorted(p.name for p in Path(root, "ckpt").iterdir()) == [".lock", "LATEST", "epoch_0_step_2"]

    peft = PeftConfig(match_all_linear=True, dim=3, alpha=6)
    lora = sharded(env, peft=peft)
    train(lora, 2)
    Checkpointer(env, f"{root}/lora", save_merged=True).save(lora)
    out = logits(lora.model)
    if env.is_main:
        torch.save(out, f"{root}/lora_logits.pt")
    if Path(root, "one").exists():  # what a single process saved, on two ranks
        fewer = sharded(env)
        assert Checkpointer(env, f"{root}/one", restore_from="latest").restore(fewer)
        assert_equal(numbers(fewer), torch.load(f"{root}/one.pt"))
    env.shutdown()


def test_two_ranks_and_one_share_checkpoints(tmp_path):
    one = make_state(optimizer=optimizer, **TIED)
    train(one, 2)
    Checkpointer(None, str(tmp_path / "one")).save(one)
    torch.save(numbers(one), tmp_path / "one.pt")

    on_ranks("tests.unit.checkpoint.test_ranks:two_ranks", 2, tmp_path)

    path = tmp_path / "ckpt/epoch_0_step_2"
    assert publish.damage(path, Ranks(None)) == []
    saved = torch.load(tmp_path / "saved.pt")
    files = load_file(path / "model/model.safetensors")
    assert "lm_head.weight" not in files  # tied
    assert_equal(files, {name: tensor for name, tensor in saved.items() if "/" not in name})

    single = make_state(optimizer=optimizer, seed=4, **TIED)
    single.fingerprint = make_state(**TIED).fingerprint
    single.extra = {"ema": Average(single.model.parameters())}
    assert Checkpointer(None, str(tmp_path / "ckpt"), restore_from="latest").restore(single)
    assert_equal(numbers(single), saved)
    average = torch.load(tmp_path / "average.pt")
    assert all(torch.equal(a, b) for a, b in zip(single.extra["ema"].average, average, strict=True))
    assert single.schedule.state_dict() == {**Schedule().state_dict(), "step": 2}

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "lora/epoch_0_step_2/model")
    torch.testing.assert_close(logits(merged), torch.load(tmp_path / "lora_logits.pt"), atol=1e-5, rtol=1e-5)
    assert "lm_head.weight" not in load_file(tmp_path / "lora/epoch_0_step_2/model/model.safetensors")


if __name__ == "__main__":
    two_ranks(sys.argv[1])
