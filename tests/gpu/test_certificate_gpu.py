"""The start-up certificate on a GPU: widths of real models in bf16, the kernels that only run there, and the time it takes.

Claims: nothing that is right is accused, with fresh weights or with those of a checkpoint that has outliers, on made up
rows or on the run's first micro-batch; a fault of the attention or of the LoRA kernel that shows at real widths only is
found and switched off; a dense model's certificate takes 10 s at most, and memory for its blocks and not for the model.
"""

import time

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.certificate import REAL, Certificate
from nemo_automodel.components._peft import linear
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.attention import function
from nemo_automodel.components.datasets.loader import DataLoader
from nemo_automodel.components.datasets.packing import PackedSequence
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Vocabularies and depth are smaller than the models', because making random weights took most of a test's time; the
# certificate tries one block of each kind and 32,768 tokens of any.
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 64, "vocab_size": 65536, "tie_word_embeddings": True}  # fmt: skip
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "vocab_size": 32768}  # fmt: skip
QWEN3_30B = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4,
             "head_dim": 128, "num_experts": 16, "num_experts_per_tok": 8, "vocab_size": 32768}  # fmt: skip
GPT_OSS = {"num_local_experts": 8, "vocab_size": 32768}
SHAPES = {
    "llama 1B": ("llama", LLAMA_1B), "llama 8B": ("llama", LLAMA_8B), "gemma2": ("gemma2", {"vocab_size": 32768}),
    "gemma3_text": ("gemma3_text", {"vocab_size": 32768}), "qwen3_moe": ("qwen3_moe", QWEN3_30B), "gpt_oss": ("gpt_oss", GPT_OSS),
    "gpt2": ("gpt2", {}),
}  # fmt: skip
LAYERS = {"gemma2": 2, "gemma3_text": 6, "gpt_oss": 2}  # one of each kind
right_attention, right_kernel = function.attention, linear.lora_linear


def build(shape, lora):
    model_type, fields = SHAPES[shape]
    config = AutoConfig.for_model(model_type, **fields, num_hidden_layers=LAYERS.get(model_type, 1))
    peft = PeftConfig(match_all_linear=True, dim=16) if lora else None
    with torch.device("cuda"):
        model = NeMoAutoModelForCausalLM.from_config(config, dtype="bfloat16", packed=True)
    if peft is not None:
        peft.apply(model, torch.device("cuda"))
    return model.cuda()


def prove(model, tmp_path, mode="strict", loader=None):
    torch.cuda.reset_peak_memory_stats()
    start, before = time.monotonic(), torch.cuda.memory_allocated()
    loss_fn = FusedLinearCrossEntropy()
    verdict = Certificate(mode, str(tmp_path / "cache")).prove(model, loss_fn, packed=True, loader=loader)
    seconds, peak = time.monotonic() - start, (torch.cuda.max_memory_allocated() - before) / 2**30
    print(
        f"{type(model).__name__}: {seconds:.1f} s, {peak:.1f} GiB beside the model, {verdict.worst}, off {verdict.off}"
    )
    prove.peak = peak
    return verdict, seconds


