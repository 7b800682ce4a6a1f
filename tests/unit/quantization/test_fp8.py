"""FP8 products, imitated on the CPU, under LoRA and in full fine-tuning: numbers, names, what is saved, what is refused."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components._peft.linear import LoRALinear
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.quantization.fp8 import Fp8Config, Fp8DynamicLinear, fp8_layers, quantize
from nemo_automodel.errors import ConfigError
from nemo_automodel.kernels.fp8 import FP8, fp8_dynamic_linear, fp8_linear, fp8_lora_linear, quantize_rows
from tests.builders import tiny_config


def build(fp8: Fp8Config | None, peft: bool = True, **over):
    torch.manual_seed(0)
    config = tiny_config("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    adapters = PeftConfig(match_all_linear=True, dim=4) if peft else None
    model = NeMoAutoModelForCausalLM.from_config(config, peft=adapters, fp8=fp8, **over)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.manual_seed(1)
            nn.init.normal_(module.lora_B.weight, std=0.02)
    return model


def test_rows_come_back_within_half_a_step():
    x = torch.randn(7, 64, dtype=torch.bfloat16) * torch.logspace(-6, 4, 7)[:, None].bfloat16()
    x[3] = 0
    values, scales = quantize_rows(x)
    assert values.dtype == FP8
    back = values.float() * scales
    coarse = x.float().abs().clamp(min=2**-6 * scales)  # below 2^-6 of a scale the steps no longer shrink
    assert ((back - x.float()).abs() <= coarse / 16 * 1.001).all()  # three bits after the leading one
    assert back[3].abs().max() == 0


def test_products_and_gradient_are_those_of_the_quantised_operands():
    x = torch.randn(2, 5, 32, dtype=torch.bfloat16, requires_grad=True)
    weight, dy = torch.randn(48, 32, dtype=torch.bfloat16), torch.randn(2, 5, 48, dtype=torch.bfloat16)
    copies = (*quantize_rows(weight), *quantize_rows(weight.t().contiguous()))
    y = fp8_linear(x, *copies)
    y.backward(dy)

    def exact(operand, values, scales):
        rows, row_scales = quantize_rows(operand.detach().reshape(10, -1))
        return ((rows.double() * row_scales) @ (values.double() * scales).t()).view(2, 5, -1)

    torch.testing.assert_close(y.double(), exact(x, *copies[:2]), rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), exact(dy, *copies[2:]), rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(y.float(), nn.functional.linear(x, weight).float(), rtol=0, atol=1.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [(2, 5), (0,)])
def test_adapters_products_and_gradients_beside_it(tokens, dtype):
    """Against autograd through the sum of the quantised product and the low-rank one, in float64 but for the operands."""
    x = torch.randn(*tokens, 32, dtype=torch.bfloat16, requires_grad=True)
    weight, dy = torch.randn(48, 32, dtype=torch.bfloat16), torch.randn(*tokens, 48, dtype=torch.bfloat16)
    lora_a, lora_b = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((4, 32), (48, 4)))
    copies = (*quantize_rows(weight), *quantize_rows(weight.t().contiguous()))
    y = fp8_lora_linear(x, *copies, lora_a, lora_b, 0.5)
    y.backward(dy)

    leaf, a, b = (t.detach().bfloat16().double().requires_grad_() for t in (x, lora_a, lora_b))
    low_rank = 0.5 * (leaf @ a.t()) @ b.t()
    low_rank.backward(dy.double())
    base = x.detach().clone().requires_grad_()
    alone = fp8_linear(base, *copies)
    alone.backward(dy)
    assert y.shape == alone.shape
    assert y.dtype == x.dtype
    for found, expected in (
        (y, alone.double() + low_rank),
        (x.grad, base.grad.double() + leaf.grad),
        (lora_a.grad, a.grad),
        (lora_b.grad, b.grad),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=2**-6, atol=0.1)
    assert lora_a.grad.dtype == lora_b.grad.dtype == dtype


def test_a_model_keeps_its_names_and_values_and_computes_nearly_the_same(caplog):
    with caplog.at_level(logging.INFO):
        plain, quantised = build(None), build(Fp8Config(min_features=16))
    assert any("14 linear layers compute in FP8 (14 from copies made once)" in r.getMessage() for r in caplog.records)
    state, expected = quantised.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert all(isinstance(layer, nn.Linear) and isinstance(layer, LoRALinear) for layer in fp8_layers(quantised))
    ids = torch.randint(0, 384, (2, 20))
    norms = []
    for model in (plain, quantised):
        model(input_ids=ids, labels=ids).loss.backward()
        norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.requires_grad]))
    assert not torch.equal(*norms)
    torch.testing.assert_close(norms[1], norms[0], rtol=0.1, atol=1e-4)


def test_copies_follow_the_weight():
    model = build(Fp8Config(min_features=16))
    layer = next(fp8_layers(model))
    before = layer.fp8_copies()[0].float().clone()
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})
    torch.testing.assert_close(
        layer.fp8_copies()[1] * layer.fp8_copies()[0].float(), layer.weight.float(), rtol=0.07, atol=1e-3
    )
    assert torch.equal(layer.fp8_copies()[0].float(), before)  # twice the scale, the same values
    with torch.no_grad():
        layer.weight.neg_()
    quantize(model)
    assert torch.equal(layer.fp8_copies()[0].float(), -before)
    model.to(torch.bfloat16)
    assert [copy.dtype for copy in layer.fp8_copies()] == [FP8, torch.float32] * 2


def test_small_and_odd_layers_stay(caplog):
    model = build(None)
    with caplog.at_level(logging.INFO):
        changed = Fp8Config(min_features=64)
        assert changed.apply(
            list(model.model.layers), torch.bfloat16, torch.device("cpu"), PeftConfig(match_all_linear=True)
        )
    assert len(list(fp8_layers(model))) == 10  # k and v have 32 outputs
    assert any("4 stay in bfloat16" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("fp8_grad_weight", [False, True])
@pytest.mark.parametrize("tokens", [32, 10, 0])
def test_trained_weights_have_the_products_of_quantised_operands(tokens, fp8_grad_weight):
    """Each of y, dX and dW against float64 products of both factors quantised along what is summed over."""
    x = torch.randn(tokens, 32).bfloat16().requires_grad_()
    weight, dy = torch.randn(48, 32).bfloat16().requires_grad_(), torch.randn(tokens, 48).bfloat16()
    y = fp8_dynamic_linear(x, weight, fp8_grad_weight)
    y.backward(dy)

    def exact(left, right, in_fp8=True):
        (a, s), (b, t) = (quantize_rows(m.detach().contiguous()) if in_fp8 else (m, 1) for m in (left, right))
        return (a.double() * s) @ (b.double() * t).t()

    torch.testing.assert_close(y.double(), exact(x, weight), rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), exact(dy, weight.t()), rtol=2**-8, atol=1e-6)
    in_fp8 = fp8_grad_weight and tokens > 0
    torch.testing.assert_close(weight.grad.double(), exact(dy.t(), x.t(), in_fp8), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("grad_weight", ["bfloat16", "float8"])
def test_full_fine_tuning_keeps_names_and_values_and_has_nearly_the_same_gradients(grad_weight, caplog):
    with caplog.at_level(logging.INFO):
        plain, quantised = (
            build(None, peft=False),
            build(Fp8Config(min_features=16, grad_weight=grad_weight), peft=False),
        )
    said = f"14 linear layers compute in FP8 (14 trained, their gradients in {grad_weight})"
    assert any(said in r.getMessage() for r in caplog.records)
    assert len(list(fp8_layers(quantised))) == 14
    state, expected = quantised.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    ids = torch.randint(0, 384, (2, 20))
    for model in (plain, quantised):
        model(input_ids=ids, labels=ids).loss.backward()
    for (name, p), q in zip(quantised.named_parameters(), plain.parameters(), strict=True):
        off = (p.grad.float() - q.grad.float()).norm() / q.grad.float().norm()
        assert 0 < off < 0.1, name


def losses_of(fp8: Fp8Config | None, peft: PeftConfig | None, lr: float, batches: int | None = None) -> torch.Tensor:
    """Of 300 steps on texts of a language of 64 words, four of which may follow each; the mean of every four steps.

    ``batches``: how many different ones there are, None for a new one at each step.
    """
    generator = torch.Generator().manual_seed(0)
    followers = torch.randint(3, 67, (67, 4), generator=generator)
    data = torch.randint(3, 67, (batches or 300, 8, 32), generator=generator)
    for i in range(1, data.shape[-1]):
        choice = torch.randint(0, 4, data.shape[:2], generator=generator)
        data[..., i] = followers[data[..., i - 1], choice]
    torch.manual_seed(0)
    config = tiny_config("llama", hidden_size=128, intermediate_size=256, head_dim=32)
    model = NeMoAutoModelForCausalLM.from_config(config, peft=peft, fp8=fp8)
    assert bool(list(fp8_layers(model))) is (fp8 is not None)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr)
    losses = []
    for step in range(300):
        ids = data[step % len(data)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses).view(-1, 4).mean(1)


@pytest.mark.full
def test_300_steps_under_lora_stay_within_one_percent_of_bf16():
    adapters = PeftConfig(match_all_linear=True, dim=8)
    bf16, quantised = (losses_of(fp8, adapters, 1e-3, batches=4) for fp8 in (None, Fp8Config(min_features=16)))
    assert bf16[-1] < 0.75 * bf16[0]
    assert ((quantised - bf16).abs() / bf16).max() < 0.01


@pytest.mark.full
@pytest.mark.parametrize("grad_weight", ["bfloat16", "float8"])
def test_300_steps_of_full_fine_tuning_stay_within_one_percent_of_bf16(grad_weight):
    fp8 = Fp8Config(min_features=16, grad_weight=grad_weight)
    bf16, quantised = (losses_of(options, None, 1e-3) for options in (None, fp8))
    print(bf16[[0, 37, 74]], ((quantised - bf16).abs() / bf16).max())
    assert bf16[-1] < 0.4 * bf16[0]  # ln 4 is what there is to learn
    assert ((quantised - bf16).abs() / bf16).max() < 0.01


def test_what_is_not_bfloat16_is_refused():
    with pytest.raises(ConfigError, match=r"write model\.dtype: bfloat16"):
        build(Fp8Config(), dtype="float32")


def test_another_dtype_for_gradients_is_refused():
    with pytest.raises(ConfigError, match="write bfloat16 or float8"):
        Fp8Config(grad_weight="float32")


def test_only_frozen_weights_of_adapted_models_have_copies():
    model = build(Fp8Config(min_features=16), peft=False)
    assert all(isinstance(layer, Fp8DynamicLinear) for layer in fp8_layers(model))
    assert not [name for name, _ in model.named_buffers() if "fp8" in name]


def test_that_no_layer_is_taken_is_said_with_the_reason(caplog):
    model = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.bfloat16)
    caplog.set_level(logging.INFO)
    assert not Fp8Config(min_features=4096).apply(list(model.model.layers), torch.bfloat16, torch.device("cpu"), None)
    assert "no layer computes in FP8" in caplog.text
    assert "fp8.min_features" in caplog.text
    assert "imitated" not in caplog.text
    caplog.clear()
    gpt2 = AutoModelForCausalLM.from_config(tiny_config("gpt2"), dtype=torch.bfloat16)
    assert not Fp8Config(min_features=1).apply(list(gpt2.transformer.h), torch.bfloat16, torch.device("cpu"), None)
    assert "no nn.Linear" in caplog.text


def test_off_is_off():
    assert not list(fp8_layers(build(Fp8Config(enabled=False))))
