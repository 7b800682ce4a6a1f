"""FSDP2Manager on real ranks.

Claims: (1) gradients are the SUM over ranks, however many micro-batches and whatever the block structure;
(2) the gradient norm and the clipped gradients equal one process's; (3) the manager's sums are global.
"""

import sys

import pytest
import torch
from torch.distributed.tensor import DTensor

from nemo_automodel.components.distributed.env import DistEnv
from nemo_automodel.components.distributed.fsdp2 import FSDP2Manager
from nemo_automodel.components.distributed.grads import GradClipper
from nemo_automodel.errors import ConfigError
from tests.ranks.launch import on_ranks


def build():
    torch.manual_seed(0)
    blocks = [torch.nn.Linear(16, 16) for _ in range(3)]
    return torch.nn.Sequential(torch.nn.Linear(5, 16), *blocks, torch.nn.Linear(16, 3, bias=False)), blocks


def inputs(micro_batches):
    torch.manual_seed(1)
    return torch.randn(micro_batches, 8, 5)


def fsdp_gradients(micro_batches: str) -> None:
    micro = int(micro_batches)
    env = DistEnv()
    manager = FSDP2Manager(env=env)
    reference, _ = build()
    for x in inputs(micro):
        reference(x).pow(2).sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)

    model, blocks = build()
    manager.parallelize(model, blocks, torch.float32)
    for i, x in enumerate(inputs(micro)):
        manager.sync_gradients(model, last_micro_batch=i == micro - 1)
        model(x[manager.dp_rank :: manager.dp_size]).pow(2).sum().backward()
    got = GradClipper(1.0)(list(model.parameters()))
    assert abs(got - norm) / norm < 1e-6, (got, norm)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        assert (grad - q.grad).norm() / q.grad.norm() < 1e-6
    assert manager.all_reduce_sum(env.rank + 1).item() == sum(range(1, env.world_size + 1))
    with env.rank_zero_first():
        pass
    assert env.broadcast({"rank": env.rank}) == {"rank": 0}
    env.shutdown()


@pytest.mark.parametrize(("nproc", "micro"), [(1, 1), (2, 1), (2, 3), (4, 2)])
def test_gradients_equal_one_process(nproc, micro):
    on_ranks("tests.ranks.test_fsdp2:fsdp_gradients", nproc, micro)


@pytest.fixture(scope="module")
def single():
    env = DistEnv(device="cpu")
    yield env
    env.shutdown()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dp_size": 3}, "dp_size=3: 1 process"),
        ({"tp_size": 2}, "tp_size 2 x cp_size 1 = 2 does not divide the 1 process"),
        ({"cp_size": 3, "dp_size": 2}, "dp_size x tp_size x cp_size = 6 must equal that"),
        ({"cp_size": 0}, "cp_size=0: write 1 or more"),
        ({"dp_replicate_size": 2}, "dp_replicate_size=2: does not divide the 1 data-parallel rank.s.; write one of 1"),
        ({"sequence_parallel": True}, "sequence_parallel=true: .* tp_size is 1"),
        ({"pp_size": 2}, "pp_size=2: pipeline parallelism is not part of this release"),
        ({"activation_checkpointing": "on"}, "activation_checkpointing=on: write one of off, selective, full, auto"),
        ({"offload": True}, "offload=true: the run is on the CPU already"),
    ],
)
def test_meshes_that_do_not_fit_say_why(single, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        FSDP2Manager(env=single, **kwargs)


@pytest.mark.parametrize(("master", "survives"), [(torch.float32, True), (torch.bfloat16, False)])
def test_class_17_an_update_at_1e5_survives_in_fp32_masters_only(single, master, survives):
    """50 AdamW steps at 1e-5 move a weight of 0.02 by 5e-4 in fp32 masters, and not at all in pure bf16."""
    layer = torch.nn.Linear(4, 4, bias=False, dtype=master)
    torch.nn.init.constant_(layer.weight, 0.02)
    start = layer.weight.detach().clone()
    manager = FSDP2Manager(env=single)
    manager.parallelize(layer, [], torch.bfloat16)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    for _ in range(50):
        out = layer(torch.ones(2, 4, dtype=torch.bfloat16))
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
        assert layer.weight.grad.dtype == master
        optimizer.step()
        optimizer.zero_grad()
    weight = layer.weight.full_tensor() if isinstance(layer.weight, DTensor) else layer.weight
    moved = (weight - start).abs().float()
    ledger = {
        "param": layer.weight.dtype,
        **{k: v.dtype for k, v in optimizer.state[layer.weight].items() if k != "step"},
    }
    assert ledger == {"param": master, "exp_avg": master, "exp_avg_sq": master}
    if survives:
        assert moved.min() > 4e-4
    else:
        assert moved.max() == 0


if __name__ == "__main__":
    fsdp_gradients(sys.argv[1])
