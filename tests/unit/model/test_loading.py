"""Damaged and unsuitable checkpoints: each has its one-line error, and nothing is loaded in part."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.weight_files import check_weight_files
from nemo_automodel.errors import ModelError
from tests.builders import make_tokenizer, tiny_config

SINGLE = "model.safetensors"


class OnMeta:
    """A distributed manager that takes models without memory, and shards nothing."""

    device, dp_rank, dp_size, takes_meta = torch.device("cpu"), 0, 1, True

    def parallelize(self, model: Any, blocks: Any, compute_dtype: torch.dtype) -> Any:
        assert all(parameter.is_meta for parameter in model.parameters())
        return model


def write(path: Path, sharded: bool) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config("llama"))
    model.save_pretrained(path, max_shard_size="60KB" if sharded else "1GB")


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / SINGLE)
    change(tensors)
    save_file(tensors, path / SINGLE, metadata={"format": "pt"})


def edit_json(path: Path, name: str, change: Callable[[dict], None]) -> None:
    content = json.loads((path / name).read_text())
    change(content)
    (path / name).write_text(json.dumps(content))


def drop(path: Path) -> None:
    edit(path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def reshape(path: Path) -> None:
    edit(path, lambda t: t.update({"model.norm.weight": torch.ones(48)}))


def nan(path: Path) -> None:
    edit(path, lambda t: t["model.layers.0.mlp.up_proj.weight"].view(-1)[7:8].fill_(torch.nan))


def lfs(path: Path) -> None:
    (path / SINGLE).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5\n")


def cut(path: Path) -> None:
    content = (path / SINGLE).read_bytes()
    (path / SINGLE).write_bytes(content[:-1000])


def cut_in_header(path: Path) -> None:
    (path / SINGLE).write_bytes((path / SINGLE).read_bytes()[:100])


def empty(path: Path) -> None:
    (path / SINGLE).write_bytes(b"")


def pickled(path: Path) -> None:
    (path / SINGLE).unlink()
    (path / "pytorch_model.bin").write_bytes(b"never read")


def no_weights(path: Path) -> None:
    (path / SINGLE).unlink()


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def unknown_type(path: Path) -> None:
    edit_json(path, "config.json", lambda c: c.update(model_type="llama99", architectures=["Llama99ForCausalLM"]))


def remote_code(path: Path) -> None:
    auto_map = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    edit_json(path, "config.json", lambda c: c.update(model_type="x", auto_map=auto_map))
    (path / "configuration_x.py").write_text("raise SystemExit('remote code ran')")


def other_task(path: Path) -> None:
    (path / "config.json").write_text(json.dumps({"model_type": "vit"}))


def bad_json(path: Path) -> None:
    (path / "config.json").write_text("{")


DAMAGE: dict[Callable[[Path], None], list[str]] = {
    drop: ["model.layers.1.mlp.up_proj.weight", "not in the checkpoint"],
    reshape: ["model.norm.weight", "[48]", "[32]"],
    nan: ["model.layers.0.mlp.up_proj.weight", "NaN"],
    lfs: [SINGLE, "Git LFS pointer", "git lfs pull"],
    cut: [SINGLE, "cut off", "bytes of"],
    cut_in_header: [SINGLE, "cut off", "100 bytes"],
    empty: [SINGLE, "cut off", "0 bytes"],
    pickled: ["pickled weights only", "convert", "save_pretrained"],
    no_weights: ["no weights", SINGLE],
    no_config: ["no config.json"],
    unknown_type: ["llama99", "pip install -U transformers"],
    remote_code: ["model code of its own", "trust_remote_code: true", "revision"],
    other_task: ["vit", "AutoModelForCausalLM"],
    bad_json: ["config.json"],
}


@pytest.mark.parametrize("distributed", [None, OnMeta()], ids=["whole", "meta"])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_bad_checkpoint_is_named(damage: Callable[[Path], None], distributed: Any, tmp_path: Path) -> None:
    write(tmp_path, sharded=False)
    damage(tmp_path)
    with pytest.raises(ModelError) as error:
        NeMoAutoModelForCausalLM.from_pretrained(str(tmp_path), distributed=distributed)
    message = str(error.value)
    assert str(tmp_path) in message
    assert "\n" not in message
    for part in DAMAGE[damage]:
        assert part in message


def escape(path: Path) -> None:
    edit_json(path, f"{SINGLE}.index.json", lambda i: i["weight_map"].update({"model.norm.weight": f"../{SINGLE}"}))


def lose_shard(path: Path) -> None:
    (path / "model-00001-of-00003.safetensors").unlink()


def promise(path: Path) -> None:
    change = {"model.norm.bias": "model-00001-of-00003.safetensors"}
    edit_json(path, f"{SINGLE}.index.json", lambda i: i["weight_map"].update(change))


def no_map(path: Path) -> None:
    (path / f"{SINGLE}.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (escape, f"'../{SINGLE}'"),
        (lose_shard, "model-00001-of-00003.safetensors, which is not there"),
        (promise, "model.norm.bias"),
        (no_map, "weight_map"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_bad_index_is_named(damage: Callable[[Path], None], part: str, tmp_path: Path) -> None:
    write(tmp_path, sharded=True)
    assert len(check_weight_files(str(tmp_path))) == 3
    NeMoAutoModelForCausalLM.from_pretrained(str(tmp_path))
    damage(tmp_path)
    with pytest.raises(ModelError) as error:
        NeMoAutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert part in str(error.value)


@pytest.mark.parametrize("distributed", [None, OnMeta()], ids=["whole", "meta"])
def test_an_adapter_among_the_weights_is_not_dropped(distributed: Any, tmp_path: Path) -> None:
    write(tmp_path, sharded=False)
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    edit(tmp_path, lambda tensors: tensors.update({name: torch.ones(2, 2)}))
    with pytest.raises(ModelError, match=r"LoRA adapter.*lora_A.*name the base model"):
        NeMoAutoModelForCausalLM.from_pretrained(str(tmp_path), distributed=distributed)


@pytest.mark.parametrize("distributed", [None, OnMeta()], ids=["whole", "meta"])
def test_a_tensor_too_many_is_reported(distributed: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, sharded=False)
    edit(tmp_path, lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)}))
    NeMoAutoModelForCausalLM.from_pretrained(str(tmp_path), distributed=distributed)
    assert [r.message for r in caplog.records if "model.extra.weight" in r.message and "unused" in r.message]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"dtype": "int8"}, ["model.dtype=int8", "bfloat16"]),
        ({"master_dtype": "float8"}, ["model.master_dtype=float8", "float32"]),
        ({"hiden_size": 8}, ["hiden_size"]),
    ],
)
def test_a_bad_argument_is_named(arguments: dict, parts: list[str], tmp_path: Path) -> None:
    write(tmp_path, sharded=False)
    with pytest.raises(ModelError) as error:
        NeMoAutoModelForCausalLM.from_pretrained(str(tmp_path), **arguments)
    for part in parts:
        assert part in str(error.value)


def untie(path: Path) -> None:
    edit_json(path, "config.json", lambda config: config.update(tie_word_embeddings=True))


def quantise(path: Path) -> None:
    # Dequantised while loading: plain numbers, with no scales beside them
    quantised = {"quant_method": "fp8", "dequantize": True, "modules_to_not_convert": ["model", "lm_head"]}
    edit_json(path, "config.json", lambda config: config.update(quantization_config=quantised))


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (untie, {}, "other values for lm_head.weight than for what that is tied to"),
        (quantise, {}, "its checkpoint is quantised"),
        (lambda path: None, {"variant": "x"}, "of model.variant"),
    ],
    ids=["untied", "quantised", "option"],
)
def test_what_cannot_be_loaded_by_shards_says_why(change, options, reason, tmp_path, caplog) -> None:
    write(tmp_path, sharded=False)
    change(tmp_path)
    with contextlib.suppress(Exception):  # OnMeta refuses what has memory; transformers may refuse the option
        NeMoAutoModelForCausalLM.from_pretrained(str(tmp_path), distributed=OnMeta(), **options)
    found = [r.message for r in caplog.records if "every rank loads all of it" in r.message]
    assert len(found) == 1
    assert reason in found[0]


def test_more_blocks_than_the_config_says(tmp_path):
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ModelError, match=r"more blocks than config\.json says \(model\.layers\.1\..*9 tensors"):
        NeMoAutoModelForCausalLM.from_pretrained(str(tmp_path))


def test_fresh_weights_have_no_name_to_load_them_from(tmp_path):
    """An adapter trained on them would otherwise name the place of the config as its base."""
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path)
    assert NeMoAutoModelForCausalLM.from_config(str(tmp_path)).config.name_or_path == ""
    assert NeMoAutoModelForCausalLM.from_pretrained(str(tmp_path)).config.name_or_path == str(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [("{oops", r"{file} is not valid JSON .*line 1"), ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull")],
)
def test_damaged_files_beside_a_tokenizer_are_named(tmp_path, file, content, message):
    from nemo_automodel._transformers.tokenizer import load_tokenizer

    make_tokenizer("plain").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / file).write_text(content)
    with pytest.raises(ModelError, match=message.replace("{file}", file.replace(".", r"\."))):
        load_tokenizer(str(tmp_path))
