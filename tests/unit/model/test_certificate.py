"""The start-up certificate: what is planted is found, named and switched off; what is right is left alone.

Faults are planted by putting a broken function in the place of ours, once the model is loaded: load-time trials have
passed then, and whatever is wrong is the certificate's to find. The oracle of "goes on right" is plain transformers.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers import experts
from nemo_automodel._transformers.certificate import REAL, TWIN, Certificate
from nemo_automodel._transformers.certificate_verdict import Verdict
from nemo_automodel._transformers.forward import forward_loss
from nemo_automodel._transformers.tiny_twin import one_block_each, tiny_twin
from nemo_automodel._transformers.twin_start import start_config
from nemo_automodel.components._peft import linear
from nemo_automodel.components._peft.experts import LoRAExperts
from nemo_automodel.components._peft.linear import lora_layers
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.attention import function
from nemo_automodel.components.datasets import collate
from nemo_automodel.components.loss import linear_ce
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from nemo_automodel.errors import ConfigError, ModelError
from nemo_automodel.kernels import lora as lora_kernels
from tests.builders import tiny_config
from tests.unit.model.models import documents, packed_inputs, padded_inputs, shifted, with_labels

WIDE = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "intermediate_size": 128,
}
ARCHITECTURES = (
    "llama", "qwen3", "gemma2", "gemma3_text", "qwen3_moe", "gpt_oss", "gpt2", "falcon_h1", "mamba", "deepseek_v3", "deepseek_v32", "inkling_text",
)  # fmt: skip
EXPERT_LORA = PeftConfig(match_all_linear=True, target_parameters=["experts.gate_up_proj", "experts.down_proj"], dim=4)
right_attention = function.attention
right_packed = function.packed_attention
right_ce = linear_ce.linear_cross_entropy
right_collate = collate.collate_packed


def build(model_type: str = "llama", **over: Any) -> Any:
    options = {key: over.pop(key) for key in ("packed", "peft", "dtype") if key in over}
    config = tiny_config(model_type, **over)
    torch.manual_seed(0)
    return NeMoAutoModelForCausalLM.from_config(config, **{"dtype": "float32", **options})


def prove(model: Any, tmp_path: Path, mode: Any = "warn", **options: Any) -> Verdict:
    verdict = Certificate(mode, str(tmp_path / "cache")).prove(model, FusedLinearCrossEntropy(), **options)
    function.register()
    assert verdict is not None
    return verdict


def loss_of(model: Any) -> float:
    """The mean loss of two padded rows, by the run's own forward."""
    inputs = padded_inputs(documents(21, 30))
    _, labels = shifted(inputs["input_ids"], inputs["attention_mask"])
    batch = with_labels(inputs, labels)
    with torch.no_grad():
        ce_sum, aux = forward_loss(model, batch, FusedLinearCrossEntropy())
    return float(ce_sum / batch["num_label_tokens"] + aux)


def plain_loss_of(model: Any) -> float:
    """The same by plain transformers with the same weights."""
    config = copy.deepcopy(model.config)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    plain.load_state_dict(model.state_dict())
    inputs = padded_inputs(documents(21, 30))
    labels, _ = shifted(inputs["input_ids"], inputs["attention_mask"])
    with torch.no_grad():
        return float(plain(**inputs, labels=labels).loss)


# --- nothing is wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["float32", pytest.param("bfloat16 LoRA", marks=pytest.mark.full)])
def test_what_is_right_is_left_alone(model_type: str, kind: str, tmp_path: Path) -> None:
    config = tiny_twin(start_config(model_type, causal=True))
    options: dict[str, Any] = {"dtype": kind.split()[0]}
    if "LoRA" in kind:
        options["peft"] = PeftConfig(match_all_linear=True, dim=4)
    packs = model_type not in ("falcon_h1", "mamba", "deepseek_v32", "inkling_text")
    model = NeMoAutoModelForCausalLM.from_config(config, packed=packs, **options)
    verdict = prove(model, tmp_path, "strict", packed=packs)
    assert verdict.off == {}
    assert verdict.unproved == []
    assert set(verdict.agree) >= {"fused loss"} | ({"packing", "attention"} if packs else set())
    assert verdict.worst[TWIN] < 1e-5
    assert verdict.worst[f"{REAL}, {kind.split()[0]}"] < (1e-5 if kind == "float32" else 2.0)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"target_modules": ["lm_head", "q_proj"]}])
