"""LoRA on stacked experts against PEFT's ``target_parameters``: matching, outputs, gradients, files and merging."""

from __future__ import annotations

import copy
import json
import logging

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from nemo_automodel._transformers.experts import choose_experts
from nemo_automodel.components._peft.experts import lora_experts
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components._peft.merge import merge_adapter, read_adapter_config, read_adapter_weights
from nemo_automodel.components.distributed.activation_checkpointing import checkpoint_activations
from nemo_automodel.errors import ModelError
from tests.builders import tiny_config

SIZES = {  # no weight is square, so that nothing transposed passes
    "qwen3_moe": {"moe_intermediate_size": 24},
    "mixtral": {"intermediate_size": 40},
    "gpt_oss": {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"intermediate_size": 24, "intermediate_size_mlp": 40, "num_local_experts": 4},
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def base_model(model_type, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **SIZES[model_type])).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:  # some start at zero, or too small to be seen
                parameter.normal_(std=0.1)
    return model.eval()


def adapted(model_type, ours=True, dtype=torch.float32, **options):
    """A model with an adapter that is not zero; ``ours``: its experts run by our function."""
    options = {"target_modules": ["q_proj"], "target_parameters": EXPERTS} | options
    config = PeftConfig(dim=4, alpha=8, **options)
    model = base_model(model_type, dtype)
    config.apply(model)
    if ours:
        choose_experts(model, torch.device("cpu"), dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return config, model


def save(config, model, directory):
    save_file(config.adapter_state_dict(model), directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config.adapter_config(model, "somewhere/base")))


def batch():
    return torch.randint(3, 384, (2, 17), generator=torch.Generator().manual_seed(2))


def gradients_in_file(config, model):
    """The gradients of ``model``'s adapters, by PEFT's names and in PEFT's layout."""
    holder = copy.deepcopy(model)
    for copied, parameter in zip(holder.parameters(), model.parameters(), strict=True):
        if parameter.requires_grad:
            copied.data = parameter.grad
    return config.adapter_state_dict(holder)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("model_type", SIZES)
def test_loss_gradients_file_and_merge_equal_pefts(model_type, ours, tmp_path):
    config, model = adapted(model_type, ours)
    assert len(list(lora_experts(model))) == 4
    by_factors = all(w.module.lora_by_factors is not None for w in lora_experts(model))
    assert by_factors == (ours and model_type != "llama4_text"), "Llama 4 runs its experts by code of its own"
    save(config, model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base_model(model_type), tmp_path, is_trainable=True).eval()

    ids = batch()
    found, wanted = (m(input_ids=ids, labels=ids) for m in (model, theirs))
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found.logits, base_model(model_type)(input_ids=ids).logits, atol=1e-3)
    found.loss.backward()
    wanted.loss.backward()
    mine = gradients_in_file(config, model)
    gradients = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert mine.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, name
        assert (mine[name] - gradient).norm() <= 1e-5 * gradient.norm(), name

    again = base_model(model_type)
    merge_adapter(again, read_adapter_config(tmp_path), read_adapter_weights(tmp_path))
    torch.testing.assert_close(again(input_ids=ids).logits, found.logits, rtol=1e-5, atol=1e-5)
    expected = theirs.merge_and_unload().state_dict()
    merged = config.merged_state_dict(model)
    assert merged.keys() == expected.keys()
    for name, value in again.state_dict().items():
        assert torch.equal(merged[name], value), f"{name}: one arithmetic, live and from the files"
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    state = model.state_dict()
    for name, (tensors, combine) in config.merges(model).items():
        assert torch.equal(combine(state[name], **{k: t.detach() for k, t in tensors.items()}), merged[name]), name


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": None, "target_parameters": ["experts.down_proj"]},
        {"target_modules": ["q_proj", "gate_up_proj"], "target_parameters": None},
        {"target_modules": None, "target_parameters": ["model.layers.1.mlp.experts.gate_up_proj"]},
        {"match_all_linear": True, "target_modules": None, "exclude_modules": ["layers.0.mlp.experts.down_proj"]},
    ],
)
def test_any_choice_of_weights_is_reloaded_by_peft(targets, tmp_path):
    config, model = adapted("qwen3_moe", **targets)
    save(config, model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base_model("qwen3_moe"), tmp_path).eval()
    live = model(input_ids=batch()).logits
    torch.testing.assert_close(theirs(input_ids=batch()).logits, live, rtol=1e-5, atol=1e-5)
    again = base_model("qwen3_moe")
    merge_adapter(again, read_adapter_config(tmp_path), read_adapter_weights(tmp_path))
    torch.testing.assert_close(again(input_ids=batch()).logits, live, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_peft_made_is_merged(tmp_path):
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=EXPERTS,
        rank_pattern={r".*\.gate_up_proj": 6}, alpha_pattern={r".*\.gate_up_proj": 3},
    )  # fmt: skip
    theirs = peft.get_peft_model(base_model("mixtral"), lora).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    theirs.save_pretrained(tmp_path)
    merged = base_model("mixtral")
    merge_adapter(merged, read_adapter_config(tmp_path), read_adapter_weights(tmp_path))
    wanted = theirs(input_ids=batch()).logits
    torch.testing.assert_close(merged(input_ids=batch()).logits, wanted, rtol=1e-5, atol=1e-5)


