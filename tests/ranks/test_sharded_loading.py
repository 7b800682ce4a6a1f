"""Loading a model that is sharded before it has memory, and saving it.

Claims: (1) every parameter and buffer is bit for bit what plain transformers loads, on 1, 2 and 4 ranks, sharded in one
and in two dimensions, for plain, tied, renamed, fused and stacked weights, in bf16 and in fp32 masters of bf16 files;
(2) fresh weights are the same for every number of ranks; (3) adapters start the same then, too; (4) saved, its files hold, under the same names, what it was loaded from.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers import sharded
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.checkpoint.export import plan_export
from nemo_automodel.components.checkpoint.ranks import Ranks
from nemo_automodel.components.checkpoint.stream import write_weights
from nemo_automodel.components.distributed.env import DistEnv
from nemo_automodel.components.distributed.fsdp2 import FSDP2Manager
from tests.builders import tiny_config
from tests.ranks.launch import on_ranks

FAMILIES = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma3_text": {},
    "gpt2": {},
    "mixtral": {"num_local_experts": 5},  # uneven over two ranks
    "qwen3_moe": {},
    "gpt_neox": {"vocab_size": 383},
    "phi3": {},
}


class TwoDimensional:
    """FSDP x TP without what computes under TP: parameters are sharded along 0 or 1 on ``tp``, then by FSDP on ``dp``."""

    takes_meta = True

    def __init__(self, env: DistEnv) -> None:
        self.device, self.mesh = (
            env.device,
            init_device_mesh("cpu", (env.world_size // 2, 2), mesh_dim_names=("dp", "tp")),
        )
        self.dp_rank, self.dp_size = self.mesh["dp"].get_local_rank(), self.mesh["dp"].size()

    def parallelize(self, model, blocks, compute_dtype):
        made: dict[int, torch.nn.Parameter] = {}
        for number, module in enumerate(model.modules()):
            for name, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                dim = number % 2 if parameter.ndim > 1 else 0
                whole = parameter.shape[dim] % 2 == 0
                if id(parameter) not in made and whole:
                    spread = distribute_tensor(parameter.detach(), self.mesh["tp"], [Shard(dim)], src_data_rank=None)
                    made[id(parameter)] = torch.nn.Parameter(spread, requires_grad=parameter.requires_grad)
                module._parameters[name] = made.get(id(parameter), parameter)
        for block in blocks:
            fully_shard(block, mesh=self.mesh["dp"])
        fully_shard(model, mesh=self.mesh["dp"])
        return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same_as_plain(model, plain) -> None:
    ours = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    theirs = dict(plain.named_parameters(remove_duplicate=False)) | dict(plain.named_buffers(remove_duplicate=False))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        got = whole(ours[name])
        assert got.dtype == tensor.dtype, (name, got.dtype, tensor.dtype)
        assert torch.equal(got, tensor), name
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.weight is head.weight) == (
        plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    )


def load(folder: str, kind: str, *families: str) -> None:
    env = DistEnv()
    manager = TwoDimensional(env) if kind == "2d" else FSDP2Manager(env=env)
    refused: list = []
    sharded._whole = lambda *args: refused.append(args) or (None, None)
    for family in families:
        for dtype, master in (("bfloat16", "float32"), ("bfloat16", "bfloat16")):
            path = str(Path(folder) / family)
            model = NeMoAutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, master_dtype=master, distributed=manager
            )
            plain = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, master))
            same_as_plain(model, plain)
            assert not refused, refused
            assert model.training is plain.training is False
            assert model.generation_config.to_dict() == plain.generation_config.to_dict()
            assert [str(c) for c in model._weight_conversions] == [str(c) for c in plain._weight_conversions]
            save(model, path, Path(folder) / "saved", env)
    fresh(env, manager, Path(folder) / f"fresh-{kind}-{env.world_size}.txt")
    env.shutdown()


def save(model, source: str, out: Path, env: DistEnv) -> None:
    """Stream the model out; the files hold what the checkpoint it came from holds, and no rank wrote them all."""
    if env.is_main:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
    env.barrier()
    export = plan_export(model, torch.bfloat16, file_bytes=12_000)
    write_weights(out, export, Ranks(env))
    if env.is_main:
        assert len(export.files) > env.world_size, (source, len(export.files))
        expected, found = stored(Path(source)), stored(out)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name
    env.barrier()


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    for family, over in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **over), dtype=torch.bfloat16)
        model.save_pretrained(root / family, max_shard_size="40KB")
    return root


FRESH = ("llama", "gemma3_text", "gpt2", "qwen3_moe")


def fresh(env: DistEnv, manager, out: Path) -> None:
    """Note what fresh weights are, for a comparison between numbers of ranks."""
    torch.manual_seed(5 + env.rank)
    digests = []
    peft = PeftConfig(match_all_linear=True, use_dora=True)
    for family in FRESH:
        for adapter in (None, peft) if family == "llama" else (None,):
            config = tiny_config(family, **FAMILIES[family])
            model = NeMoAutoModelForCausalLM.from_config(config, distributed=manager, peft=adapter)
            sums = hashlib.sha256()
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                value = whole(tensor)
                assert torch.isfinite(value).all(), name
                sums.update(name.encode() + value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            digests.append(f"{family} {adapter is not None} {sums.hexdigest()}")
    if env.is_main:
        out.write_text("\n".join(digests))


def load_slowly(folder: str) -> None:
    """Rank 1 opens its weights later than a collective may take; the audit hook is what sees a file opened."""
    env = DistEnv(device="cpu", timeout_minutes=0.3)
    slowed = []

    def slow(event: str, args: tuple) -> None:
        if event == "open" and str(args[0]).endswith(".safetensors") and not slowed:
            slowed.append(args[0])
            time.sleep(25)

    if env.rank == 1:
        sys.addaudithook(slow)
    NeMoAutoModelForCausalLM.from_pretrained(folder, distributed=FSDP2Manager(env=env))
    assert env.rank != 1 or slowed


@pytest.mark.full
def test_a_rank_whose_weights_come_late_trips_no_time_out(tmp_path):
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path)
    on_ranks("tests.ranks.test_sharded_loading:load_slowly", 2, tmp_path)


@pytest.mark.parametrize(("kind", "nproc"), [pytest.param("1d", 1, marks=pytest.mark.full), ("1d", 2), ("2d", 4)])
def test_every_tensor_is_what_transformers_loads_and_fresh_ones_are_the_same(folder, kind, nproc):
    on_ranks("tests.ranks.test_sharded_loading:load", nproc, folder, kind, *FAMILIES)
    found = [path.read_text().splitlines() for path in sorted(folder.glob("fresh-*.txt"))]
    assert len(set(found[0])) == len(FRESH) + 1
    for each in found:
        assert each == found[0]
