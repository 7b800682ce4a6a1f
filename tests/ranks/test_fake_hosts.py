"""Eight hosts with eight devices each shard a model of 70 billion weights as the arithmetic says, without any of them.

Claims, for a rank of torch's fake process group: (1) the meshes are those that the layout asks for; (2) each weight's
shard, its gradient's and its optimizer state's have the sizes that dividing by hand gives; (3) all ranks together hold
each weight once for each replica.
"""

import inspect
import math

import pytest
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Replicate, Shard

from benchmarks.fake_hosts import LLAMA_70B, as_rank, memory_of, sharded_model
from nemo_automodel.components.distributed.fsdp2 import FSDP2Manager

HOSTS, DEVICES = 8, 8
WORLD = HOSTS * DEVICES
WEIGHTS = 70_553_706_496  # Llama 3.1 70B, by its published shapes
LAYOUTS = {
    "fsdp over 64": ({}, WORLD),
    "hsdp: hosts hold copies": ({"dp_replicate_size": HOSTS}, DEVICES),
    "context parallel 8": ({"dp_replicate_size": 1, "cp_size": 8}, WORLD),
}


def _shapes():
    """Every weight's shape, from the config's numbers alone."""
    hidden, inner, vocab = (LLAMA_70B[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    key_value = hidden // LLAMA_70B["num_attention_heads"] * LLAMA_70B["num_key_value_heads"]
    block = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden)]
    block += [(inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
    return block * LLAMA_70B["num_hidden_layers"] + [(vocab, hidden), (vocab, hidden), (hidden,)]


def _share(rows, ranks, rank):
    """Rows of ``rank`` where ``rows`` are cut into ``ranks`` chunks, the last ones smaller."""
    chunk = math.ceil(rows / ranks)
    return max(0, min(chunk, rows - rank * chunk))


def test_the_shapes_are_those_of_70b():
    assert sum(map(math.prod, _shapes())) == WEIGHTS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [0, 19, pytest.param(63, marks=pytest.mark.full)])
def test_memory_of_a_rank(layout, rank):
    options, shards = LAYOUTS[layout]
    if not set(options) <= set(inspect.signature(FSDP2Manager).parameters):
        pytest.skip(f"FSDP2Manager has no {', '.join(options)}")
    with as_rank(rank, WORLD) as env:
        model, blocks = sharded_model(LLAMA_70B, env, **options)
        params = list(model.parameters())
        assert all(isinstance(param, DTensor) for param in params)
        assert all(param.is_meta for param in params)
        mesh, placements = params[0].device_mesh, params[0].placements
        replicas = WORLD // shards
        expected_mesh = [list(range(i * shards, (i + 1) * shards)) for i in range(replicas)]
        assert mesh.mesh.tolist() == (expected_mesh if replicas > 1 else expected_mesh[0])
        assert placements == ((Replicate(), Shard(0)) if replicas > 1 else (Shard(0),))
        memory = memory_of(model, blocks)

    mine = sum(_share(shape[0], shards, rank % shards) * math.prod(shape[1:]) for shape in _shapes())
    everyones = sum(_share(shape[0], shards, i) * math.prod(shape[1:]) for shape in _shapes() for i in range(shards))
    assert everyones == WEIGHTS
    assert len(blocks) == 80
    assert memory.weights == memory.gradients == 4 * mine
    steps = 4 * len(params)  # AdamW's step counters, one float32 each
    assert memory.optimizer == 8 * mine + steps
