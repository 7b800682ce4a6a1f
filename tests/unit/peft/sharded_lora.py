"""Two gloo ranks, each running this file's ``main`` (``test_lora_sharded.py`` starts them).

Claims, for LoRA, DoRA and LoRA on experts under ``fully_shard``: ranks that were seeded differently start from the same adapters; the
gathered adapter and the merged weights equal one process's; loss and gradients equal one process's.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from nemo_automodel._transformers.experts import choose_experts
from nemo_automodel.components._peft.lora import PeftConfig
from tests.builders import tiny_config


def build(config: PeftConfig, seed: int):
    torch.manual_seed(0)
    kind = "qwen3_moe" if config.target_parameters else "llama"
    model = AutoModelForCausalLM.from_config(tiny_config(kind))
    torch.manual_seed(seed)
    config.apply(model)
    choose_experts(model, torch.device("cpu"), torch.float32)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(torch.randn(parameter.shape, generator=g) * 0.05)
    return model


def shard(model) -> None:
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check(config: PeftConfig) -> None:
    rank = dist.get_rank()
    model = build(config, seed=100 + rank)
    alone = config.adapter_state_dict(model)
    seen = [None, None]
    dist.all_gather_object(seen, alone)
    for key in alone:
        assert torch.equal(seen[0][key], seen[1][key]), f"ranks start from another {key}"
    ids = torch.randint(3, 384, (2, 9), generator=torch.Generator().manual_seed(2))
    merged_alone = config.merged_state_dict(model)
    loss_alone = model(input_ids=ids, labels=ids).loss
    loss_alone.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()

    shard(model)
    for key, value in config.adapter_state_dict(model).items():
        assert torch.equal(value, alone[key]), key
    merged = config.merged_state_dict(model)
    assert merged.keys() == merged_alone.keys()
    assert any(isinstance(value, DTensor) for value in merged.values())
    for key, value in merged.items():
        torch.testing.assert_close(full(value), merged_alone[key], rtol=1e-6, atol=1e-7, msg=key)
    loss = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, loss_alone, rtol=1e-6, atol=1e-6)
    loss.backward()  # the same batch on both ranks: the mean over ranks is one process's gradient
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(full(parameter.grad), gradients[name], rtol=1e-5, atol=1e-7, msg=name)


def main(rank: int, port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for use_dora in (False, True):
        check(PeftConfig(match_all_linear=True, dim=3, use_dora=use_dora))
    check(PeftConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"], dim=3))
    dist.destroy_process_group()


if __name__ == "__main__":
    meeting = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(main, args=(meeting.port,), nprocs=2)
    sys.exit(0)
