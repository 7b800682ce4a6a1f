"""Adapters whose layers share an input: the same loss and gradients as PEFT's, in every way a model is run."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.blocks import find_blocks
from nemo_automodel._transformers.shared_inputs import SHARED_INPUTS, find_shared_inputs, share_found_inputs
from nemo_automodel._transformers.tiny_twin import tiny_twin
from nemo_automodel._transformers.twin_start import start_config
from nemo_automodel.components._peft.linear import LoRALinear, lora_layers
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components._peft.shared import share_inputs, unshare_inputs
from nemo_automodel.components.distributed.activation_checkpointing import checkpoint_activations
from nemo_automodel.components.quantization.fp8 import Fp8Config
from tests.builders import tiny_config
from tests.vlm_builders import tiny_vlm_config, write_processor

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
KEPT = "_lora_outputs"


def base_model(model_type: str = "llama", **over: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **over)).eval()


def randomize_adapters(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def adapted(model: Any, share: bool = True, **options: Any) -> Any:
    find_shared_inputs(model)
    PeftConfig(**({"match_all_linear": True, "dim": 4, "alpha": 8} | options)).apply(model)
    randomize_adapters(model)
    if share:
        share_found_inputs(model)
    return model


def ids(seed: int = 2, length: int = 17) -> torch.Tensor:
    return torch.randint(3, 384, (2, length), generator=torch.Generator().manual_seed(seed))


def train(model: Any, times: int = 2) -> dict[str, torch.Tensor]:
    """Two micro-batches' losses and their summed gradients, by name."""
    model.zero_grad()
    found = {}
    for i in range(times):
        loss = model(input_ids=ids(i), labels=ids(i), use_cache=False).loss
        loss.backward()
        found[f"loss {i}"] = loss.detach()
    return found | {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], limit: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert (value - expected[name]).norm() <= limit * expected[name].norm() + 1e-9, name


def groups_of(model: nn.Module) -> set[tuple[str, ...]]:
    names = {module: name for name, module in model.named_modules()}
    groups = {id(layer.lora_group): layer.lora_group for _, layer in lora_layers(model) if layer.lora_group is not None}
    return {tuple(names[member] for member in group.members) for group in groups.values()}


# --- which layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", {QKV, GATE_UP}),
        ("qwen3", {QKV, GATE_UP}),
        ("gemma3_text", {QKV, GATE_UP}),
        ("qwen2_moe", {QKV, GATE_UP}),  # its shared expert
        ("deepseek_v3", {("q_a_proj", "kv_a_proj_with_mqa"), GATE_UP}),
        ("gemma3n_text", {GATE_UP}),  # some of its layers take k and v from others
        ("gpt_oss", {QKV}),
        ("olmo2", {GATE_UP}),  # attention takes the block's own input, without a norm
        ("phi3", set()),  # fused
        ("gpt_neox", set()),
        ("gpt2", set()),
    ],
)
def test_layers_that_share_an_input_are_found_by_running_the_model(model_type: str, expected: set[Any]) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_twin(start_config(model_type, causal=True)))
    find_shared_inputs(model)
    assert {group for _, groups in model.__dict__[SHARED_INPUTS] for group in groups} == expected


def test_a_model_that_cannot_be_tried_is_left_as_it_is() -> None:
    model = base_model()
    model.forward = None
    find_shared_inputs(model)
    assert model.__dict__[SHARED_INPUTS] == ()


def test_only_adapters_that_are_alike_and_plain_share() -> None:
    assert len(groups_of(adapted(base_model()))) == 4
    assert groups_of(adapted(base_model(), match_all_linear=False, target_modules=["q_proj", "v_proj", "up_proj"])) == {
        tuple(f"model.layers.{i}.self_attn.{name}" for name in ("q_proj", "v_proj")) for i in range(2)
    }
    for alone in ({"use_dora": True}, {"dropout": 0.1}, {"dim": 128}):
        assert groups_of(adapted(base_model(), **alone)) == set()
    assert groups_of(adapted(base_model("gpt2"))) == set()


def test_our_own_models_share_by_default_and_without_weights() -> None:
    config = PeftConfig(match_all_linear=True, dim=4)
    model = NeMoAutoModelForCausalLM.from_config(tiny_config("llama"), peft=config, dtype="float32")
    assert len(groups_of(model)) == 4
    unshare_inputs(model)
    assert groups_of(model) == set()


# --- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "qwen2_moe", "phi3"])
def test_loss_and_every_gradient_equal_pefts(model_type: str) -> None:
    over = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
    }
    over = over if model_type == "qwen2_moe" else {}
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj"]
    ours = base_model(model_type, **over)
    there = {name.rpartition(".")[2] for name, module in ours.named_modules() if isinstance(module, nn.Linear)}
    targets = [name for name in names if name in there]
    config = PeftConfig(target_modules=targets, dim=4, alpha=8)
    ours = adapted(ours, match_all_linear=False, target_modules=targets)
    assert bool(groups_of(ours)) == (model_type != "phi3")
    theirs = peft.get_peft_model(
        base_model(model_type, **over),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"),
    )
    loaded = peft.set_peft_model_state_dict(theirs, config.adapter_state_dict(ours))
    assert not loaded.unexpected_keys
    expected = train(theirs)
    expected = {n.removeprefix("base_model.model.").replace(".default", ""): value for n, value in expected.items()}
    assert_same(train(ours), expected, 1e-5)


