"""What ``PeftConfig.apply`` adapts, freezes, initialises and reports (failure class 13: LoRA absent or ignored)."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from nemo_automodel.components._peft import lora
from nemo_automodel.components._peft.linear import LoRALinear, lora_layers
from nemo_automodel.components._peft.lora import PeftConfig, reset_adapters
from nemo_automodel.components._peft.match import name_matches, summarize
from nemo_automodel.errors import ConfigError, ModelError
from nemo_automodel.kernels.lora import is_faster_for
from tests.builders import tiny_config


def build(model_type="llama", **over):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **over))


def adapted(model):
    return [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("layers.1.self_attn.q_proj", ["model.layers.1.self_attn.q_proj"]),
        ("model.layers.1.mlp.down_proj", ["model.layers.1.mlp.down_proj"]),
        ("*.layers.0.*.q_proj", ["model.layers.0.self_attn.q_proj"]),
        ("layers.0.*", [f"model.layers.0.{m}" for m in [*(f"self_attn.{a}" for a in ATTENTION), *(f"mlp.{p}" for p in MLP)]]),
        ("[qv]_proj", [f"model.layers.{i}.self_attn.{p}" for i in (0, 1) for p in ("q_proj", "v_proj")]),
    ],
)  # fmt: skip
def test_patterns_select_what_they_say(pattern, expected):
    model = build()
    assert PeftConfig(target_modules=[pattern]).apply(model) == expected == adapted(model)
    assert PeftConfig(target_modules=pattern).apply(build()) == expected


def test_a_suffix_starts_at_a_dot():
    assert not name_matches("proj", "layers.0.q_proj")
    assert name_matches("q_proj", "q_proj")
    assert not name_matches("layers.1.q_proj", "layers.11.q_proj")


@pytest.mark.parametrize("spelling", [{"match_all_linear": True}, {"target_modules": "all-linear"}])
def test_all_linear_is_every_linear_but_the_head(spelling):
    model = build(tie_word_embeddings=False)
    names = PeftConfig(**spelling).apply(model)
    assert names == [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert {n.rsplit(".", 1)[-1] for n in names} == {*ATTENTION, *MLP}


def test_exclude_modules():
    names = PeftConfig(match_all_linear=True, exclude_modules=["*.layers.0.*", "down_proj"]).apply(build())
    assert names == [
        f"model.layers.1.{m}" for m in [*(f"self_attn.{a}" for a in ATTENTION), *(f"mlp.{p}" for p in MLP[:2])]
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_porj"]}, r"'q_porj' matches no module; did you mean 'q_proj'\?.*q_proj, k_proj"),
        ({"target_modules": ["q_proj", "*.layers.7.*"]}, r"'\*\.layers\.7\.\*' matches no module"),
        ({"target_modules": ["self_attn"]}, "a LlamaAttention, but no linear layer"),
        ({"match_all_linear": True, "exclude_modules": ["router"]}, "peft.exclude_modules: 'router' matches no module"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "no linear layer is left"),
    ],
)
def test_class_13_a_pattern_that_matches_nothing_is_an_error(options, message):
    model = build()
    with pytest.raises(ModelError, match=message):
        PeftConfig(**options).apply(model)
    assert not adapted(model)
    assert all(p.requires_grad for p in model.parameters()), "a refused configuration must leave the model alone"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "match_all_linear: true, or target_modules"),
        ({"target_modules": ["a"], "match_all_linear": True}, "both set"),
        ({"dim": 0}, "peft.dim=0"),
        ({"alpha": 0}, "peft.alpha=0"),
        ({"dropout": 1.0}, "peft.dropout=1.0"),
        ({"dropout_position": "mid"}, "one of pre, post"),
        ({"lora_A_init": "zeros"}, "one of kaiming, xavier, gaussian"),
        ({"lora_dtype": "int8"}, "peft.lora_dtype='int8'"),
        ({"lora_dtype": "float16"}, "float16 has too little range"),
    ],
)
def test_bad_options_are_refused(options, message):
    given = options if "target_modules" in options or not options else {"target_modules": ["a"], **options}
    with pytest.raises(ConfigError, match=message):
        PeftConfig(**given)


@pytest.mark.parametrize(("dim", "use_dora"), [(1, False), (8, False), (4, True)])
def test_class_13_only_the_adapters_train_and_their_size_is_the_formula(dim, use_dora):
    model = build()
    shapes = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = PeftConfig(match_all_linear=True, dim=dim, use_dora=use_dora).apply(model)
    expected = sum(dim * sum(shapes[n]) + (shapes[n][0] if use_dora else 0) for n in names)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert all(("lora_" in n) == p.requires_grad for n, p in model.named_parameters())


def test_base_names_and_values_stay_and_the_start_is_the_base():
    model, ids = build(), torch.randint(3, 384, (2, 9))
    before, logits = {n: v.clone() for n, v in model.state_dict().items()}, model(input_ids=ids).logits
    PeftConfig(match_all_linear=True).apply(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {n.split(".lora_")[1] for n in after.keys() - before.keys()} == {"A.weight", "B.weight"}
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)


@pytest.mark.parametrize(
    ("init", "std"), [("kaiming", (1 / 3 / 64) ** 0.5), ("xavier", (2 / (64 + 16)) ** 0.5), ("gaussian", 1 / 16)]
)
def test_initialisation_of_a(init, std):
    layer = nn.Sequential(nn.Linear(64, 500))
    PeftConfig(match_all_linear=True, dim=16, lora_A_init=init).apply(layer)
    assert layer[0].lora_A.weight.std().item() == pytest.approx(std, rel=0.08)
    assert layer[0].lora_B.weight.count_nonzero() == 0


def test_initial_values_follow_the_seed_and_nothing_else():
    def a_weights(dtype=None):
        model = build()
        torch.manual_seed(5)
        PeftConfig(match_all_linear=True, lora_dtype=dtype).apply(model)
        return [m.lora_A.weight for m in model.modules() if isinstance(m, LoRALinear)]

    first, second, half = a_weights(), a_weights(), a_weights("bfloat16")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(first, half, strict=True))
    assert not torch.equal(first[0], first[7])


def test_fp32_adapters_beside_a_bf16_base_get_fp32_gradients():
    model = build().bfloat16()
    PeftConfig(match_all_linear=True, dim=2).apply(model)
    ids = torch.randint(3, 384, (2, 9))
    output = model(input_ids=ids, labels=ids)
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert parameter.grad.dtype == torch.float32, name
        else:
            assert parameter.dtype == torch.bfloat16
            assert parameter.grad is None, name


def test_meta_model_is_adapted_first_and_reset_once_it_has_values():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    PeftConfig(match_all_linear=True, use_dora=True).apply(model)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.load_state_dict(build().state_dict(), strict=False)
    for name, buffer in build().named_buffers():
        model.get_buffer(name).copy_(buffer)
    reset_adapters(model)
    ids = torch.randint(3, 384, (2, 9))
    torch.testing.assert_close(model(input_ids=ids).logits, build()(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert all(m.lora_A.weight.std() > 0 for m in model.modules() if isinstance(m, LoRALinear))


def test_an_adapted_model_is_not_adapted_again():
    model = build()
    PeftConfig(target_modules=["q_proj"]).apply(model)
    with pytest.raises(ModelError, match="already"):
        PeftConfig(target_modules=["v_proj"]).apply(model)


# --- what cannot be adapted is said, never silently absent ----------------------------------------------------------


def test_class_13_fused_experts_are_reported_and_attention_is_adapted(caplog):
    model = build("qwen3_moe")
    with caplog.at_level(logging.WARNING):
        names = PeftConfig(match_all_linear=True).apply(model)
    assert {n.rsplit(".", 1)[-1] for n in names} == set(ATTENTION)
    warnings = [r.getMessage() for r in caplog.records if "NOT adapted" in r.getMessage()]
    assert len(warnings) == 1
    assert "model.layers.*.mlp.experts.gate_up_proj (x2), model.layers.*.mlp.experts.down_proj (x2)" in warnings[0]
    assert "peft.target_parameters" in warnings[0]
    caplog.clear()
    PeftConfig(target_modules=ATTENTION).apply(build("qwen3_moe"))
    assert "NOT adapted" not in caplog.text, "experts that nobody asked for need no warning"


def test_a_tied_head_is_refused_and_an_untied_one_allowed():
    with pytest.raises(ModelError, match=r"lm_head cannot be adapted: .*tied"):
        PeftConfig(target_modules=["q_proj", "lm_head"]).apply(build(tie_word_embeddings=True))
    names = PeftConfig(target_modules=["q_proj", "lm_head"]).apply(build(tie_word_embeddings=False))
    assert "lm_head" in names


class Odd(nn.Module):
    """Layers that look linear: a router that returns a tuple, attention that never calls its layer, a patched one."""

    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    class Own(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    def __init__(self):
        super().__init__()
        self.router, self.own, self.plain = self.Router(8, 4), self.Own(8, 4), nn.Linear(8, 4)
        self.attention, self.patched = nn.MultiheadAttention(8, 2), nn.Linear(8, 4)
        self.patched.forward = lambda x: x


def test_class_13_layers_that_an_adapter_would_not_reach_are_reported_or_refused(caplog):
    with caplog.at_level(logging.WARNING):
        model = Odd()
        assert PeftConfig(match_all_linear=True).apply(model) == ["own", "plain"]
    for name in ("router", "attention.out_proj", "patched"):
        assert f"{name}, " in caplog.text
        with pytest.raises(ModelError, match="cannot be adapted"):
            PeftConfig(target_modules=[name]).apply(Odd())
    nn.init.normal_(model.own.lora_B.weight)
    x = torch.randn(3, 8)
    expected = x @ model.own.weight.T + model.own.bias + 4 * x @ model.own.lora_A.weight.T @ model.own.lora_B.weight.T
    torch.testing.assert_close(model.own(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "does not run on cpu"),
        ({"use_dora": True}, "DoRA"),
        ({"dropout": 0.1}, "dropout is on"),
        ({"dim": 129}, "dim 129 is above 128"),
    ],
)
def test_use_triton_falls_back_with_one_reason(options, reason, caplog):
    """The announcement's ``use_triton: True`` runs on a machine without a GPU, and says so once."""
    model, plain = build(), build()
    with caplog.at_level(logging.WARNING):
        PeftConfig(match_all_linear=True, use_triton=True, **options).apply(model)
    assert [r.getMessage() for r in caplog.records if "use_triton" in r.getMessage() and reason in r.getMessage()]
    assert len(caplog.records) == 1
    torch.manual_seed(0)
    PeftConfig(match_all_linear=True, **options).apply(plain)
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(3, 384, (2, 9))
    assert torch.equal(model.eval()(input_ids=ids).logits, plain.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("options", "faster", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"use_triton": False}, True, False),
        ({"dropout": 0.1}, True, False),
        ({"use_dora": True}, True, False),
    ],
)
def test_the_kernels_are_chosen_where_they_are_faster(options, faster, expected, monkeypatch, caplog):
    """Left open, ``use_triton`` is on where the kernels were measured to be faster, and that is said."""
    monkeypatch.setattr(lora, "is_faster_for", lambda weight, device: faster)
    model = build()
    with caplog.at_level(logging.INFO):
        PeftConfig(match_all_linear=True, **options).apply(model)
    assert {layer.lora_use_triton for _, layer in lora_layers(model)} == {expected}
    assert any("run by the Triton kernels" in r.getMessage() for r in caplog.records) is expected
    assert not [r for r in caplog.records if "use_triton is on" in r.getMessage()]


def test_on_a_cpu_the_kernels_are_not_chosen():
    assert not is_faster_for(torch.zeros(2, 2, dtype=torch.bfloat16))


def test_layers_compile_into_one_graph():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    PeftConfig(match_all_linear=True, use_dora=True).apply(model)
    nn.init.normal_(model[0].lora_B.weight)
    x = torch.randn(3, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
    compiled(x).sum().backward()
    assert model[0].lora_A.weight.grad.abs().sum() > 0


def test_names_are_folded_over_layers():
    assert summarize(["a.0.b", "a.1.b", "c"]) == "a.*.b (x2), c"
