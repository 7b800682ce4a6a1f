"""What a certificate is tried on: the run's own weights and first micro-batch, and images.

Each planted fault shows only there: for large values that fresh weights never give, for one token, at one boundary of
documents, in a tower's attention, behind a projector.
"""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from nemo_automodel import NeMoAutoModelForCausalLM, NeMoAutoModelForImageTextToText
from nemo_automodel._transformers import certificate_trial
from nemo_automodel._transformers import certificate_weights as weights
from nemo_automodel._transformers.blocks import find_blocks
from nemo_automodel._transformers.certificate import REAL, TWIN, Certificate
from nemo_automodel._transformers.certificate_rows import Documents, compact_vocabulary, first_documents
from nemo_automodel._transformers.certificate_stages import IMAGES
from nemo_automodel._transformers.certificate_verdict import Verdict
from nemo_automodel._transformers.forward import forward_loss
from nemo_automodel._transformers.tiny_twin import kept_blocks, moved_tokens, one_block_each, tiny_twin
from nemo_automodel._transformers.trial import build
from nemo_automodel._transformers.twin_start import start_config
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.attention import function
from nemo_automodel.components.datasets.loader import DataLoader
from nemo_automodel.components.datasets.packing import PackedSequence
from nemo_automodel.components.distributed import activation_checkpointing
from nemo_automodel.components.distributed.activation_checkpointing import checkpoint_activations
from nemo_automodel.components.loss import linear_ce
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from nemo_automodel.components.quantization.nf4 import QuantizationConfig
from nemo_automodel.errors import ModelError
from nemo_automodel.types import IGNORE_INDEX
from tests.builders import tiny_config
from tests.unit.model.models import documents, padded_inputs, shifted, with_labels

right_attention = function.attention
right_packed = function.packed_attention
right_ce = linear_ce.linear_cross_entropy
WIDE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 128}  # fmt: skip


class Rows:
    """Rows of 40 tokens and more, the first ten of which are a prompt; one token is in all of them."""

    token = 101

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(8, 60, (41 + index,), generator=torch.Generator().manual_seed(index))
        ids[14] = self.token
        labels = ids[1:].clone()
        labels[:10] = IGNORE_INDEX
        return {"input_ids": ids[:-1].tolist(), "labels": labels.tolist()}


def loader_of(rows: Any = None, packed: int = 0, **options: Any) -> DataLoader:
    return DataLoader(rows or Rows(), packing=PackedSequence(packed), local_batch_size=1 if packed else 4,
                      global_batch_size=1 if packed else 4, **options)  # fmt: skip


def saved(path: Path, change: Any = None, **over: Any) -> Path:
    """A checkpoint of a tiny Llama, its weights of the size that trained ones have."""
    config = tiny_config("llama", **{**WIDE, **over})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.7 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1))  # fmt: skip
        if change is not None:
            change(model)
    model.save_pretrained(path)
    return path


def outliers(model: Any) -> None:
    """A few channels that are a hundred times larger, as trained models have them."""
    model.model.embed_tokens.weight[:, 3] *= 100
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[7] *= 30
        layer.input_layernorm.weight[5] *= 20


def large_queries(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= 20


def load(path: Path, dtype: str = "float32", **options: Any) -> Any:
    return NeMoAutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)


def prove(model: Any, tmp_path: Path, mode: Any = "warn", **options: Any) -> Verdict:
    verdict = Certificate(mode, str(tmp_path / "cache")).prove(model, FusedLinearCrossEntropy(), **options)
    function.register()
    assert verdict is not None
    return verdict


# --- the run's own rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [0, 128])
def test_the_first_micro_batch_is_cut_around_what_is_trained(packed: int) -> None:
    loader = loader_of(packed=packed)
    found = first_documents(loader, tiny_config("llama"), 16)
    assert found is not None
    first = next(iter(loader.steps(0)))[0]
    row, labels = first["input_ids"][0], first["labels"][0]
    assert len(found.ids) == (2 if packed else 3)
    assert torch.equal(found.ids[0], row[2:18]), "eight tokens before the first that is trained, eight after it"
    assert torch.equal(found.targets[0][:-1], labels[2:17])
    assert found.targets[0][-1] == IGNORE_INDEX


