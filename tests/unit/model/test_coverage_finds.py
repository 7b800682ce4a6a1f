"""What the sweep over all architectures found wrong here once, each by itself."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.coverage_cells import attempt
from nemo_automodel._transformers.forward import forward_loss
from nemo_automodel._transformers.head import HeadTap, infer_transform, probe_logits
from nemo_automodel._transformers.tiny_twin import tiny_twin
from nemo_automodel._transformers.twin_batch import text_batch
from nemo_automodel._transformers.twin_start import start_config
from nemo_automodel.components._peft.linear import lora_layers
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.attention.function import attention
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.errors import ModelError


def twin(model_type: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_twin(start_config(model_type, causal=True)))


def test_only_keys_that_an_indexer_chose_are_attended() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 6, 8, generator=generator) for _ in range(3))
    causal = torch.ones(6, 6).tril().bool()[None, None].expand(2, 1, -1, -1)
    indices = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(12)]).reshape(2, 6, 3)
    indices[..., 0] = torch.arange(6)  # its own, so that no row is empty
    chosen = torch.zeros(2, 6, 6).scatter(-1, indices, 1.0).bool()[:, None]
    scores = (query @ key.transpose(-1, -2) / 8**0.5).masked_fill(~(causal & chosen), float("-inf"))
    wanted = (scores.softmax(-1) @ value).transpose(1, 2)
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~causal, torch.finfo(torch.float32).min)
    for mask in (causal, additive, None):
        out, _ = attention(nn.Module(), query, key, value, mask, indices=indices)
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)
    dense, _ = attention(nn.Module(), query, key, value, causal)
    assert (dense - wanted).abs().max() > 0.1


def test_layers_beside_fused_experts_are_named_by_their_weights() -> None:
    model = twin("deepseek_v3")
    config = PeftConfig(match_all_linear=True, dim=4, dropout=0.1)
    config.apply(model)
    written = config.adapter_config(model, "base")
    assert not {"gate_proj", "up_proj", "down_proj"} & set(written["target_modules"])
    shared = [n for n in written["target_parameters"] if "shared_experts" in n]
    assert len(shared) == 3 * 2  # three layers of two routed blocks
    assert written["lora_dropout"] == 0.0  # PEFT refuses any on a parameter


def test_dense_models_are_named_by_module_as_ever() -> None:
    model = twin("llama")
    config = PeftConfig(match_all_linear=True, dim=4, dropout=0.1)
    config.apply(model)
    written = config.adapter_config(model, "base")
    assert "target_parameters" not in written
    assert {"gate_proj", "up_proj", "down_proj"} <= set(written["target_modules"])
    assert written["lora_dropout"] == 0.1


def test_a_layer_whose_weight_goes_to_a_kernel_is_left_out() -> None:
    model = twin("mamba")
    PeftConfig(match_all_linear=True, dim=4).apply(model)
    adapted = {name.rsplit(".", 1)[-1] for name, _ in lora_layers(model)}
    assert "in_proj" in adapted
    assert "out_proj" not in adapted


class WritesIntoItsLogits(nn.Module):
    """A head whose model forbids a token by writing into the logits, as image tokens are forbidden."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 8, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.head(hidden)
        logits[..., 3] = torch.finfo(logits.dtype).min
        return logits


def test_a_model_that_writes_into_its_logits_is_not_fused() -> None:
    model, probe = WritesIntoItsLogits(), probe_logits(8, torch.device("cpu"))
    with HeadTap(model.head, probe):
        seen = model(torch.zeros(2, 5, 4))
    assert seen[0, 0, 3] < -1e38
    assert torch.equal(probe, probe_logits(8, torch.device("cpu")))
    assert infer_transform(probe, seen) is None


def test_reversible_layers_train_with_a_frozen_input() -> None:
    model = NeMoAutoModelForCausalLM.from_config(tiny_twin(start_config("reformer", causal=True)), dtype="float32")
    PeftConfig(match_all_linear=True, dim=4).apply(model)
    batch = text_batch()
    labels = batch.pop("labels")
    model.train()
    loss, _ = forward_loss(model, {**batch, "labels": labels, "num_label_tokens": labels.numel()}, MaskedCrossEntropy())
    loss.backward()
    assert all(layer.lora_B.weight.grad is not None for _, layer in lora_layers(model))


def test_a_model_that_does_not_run_on_a_packed_row_says_so() -> None:
    with pytest.raises(ModelError, match=r"does not run on a row of packed documents .*packed_sequence_size: 0"):
        NeMoAutoModelForCausalLM.from_config(tiny_twin(start_config("blt", causal=True)), dtype="float32", packed=True)


def test_a_reason_names_no_temporary_directory() -> None:
    with tempfile.TemporaryDirectory() as directory:
        cell = attempt(lambda: (Path(directory) / "base/config.json").read_text())
    assert cell.startswith("FileNotFoundError")
    assert "'<directory>/base/config.json'" in cell
