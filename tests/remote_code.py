"""Model repositories that bring their own code, as authors write it before transformers has their model.

Two decoders of one kind (rotary attention, gated MLP), apart in where attention comes from: ``registry`` asks
transformers for it, ``own`` writes it out.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.builders import make_tokenizer

STYLES = ("registry", "own")

CONFIGURATION = """
from transformers import PretrainedConfig


class QuillConfig(PretrainedConfig):
    model_type = "quill"

    def __init__(self, vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=4, rms_norm_eps=1e-6, residual_scale=0.7, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.rms_norm_eps = rms_norm_eps
        self.residual_scale = residual_scale
        super().__init__(**kwargs)
"""

_REGISTRY = """
    def attend(self, q, k, v, mask, **kwargs):
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        out, _ = attention(self, q, k, v, mask, scaling=self.head_dim**-0.5, dropout=0.0, **kwargs)
        return out
"""
_OWN = """
    def attend(self, q, k, v, mask, **kwargs):
        return eager(self, q, k, v, mask, scaling=self.head_dim**-0.5)[0]
"""
_REGISTRY_MASK = "create_causal_mask(config=self.config, inputs_embeds=h, attention_mask=attention_mask, past_key_values=None, position_ids=position_ids)"
_OWN_MASK = "own_mask(h, attention_mask)"

_MODELING = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_quill import QuillConfig


def own_mask(h, attention_mask):
    length = h.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=h.device).tril()[None, None]
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, None, :].bool()
    return torch.zeros(allowed.shape, dtype=h.dtype, device=h.device).masked_fill(~allowed, torch.finfo(h.dtype).min)


def eager(module, q, k, v, mask, scaling, dropout=0.0, **kwargs):
    scores = q @ k.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores + mask[..., : k.shape[-2]]
    return (scores.float().softmax(-1).to(q.dtype) @ v).transpose(1, 2), None


def rotate(x, angles):
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class QuillNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return self.gain * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class QuillMixer(nn.Module):
    is_causal = True

    def __init__(self, config, index):
        super().__init__()
        self.config, self.layer_idx = config, index
        self.heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = 1
        self.wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
{attend}
    def forward(self, x, angles, mask, **kwargs):
        q, k, v = (part.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2) for part in self.wqkv(x).chunk(3, -1))
        return self.wo(self.attend(rotate(q, angles), rotate(k, angles), v, mask, **kwargs).flatten(2))


class QuillBlock(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.norm1 = QuillNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = QuillMixer(config, index)
        self.norm2 = QuillNorm(config.hidden_size, config.rms_norm_eps)
        self.w_in = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        self.w_out = nn.Linear(config.intermediate_size, config.hidden_size)
        self.scale = config.residual_scale

    def forward(self, h, angles, mask, **kwargs):
        h = h + self.scale * self.mixer(self.norm1(h), angles, mask, **kwargs)
        gate, value = self.w_in(self.norm2(h)).chunk(2, -1)
        return h + self.scale * self.w_out(nn.functional.gelu(gate) * value)


class QuillPreTrainedModel(PreTrainedModel):
    config_class = QuillConfig
    base_model_prefix = "backbone"
    _no_split_modules = ["QuillBlock"]
    {supports}

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.05)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, QuillNorm):
            nn.init.ones_(module.gain)


class QuillModel(QuillPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([QuillBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = QuillNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.tokens

    def set_input_embeddings(self, value):
        self.tokens = value

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):
        h = self.tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(h.shape[1], device=h.device)[None]
        half = self.config.hidden_size // self.config.num_attention_heads // 2
        frequencies = 10000.0 ** (-torch.arange(half, device=h.device) / half)
        angles = (position_ids[..., None].float() * frequencies)[:, None]
        mask = {mask}
        for block in self.blocks:
            h = block(h, angles, mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(h))


class QuillForCausalLM(QuillPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.backbone = QuillModel(config)
        self.unembed = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.unembed

    def set_output_embeddings(self, value):
        self.unembed = value

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None, **kwargs):
        h = self.backbone(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs).last_hidden_state
        logits = self.unembed(h)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)
"""

AUTO_MAP = {
    "AutoConfig": "configuration_quill.QuillConfig",
    "AutoModel": "modeling_quill.QuillModel",
    "AutoModelForCausalLM": "modeling_quill.QuillForCausalLM",
}


def modeling(style: str) -> str:
    """The modelling file of one of ``STYLES``."""
    registry = style == "registry"
    text = _MODELING.replace("{attend}", _REGISTRY if registry else _OWN)
    text = text.replace("{mask}", _REGISTRY_MASK if registry else _OWN_MASK)
    return text.replace(
        "{supports}", "_supports_sdpa = True\n    _supports_attention_backend = True" if registry else ""
    )


def write_remote_model(directory: Path, style: str) -> Path:
    """Write a model with code of its own, fp32 weights and a tokenizer."""
    directory.mkdir(parents=True)
    # transformers keeps one class of model for a class of config, so a config of each style has a file of its own
    (directory / "configuration_quill.py").write_text(f"# {style}\n{CONFIGURATION}")
    (directory / "modeling_quill.py").write_text(modeling(style))
    config = {"model_type": "quill", "architectures": ["QuillForCausalLM"], "auto_map": AUTO_MAP, "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(directory, trust_remote_code=True), trust_remote_code=True
    )
    model.save_pretrained(directory)
    saved = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**saved, "auto_map": AUTO_MAP}, indent=2))
    make_tokenizer("plain").save_pretrained(directory)
    return directory
