"""What the sweep over all architectures found wrong here once, each by itself."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from nemo_automodel._transformers.tiny_twin import tiny_twin
from nemo_automodel._transformers.twin_start import start_config
from nemo_automodel.components._peft.linear import lora_layers
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.attention.function import attention


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
