"""Four-bit base weights under LoRA on the CPU: against plain transformers + PEFT over the same weights, unpacked."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components._peft.linear import LoRALinear
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.distributed.fsdp2 import FSDP2Manager
from nemo_automodel.components.quantization.nf4 import Nf4Linear, QuantizationConfig, nf4_layers
from nemo_automodel.errors import ConfigError, ModelError
from tests.builders import tiny_config

functional = pytest.importorskip("bitsandbytes").functional

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(3, 384, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint in fp32 on the disk."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = tiny_config("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def quantised(base, distributed=None, dtype="float32", peft=None, **options):
    peft = peft or PeftConfig(match_all_linear=True, dim=4, alpha=8)
    options = {"min_features": 16, **options}
    model = NeMoAutoModelForCausalLM.from_pretrained(
        str(base), dtype=dtype, peft=peft, distributed=distributed, quantization=QuantizationConfig(**options)
    )
    draw_adapters(model)
    return model


@torch.no_grad()
def draw_adapters(model):
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0].replace(".default", "")):
        if "lora_A" in name or "lora_B" in name:
            generator = torch.Generator().manual_seed(sum(map(ord, name.split("layers.")[1].replace(".default", ""))))
            _local(parameter).copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def round_trip(weight, nested=True, kind="nf4"):
    """What bitsandbytes itself makes of ``weight``, there and back."""
    return functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested))


def reference(base, dtype=torch.float32, **options):
    """Plain transformers and PEFT, the blocks' linear weights replaced by what four bits leave of them."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=dtype)
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = round_trip(module.weight.data)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=TARGETS, **options)
    peft = get_peft_model(model, config)
    draw_adapters(peft)
    return peft


def gradients(model):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    named = [(name.replace("base_model.model.", "").replace(".default", ""), p) for name, p in model.named_parameters()]
    return loss.item(), {name: _local(p.grad).clone() for name, p in named if p.requires_grad}


def _local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize(("dtype", "sharded"), [("float32", False), ("bfloat16", True)])
def test_loss_and_gradients_are_those_of_peft_over_the_unpacked_weights(base, dtype, sharded, single_rank):
    model = quantised(base, FSDP2Manager() if sharded else None, dtype)
    expected_loss, expected = gradients(reference(base, getattr(torch, dtype)))
    loss, found = gradients(model)
    exact = dtype == "float32"
    assert loss == pytest.approx(expected_loss, rel=1e-6 if exact else 2e-3)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        error = (grad - expected[name]).norm() / expected[name].norm()
        assert error < (1e-5 if exact else 0.03), name


def test_every_packed_byte_is_the_one_that_transformers_packs(base):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )
    model = quantised(base)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Nf4Linear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        weight, own = theirs.get_submodule(name).weight, layer.packed()
        state = weight.quant_state
        assert torch.equal(own.values, weight.data)
        assert torch.equal(own.scales, state.absmax)
        assert torch.equal(own.scale_scales, state.state2.absmax)
        assert torch.equal(own.scale_offset, state.offset)
        assert torch.equal(own.scale_code, state.state2.code)


@pytest.fixture
def single_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_loads_by_slices_what_it_loads_whole(base, single_rank, caplog):
    with caplog.at_level(logging.INFO):
        whole, by_slices = quantised(base), quantised(base, FSDP2Manager())
    assert sum("14 of 14 frozen linear layers in four bits (nf4)" in r.getMessage() for r in caplog.records) == 2
    for first, second in zip(nf4_layers(whole), nf4_layers(by_slices), strict=True):
        assert torch.equal(first.weight, second.weight)
        assert torch.equal(first.packed().values, second.packed().values)
    assert not any(p.numel() > 384 * 64 or p.dtype == torch.uint8 for p in by_slices.parameters())