@pytest.mark.parametrize("checkpointing", ["off", "selective", "full"])
@pytest.mark.parametrize("backend", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_checkpointed_and_compiled_it_is_one_graph_and_the_same(checkpointing: str, backend: str | None) -> None:
    expected = train(adapted(base_model(), share=False))
    counts = {}
    for share in (False, True):
        model = adapted(base_model(), share)
        blocks = find_blocks(model)
        checkpoint_activations(blocks, checkpointing)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for block in blocks if backend is not None else ():
            block.compile(fullgraph=True, backend=backend)
        assert_same(train(model), expected, 1e-5)
        counts[share] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert counts[True] == counts[False]


def test_a_vision_language_model_computes_the_same(tmp_path: Path) -> None:
    config = tiny_vlm_config("qwen3_vl", write_processor("qwen3_vl", tmp_path))
    results = []
    for share in (False, True):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).eval()
        results.append(train(adapted(model, share)))
        assert bool(groups_of(model)) == share
    assert_same(results[1], results[0], 1e-5)


def test_fp8_base_computes_the_same() -> None:
    exact = train(adapted(base_model(hidden_size=64).bfloat16().float(), share=False), times=1)
    results = []
    for share in (False, True):
        model = adapted(base_model(hidden_size=64).bfloat16(), share=False)
        assert Fp8Config(min_features=16).apply(model, find_blocks(model))
        if share:
            share_found_inputs(model)
            assert len(groups_of(model)) == 4
        results.append(train(model, times=1))
    off = [torch.cat([(r[name].float() - exact[name]).flatten() for name in exact]).norm() for r in results]
    apart = torch.cat([(results[1][name].float() - results[0][name].float()).flatten() for name in exact]).norm()
    assert off[1] <= 1.02 * off[0]
    assert apart <= 0.5 * off[0]


# --- in any order ----------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Calls its layers as it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, n) for n in (6, 6, 5))

    def forward(self, x: torch.Tensor, calls: str) -> list[torch.Tensor]:
        other = x + 1
        return [getattr(self, call.lower())(x if call.islower() else other) for call in calls]


def odd(share: bool) -> Odd:
    torch.manual_seed(0)
    model = Odd()
    PeftConfig(match_all_linear=True, dim=2).apply(model)
    randomize_adapters(model)
    if share:
        assert share_inputs(model, {Odd: [("a", "b", "c")]}) == 1
    return model


@pytest.mark.parametrize("calls", ["abc", "aBc", "cba", "a", "bc", "abcabc", "aabbcc", "abcb", "aAbBcC", "bac"])
def test_called_in_another_way_layers_still_compute_what_they_do_alone(calls: str) -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        found = []
        for share in (False, True):
            model, leaf = odd(share), x.clone().requires_grad_()
            outputs = model(leaf, calls)
            loss = sum((output * (i + 1)).square().sum() for i, output in enumerate(outputs))
            loss.backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
            found.append({"x": leaf.grad, **{str(i): y.detach() for i, y in enumerate(outputs)}, **grads})
        assert_same(found[1], found[0], 1e-5)


def test_parameters_that_changed_between_two_calls_with_one_tensor_are_used() -> None:
    model, x = odd(True), torch.randn(4, 8)
    model(x, "ab")  # c was not called: what it would have given waits at x
    with torch.no_grad():
        model.c.lora_B.weight.add_(1.0)
    expected = model.c._alone(x)
    model(x, "ab")
    torch.testing.assert_close(model(x, "abc")[2], expected)


def test_training_with_dropout_or_sharing_switched_off_is_seen_at_once() -> None:
    model, x = odd(True), torch.randn(64, 8)
    model.train()
    model.b.lora_dropout = 0.5
    torch.manual_seed(1)
    first = model(x, "abc")
    torch.manual_seed(2)
    second = model(x, "abc")
    assert not torch.equal(first[1], second[1])
    assert torch.equal(first[0], second[0])


def test_nothing_is_kept_after_a_forward() -> None:
    model, seen = adapted(base_model()), []
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loss = model(input_ids=ids(), labels=ids(), use_cache=False).loss
    assert all(getattr(x, KEPT, None) is None for x in seen)
    assert any(hasattr(x, KEPT) for x in seen)
    refs = [weakref.ref(x) for x in seen]
    seen.clear()
    loss.backward()
    del loss
    gc.collect()
    assert not any(ref() is not None for ref in refs)


def test_what_nobody_fetches_is_dropped_by_the_next_forward() -> None:
    model, refs = odd(True), []
    for _ in range(5):
        x = torch.randn(4, 8, requires_grad=True) * 2
        model(x, "ab")  # no backward, which would free what the graph holds
        refs.append(weakref.ref(x))
        del x
    gc.collect()
    assert sum(ref() is not None for ref in refs) == 1


def test_a_copied_model_shares_among_its_own_layers() -> None:
    model = odd(True)
    model(torch.randn(4, 8), "ab")
    for copied in (copy.deepcopy(model), copy.deepcopy(model.eval())):
        assert copied.a.lora_group.members == [copied.a, copied.b, copied.c]
        assert copied.a.lora_group is copied.c.lora_group
    assert pickle.loads(pickle.dumps(model.a.lora_group.__getstate__()["last"])) is None
