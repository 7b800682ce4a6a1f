"""LoRA checkpoints: PEFT reads the adapter, transformers the merged weights, and ``automodel merge`` equals PEFT's merge."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from nemo_automodel.cli.merge import find_adapter, merge
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components._peft.merge import merge_adapter, read_adapter_weights
from nemo_automodel.components.checkpoint.checkpointer import Checkpointer
from nemo_automodel.components.checkpoint.dcp import stored_tensors
from nemo_automodel.components.checkpoint.hf import gather_weights, write_model
from nemo_automodel.errors import CheckpointError, ConfigError, ModelError
from tests.builders import make_tokenizer, tiny_config
from tests.unit.checkpoint.runs import logits, make_state, read_json, train

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 54321.0}}


def lora_run(tmp_path, model_type="llama", steps=3, base_dtype=None, peft_over=None, **over):
    """A base saved by transformers, a LoRA run on it, trained so that B is not zero."""
    over = {**({} if model_type == "gpt2" else ROPE), **over}
    base = make_state(model_type, seed=7, **over).model
    if base_dtype is not None:
        base = base.to(base_dtype)
    base.save_pretrained(tmp_path / "base")
    make_tokenizer("chatml").save_pretrained(tmp_path / "base")
    config = PeftConfig(match_all_linear=True, dim=4, alpha=16, **(peft_over or {}))
    state = make_state(model_type, seed=7, peft=config, **over)
    if base_dtype is not None:
        for parameter in state.model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(base_dtype)
    state.model.config._name_or_path = str(tmp_path / "base")
    state.optimizer.param_groups[0]["lr"] = 0.05
    if base_dtype is None:
        train(state, steps)
    return state


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("dora", [False, True])
def test_class_14_peft_reads_the_adapter(model_type, dora, tmp_path):
    state = lora_run(tmp_path, model_type, peft_over={"use_dora": dora})
    path = Checkpointer(None, str(tmp_path / "ckpt")).save(state) / "model"
    assert {p.name for p in path.iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "tokenizer.json",
    }
    assert not (path / "config.json").exists()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = logits(base)
    reloaded = peft.PeftModel.from_pretrained(base, path)
    torch.testing.assert_close(logits(reloaded), logits(state.model), atol=1e-5, rtol=1e-5)
    assert (logits(reloaded) - plain).abs().max() > 1e-2
    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert read_json(path / "adapter_config.json")["base_model_name_or_path"] == str(tmp_path / "base")


@pytest.mark.parametrize("tied", [False, True])
def test_class_14_merged_weights_and_the_adapter_beside_them(tied, tmp_path, capsys):
    state = lora_run(tmp_path, tie_word_embeddings=tied)
    checkpointer = Checkpointer(None, str(tmp_path / "ckpt"), save_merged=True)
    path = checkpointer.save(state)
    merged, info = AutoModelForCausalLM.from_pretrained(path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(merged), logits(state.model), atol=1e-5, rtol=1e-5)
    keys = load_file(path / "model/model.safetensors").keys()
    assert ("lm_head.weight" in keys) is not tied
    base = load_file(tmp_path / "base/model.safetensors")
    assert keys == base.keys()
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), path / "adapter")
    torch.testing.assert_close(logits(adapted), logits(state.model), atol=1e-5, rtol=1e-5)
    oracle = adapted.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, oracle[name], atol=1e-6, rtol=1e-6)
    checkpointer.finish(state)
    printed = capsys.readouterr().out
    assert f"vllm serve {path / 'model'}" in printed
    assert (
        f"vllm serve {tmp_path / 'base'} --enable-lora --max-lora-rank 8 --lora-modules tuned={path / 'adapter'}"
        in printed
    )


def test_a_head_merged_apart_from_its_tied_embedding_is_saved_untied(tmp_path):
    model = make_state("llama", tie_word_embeddings=True).model
    weights = gather_weights(model, None, None, keep=True)
    weights["lm_head.weight"] = weights["lm_head.weight"] * 2
    write_model(tmp_path, model, weights, None)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.tie_word_embeddings
    assert torch.equal(logits(merged), 2 * logits(model))


def test_a_base_that_exists_nowhere_is_saved_merged(tmp_path, caplog):
    state = lora_run(tmp_path)
    state.model.config._name_or_path = ""
    path = Checkpointer(None, str(tmp_path / "ckpt")).save(state)
    assert "save_merged" in caplog.text
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(path / "model")), logits(state.model), atol=1e-5, rtol=1e-5
    )


def test_class_12_bf16_base_merges_with_one_rounding(tmp_path):
    state = lora_run(tmp_path, base_dtype=torch.bfloat16)
    for name, parameter in state.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    state.model.export_dtype = torch.bfloat16
    path = Checkpointer(None, str(tmp_path / "ckpt"), save_merged=True).save(state)
    merged = load_file(path / "model/model.safetensors")
    adapter, base = (
        load_file(path / "adapter/adapter_model.safetensors"),
        load_file(tmp_path / "base/model.safetensors"),
    )
    name = "model.layers.1.mlp.down_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    assert a.dtype == torch.float32
    assert torch.equal(merged[f"{name}.weight"], (base[f"{name}.weight"].float() + 4 * (b @ a)).bfloat16())
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


def test_lora_resumes_bit_for_bit(tmp_path):
    state = lora_run(tmp_path)
    Checkpointer(None, str(tmp_path / "ckpt")).save(state)
    expected = train(state, 3)
    again = make_state("llama", seed=7, peft=PeftConfig(match_all_linear=True, dim=4, alpha=16), **ROPE)
    assert Checkpointer(None, str(tmp_path / "ckpt"), restore_from="latest").restore(again)
    assert train(again, 3) == expected
    saved = stored_tensors(tmp_path / "ckpt/epoch_0_step_3/resume/tensors")
    trainable = {name for name, parameter in state.model.named_parameters() if parameter.requires_grad}
    assert {name.removeprefix("model/") for name in saved if name.startswith("model/")} == trainable  # no frozen base


def test_another_rank_is_refused_by_its_shapes(tmp_path):
    Checkpointer(None, str(tmp_path / "ckpt")).save(lora_run(tmp_path))
    other = make_state("llama", seed=7, peft=PeftConfig(match_all_linear=True, dim=8, alpha=16), **ROPE)
    with pytest.raises(CheckpointError, match=r"lora_A.weight: float32\[4, 32\] -> float32\[8, 32\]"):
        Checkpointer(None, str(tmp_path / "ckpt"), restore_from="latest").restore(other)


EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def test_adapters_of_experts_are_saved_merged_and_resumed(tmp_path):
    state = lora_run(tmp_path, "qwen3_moe", peft_over=EXPERTS, moe_intermediate_size=24)
    path = Checkpointer(None, str(tmp_path / "ckpt"), save_merged=True).save(state)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(base, path / "adapter")
    live = logits(state.model)
    torch.testing.assert_close(logits(adapted), live, atol=1e-5, rtol=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(path / "model")
    torch.testing.assert_close(logits(merged), live, atol=1e-5, rtol=1e-5)
    assert load_file(path / "model/model.safetensors").keys() == load_file(tmp_path / "base/model.safetensors").keys()
    out = merge(path / "adapter", output=tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(again[name], tensor), name

    config = PeftConfig(match_all_linear=True, dim=4, alpha=16, **EXPERTS)
    resumed = make_state("qwen3_moe", seed=7, peft=config, moe_intermediate_size=24, **ROPE)
    assert Checkpointer(None, str(tmp_path / "ckpt"), restore_from="latest").restore(resumed)
    traces = []
    for run in (state, resumed):
        torch.manual_seed(5)
        traces.append(train(run, 3))
    assert traces[0] == traces[1]


# --- automodel merge ------------------------------------------------------------------------------------------------


def peft_adapter(tmp_path, model_type="llama", dtype=torch.float32, tied=False, **lora):
    """An adapter written by PEFT itself, its B random."""
    torch.manual_seed(0)
    over = {} if model_type == "gpt2" else {**ROPE, "tie_word_embeddings": tied}
    base = AutoModelForCausalLM.from_config(tiny_config(model_type, **over)).to(dtype)
    base.save_pretrained(tmp_path / "base")
    make_tokenizer("chatml").save_pretrained(tmp_path / "base")
    live = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    live = peft.get_peft_model(live, peft.LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", **lora))
    for name, parameter in live.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name or "modules_to_save" in name or "magnitude" in name:
            parameter.data += 0.1 * torch.rand_like(parameter)
    live.save_pretrained(tmp_path / "adapter")
    return live


LORA_KINDS = {
    "plain": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
        "alpha_pattern": {"v_proj": 3},
    },
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "whole_modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "bias": {"target_modules": ["q_proj"], "bias": "none", "lora_bias": False},
    **{
        f"init_{init}": {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": init}
        for init in (False, "gaussian", "eva", "orthogonal", "mica")
    },
}


def test_merge_of_experts_equals_pefts_own(tmp_path):
    live = peft_adapter(tmp_path, "qwen3_moe", target_modules=["q_proj"], **EXPERTS)
    expected = logits(live)
    merged = AutoModelForCausalLM.from_pretrained(merge(tmp_path / "adapter", output=tmp_path / "out"))
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    for name, tensor in live.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", LORA_KINDS)
def test_merge_equals_pefts_own(kind, tmp_path, capsys):
    live = peft_adapter(tmp_path, **LORA_KINDS[kind])
    expected = logits(live)
    out = merge(tmp_path / "adapter", output=tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    for name, tensor in live.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, atol=1e-6, rtol=1e-6)
    assert AutoTokenizer.from_pretrained(out).chat_template == make_tokenizer("chatml").chat_template
    assert f"vllm serve {out}" in capsys.readouterr().out


def test_merge_of_a_transposed_layer(tmp_path):
    live = peft_adapter(tmp_path, "gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    out = merge(tmp_path / "adapter", output=tmp_path / "out")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), logits(live), atol=1e-5, rtol=1e-5)


def test_merge_of_an_adapter_on_a_tied_embedding(tmp_path):
    live = peft_adapter(tmp_path, tied=True, target_modules=["q_proj", "embed_tokens"])
    expected = logits(live)
    out = merge(tmp_path / "adapter", output=tmp_path / "out")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
@pytest.mark.parametrize("together", [False, True])
def test_merge_of_whole_modules_that_are_tied_in_the_base(whole, together, tmp_path):
    """Trained apart they are merged apart; the other one stays the base's. PEFT can also keep them tied."""
    live = peft_adapter(
        tmp_path, tied=True, target_modules=["q_proj"], modules_to_save=whole, ensure_weight_tying=together
    )
    expected = logits(live)
    out = merge(tmp_path / "adapter", output=tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    if whole == ["lm_head"] and not together:
        base = load_file(tmp_path / "base/model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(merged.get_input_embeddings().weight, base)
        assert not torch.equal(merged.lm_head.weight, base)


@pytest.mark.parametrize(("dtype", "written"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_class_17_merge_writes_the_dtype_asked_for(dtype, written, tmp_path):
    peft_adapter(tmp_path, dtype=torch.bfloat16, target_modules=["q_proj"])
    out = merge(tmp_path / "adapter", output=tmp_path / "out", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {written}
    assert read_json(out / "config.json")["dtype"] == str(written).removeprefix("torch.")
    assert read_json(out / "config.json")["rope_theta"] == 54321.0


def test_merge_takes_a_checkpoint_directory(tmp_path):
    state = lora_run(tmp_path)
    path = Checkpointer(None, str(tmp_path / "ckpt")).save(state)
    assert find_adapter(path) == find_adapter(path / "model") == path / "model"
    out = merge(path)
    assert out == tmp_path / "ckpt/epoch_0_step_3-merged"
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(out)), logits(state.model), atol=1e-5, rtol=1e-5
    )
    assert not [p for p in out.parent.iterdir() if p.name.startswith(".tmp")]


def test_merge_says_what_is_wrong(tmp_path):
    peft_adapter(tmp_path, target_modules=["q_proj"])
    adapter = tmp_path / "adapter"
    with pytest.raises(CheckpointError, match="is not a directory"):
        merge(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="full model, with nothing to merge"):
        merge(tmp_path / "base")
    with pytest.raises(ConfigError, match="exists already"):
        merge(adapter, output=tmp_path / "base")
    with pytest.raises(ConfigError, match="write one of auto, float32"):
        merge(adapter, dtype="fp32")
    with pytest.raises(ModelError, match="--base MODEL"):
        merge(adapter, output=tmp_path / "out", base=str(tmp_path / "missing"))
    AutoModelForCausalLM.from_config(tiny_config("llama", hidden_size=16)).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ModelError, match=r"weight of \[32, 32\], the base model's is \[32, 16\]"):
        merge(adapter, output=tmp_path / "out", base=str(tmp_path / "narrow"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k.replace("q_proj", "query"): t for k, t in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"model.layers.0.self_attn.query, which the base model does not have"):
        merge(adapter, output=tmp_path / "out")
    (adapter / "adapter_model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(CheckpointError, match="damaged"):
        merge(adapter, output=tmp_path / "out")
    config = read_json(adapter / "adapter_config.json")
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="names no base model"):
        merge(adapter, output=tmp_path / "out")
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(CheckpointError, match="only LORA"):
        merge(adapter, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_merge_refuses_an_adapter_of_a_base_that_peft_has_changed(init, tmp_path):
    peft_adapter(tmp_path, target_modules=["q_proj"], init_lora_weights=init)
    with pytest.raises(CheckpointError, match=rf"init_lora_weights={init} cannot be merged here.*merge_and_unload"):
        merge(tmp_path / "adapter", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("init_lora_weights", "corda", "merge_and_unload"),
        ("init_lora_weights", "loftq", "merge_and_unload"),
        ("init_lora_weights", "lora_ga", "merge_and_unload"),
        ("use_bdlora", {"nblocks": 2}, "merge_and_unload"),
        ("kasa_config", {"beta": 1e-4}, "merge_and_unload"),
        ("alora_invocation_tokens", [1, 2], "unmerged"),
        ("arrow_config", {"top_k": 3}, "unmerged"),
        ("use_qalora", True, "unmerged"),
    ],
)
def test_merge_refuses_other_kinds_of_lora(key, value, says, tmp_path):
    peft_adapter(tmp_path, target_modules=["q_proj"])
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps({**read_json(path), key: value}))
    with pytest.raises(CheckpointError, match=rf"{key}.*{says}"):
        merge(tmp_path / "adapter", output=tmp_path / "out")


def in_fp8(directory, config):
    """Store the projections of ``directory`` as blocks in FP8 with their scales; returns what they then stand for."""
    stored, plain = {}, {}
    for name, weight in load_file(directory / "model.safetensors").items():
        stored[name] = plain[name] = weight
        if "_proj" in name:
            rows, columns = weight.shape[0] // 16, weight.shape[1] // 16
            blocks = weight.float().reshape(rows, 16, columns, 16)
            scales = blocks.abs().amax((1, 3)) / 448
            codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
            stored[name], stored[f"{name}_scale_inv"] = codes.reshape(weight.shape), scales
            plain[name] = (codes.float() * scales[:, None, :, None]).reshape(weight.shape).to(weight.dtype)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    quantised = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
    return plain


def check_merge_into_fp8(model_type, tmp_path):
    """On a machine where transformers keeps weights in FP8."""
    live = peft_adapter(tmp_path, model_type, torch.bfloat16, target_modules=["q_proj", "v_proj"])
    plain = in_fp8(tmp_path / "base", read_json(tmp_path / "base/config.json"))
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert kept.model.layers[0].self_attn.q_proj.weight.dtype == torch.float8_e4m3fn  # without being asked not to
    out = merge(tmp_path / "adapter", output=tmp_path / "out")
    assert "quantization_config" not in read_json(out / "config.json")
    merged = load_file(out / "model.safetensors")
    assert merged.keys() == plain.keys()
    for name, weight in plain.items():
        expected = weight
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            layer = live.base_model.model.get_submodule(name.removesuffix(".weight"))
            delta = layer.get_delta_weight("default")
            assert delta.abs().max() > 1e-2
            expected = (weight.float() + delta).to(weight.dtype)
        torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=1e-2)  # one bf16 step


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_merge_into_an_fp8_base_where_a_gpu_could_keep_it(model_type, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    check_merge_into_fp8(model_type, tmp_path)


@pytest.mark.parametrize("bits", [4, 8])
def test_merge_refuses_a_base_quantised_otherwise(bits, tmp_path):
    peft_adapter(tmp_path, target_modules=["q_proj"])
    path = tmp_path / "base/config.json"
    quantised = {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}
    path.write_text(json.dumps({**read_json(path), "quantization_config": quantised}))
    with pytest.raises(ModelError, match="is quantised; pass its 16-bit original: --base MODEL"):
        merge(tmp_path / "adapter", output=tmp_path / "out")


@pytest.mark.parametrize(("model_type", "targets", "weight"), [
    ("llama", {"target_modules": ["q_proj"]}, "model.layers.0.self_attn.q_proj.weight"),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head.weight"),
    ("qwen3_moe", {"target_modules": ["q_proj"], **EXPERTS}, "model.layers.0.mlp.experts.down_proj"),
])  # fmt: skip
def test_merge_adds_to_no_codes(model_type, targets, weight, tmp_path):
    live = peft_adapter(tmp_path, model_type, **targets)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    module, _, name = weight.rpartition(".")
    codes = base.get_parameter(weight).to(torch.float8_e4m3fn)
    setattr(base.get_submodule(module), name, torch.nn.Parameter(codes, requires_grad=False))
    with pytest.raises(ModelError, match=rf"{weight} is float8_e4m3fn, quantised; pass its 16-bit original"):
        merge_adapter(base, live.peft_config["default"].to_dict(), read_adapter_weights(tmp_path / "adapter"))


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from nemo_automodel.cli.merge import merge
from nemo_automodel.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes beyond the limit fail with EFBIG, as ENOSPC on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    merge(Path(sys.argv[1]) / "adapter", output=Path(sys.argv[1]) / "out")
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [200, 20_000, 300_000])  # the config does not fit; the weights; the tokenizer
def test_merge_on_a_full_disk_is_one_message_and_leaves_nothing(limit, tmp_path):
    peft_adapter(tmp_path, target_modules=["q_proj"])
    tokenizer = make_tokenizer("chatml")
    tokenizer.add_tokens([f"<extra {number}>" for number in range(4000)])
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter/tokenizer.json").stat().st_size > 300_000
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{tmp_path / 'out'} cannot be written: " in done.stdout
    assert "File too large" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_merge_that_is_broken_off_leaves_nothing(tmp_path, monkeypatch):
    peft_adapter(tmp_path, target_modules=["q_proj"])

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "adapter", output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_base_with_a_missing_tensor_is_refused(tmp_path):
    peft_adapter(tmp_path, target_modules=["q_proj"])
    tensors = load_file(tmp_path / "base/model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks tensors: model.layers.1.mlp.up_proj.weight"):
        merge(tmp_path / "adapter", output=tmp_path / "out")
