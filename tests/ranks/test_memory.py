"""Host memory while a large model is loaded and saved on two ranks.

Claim: beside the interpreter, a rank never has more than 1.2 times its own shard and one group of tensors (those that
become one tensor of the model, or are written as one).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.checkpoint.export import plan_export
from nemo_automodel.components.checkpoint.ranks import Ranks
from nemo_automodel.components.checkpoint.shards import local_of
from nemo_automodel.components.checkpoint.stream import write_weights
from nemo_automodel.components.distributed.env import DistEnv
from nemo_automodel.components.distributed.fsdp2 import FSDP2Manager
from tests.builders import tiny_config
from tests.ranks.launch import torchrun
from tests.ranks.synthetic import resident, write_hollow

SIZES = {
    "llama": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 20, "vocab_size": 16384},
    "qwen3_moe": {
        "hidden_size": 1024,
        "num_hidden_layers": 14,
        "moe_intermediate_size": 512,
        "num_experts": 48,
        "vocab_size": 16384,
    },
}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}


def load(path: str, out: str) -> None:
    env = DistEnv()
    manager = FSDP2Manager(env=env)
    NeMoAutoModelForCausalLM.from_config(tiny_config("llama"), distributed=manager)  # what is imported at first use
    before = resident()
    model = NeMoAutoModelForCausalLM.from_pretrained(path, master_dtype="bfloat16", distributed=manager)
    shard = sum(local_of(p).nbytes for p in model.parameters())
    figures = {"before": before, "shard": shard, "load": resident(peak=True) - before}
    figures["group"] = max(p.numel() * p.itemsize for p in model.parameters())
    write_weights(Path(path) / "saved", plan_export(model, None), Ranks(env))
    figures["save"] = resident(peak=True) - before
    Path(f"{out}.{env.rank}").write_text(json.dumps(figures))
    env.shutdown()


def fresh(path: str, out: str) -> None:
    env = DistEnv()
    manager = FSDP2Manager(env=env)
    NeMoAutoModelForCausalLM.from_config(tiny_config("llama"), distributed=manager)
    before = resident()
    model = NeMoAutoModelForCausalLM.from_config(path, master_dtype="bfloat16", distributed=manager)
    block = sum(p.numel() * p.itemsize for p in model.model.layers[0].parameters())
    shard = sum(local_of(p).nbytes for p in model.parameters())
    Path(f"{out}.{env.rank}").write_text(json.dumps([resident(peak=True) - before, shard, block]))
    env.shutdown()


@pytest.mark.full
def test_fresh_weights_are_drawn_one_block_at_a_time(tmp_path):
    AutoConfig.for_model("llama", **HEADS, **SIZES["llama"]).save_pretrained(tmp_path)
    torchrun("tests.ranks.test_memory:fresh", 2, tmp_path, tmp_path / "figures", timeout=500)
    for rank in range(2):
        peak, shard, block = json.loads((tmp_path / f"figures.{rank}").read_text())
        print(rank, [f"{value / 2**20:.0f} MiB" for value in (peak, shard, block)])
        assert shard > 1 << 30
        assert peak < 1.2 * shard + block


@pytest.mark.full
@pytest.mark.parametrize("family", SIZES)
def test_no_rank_ever_has_the_whole_model(family, tmp_path):
    config = AutoConfig.for_model(family, **HEADS, **SIZES[family])
    total = write_hollow(tmp_path, config)
    (tmp_path / "saved").mkdir()
    assert total > 2 << 30
    torchrun("tests.ranks.test_memory:load", 2, tmp_path, tmp_path / "figures", timeout=500)
    for rank in range(2):
        figures = json.loads((tmp_path / f"figures.{rank}").read_text())
        print(family, rank, {key: f"{value / 2**20:.0f} MiB" for key, value in figures.items()})
        assert abs(figures["shard"] - total / 2) < 0.05 * total
        assert figures["load"] < 1.2 * figures["shard"] + figures["group"]
        assert figures["save"] < 1.2 * figures["shard"] + figures["group"]
    written = sum(path.stat().st_size for path in (tmp_path / "saved").glob("*.safetensors"))
    assert total < written < total + 2**20
