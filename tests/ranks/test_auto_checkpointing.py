"""``activation_checkpointing: auto`` on ranks that share blocks and have unequal room.

Claims: both run a block's forward, in which they exchange tensors, equally often, and end with the choice of the one that has
less; a later micro-batch that is larger changes neither's choice. Where it is not so, they wait for each other for ever.
"""

from __future__ import annotations

import torch

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.blocks import find_blocks
from nemo_automodel.components.distributed.auto_checkpointing import AutoCheckpointing
from nemo_automodel.components.distributed.env import DistEnv
from nemo_automodel.components.distributed.fsdp2 import FSDP2Manager
from tests.builders import tiny_config
from tests.ranks.launch import on_ranks


def on_two_ranks() -> None:
    env = DistEnv(backend="gloo", device="cpu", timeout_minutes=1)
    manager = FSDP2Manager(tp_size=2, env=env)
    model = NeMoAutoModelForCausalLM.from_config(
        tiny_config("llama", num_hidden_layers=4), dtype="float32", distributed=manager
    ).train()
    room = 2**40 if env.rank == 0 else 0
    blocks = find_blocks(model)
    auto = AutoCheckpointing(
        model, blocks, torch.device("cpu"), lambda f: f, lambda: None, torch.float32, free=lambda: room, shared=True
    )
    for tokens in (16, 64):
        ids = torch.arange(tokens).remainder(300)[None]
        model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
        assert (auto.mode, auto.laxer) == ("full", 0)
    env.shutdown()


def test_ranks_that_share_blocks_choose_together() -> None:
    on_ranks("tests.ranks.test_auto_checkpointing:on_two_ranks", 2)