def test_looking_at_it_leaves_order_and_random_numbers_as_they_are(tmp_path: Path) -> None:
    class Drawing(Rows):
        def __getitem__(self, index: int) -> dict[str, Any]:
            random.random(), np.random.rand(), torch.rand(1)
            return super().__getitem__(index)

    loader = loader_of(Drawing(), num_workers=2)
    model = load(saved(tmp_path / "model"))
    state = random.getstate(), np.random.get_state()[1].copy(), torch.random.get_rng_state()
    assert "documents of the first micro-batch (16, 16, 16 tokens)" in str(prove(model, tmp_path, loader=loader).tried)
    assert random.getstate() == state[0]
    assert np.array_equal(np.random.get_state()[1], state[1])
    assert torch.equal(torch.random.get_rng_state(), state[2])
    assert loader.num_workers == 2
    again = [batch["sample_ids"] for step in loader_of().steps(0) for batch in step]
    loader.num_workers = 0
    assert [batch["sample_ids"] for step in loader.steps(0) for batch in step] == again


def test_a_vocabulary_holds_the_documents_tokens_and_keeps_special_ones_apart() -> None:
    config = start_config("llama", causal=True)
    config.eos_token_id, config.pad_token_id = 30007, 5
    special = moved_tokens(config, 512)
    ids = torch.tensor([30007, 5, 12000, 31999, 600, 20])
    numbers, rows = compact_vocabulary(Documents((ids,), (ids,)), special, 512, 32000)
    new = Documents((ids,), (ids,)).mapped(numbers).ids[0]
    assert torch.equal(rows[new], ids)
    assert new.max() < 512
    assert [new[0].item(), new[1].item(), new[5].item()] == [special[30007], 5, 20]
    assert len(rows.unique()) == 512


def test_what_stands_for_an_image_is_no_text() -> None:
    class Seen(Rows):
        def __getitem__(self, index: int) -> dict[str, Any]:
            row = super().__getitem__(index)
            row["input_ids"][12] = row["labels"][11] = 99
            return row

    config = tiny_config("llama")
    config.image_token_id = 99
    found = first_documents(loader_of(Seen()), config, 16)
    assert found is not None
    assert not any((ids == 99).any() for ids in found.ids)


def test_rows_that_cannot_be_read_are_said_to_be_made_up(tmp_path: Path) -> None:
    class Broken(Rows):
        def __getitem__(self, index: int) -> dict[str, Any]:
            raise OSError("no disk")

    verdict = prove(load(saved(tmp_path / "model")), tmp_path, "strict", loader=loader_of(Broken()))
    assert "made up documents, because the first micro-batch cannot be read (OSError: no disk)" in str(verdict.tried)


# --- the model's own weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "layers"), [("gemma3_text", [0, 5]), ("gpt_oss", [0, 1])])
def test_blocks_get_the_values_of_the_first_layer_of_each_kind(model_type: str, layers: list[int]) -> None:
    config = start_config(model_type, causal=True)
    live_config = tiny_twin(config, layers=6)
    live_config.num_hidden_layers = 6
    live_config.layer_types = [config.layer_types[i] for i in range(6)]
    torch.manual_seed(0)
    live = NeMoAutoModelForCausalLM.from_config(live_config, dtype="bfloat16", peft=PeftConfig(match_all_linear=True))
    cut = one_block_each(live_config, vocab_size=96, window=4)
    small = build(AutoModelForCausalLM._model_mapping[type(cut)], cut)
    rows = torch.arange(96) + 8
    wanted = weights.wanted_of(small, live, kept_blocks(live_config), rows)
    values = weights.gather(live, wanted, keep=True)
    weights.load(small, values)
    assert weights.left_fresh(small, values) == []
    assert torch.equal(small.get_input_embeddings().weight, live.get_input_embeddings().weight[rows].float())
    assert torch.equal(small.model.norm.weight, live.model.norm.weight.float())
    for mine, there in enumerate(layers):
        ours, theirs = small.model.layers[mine], live.model.layers[there]
        assert torch.equal(ours.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight.float())
        if model_type == "gpt_oss":
            experts = ours.mlp.experts.gate_up_proj
            assert torch.equal(experts, theirs.mlp.experts.gate_up_proj[: len(experts)].float())