def test_dora_and_an_adapted_head_are_compared_with_merged_weights(options: dict[str, Any], tmp_path: Path) -> None:
    peft = PeftConfig(match_all_linear="target_modules" not in options, dim=4, **options)
    verdict = prove(build(peft=peft), tmp_path, "strict")
    assert verdict.worst[TWIN] < 1e-5
    assert "LoRA" in verdict.agree
    assert ("fused loss" in verdict.agree) == ("use_dora" in options), "an adapted head is not fused"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_of_experts_are_compared_with_merged_weights(dtype: str, tmp_path: Path) -> None:
    verdict = prove(build("qwen3_moe", dtype=dtype, moe_intermediate_size=24, peft=EXPERT_LORA), tmp_path, "strict")
    assert set(verdict.agree) >= {"experts", "LoRA"}
    assert verdict.worst[TWIN] < 1e-5


def test_a_wrong_experts_function_is_switched_off(tmp_path: Path, monkeypatch: Any) -> None:
    model = build("qwen3_moe", moe_intermediate_size=24)
    right, wanted = experts._project, plain_loss_of(model)

    def too_large(module: Any, name: str, x: Tensor, *args: Any) -> Tensor:
        return right(module, name, x * (1.1 if name == "down_proj" else 1.0), *args)

    monkeypatch.setattr(experts, "_project", too_large)
    verdict = prove(model, tmp_path)
    assert set(verdict.off) == {"experts"}
    assert loss_of(model) == pytest.approx(wanted, rel=1e-5)


def test_a_wrong_adapter_of_experts_ends_the_run(tmp_path: Path, monkeypatch: Any) -> None:
    model = build("qwen3_moe", moe_intermediate_size=24, peft=EXPERT_LORA)
    right = LoRAExperts.lora_adapter

    def of_another(self: LoRAExperts, name: str) -> Any:
        adapter = copy.copy(right(self, name))
        adapter._modules = adapter._modules | {"lora_B": Rolled(adapter.lora_B)}
        return adapter

    class Rolled(torch.nn.Module):
        def __init__(self, factor: Any) -> None:
            super().__init__()
            self.weight = factor.weight.roll(1, 0)

    monkeypatch.setattr(LoRAExperts, "lora_adapter", of_another)
    with pytest.raises(ModelError, match="LoRA"):
        prove(model, tmp_path)


@pytest.mark.parametrize(
    ("model_type", "layer"),
    [("jamba", "dt_proj"), ("gemma3n_text", "correction_coefs"), ("longcat_flash", "classifier")],
)
def test_no_adapter_is_put_on_a_weight_that_is_used_without_its_layer(
    model_type: str, layer: str, tmp_path: Path
) -> None:
    """They were, and their certificates said so."""
    config = tiny_twin(start_config(model_type, causal=True))
    model = NeMoAutoModelForCausalLM.from_config(config, dtype="float32", peft=PeftConfig(match_all_linear=True, dim=4))
    assert not any(layer in name for name, _ in lora_layers(model))
    assert prove(model, tmp_path).off == {}


