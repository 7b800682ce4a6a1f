"""Memory of each rank of a cluster that is not there: meshes and shardings of a big model, without a GPU.

torch's fake process group lets one process believe that it is a rank among many, and the meta device gives tensors a
shape and no storage; sharding then is the real code. Nothing is trained: activations are not in these numbers.

    python -m benchmarks.fake_hosts --hosts 8 --devices 8                            # FSDP over all 64
    python -m benchmarks.fake_hosts --hosts 8 --devices 8 --distributed '{dp_replicate_size: 8}'
    python -m benchmarks.fake_hosts --model path/or/hub-id --hosts 1 --devices 8
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_automodel._transformers.blocks import find_blocks
from nemo_automodel.components.distributed.fsdp2 import FSDP2Manager

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank; ``gathered`` is what it holds of others' shards at most: two blocks, one of them coming."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered


@contextmanager
def as_rank(rank: int, world_size: int) -> Iterator[Any]:
    """Be ``rank`` among ``world_size`` processes that do not exist; yields what a manager takes as ``env``."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield SimpleNamespace(rank=rank, world_size=world_size, device=torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def sharded_model(config: dict[str, Any], env: Any, **distributed: Any) -> tuple[nn.Module, list[nn.Module]]:
    """The model of ``config`` on the meta device with fp32 masters, sharded as ``distributed:`` of a recipe says.

    Returns:
        The model and its blocks.
    """
    manager = FSDP2Manager(**distributed, env=env)
    manager.device = torch.device("meta")  # of the weights; the mesh is of a device that exists
    options = dict(config)
    built = AutoConfig.for_model(options.pop("model_type"), **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(built, dtype=torch.float32)
    blocks = find_blocks(model)
    return manager.parallelize(model, blocks, torch.bfloat16), blocks


def memory_of(model: nn.Module, blocks: list[nn.Module], compute_dtype: torch.dtype = torch.bfloat16) -> Memory:
    """What training ``model`` with AdamW keeps on this rank, from the shards that it really has."""
    params = list(model.parameters())
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer = torch.optim.AdamW(params, foreach=False)  # the same state as the fused one, which has no meta device
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    of_blocks = {id(param) for block in blocks for param in block.parameters()}
    rest = sum(param.numel() for param in params if id(param) not in of_blocks)
    block = max(sum(param.numel() for param in block.parameters()) for block in blocks)
    return Memory(
        weights=sum(map(local_bytes, params)),
        gradients=sum(local_bytes(param.grad) for param in params),
        optimizer=sum(map(local_bytes, states)),
        gathered=(rest + 2 * block) * compute_dtype.itemsize if isinstance(params[0], DTensor) else 0,
    )


def local_bytes(tensor: torch.Tensor | None) -> int:
    """Bytes of this rank's shard."""
    if tensor is None:
        return 0
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--devices", type=int, default=8, help="of each host")
    parser.add_argument("--distributed", type=yaml.safe_load, default={}, help="the section of a recipe, as YAML")
    parser.add_argument("--model", help="a config's Hub ID or directory; default: the shape of Llama 70B")
    args = parser.parse_args()
    config = AutoConfig.from_pretrained(args.model).to_dict() if args.model else LLAMA_70B
    world_size = args.hosts * args.devices
    print(f"{args.hosts} hosts x {args.devices} devices, distributed: {args.distributed or 'defaults'}; GiB a rank\n")
    print("| rank | weights | gradients | optimizer | gathered | total |\n|---:|---:|---:|---:|---:|---:|")
    for rank in (0, world_size - 1):
        with as_rank(rank, world_size) as env:
            memory = memory_of(*sharded_model(config, env, **args.distributed))
        cells = (memory.weights, memory.gradients, memory.optimizer, memory.gathered, memory.total)
        print(f"| {rank} | " + " | ".join(f"{bytes_ / GIB:.2f}" for bytes_ in cells) + " |")


if __name__ == "__main__":
    main()