def test_of_a_base_in_four_bits_the_unpacked_values_are_taken(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    peft, bits = PeftConfig(match_all_linear=True, dim=4), QuantizationConfig(min_features=64)
    model = load(saved(tmp_path / "model"), peft=peft, quantization=bits)
    name = "model.layers.0.mlp.up_proj.weight"
    assert name not in dict(model.named_parameters())
    values = weights.gather(model, {name: weights.Wanted(name)}, keep=True)
    assert torch.equal(values[name], model.get_submodule(name.removesuffix(".weight")).weight)
    tried = prove(model, tmp_path, "strict", loader=loader_of()).tried[f"{REAL}, float32"]
    assert tried.endswith("; the model's own weights")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("peft", [None, PeftConfig(match_all_linear=True, dim=4)], ids=["SFT", "LoRA"])
def test_outliers_are_no_fault(dtype: str, peft: Any, tmp_path: Path) -> None:
    model = load(saved(tmp_path / "model", outliers), dtype, packed=True, peft=peft)
    verdict = prove(model, tmp_path, "strict", packed=True, loader=loader_of(packed=128))
    assert (verdict.off, verdict.unproved) == ({}, [])
    assert "the model's own weights" in verdict.tried[f"{REAL}, {dtype}"]


def test_another_checkpoint_or_other_rows_prove_themselves_anew(tmp_path: Path) -> None:
    path = saved(tmp_path / "model")
    for _ in range(2):
        prove(load(path), tmp_path, loader=loader_of())
    assert len(list((tmp_path / "cache").iterdir())) == 1
    prove(load(path), tmp_path, loader=loader_of(seed=1))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    prove(load(saved(path, outliers)), tmp_path, loader=loader_of())
    assert len(list((tmp_path / "cache").iterdir())) == 3


# --- faults that show only there -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_attention_that_is_wrong_for_large_values_only(dtype: str, tmp_path: Path, monkeypatch: Any) -> None:
    def saturates(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return right_attention(module, query.clamp(-12, 12), *args, **kwargs)

    ordinary, large = load(saved(tmp_path / "1"), dtype), load(saved(tmp_path / "2", large_queries), dtype)
    monkeypatch.setattr(function, "attention", saturates)
    assert prove(ordinary, tmp_path, loader=loader_of()).off == {}
    verdict = prove(large, tmp_path, loader=loader_of())
    assert list(verdict.off) == ["attention"]
    assert REAL in verdict.off["attention"]


def test_a_loss_that_is_wrong_for_one_token_only(tmp_path: Path, monkeypatch: Any) -> None:
    def wrong(hidden: Any, weight: Any, bias: Any, labels: Any, indices: Any, options: Any) -> Tensor:
        labels = torch.where(labels == Rows.token, 9, labels)
        return right_ce(hidden, weight, bias, labels, indices, options)

    model = load(saved(tmp_path / "model"))
    monkeypatch.setattr(linear_ce, "linear_cross_entropy", wrong)
    assert prove(model, tmp_path).off == {}, "made up rows do not have it"
    assert list(prove(model, tmp_path, loader=loader_of()).off) == ["fused loss"]


def test_packing_that_leaks_at_one_boundary_only(tmp_path: Path, monkeypatch: Any) -> None:
    def leaks(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        moved = cu_seqlens.clone()
        moved[1] -= int(moved[1] == 16)
        longest, *rest = args
        return right_packed(query, key, value, moved, longest + 1, *rest, **kwargs)

    model = load(saved(tmp_path / "model"), packed=True)
    monkeypatch.setattr(function, "packed_attention", leaks)
    assert prove(model, tmp_path, packed=True).off == {}
    with pytest.raises(ModelError, match="certificate: packing"):
        prove(model, tmp_path, packed=True, loader=loader_of(packed=128))


def test_activation_checkpointing_that_is_wrong_is_switched_off(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    model = load(saved(tmp_path / "model"))
    checkpoint_activations(find_blocks(model), "full")
    right = activation_checkpointing.checkpoint
    monkeypatch.setattr(activation_checkpointing, "checkpoint", lambda *args, **kwargs: right(*args, **kwargs) * 1.1)
    inputs = padded_inputs(documents(21, 30))
    batch = with_labels(inputs, shifted(inputs["input_ids"], inputs["attention_mask"])[1])
    before = forward_loss(model, batch, FusedLinearCrossEntropy())[0].item()
    manager = SimpleNamespace(device="cpu", activation_checkpointing="full")
    assert list(prove(model, tmp_path, distributed=manager).off) == ["activation checkpointing"]
    assert "activation checkpointing is off, every activation kept, in more memory is used" in caplog.text
    after = forward_loss(model, batch, FusedLinearCrossEntropy())[0].item()
    plain = forward_loss(load(tmp_path / "model"), batch, FusedLinearCrossEntropy())[0].item()
    assert after == pytest.approx(plain, rel=1e-6)
    assert abs(before - plain) > 1e-3
    manager.activation_checkpointing = "auto"
    with pytest.raises(ModelError, match=r"distributed\.activation_checkpointing: off"):
        prove(load(tmp_path / "model"), tmp_path, distributed=manager)


# --- images ----------------------------------------------------------------------------------------------------------


def seeing(model_type: str, dtype: str = "float32", **options: Any) -> Any:
    config = tiny_twin(start_config(model_type, causal=False))
    return NeMoAutoModelForImageTextToText.from_config(config, dtype=dtype, **options)


FULL = pytest.mark.full
SEEING = ("gemma3", "qwen3_vl", "mllama", "paligemma", pytest.param("florence2", marks=FULL), pytest.param("git", marks=FULL),
          pytest.param("internvl", marks=FULL), pytest.param("kimi_k25", marks=FULL))  # fmt: skip


@pytest.mark.parametrize("model_type", SEEING)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=FULL)])
def test_a_model_that_sees_is_tried_with_images(model_type: str, dtype: str, tmp_path: Path) -> None:
    peft = PeftConfig(match_all_linear=True, dim=4) if dtype == "bfloat16" else None
    verdict = prove(seeing(model_type, dtype, peft=peft), tmp_path, "strict")
    assert verdict.worst[TWIN + IMAGES] < 1e-4
    assert verdict.worst[f"{REAL}, {dtype}{IMAGES}"] < (1e-4 if peft is None else 2)


def test_a_tower_that_does_not_look_ahead(tmp_path: Path, monkeypatch: Any) -> None:
    def always_causal(module: Any, *args: Any, is_causal: bool | None = None, **kwargs: Any) -> Any:
        return right_attention(module, *args, is_causal=True, **kwargs)

    model = seeing("gemma3")
    monkeypatch.setattr(function, "attention", always_causal)
    verdict = prove(model, tmp_path)
    assert list(verdict.off) == ["attention"]
    assert IMAGES in verdict.off["attention"]


def test_a_projector_whose_output_is_scaled(tmp_path: Path, monkeypatch: Any) -> None:
    """Only where the model runs as ours; text is right."""
    right = certificate_trial.adopt

    def scaled(model: Any) -> Any:
        projector: nn.Module = model.model.multi_modal_projector
        projector.register_forward_hook(lambda module, args, output: output * 1.05)
        return right(model)

    model = seeing("gemma3")
    monkeypatch.setattr(certificate_trial, "adopt", scaled)
    verdict = prove(model, tmp_path)
    assert [reason.split(": ")[0] for reason in verdict.unproved] == [TWIN + IMAGES, f"{REAL}, float32{IMAGES}"]
    with pytest.raises(ModelError, match="images: plain transformers and its own forward by us do not agree"):
        prove(seeing("gemma3"), tmp_path / "strict", "strict")
