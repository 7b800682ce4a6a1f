"""The HF directory of a full fine-tuning run, read by plain transformers: logits to the last bit, and every file."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from nemo_automodel.components.checkpoint.checkpointer import Checkpointer
from nemo_automodel.components.checkpoint.hf import complete_config, end_of_turn_id, gather_weights, write_model
from tests.builders import CHAT_KINDS, TOKENIZER_KINDS, make_tokenizer, tiny_config
from tests.unit.checkpoint.runs import logits, make_state, read_json, train

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 54321.0}}
GEMMA_ROPE = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 54321.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 4321.0},
    }
}
ARCHITECTURES = {
    "llama": ("llama", {**ROPE, "attention_bias": True}),
    "llama_tied": ("llama", {**ROPE, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", ROPE),
    "gemma3_text": ("gemma3_text", GEMMA_ROPE),
    "mixtral": ("mixtral", ROPE),
    "qwen3_moe": ("qwen3_moe", ROPE),
    "gpt2": ("gpt2", {}),
}


def export(model, directory, tokenizer=None, dtype=None):
    write_model(directory, model, gather_weights(model, None, dtype, keep=True), tokenizer, dtype)
    return directory


def stored(directory):
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_class_14_trained_weights_reload_bitwise(name, tmp_path):
    model_type, over = ARCHITECTURES[name]
    state = make_state(model_type, **over)
    for _, buffer_or_bias in state.model.named_parameters():
        if buffer_or_bias.ndim == 1:
            buffer_or_bias.data += 0.01 * torch.randn_like(buffer_or_bias)
    train(state, 2)
    path = Checkpointer(None, str(tmp_path)).save(state)
    assert path == tmp_path / "epoch_0_step_2"
    reloaded, info = AutoModelForCausalLM.from_pretrained(path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(reloaded) is type(state.model)
    assert torch.equal(logits(reloaded), logits(state.model))
    tied = state.model.config.tie_word_embeddings
    assert (reloaded.get_input_embeddings().weight is reloaded.get_output_embeddings().weight) == tied
    # the names in the file are the original checkpoint's: those that transformers itself would write
    AutoModelForCausalLM.from_pretrained(path / "model").save_pretrained(tmp_path / "plain")
    ours, plain = stored(path / "model"), stored(tmp_path / "plain")
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[key], plain[key]) for key in ours)


def test_saving_leaves_the_live_model_as_it_is(tmp_path):
    state = make_state()
    before = copy.deepcopy((state.model.config.to_dict(), state.model.generation_config.to_dict()))
    weights = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    random_state, cls = torch.get_rng_state(), type(state.model)
    state.model.export_dtype = torch.bfloat16
    Checkpointer(None, str(tmp_path)).save(state)
    assert (state.model.config.to_dict(), state.model.generation_config.to_dict()) == before
    assert type(state.model) is cls
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in state.model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_class_17_the_saved_dtype_is_the_declared_one(dtype, tmp_path):
    state = make_state("llama")
    state.model.export_dtype = dtype
    path = Checkpointer(None, str(tmp_path)).save(state)
    assert {tensor.dtype for tensor in stored(path / "model").values()} == {dtype}
    assert read_json(path / "model/config.json")["dtype"] == str(dtype).removeprefix("torch.")
    reloaded = AutoModelForCausalLM.from_pretrained(path / "model")
    assert reloaded.dtype == dtype
    for name, parameter in state.model.named_parameters():
        assert torch.equal(reloaded.get_parameter(name), parameter.to(dtype))
    # the run itself goes on from its float32 master weights, not from what was exported
    train(state, 1)
    resumed = make_state("llama")
    Checkpointer(None, str(tmp_path), restore_from="latest").restore(resumed)
    assert {p.dtype for p in resumed.model.parameters()} == {torch.float32}
    train(resumed, 1)
    assert torch.equal(logits(resumed.model), logits(state.model))


def test_class_17_what_the_model_keeps_in_float32_stays_so(tmp_path):
    model = LlamaForCausalLM(tiny_config("llama"))
    model._keep_in_fp32_modules_strict = {"norm"}
    export(model, tmp_path, dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in stored(tmp_path).items()}
    assert dtypes["model.norm.weight"] == torch.float32
    assert dtypes["lm_head.weight"] == dtypes["model.layers.0.input_layernorm.weight"] == torch.bfloat16


def test_class_15_added_tokens_are_saved_with_their_rows(tmp_path):
    state = make_state("llama", tie_word_embeddings=True)
    new = ["<new_a>", "<new_b>"]
    state.tokenizer.add_tokens(new, special_tokens=True)
    state.model.resize_token_embeddings(max(len(state.tokenizer), state.model.config.vocab_size + 2))
    state.optimizer = torch.optim.AdamW(state.model.parameters(), lr=1e-2)
    ids = state.tokenizer("hello <new_a> world <new_b>", return_tensors="pt")["input_ids"]
    for _ in range(2):
        state.model(input_ids=ids, labels=ids).loss.backward()
        state.optimizer.step()
    path = Checkpointer(None, str(tmp_path)).save(state)
    tokenizer = AutoTokenizer.from_pretrained(path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(path / "model")
    assert torch.equal(tokenizer("hello <new_a> world <new_b>", return_tensors="pt")["input_ids"], ids)
    assert torch.equal(logits(reloaded, ids), logits(state.model, ids))
    assert reloaded.config.vocab_size == state.model.config.vocab_size


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_class_7_tokenizer_and_template_round_trip(kind, tmp_path):
    tokenizer = make_tokenizer(kind)
    export(LlamaForCausalLM(tiny_config("llama")), tmp_path, tokenizer)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Hello,  world! <|im_end|></s><s> é\n"
    assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert reloaded.special_tokens_map == tokenizer.special_tokens_map
    assert reloaded.chat_template == tokenizer.chat_template
    assert len(reloaded) == len(tokenizer)
    if kind in CHAT_KINDS:
        turns = [{"role": "user", "content": "Hi  there"}, {"role": "assistant", "content": " ok "}]
        assert reloaded.apply_chat_template(turns, tokenize=False) == tokenizer.apply_chat_template(
            turns, tokenize=False
        )
        assert (tmp_path / "chat_template.jinja").read_text() == tokenizer.chat_template
    # a class name that transformers 4 knows
    assert read_json(tmp_path / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize(
    ("kind", "stop"),
    [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("mistral", "</s>"), ("reasoning", "<|im_end|>")],
)  # fmt: skip
def test_class_4_generation_stops_at_the_end_of_turn(kind, stop, tmp_path):
    tokenizer = make_tokenizer(kind)
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    assert end_of_turn_id(tokenizer) == stop_id
    model = LlamaForCausalLM(tiny_config("llama", eos_token_id=100))
    export(model, tmp_path, tokenizer)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [100, stop_id]
    assert model.generation_config.eos_token_id == 100


def test_without_a_template_the_generation_config_is_left_alone(tmp_path):
    export(LlamaForCausalLM(tiny_config("llama", eos_token_id=100)), tmp_path, make_tokenizer("plain"))
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 100


def test_a_published_generation_config_that_transformers_refuses_to_save(tmp_path):
    model = LlamaForCausalLM(tiny_config("llama"))
    model.generation_config.temperature = 0.7  # without do_sample
    export(model, tmp_path, make_tokenizer("chatml"))
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.temperature, saved.do_sample) == (0.7, True)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_rope_theta_stands_where_transformers_4_looks(name, tmp_path):
    export(AutoModelForCausalLM.from_config(tiny_config(name, **ROPE)), tmp_path)
    saved = read_json(tmp_path / "config.json")
    assert saved["rope_theta"] == saved["rope_parameters"]["rope_theta"] == 54321.0
    assert "rope_scaling" not in saved


def test_rope_scaling_and_layer_types_stand_where_transformers_4_looks(tmp_path):
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled |= {"original_max_position_embeddings": 128, "rope_theta": 54321.0}
    export(AutoModelForCausalLM.from_config(tiny_config("llama", rope_parameters=scaled)), tmp_path / "llama")
    saved = read_json(tmp_path / "llama/config.json")
    assert saved["rope_theta"] == 54321.0
    assert saved["rope_scaling"] == {key: value for key, value in scaled.items() if key != "rope_theta"}
    export(AutoModelForCausalLM.from_config(tiny_config("gemma3_text", **GEMMA_ROPE)), tmp_path / "gemma")
    saved = read_json(tmp_path / "gemma/config.json")
    assert (saved["rope_theta"], saved["rope_local_base_freq"]) == (54321.0, 4321.0)
    for directory in ("llama", "gemma"):
        original = read_json(tmp_path / directory / "config.json")["rope_parameters"]
        assert AutoConfig.from_pretrained(tmp_path / directory).rope_parameters == original


def test_nested_text_config_gets_its_rope_theta_and_dtype(tmp_path):
    config = AutoConfig.for_model("gemma3", text_config=tiny_config("gemma3_text", **GEMMA_ROPE).to_dict())
    config.save_pretrained(tmp_path)
    complete_config(tmp_path / "config.json", type(config), torch.bfloat16)
    saved = read_json(tmp_path / "config.json")
    assert saved["dtype"] == "bfloat16"
    assert saved["text_config"]["rope_theta"] == 54321.0
    assert AutoConfig.from_pretrained(tmp_path).text_config.rope_parameters == config.text_config.rope_parameters


def test_sharded_files_have_an_index(tmp_path, monkeypatch):
    model = LlamaForCausalLM(tiny_config("llama"))
    plain_save = LlamaForCausalLM.save_pretrained
    monkeypatch.setattr(
        LlamaForCausalLM, "save_pretrained", lambda self, d, **kw: plain_save(self, d, max_shard_size="40KB", **kw)
    )
    export(model, tmp_path)
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert len(set(index["weight_map"].values())) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_the_model_card_says_what_is_known(tmp_path):
    state = make_state()
    state.fingerprint["config"]["dataset"] = {
        "dataset_name": "rajpurkar/squad",
        "split": "train",
        "path": str(tmp_path),
    }
    card = (Checkpointer(None, str(tmp_path)).save(state) / "model/README.md").read_text()
    front = card.split("---")[1]
    for line in (
        "base_model: acme/base",
        "- rajpurkar/squad",
        "library_name: transformers",
        "pipeline_tag: text-generation",
    ):
        assert line in front
    assert str(tmp_path) not in card


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OddConfig(LlamaConfig):
    model_type = "odd_llama"
class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


def test_remote_code_travels_with_the_weights(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "modeling_odd.py").write_text(REMOTE)
    config = tiny_config("llama").to_dict() | {"model_type": "odd_llama", "architectures": ["OddForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    (source / "config.json").write_text(json.dumps(config))
    live_config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(live_config, trust_remote_code=True)
    out = export(model, tmp_path / "out")
    assert (out / "modeling_odd.py").read_text() == REMOTE
    reloaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(reloaded).__name__ == "OddForCausalLM"
    assert torch.equal(logits(reloaded), logits(model))


MEMORY = """
import resource, sys, torch
from pathlib import Path
from transformers import LlamaForCausalLM
from nemo_automodel.components.checkpoint.hf import gather_weights, write_model
from tests.builders import tiny_config
config = tiny_config("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=12, head_dim=128)
with torch.device("meta"):
    model = LlamaForCausalLM(config)
model.to_empty(device="cpu")
for tensor in [*model.parameters(), *model.buffers()]:
    tensor.data.fill_(0.5)
size = sum(p.numel() for p in model.parameters()) * 4 / 2**20
small = LlamaForCausalLM(tiny_config("llama"))
write_model(Path(sys.argv[1]) / "warm", small, gather_weights(small, None, None, True), None)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for dtype in (torch.float32, torch.bfloat16):
    before = peak()
    write_model(Path(sys.argv[1]) / str(dtype), model, gather_weights(model, None, dtype, True), None, dtype)
    print(size, peak() - before)
"""


def test_class_16_host_memory_of_a_save(tmp_path):
    """In its own dtype a CPU model is written from where it lies; in bf16, one copy of half the size is made."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    (size, own), (_, half) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert size > 150
    assert own < 0.4 * size
    assert half < 0.9 * size
