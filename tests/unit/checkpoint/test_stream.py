"""Weights written group by group: the files that transformers itself would write, whatever the model and the dtype."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.checkpoint.export import Merge, plan_export
from nemo_automodel.components.checkpoint.hf import gather_weights, write_model
from nemo_automodel.components.checkpoint.ranks import Ranks
from nemo_automodel.components.checkpoint.stream import write_weights
from nemo_automodel.errors import CheckpointError
from tests.builders import tiny_config

FAMILIES = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma3_text": {},
    "gpt2": {},
    "qwen3_moe": {},
    "mixtral": {},
    "phi3": {},
}


def stored(directory):
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def identical(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "fresh"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_files_are_those_of_transformers(family, loaded, tmp_path):
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(tiny_config(family, **FAMILIES[family]), dtype=torch.float32)
    plain.save_pretrained(tmp_path / "plain")
    plain.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    if loaded:
        model = NeMoAutoModelForCausalLM.from_pretrained(str(tmp_path / "plain"), dtype="float32")
    else:
        model = NeMoAutoModelForCausalLM.from_config(tiny_config(family, **FAMILIES[family]), dtype="float32")
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict())
    for dtype, name in ((torch.float32, "plain"), (torch.bfloat16, "half")):
        for limit in (10**9, 40_000):
            out = tmp_path / f"{name}-{limit}"
            out.mkdir()
            write_weights(out, plan_export(model, dtype, file_bytes=limit), Ranks(None))
            identical(stored(out), stored(tmp_path / name))
            index = out / "model.safetensors.index.json"
            assert index.exists() == (limit == 40_000)
            for file in out.glob("*.safetensors"):
                with safe_open(file, framework="pt") as opened:
                    assert opened.metadata() == {"format": "pt"}
            plain.config.save_pretrained(out)
            again = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
            identical(
                again.state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=dtype).state_dict()
            )
    plain.save_pretrained(tmp_path / "split", max_shard_size="40KB")
    ours, theirs = (json.loads((d / "model.safetensors.index.json").read_text()) for d in (out, tmp_path / "split"))
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_merged_adapter_is_what_merging_gives(family, dora, tmp_path):
    config = tiny_config(family, tie_word_embeddings=True)
    layers = ["c_attn", "mlp.c_proj"] if family == "gpt2" else ["q_proj", "down_proj"]
    peft = PeftConfig(target_modules=layers, dim=4, use_dora=dora)
    model = NeMoAutoModelForCausalLM.from_config(config, dtype="float32", peft=peft)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1 if "magnitude" not in name else 1.0)
    merges = {name: Merge(*merge) for name, merge in peft.merges(model).items()}
    for dtype in (torch.float32, torch.bfloat16):
        streamed, gathered = tmp_path / f"streamed-{dtype}", tmp_path / f"gathered-{dtype}"
        streamed.mkdir()
        plan = plan_export(model, dtype, merges)
        write_weights(streamed, plan, Ranks(None))
        write_model(gathered, model, gather_weights(model, peft.merged_state_dict(model), dtype, True), None)
        assert plan.tied is True
        identical(stored(streamed), stored(gathered))


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.checkpoint.export import plan_export
from nemo_automodel.components.checkpoint.ranks import Ranks
from nemo_automodel.components.checkpoint.stream import write_weights
from nemo_automodel.errors import CheckpointError
from tests.builders import tiny_config
model = NeMoAutoModelForCausalLM.from_config(tiny_config("llama"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    write_weights(Path(sys.argv[1]), plan_export(model, None), Ranks(None))
except CheckpointError as error:
    print(error)
"""


def test_a_file_that_cannot_grow_is_an_error(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "Writing the weights failed" in done.stdout
    assert "File too large" in done.stdout


def test_a_directory_that_is_not_there_is_an_error(tmp_path):
    model = NeMoAutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(CheckpointError, match="No such file"):
        write_weights(tmp_path / "absent", plan_export(model, None), Ranks(None))