def test_a_run_goes_on_with_its_own_random_numbers(tmp_path: Path) -> None:
    model = build()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    prove(model, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


def test_one_block_each_keeps_widths_and_one_layer_of_each_kind() -> None:
    config = start_config("gemma2", causal=True)
    cut = one_block_each(config, vocab_size=512, window=16)
    assert (cut.hidden_size, cut.head_dim, cut.intermediate_size) == (
        config.hidden_size, config.head_dim, config.intermediate_size
    )  # fmt: skip
    assert cut.layer_types == ["sliding_attention", "full_attention"]
    assert (cut.num_hidden_layers, cut.vocab_size, cut.sliding_window) == (2, 512, 16)
    experts = one_block_each(start_config("deepseek_v3", causal=True), vocab_size=512, window=16)
    assert (experts.n_routed_experts, experts.num_experts_per_tok, experts.n_group, experts.topk_group) == (2, 2, 1, 1)


# --- planted faults --------------------------------------------------------------------------------------------------


def wrong_scale(
    module: Any, query: Tensor, key: Tensor, *args: Any, scaling: float | None = None, **kwargs: Any
) -> Any:
    scaling = (query.shape[-1] ** -0.5 if scaling is None else scaling) * 1.1
    return right_attention(module, query, key, *args, scaling=scaling, **kwargs)


def forgets_a_channel(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Wrong only where heads are as wide as those of real models: the last channel is left out of the scores."""
    if query.shape[-1] >= 64:
        query = torch.cat([query[..., :-1], torch.zeros_like(query[..., -1:])], -1)
    return right_attention(module, query, *args, **kwargs)


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor) -> Tensor:
        return key.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 0.97


def wrong_key_gradient(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
    return right_attention(module, query, WrongBackward.apply(key), *args, **kwargs)


@pytest.mark.parametrize(
    ("planted", "stage", "dtype"),
    [
        (wrong_scale, TWIN, "float32"),
        (wrong_key_gradient, TWIN, "float32"),
        (forgets_a_channel, REAL, "float32"),
        (forgets_a_channel, REAL, "bfloat16"),
    ],
)
def test_a_wrong_attention_is_switched_off(
    planted: Any, stage: str, dtype: str, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    model = build(dtype=dtype, **WIDE)
    monkeypatch.setattr(function, "attention", planted)
    with caplog.at_level(logging.WARNING):
        verdict = prove(model, tmp_path)
    assert list(verdict.off) == ["attention"]
    assert stage in verdict.off["attention"]
    assert verdict.agree == ["fused loss"]
    (warning,) = [r.getMessage() for r in caplog.records if "certificate" in r.getMessage()]
    assert "attention is off, transformers' own attention (sdpa) is used" in warning
    assert " by 0.0" in warning
    if dtype == "float32":
        assert loss_of(model) == pytest.approx(plain_loss_of(model), rel=1e-6)


def test_a_soft_capped_model_goes_on_with_the_attention_that_soft_caps(tmp_path: Path, monkeypatch: Any) -> None:
    model = build("gemma2", attn_logit_softcapping=1.0)
    monkeypatch.setattr(function, "attention", wrong_scale)
    verdict = prove(model, tmp_path)
    assert list(verdict.off) == ["attention"]
    assert loss_of(model) == pytest.approx(plain_loss_of(model), rel=1e-6)


def leaks_one_token(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The second document sees the last token of the first."""
    moved = cu_seqlens.clone()
    moved[1] -= 1
    longest, *rest = args
    return right_packed(query, key, value, moved, longest + 1, *rest, **kwargs)


def positions_go_on(*args: Any, **kwargs: Any) -> Any:
    """Rotary angles as if the packed row were one document."""
    batch = right_collate(*args, **kwargs)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None] * 2
    return batch


@pytest.mark.parametrize(
    ("where", "name", "planted"),
    [(function, "packed_attention", leaks_one_token), (collate, "collate_packed", positions_go_on)],
)
def test_packing_that_leaks_or_turns_by_wrong_angles_ends_the_run(
    where: Any, name: str, planted: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    model = build(packed=True)
    monkeypatch.setattr(where, name, planted)
    with pytest.raises(ModelError, match=r"certificate: packing does not compute .*packed_sequence_size: 0"):
        prove(model, tmp_path, packed=True)
    assert prove(model, tmp_path, packed=False).off == {}, "padded rows are right"


def test_a_leak_alone_is_seen_where_the_loss_hardly_moves(tmp_path: Path, monkeypatch: Any) -> None:
    """A document beside another one moves it by a hundredth of what a leak of one token does."""
    model = build(packed=True)

    def faint(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = right_packed(query, key, value, cu_seqlens, *args, **kwargs)
        return out + 0.01 * (leaks_one_token(query, key, value, cu_seqlens, *args, **kwargs) - out)

    monkeypatch.setattr(function, "packed_attention", faint)
    with pytest.raises(ModelError, match="certificate: packing"):
        prove(model, tmp_path, packed=True)


def test_rotary_frequencies_that_were_loaded_wrong_are_put_right(tmp_path: Path, caplog: Any) -> None:
    model = build()
    right = plain_loss_of(model)
    model.model.rotary_emb.inv_freq.mul_(1.02)
    assert abs(loss_of(model) - right) > 1e-7
    with caplog.at_level(logging.WARNING):
        prove(model, tmp_path)
    assert "model.rotary_emb.inv_freq was loaded with other values" in caplog.text
    assert loss_of(model) == pytest.approx(right, rel=1e-6)
    model.model.rotary_emb.inv_freq.mul_(1.02)
    with pytest.raises(ModelError, match=r"buffer model\.rotary_emb\.inv_freq"):
        prove(model, tmp_path, "strict")


def test_a_wrong_fused_loss_becomes_whole_logits(tmp_path: Path, monkeypatch: Any) -> None:
    model = build("gemma2", final_logit_softcapping=0.5)

    def no_softcap(hidden: Any, weight: Any, bias: Any, labels: Any, indices: Any, options: Any) -> Tensor:
        return right_ce(hidden, weight, bias, labels, indices, dataclasses.replace(options, logit_softcap=None))

    monkeypatch.setattr(linear_ce, "linear_cross_entropy", no_softcap)
    wrong = loss_of(model)
    verdict = prove(model, tmp_path)
    assert list(verdict.off) == ["fused loss"]
    assert verdict.agree == ["attention"]
    assert loss_of(model) == pytest.approx(plain_loss_of(model), rel=1e-6)
    assert abs(wrong - loss_of(model)) > 1e-4


def torch_kernel(factor: float) -> Any:
    """What the Triton kernel computes, in torch, the gradient of B times ``factor``."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, b: Tensor) -> Tensor:
            return b.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * factor

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, a.to(x.dtype)), Scaled.apply(b).to(x.dtype))

    return kernel


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_gradient_of_the_lora_kernel_is_seen(dtype: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(lora_kernels, "_DEVICES", ("cpu",))
    peft = PeftConfig(match_all_linear=True, dim=4, use_triton=True)
    model = build(peft=peft, dtype=dtype)
    monkeypatch.setattr(linear, "lora_linear", torch_kernel(1.0))
    assert "LoRA kernel" in prove(model, tmp_path / "right").agree
    monkeypatch.setattr(linear, "lora_linear", torch_kernel(0.8))
    verdict = prove(model, tmp_path / "wrong")
    assert list(verdict.off) == ["LoRA kernel"]
    assert {"attention", "fused loss", "LoRA"} <= set(verdict.agree)
    assert not any(layer.lora_use_triton for _, layer in lora_layers(model))


def test_two_faults_are_both_named(tmp_path: Path, monkeypatch: Any) -> None:
    model = build()
    monkeypatch.setattr(function, "attention", wrong_scale)
    monkeypatch.setattr(linear_ce, "linear_cross_entropy", lambda *args: right_ce(*args) * 1.01)
    assert sorted(prove(model, tmp_path).off) == ["attention", "fused loss"]
    assert loss_of(model) == pytest.approx(plain_loss_of(model), rel=1e-6)


def test_strict_ends_the_run_and_names_the_number(tmp_path: Path, monkeypatch: Any) -> None:
    model = build()
    monkeypatch.setattr(function, "attention", wrong_scale)
    with pytest.raises(ModelError, match=r"certificate: attention: .* by 0.*certificate.mode: warn"):
        prove(model, tmp_path, "strict")


def test_packed_rows_stay_apart_without_our_attention(tmp_path: Path, monkeypatch: Any) -> None:
    model = build(packed=True)
    monkeypatch.setattr(function, "attention", wrong_scale)
    verdict = prove(model, tmp_path, packed=True)
    assert list(verdict.off) == ["attention"]
    ids = documents(9, 14)
    packed = packed_inputs(ids)
    labels = torch.cat([shifted(x)[1] for x in ids], 1)
    with torch.no_grad():
        together = forward_loss(model, with_labels(packed, labels), FusedLinearCrossEntropy())[0]
        alone = [forward_loss(model, with_labels({"input_ids": x}, shifted(x)[1]), FusedLinearCrossEntropy())[0] for x in ids]  # fmt: skip
    assert float(together) == pytest.approx(float(sum(alone)), rel=1e-5)


# --- kept results, modes ---------------------------------------------------------------------------------------------


def test_a_result_is_kept_by_what_it_depends_on_and_a_damaged_one_is_made_anew(tmp_path: Path, caplog: Any) -> None:
    model = build()
    with caplog.at_level(logging.INFO, "nemo_automodel"):
        first = prove(model, tmp_path)
        again = prove(model, tmp_path)
    assert first == again
    said = [r.getMessage() for r in caplog.records if "agree with plain transformers" in r.getMessage()]
    assert [("cached" in line) for line in said] == [False, True]
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text(kept.read_text()[:40])
    with caplog.at_level(logging.INFO, "nemo_automodel"):
        prove(model, tmp_path)
    assert "cached" not in caplog.records[-1].getMessage()
    assert json.loads(kept.read_text())["agree"] == ["attention", "fused loss"]
    prove(build(rms_norm_eps=1e-4), tmp_path)
    prove(build(peft=PeftConfig(match_all_linear=True)), tmp_path)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_kept_fault_is_acted_upon_again(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(function, "attention", wrong_scale)
    for _ in range(2):
        model = build()
        assert list(prove(model, tmp_path).off) == ["attention"]
        assert model.config._attn_implementation == "sdpa"


def test_what_cannot_be_tried_is_said_and_is_an_error_where_strict(tmp_path: Path, caplog: Any) -> None:
    model = torch.nn.Linear(4, 4)
    with caplog.at_level(logging.WARNING):
        assert prove(model, tmp_path).unproved == ["it is no model of transformers"]
    assert "certificate: not proved: it is no model of transformers" in caplog.text
    with pytest.raises(ModelError, match="not proved"):
        prove(model, tmp_path, "strict")


def test_off_proves_nothing_and_a_wrong_mode_is_refused(tmp_path: Path) -> None:
    assert Certificate("off", str(tmp_path)).prove(build(), FusedLinearCrossEntropy()) is None
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"certificate\.mode=maybe"):
        Certificate("maybe")  # type: ignore[arg-type]
