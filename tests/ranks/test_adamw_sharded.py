"""Our AdamW on sharded and replicated weights of two gloo ranks, against one process.

Claims: (1) sharded by rows, fp32 weights and moments (whole, or in eight bits) are one process's, to the last bit; (2) ranks that
hold the same bf16 weight round it alike at random; (3) ranks that hold different parts do not draw the same bits.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from nemo_automodel.components.training.adamw import AdamW
from tests.ranks.launch import on_ranks

STATES = ["float32", "int8"] if importlib.util.find_spec("bitsandbytes") is not None else ["float32"]


def train(weight, spread, **options):
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(spread(weight.clone()))
    optimizer = AdamW([parameter], lr=1e-2, weight_decay=0.1, **options)
    for _ in range(5):
        parameter.grad = spread(torch.randn(weight.shape, generator=generator).to(weight.dtype))
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


def on_two_ranks():
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    weight = torch.randn(
        31, 256, generator=torch.Generator().manual_seed(1)
    )  # 16 rows, and 15: few enough to be kept in fp32
    for state_dtype in STATES:
        expected, state = train(weight, lambda t: t, state_dtype=state_dtype)
        found, sharded = train(weight, lambda t: distribute_tensor(t, mesh, [Shard(0)]), state_dtype=state_dtype)
        assert torch.equal(found.full_tensor(), expected)
        for key in state:
            if "exp_avg" in key:
                assert torch.equal(sharded[key].full_tensor(), state[key]), key

    found, _ = train(weight.bfloat16(), lambda t: distribute_tensor(t, mesh, [Replicate()]))
    both = [torch.empty_like(found.to_local()) for _ in range(2)]
    dist.all_gather(both, found.to_local())
    assert torch.equal(*both)

    twice = torch.ones(64, 256, dtype=torch.bfloat16)
    parameter = nn.Parameter(distribute_tensor(twice, mesh, [Shard(0)]))
    optimizer = AdamW([parameter], lr=1e-3)
    parameter.grad = distribute_tensor(torch.ones_like(twice), mesh, [Shard(0)])
    optimizer.step()
    upper, lower = parameter.detach().full_tensor().chunk(2)
    assert not torch.equal(upper, lower)
    dist.barrier()
    dist.destroy_process_group()


def test_sharded_and_replicated_weights():
    on_ranks("tests.ranks.test_adamw_sharded:on_two_ranks", 2)