@pytest.mark.parametrize("lora", [False, True], ids=["SFT", "LoRA"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_right_at_real_widths_is_left_alone(shape, lora, tmp_path):
    verdict, seconds = prove(build(shape, lora), tmp_path)
    assert verdict.off == {}
    assert verdict.unproved == []
    assert {"attention", "packing", "fused loss"} <= set(verdict.agree)
    assert ("LoRA kernel" in verdict.agree) == lora
    assert verdict.worst[f"{REAL}, bfloat16"] < 2
    assert seconds <= 10


class Rows:
    """Documents of 200 to 700 tokens of the whole vocabulary, prompts of 50 among them."""

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary

    lengths = tuple(200 + 60 * (i % 9) for i in range(64))

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        ids = torch.randint(
            0, self.vocabulary, (self.lengths[index] + 1,), generator=torch.Generator().manual_seed(index)
        )
        labels = ids[1:].clone()
        labels[:50] = -100
        return {"input_ids": ids[:-1].tolist(), "labels": labels.tolist()}


@pytest.fixture(scope="module", params=["llama 1B", "llama 8B"])
def checkpoint(request, tmp_path_factory):
    """Two layers of real width, with channels a hundred times larger than others, as trained models have them."""
    path = tmp_path_factory.mktemp("checkpoint")
    model_type, fields = SHAPES[request.param]
    config = AutoConfig.for_model(model_type, **fields, num_hidden_layers=LAYERS.get(model_type, 1))
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] *= 100
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[7] *= 30
            layer.input_layernorm.weight[5] *= 20
    model.save_pretrained(path)
    return request.param, path


@pytest.mark.parametrize("lora", [False, True], ids=["SFT", "LoRA"])
def test_with_the_models_own_weights_on_its_first_micro_batch(checkpoint, lora, tmp_path):
    shape, path = checkpoint
    peft = PeftConfig(match_all_linear=True, dim=16) if lora else None
    model = NeMoAutoModelForCausalLM.from_pretrained(path, dtype="bfloat16", packed=True)
    if peft is not None:
        peft.apply(model, torch.device("cuda"))
    loader = DataLoader(Rows(SHAPES[shape][1]["vocab_size"]), packing=PackedSequence(2048))
    verdict, seconds = prove(model.cuda(), tmp_path, loader=loader)
    assert (verdict.off, verdict.unproved) == ({}, [])
    tried = verdict.tried[f"{REAL}, bfloat16"]
    assert tried.startswith("documents of the first micro-batch (")
    assert tried.endswith("; the model's own weights")
    assert ("LoRA kernel" in verdict.agree) == lora
    assert verdict.worst[f"{REAL}, bfloat16"] < 2
    assert seconds <= 10
    assert prove.peak <= (6 if shape == "llama 1B" else 14), "GiB: float32 and 16 bit of one block and the head"


def test_an_attention_that_is_wrong_for_large_values_only(tmp_path, monkeypatch):
    def saturates(module, query, *args, **kwargs):
        return right_attention(module, query.clamp(-12, 12), *args, **kwargs)

    model_type, fields = SHAPES["llama 1B"]
    config = AutoConfig.for_model(model_type, **fields, num_hidden_layers=LAYERS.get(model_type, 1))
    with torch.device("cuda"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.self_attn.q_proj.weight *= 20
    plain.save_pretrained(tmp_path / "model")
    model = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="bfloat16", packed=True).cuda()
    monkeypatch.setattr(function, "attention", saturates)
    assert prove(build("llama 1B", False), tmp_path / "fresh", "warn")[0].off == {}
    verdict, _ = prove(model, tmp_path, "warn", loader=DataLoader(Rows(65536), packing=PackedSequence(2048)))
    assert list(verdict.off) == ["attention"]
    assert REAL in verdict.off["attention"]


def test_an_attention_that_is_wrong_at_real_head_sizes_only_is_switched_off(tmp_path, monkeypatch):
    def forgets_a_channel(module, query, *args, **kwargs):
        if query.shape[-1] >= 64:
            query = torch.cat([query[..., :-1], torch.zeros_like(query[..., -1:])], -1)
        return right_attention(module, query, *args, **kwargs)

    model = build("llama 1B", False)
    monkeypatch.setattr(function, "attention", forgets_a_channel)
    verdict, _ = prove(model, tmp_path, "warn")
    assert list(verdict.off) == ["attention"]
    assert REAL in verdict.off["attention"]
    assert model.config._attn_implementation == "sdpa"


def test_a_wrong_gradient_of_the_lora_kernel_is_switched_off(tmp_path, monkeypatch):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, b):
            return b.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 0.9

    def kernel(x, weight, bias, a, b, scale):
        return right_kernel(x, weight, bias, a, Scaled.apply(b), scale)

    model = build("llama 1B", True)
    monkeypatch.setattr(linear, "lora_linear", kernel)
    verdict, _ = prove(model, tmp_path, "warn")
    assert list(verdict.off) == ["LoRA kernel"]
    assert not any(layer.lora_use_triton for _, layer in linear.lora_layers(model))
