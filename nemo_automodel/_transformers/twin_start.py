"""The config that a registered architecture is tried with: its class's defaults, completed where they are not enough.

Some classes leave fields empty that every published config sets; without them transformers itself builds no model.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from nemo_automodel._transformers import compat
from nemo_automodel._transformers import twin_fields as names
from nemo_automodel._transformers.tiny_twin import tiny_twin
from nemo_automodel._transformers.twin_codes import name_codes
from nemo_automodel._transformers.twin_images import side_of
from nemo_automodel._transformers.twin_layers import is_layer_map

_WINDOW_MASK = '"sliding_attention": create_sliding_window_causal_mask('  # made whatever layers there are
_KINDS = ("full_attention", "linear_attention", "conv", "sliding_attention")


def start_config(model_type: str, *, causal: bool) -> PretrainedConfig:
    """The default config of ``model_type``, complete, as a decoder where ``causal`` and the class has such a switch."""
    config = CONFIG_MAPPING[model_type]()
    auto_class: Any = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    model_class = compat.model_class_for(auto_class, config)
    source = inspect.getsource(sys.modules[model_class.__module__]) if model_class else ""
    for part in names.parts_of(config):
        _add_missing_parts(part)
    for part in names.parts_of(config):
        complete(part, source)
        name_codes(part, names.parts_of(config), source)
    text = names.text_part(config)
    if causal and getattr(text, "is_decoder", None) is False:
        text.is_decoder = True
    for part in names.parts_of(config):
        _add_rate(part)
    if not causal:
        _complete_tokens(config, text, source)
        _fit_towers(config, text)
    _borrow_missing(config, auto_class)
    return config


def _add_missing_parts(part: PretrainedConfig) -> None:
    for name, kind in part.sub_configs.items():
        if getattr(part, name, None) is None and name == "vision_config" and issubclass(kind, PretrainedConfig):
            setattr(part, name, kind())


def _add_rate(part: PretrainedConfig) -> None:
    """By how much a projector downsamples, where it is not set; images get sides that its windows divide."""
    if getattr(part, "downsample_rate", "") is not None:
        return
    part.downsample_rate = "4/8"
    for tower in names.parts_of(part):
        size, patch = side_of(getattr(tower, "image_size", None)), side_of(getattr(tower, "patch_size", None))
        if size and patch and size % (8 * patch):
            tower.image_size = size = -(-size // (8 * patch)) * 8 * patch
        if size and getattr(part, "image_grid_pinpoints", None):
            part.image_grid_pinpoints = [[size, 2 * size], [2 * size, size], [2 * size, 2 * size]]


def _complete_tokens(config: PretrainedConfig, text: PretrainedConfig, source: str) -> None:
    """Give the special tokens that the model's code reads, and its config does not set, ids of their own."""
    vocab_size = getattr(text, "vocab_size", 1000)
    unset = [k for k in vars(config) if names.IMAGE_TOKEN.search(k) and getattr(config, k) is None]
    read = set(re.findall(r"self\.config\.(\w+_token_id)\b", source))
    missing = [name for name in sorted(read) if not hasattr(config, name) and not unset]
    for i, name in enumerate(unset + missing):
        setattr(config, name, vocab_size - 1 - i)


def _fit_towers(config: PretrainedConfig, text: PretrainedConfig) -> None:
    """What a tower puts out is as wide as the decoder, whatever its class's default says."""
    hidden = getattr(text, "hidden_size", None)
    if config is not text and names.is_int(vars(config).get("hidden_size")) and hidden:
        config.hidden_size = hidden
    for part in names.parts_of(config):
        if part is config or part is text or hidden is None:
            continue
        fields = names.fields_of(part)
        for name in ("out_hidden_size", "text_hidden_size", "adapter_out_dim"):
            if names.is_int(fields.get(name)):
                setattr(part, name, hidden)
        if names.is_int(fields.get("embed_dim")) and names.is_int(fields.get("hidden_size")) and "patch_size" in fields:
            part.hidden_size = hidden  # its own width is embed_dim
        if fields.get("downsample_channels"):
            _widen_next(config, part, fields["downsample_channels"][-1])
        if "vision_output_dim" in fields and "projector_output_dim" in fields:
            part.vision_output_dim = fields["projector_output_dim"]


def _widen_next(config: PretrainedConfig, tower: PretrainedConfig, width: int) -> None:
    """Make what stands beside ``tower`` as wide as what ``tower`` puts out."""
    for part in names.parts_of(config):
        beside = [v for v in vars(part).values() if isinstance(v, PretrainedConfig)]
        for other in beside if any(v is tower for v in beside) else ():
            if other is not tower and names.is_int(getattr(other, "hidden_size", None)):
                other.hidden_size = width