def test_fresh_weights_are_those_of_the_unquantised_model(single_rank):
    config = tiny_config("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    peft = PeftConfig(match_all_linear=True, dim=4)
    models = []
    for quantization in (None, QuantizationConfig(min_features=16)):
        torch.manual_seed(0)
        models.append(
            NeMoAutoModelForCausalLM.from_config(
                config, peft=peft, distributed=FSDP2Manager(), quantization=quantization, dtype="float32"
            )
        )
    plain, packed = (dict(model.named_modules()) for model in models)
    layers = [name for name, module in packed.items() if isinstance(module, Nf4Linear)]
    assert len(layers) == 14
    for name in layers:
        assert torch.equal(packed[name].weight, round_trip(plain[name].weight.data)), name
    assert torch.equal(models[0].lm_head.weight, models[1].lm_head.weight)


@pytest.mark.parametrize(("kind", "nested", "bits"), [("nf4", True, 4.127), ("nf4", False, 4.5), ("fp4", True, 4.127)])
def test_memory_and_values_of_each_kind(kind, nested, bits):
    torch.manual_seed(0)
    linear = nn.Linear(1024, 512, bias=True).requires_grad_(False)
    weight, x = linear.weight.detach().clone(), torch.randn(3, 1024)
    block = nn.ModuleList([linear, nn.Linear(1, 1)])
    config = QuantizationConfig(bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested)
    assert config.apply(block, [block], torch.device("cpu"))
    assert torch.equal(linear.weight, round_trip(weight, nested, kind))
    torch.testing.assert_close(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
    kept = sum(b.nbytes for name, b in linear.named_buffers() if name not in ("nf4_scale_code", "nf4_scale_offset"))
    assert 8 * kept / weight.numel() == pytest.approx(bits, abs=0.001)
    assert (linear.weight - weight).norm() / weight.norm() < 0.12


def test_dora_starts_at_the_packed_weights_norm_and_follows_peft(base):
    model = quantised(base, peft=PeftConfig(match_all_linear=True, dim=4, alpha=8, use_dora=True))
    peft = reference(base, use_dora=True)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    for name, layer in layers.items():
        own = layer.weight.norm(dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector.data.float(), own)
        peft.base_model.model.get_submodule(name).lora_magnitude_vector["default"].weight.data.copy_(own)
    (loss, found), (expected_loss, expected) = gradients(model), gradients(peft)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, grad in found.items():
        other = expected[name + ".weight" if name.endswith("magnitude_vector") else name]
        assert (grad - other).norm() / other.norm() < 1e-4, name


def saved_by(step):
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return kept


def test_nothing_whole_is_kept_for_backward(base):
    """The largest tensor that autograd holds on to is an activation, compiled or not."""
    torch._dynamo.reset()  # what other tests compiled counts against a limit
    for compiled in (False, True):
        model = quantised(base)
        if compiled:
            for block in model.model.layers:
                block.compile(backend="aot_eager", fullgraph=True)
        whole = {tuple(layer.nf4_shape) for layer in nf4_layers(model)}
        whole |= {shape[::-1] for shape in whole}
        kept = saved_by(lambda model=model: model(input_ids=IDS, labels=IDS).loss.backward())
        live = {p.untyped_storage().data_ptr() for p in model.parameters()}
        fresh = {tuple(t.shape) for t in kept if t.untyped_storage().data_ptr() not in live and t.is_floating_point()}
        assert not fresh & whole
        grads = gradients(model)[1]
        reference_grads = gradients(reference(base))[1]
        assert all((grads[n] - g).norm() / g.norm() < 1e-5 for n, g in reference_grads.items())


def test_a_cast_leaves_the_scales_alone(base):
    model = quantised(base)
    layer = next(nf4_layers(model))
    before = layer.weight.clone()
    model.to(torch.bfloat16)
    assert layer.packed().scale_scales.dtype == torch.float32
    assert torch.equal(layer.weight, before)


def test_what_cannot_be_is_refused(base, caplog):
    with pytest.raises(ConfigError, match="add a peft section"):
        NeMoAutoModelForCausalLM.from_pretrained(str(base), quantization=QuantizationConfig())
    with pytest.raises(ConfigError, match="write nf4 or fp4"):
        QuantizationConfig(bnb_4bit_quant_type="int4")
    peft = PeftConfig(match_all_linear=True, dim=4)
    model = quantised(base, peft=peft)
    with pytest.raises(ModelError, match="automodel merge"):
        peft.merged_state_dict(model)
    assert not list(nf4_layers(quantised(base, load_in_4bit=False)))
    assert not list(nf4_layers(quantised(base, min_features=256)))
    assert "no layer is in four bits" in caplog.text
    conv = [nn.ModuleList([Conv1D(8, 8)])]
    with pytest.raises(ConfigError, match=r"hold no nn\.Linear"):
        QuantizationConfig().apply(nn.ModuleList(conv), conv, torch.device("cpu"))
