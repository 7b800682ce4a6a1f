"""Our LoRA and DoRA against PEFT's, with the same A and B: outputs, gradients, training, merging and files."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components._peft.merge import merge_adapter, read_adapter_config, read_adapter_weights
from tests.builders import tiny_config

TARGETS = {"gpt2": ["c_attn", "c_fc", "c_proj"]}


def base_model(model_type="llama", dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type)).to(dtype)
    with torch.no_grad():  # GPT-2's biases start at zero, which would hide a bias that is lost
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    return model.eval()  # GPT-2 has dropout of its own


def randomize_adapters(model):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.05)
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=g))


def ours_and_pefts(model_type="llama", **options):
    """The same base and the same adapter values, in ours and in PEFT's."""
    targets = TARGETS.get(model_type, ["q_proj", "v_proj", "down_proj"])
    config = PeftConfig(target_modules=targets, dim=4, alpha=8, **options)
    ours = base_model(model_type)
    config.apply(ours)
    randomize_adapters(ours)
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", use_dora=config.use_dora,
        lora_dropout=config.dropout, fan_in_fan_out=model_type == "gpt2",
    )  # fmt: skip
    theirs = peft.get_peft_model(base_model(model_type), lora)
    loaded = peft.set_peft_model_state_dict(theirs, config.adapter_state_dict(ours))
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if "lora" in key]
    return config, ours, theirs


def batch():
    return torch.randint(3, 384, (2, 17), generator=torch.Generator().manual_seed(2))


def theirs_under_our_names(model, what):
    """PEFT's adapter parameters (or their gradients) by our parameter names."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ours = name.removeprefix("base_model.model.").replace(".default", "")
            found[ours.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")] = what(parameter)
    return found


CASES = [("llama", False), ("llama", True), ("qwen3", False), ("gemma3_text", False), ("gpt2", False), ("gpt2", True)]


@pytest.mark.parametrize(("model_type", "use_dora"), CASES)
def test_logits_gradients_and_five_steps_equal_pefts(model_type, use_dora):
    _, ours, theirs = ours_and_pefts(model_type, use_dora=use_dora)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in (ours, theirs)]
    ids = batch()
    for step in range(5):
        outputs = [m(input_ids=ids, labels=ids) for m in (ours, theirs)]
        torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-6, atol=1e-6)
        for output in outputs:
            output.loss.backward()
        gradients = theirs_under_our_names(theirs, lambda p: p.grad)
        mine = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
        assert mine.keys() == gradients.keys()
        for name, gradient in mine.items():
            assert (gradient - gradients[name]).norm() <= 1e-4 * gradients[name].norm() + 1e-8, (step, name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, value in theirs_under_our_names(theirs, lambda p: p.detach()).items():
        torch.testing.assert_close(ours.get_parameter(name).detach(), value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("model_type", "use_dora"), CASES)
def test_merged_weights_equal_pefts(model_type, use_dora):
    config, ours, theirs = ours_and_pefts(model_type, use_dora=use_dora)
    live = ours(input_ids=batch()).logits
    before = copy.deepcopy(ours.state_dict())
    merged = config.merged_state_dict(ours)
    expected = theirs.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys() == base_model(model_type).state_dict().keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items()), (
        "merging changed the model"
    )
    reloaded = base_model(model_type)
    reloaded.load_state_dict(merged)
    torch.testing.assert_close(reloaded(input_ids=batch()).logits, live, rtol=1e-5, atol=1e-5)


def test_merging_rounds_once_to_the_bases_dtype():
    model = base_model(dtype=torch.bfloat16)
    config = PeftConfig(target_modules="q_proj", dim=4, alpha=8)
    name = config.apply(model)[0]
    randomize_adapters(model)
    layer = model.get_submodule(name)
    exact = layer.weight.double() + 2.0 * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
    merged = config.merged_state_dict(model)[f"{name}.weight"]
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged.double(), exact, rtol=2**-8, atol=1e-6)
    assert not torch.equal(merged, layer.weight)


def save(config, model, directory: Path):
    directory.mkdir(parents=True, exist_ok=True)
    save_file(config.adapter_state_dict(model), directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config.adapter_config(model, "somewhere/base")))


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"match_all_linear": True}),
        ("llama", {"match_all_linear": True, "use_dora": True}),
        ("llama", {"target_modules": ["*.layers.0.*.q_proj", "model.layers.1.mlp.down_proj"]}),
        ("llama", {"match_all_linear": True, "exclude_modules": ["layers.1.mlp.up_proj"], "lora_A_init": "gaussian"}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("gpt2", {"match_all_linear": True}),
        ("qwen3_moe", {"match_all_linear": True}),
    ],
)
def test_saved_adapter_is_peft_s_and_ours(model_type, options, tmp_path):
    """``PeftModel.from_pretrained`` on the directory gives the live logits, adapts the same layers and no others."""
    config = PeftConfig(dim=4, alpha=12, **options)
    ours = base_model(model_type)
    adapted = config.apply(ours)
    randomize_adapters(ours)
    save(config, ours, tmp_path)

    live = ours.eval()(input_ids=batch()).logits
    assert not torch.allclose(live, base_model(model_type).eval()(input_ids=batch()).logits, atol=1e-3)
    theirs = peft.PeftModel.from_pretrained(base_model(model_type), tmp_path).eval()
    assert sorted(theirs.base_model.targeted_module_names) == sorted(adapted)
    torch.testing.assert_close(theirs(input_ids=batch()).logits, live, rtol=1e-5, atol=1e-5)

    again = base_model(model_type)
    merge_adapter(again, read_adapter_config(tmp_path), read_adapter_weights(tmp_path))
    torch.testing.assert_close(again.eval()(input_ids=batch()).logits, live, rtol=1e-5, atol=1e-5)
    for name, merged in config.merged_state_dict(ours).items():  # one arithmetic, live and from the files
        assert torch.equal(again.state_dict()[name], merged), name


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_before_the_adapter_is_pefts(use_dora):
    """The same random draws give the same training logits, with PEFT's place for dropout."""
    _, ours, theirs = ours_and_pefts(dropout=0.3, use_dora=use_dora)
    logits = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(7)
        logits.append(model(input_ids=batch()).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.eval()(input_ids=batch()).logits, theirs.eval()(input_ids=batch()).logits,
                               rtol=1e-5, atol=1e-5)  # fmt: skip
    assert not torch.allclose(logits[0], ours(input_ids=batch()).logits, atol=1e-4)


def test_dropout_after_the_adapter_drops_its_output():
    layer = torch.nn.Sequential(torch.nn.Linear(6, 5))
    PeftConfig(match_all_linear=True, dim=2, alpha=4, dropout=0.5, dropout_position="post").apply(layer)
    randomize_adapters(layer)
    x = torch.randn(4, 6)
    adapter = 2.0 * x @ layer[0].lora_A.weight.t() @ layer[0].lora_B.weight.t()
    base = torch.nn.functional.linear(x, layer[0].weight, layer[0].bias)
    torch.manual_seed(3)
    found = layer.train()(x)
    torch.manual_seed(3)
    torch.testing.assert_close(found, base + torch.nn.functional.dropout(adapter, 0.5), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.eval()(x), base + adapter, rtol=1e-5, atol=1e-6)