def test_training_starts_from_the_base_and_draws_as_peft_does():
    model = base_model("qwen3_moe")
    PeftConfig(target_parameters=EXPERTS, dim=4).apply(model)
    assert torch.equal(model(input_ids=batch()).logits, base_model("qwen3_moe")(input_ids=batch()).logits)
    for weight in lora_experts(model):
        a, b = (factor.detach() for factor in weight.factors)
        bound = a.shape[-1] ** -0.5  # kaiming uniform over the inputs
        assert not b.any()
        assert a.abs().max() <= bound
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not torch.equal(a[0], a[1])


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_nothing(mode):
    gradients = []
    for checkpointing in ("off", mode):
        _, model = adapted("qwen3_moe")
        checkpoint_activations(list(model.model.layers), checkpointing)
        model.train()(input_ids=batch(), labels=batch(), use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("lora_dtype", ["float32", "bfloat16"])
def test_a_bf16_base_computes_with_adapters_of_either_dtype(lora_dtype):
    config, model = adapted("qwen3_moe", dtype=torch.bfloat16, lora_dtype=lora_dtype)
    exact = base_model("qwen3_moe", torch.bfloat16).float()
    state = {name: value.float() for name, value in config.merged_state_dict(model.float()).items()}
    exact.load_state_dict(state)
    _, model = adapted("qwen3_moe", dtype=torch.bfloat16, lora_dtype=lora_dtype)
    loss = model(input_ids=batch(), labels=batch()).loss
    loss.backward()
    torch.testing.assert_close(loss.float(), exact(input_ids=batch(), labels=batch()).loss, rtol=0.01, atol=0.01)
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {getattr(torch, lora_dtype)}


# --- what is meant by a name ----------------------------------------------------------------------------------------


def test_a_name_that_linear_layers_have_means_those_and_says_so(caplog):
    torch.manual_seed(0)
    config = tiny_config("qwen2_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                         shared_expert_intermediate_size=40)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with caplog.at_level(logging.WARNING):
        names = PeftConfig(target_modules=["down_proj"]).apply(model)
    assert names == [f"model.layers.{i}.mlp.shared_expert.down_proj" for i in range(2)]
    assert "model.layers.*.mlp.experts.down_proj (x2)" in caplog.text
    assert "peft.target_parameters" in caplog.text
    both = PeftConfig(target_modules=["shared_expert.down_proj", "experts.down_proj"])
    assert len(both.apply(AutoModelForCausalLM.from_config(config))) == 4


def test_a_layer_may_be_named_by_its_weight():
    names = PeftConfig(target_parameters=["q_proj.weight"]).apply(base_model("qwen3_moe"))
    assert names == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": ["experts.gate_proj"]}, r"target_parameters: 'experts.gate_proj' matches no stacked"),
        ({"target_modules": ["gate_proj"]}, "did you mean 'gate_up_proj'"),
        ({"target_parameters": EXPERTS, "dropout": 0.1}, r"peft.dropout: .*stacked expert"),
        ({"target_parameters": EXPERTS, "use_dora": True}, r"peft.use_dora: .*stacked expert"),
    ],
)
def test_mistakes_are_explained(options, message):
    with pytest.raises(ModelError, match=message):
        PeftConfig(**options).apply(base_model("qwen3_moe"))


def test_an_adapter_for_other_experts_is_refused(tmp_path):
    config, model = adapted("qwen3_moe")
    save(config, model, tmp_path)
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe", moe_intermediate_size=16))
    with pytest.raises(ModelError, match="does not fit the base model's"):
        merge_adapter(other, read_adapter_config(tmp_path), read_adapter_weights(tmp_path))