def complete(part: PretrainedConfig, source: str) -> None:
    """Fill those fields of one part of a config that are None and cannot be, by what their names count."""
    fields = names.fields_of(part)
    hidden, heads = names.find(part, fields, *names.HIDDEN), names.find(part, fields, "num_attention_heads")
    for name, value in fields.items():
        if name.startswith("clip_") and value is None:
            setattr(part, name, 8.0)
        elif value is None and is_layer_map(name):
            setattr(part, name, [[-2, 0], [-1, 1]])
        elif value is None and heads and (filled := _missing(name, fields, hidden, heads)) is not None:
            setattr(part, name, filled)
    layers = names.find(part, fields, "num_hidden_layers")
    if layers and "layer_types" in fields and fields["layer_types"] is None:
        part.layer_types = _alternate(_kinds_in(source, _KINDS), fields[layers])
    if layers and "mlp_layer_types" in fields and fields["mlp_layer_types"] is None:
        part.mlp_layer_types = ["dense"] + ["sparse"] * (fields[layers] - 1)
    kinds = getattr(part, "layer_types", None)
    slides = (kinds and "sliding_attention" in kinds) or _WINDOW_MASK in source
    if slides and "layer_types" in fields and getattr(part, "sliding_window", None) is None:
        part.sliding_window = 512
    if "rope_parameters" in fields and fields["rope_parameters"] == {} and kinds:
        part.rope_parameters = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in set(kinds)}
    rotates = "mrope_section" in getattr(part, "ignore_keys_at_rope_validation", ()) or "mrope_section" in source
    if heads and hidden and rotates and "vocab_size" in fields:
        _add_rope_sections(part, fields.get("head_dim") or fields[hidden] // fields[heads], source)


def _add_rope_sections(part: PretrainedConfig, head_dim: int, source: str) -> None:
    """Sections of multimodal rotary embeddings, in the proportions that the model's code falls back to."""
    rope = part.rope_parameters or {}
    if rope.get("rope_type") != "default" or "mrope_section" in rope:
        return
    pairs = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
    default = re.search(r"mrope_section\", \[(\d+), (\d+), (\d+)\]", source)
    shares = [int(n) for n in default.groups()] if default else [2, 3, 3]
    equal = pairs * max(shares) // sum(shares)
    rope["mrope_section"] = [equal if n == max(shares) else pairs - 2 * equal for n in shares]


def _missing(name: str, fields: dict[str, Any], hidden: str | None, heads: str) -> Any:
    if name == "head_dim" and hidden:
        return fields[hidden] // fields[heads]
    if name == "num_key_value_heads":
        return fields[heads]
    if names.TOP_K.search(name) and name.startswith("num_experts_per") and any(map(names.EXPERTS.search, fields)):
        return 2
    if name == "n_routed_experts" and fields.get("moe_intermediate_size"):
        return 8
    if name == "n_shared_experts" and fields.get("moe_intermediate_size"):
        return 1
    if name == "default_language" and fields.get("languages"):
        return fields["languages"][0]
    if name == "attn_layer_indices":
        return list(range(2, fields.get("num_hidden_layers", 0), 4))
    if name.startswith("indexer_"):
        counts = {"n_heads": fields[heads], "kv_heads": 1, "head_dim": fields.get("head_dim"), "budget": 64}
        return counts.get(name.removeprefix("indexer_"), 4 if name.endswith("ratio") else None)
    return None


def _kinds_in(source: str, kinds: tuple[str, ...]) -> list[str]:
    """Those kinds of layers that the model's own code asks for."""
    return [kind for kind in kinds if f'"{kind}"' in source] or ["full_attention"]


def _alternate(kinds: list[str], total: int) -> list[str]:
    return [kinds[i % len(kinds)] for i in range(total)]


def _borrow_missing(config: PretrainedConfig, auto_class: Any) -> None:
    """What the model cannot be built without: fields of the whole that a part is asked for, and numbers of experts."""
    for _ in range(4):
        try:
            twin = tiny_twin(config)
            with torch.device("meta"):
                auto_class.from_config(twin)
        except AttributeError as error:
            asked = [i for i, part in enumerate(names.parts_of(twin)) if part is error.obj]
            value = getattr(config, str(error.name), (getattr(config, "rope_parameters", None) or {}).get(error.name))
            if not asked or asked == [0] or value is None:
                return
            setattr(names.parts_of(config)[asked[0]], str(error.name), value)
        except TypeError:  # a layer of None by something
            if not any(_add_experts(part) for part in names.parts_of(config)):
                return
        except Exception:  # whoever builds it next gets to see it
            return
        else:
            return


def _add_experts(part: PretrainedConfig) -> bool:
    """Whether fields that count experts were all None and are set now."""
    fields = names.fields_of(part)
    unset = [k for k, v in fields.items() if v is None and (names.EXPERTS.search(k) or names.TOP_K.search(k))]
    for name in unset:
        setattr(part, name, 2 if names.TOP_K.search(name) else 8)
    if unset and fields.get("moe_intermediate_size", 0) is None:
        part.moe_intermediate_size = fields["intermediate_size"]
    return bool(unset)


__all__ = ["complete", "start_config"]
