"""What a config field counts, told from its name: the one place where names of fields are known."""

from __future__ import annotations

import re
from typing import Any

from transformers import PretrainedConfig

HIDDEN = ("embed_dim", "hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_dim", "hidden_dim")
"""Names of a part's own width, the likeliest first."""

HEADS = re.compile(r"(attention_heads|^n_heads?|num_heads|_heads|heads_per_layer)$")
KEY_VALUE_HEADS = re.compile(r"(key_value_heads|kv_heads|kv_n_heads|query_groups|num_key_heads)$")
HEAD_DIM = re.compile(r"(head_dim|d_head|dim_head|d_kv|kv_channels|headdim|head_size|rotary_dim)$")
GROUPS = re.compile(r"(n_groups|o_groups|^num_groups|ngroups)$")
EXPERTS = re.compile(r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|zero_expert_num|n_experts)$")
TOP_K = re.compile(r"(experts_per_tok(en)?|moe_top_?k|moe_k|^top_?k(_experts)?|^n_group|num_expert_group)$")
EXPERT_GROUPS = re.compile(r"^(n_group|num_expert_group|topk_group)s?$")
QUERIES = re.compile(r"^(latent_query_num|num_query_tokens|num_latents|resampler_n_latents|resampler_num_latents)$")
WINDOW = re.compile(r"(sliding_window|attention_window|window_size|local_attention|window_len|window_length)$")
CHUNK = re.compile(r"(chunk_size|chunk_length|index_topk|_budget|index_block_size|compress_rates?|index_kpool)$")
BLOCKS_CHOSEN = re.compile(r"topk_blocks$")  # of keys, each as wide as a CHUNK
VOCABULARY = re.compile(r"vocab(_size)?(_\w+)?$|^num_embeddings$|codebook_size")
POSITIONS = re.compile(r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length)$")
WIDTH = re.compile(
    r"(size|sizes|dims?|width|rank|channels?|channel_size|d_model|d_ff|dff|inner|ffn|embd|hidden|intermediate|d_ssm"
    r"|features|input_feat_size)$|^(mlp_hidden|hidden_size|projection|intermediate|ffn)"
)
NOT_WIDTH = re.compile(
    r"(pos_emb_|patch|image|kernel|window|block|chunk|group|merge_|crop|tile|batch|vocab|canvas|parallel|stride|pool|input_feat"
    r"|img|position|num_|resolution|feature_size|codebook_size|audio_channels|base_channels|scale|factor|patch_dim)"
)
IMAGE_TOKEN = re.compile(r"^(image_token_id|image_token_index|video_token_id|video_token_index|audio_token_id)$")
GRID = re.compile(r"^axial_pos_shape$")
CODES = re.compile(r"^(num_embeddings|codebook_size)$")
CODE_NAMES = re.compile(r"^vocabulary_map$")
_TOKEN = re.compile(r"(token_ids?|token_index|im_\w+_id|image_patch_id|lang_id|suppress_tokens|unk_index|mask_index)$")


def is_int(value: Any) -> bool:
    """Whether ``value`` is a number to count with; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_width(name: str) -> bool:
    """Whether a field of this name is a width of some layer."""
    return bool(WIDTH.search(name)) and (not NOT_WIDTH.search(name) or "hidden_size" in name)


def is_token(name: str) -> bool:
    """Whether a field of this name holds token ids."""
    return bool(_TOKEN.search(name)) and "_per_" not in name


def parts_of(config: PretrainedConfig) -> list[PretrainedConfig]:
    """``config`` and all its sub-configs."""
    found = [config]
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            found += parts_of(value)
    return found


def text_part(config: PretrainedConfig) -> PretrainedConfig:
    """The sub-config of the decoder that writes text."""
    try:
        return config.get_text_config(decoder=True)
    except ValueError:  # several
        return getattr(config, "decoder", config)


def fields_of(part: PretrainedConfig) -> dict[str, Any]:
    """The fields of one part by their own names, sub-configs left out."""
    fields = {k: v for k, v in vars(part).items() if not k.startswith("_") and not isinstance(v, PretrainedConfig)}
    if (overrides := part.to_dict().get("per_layer_config")) is not None:
        fields["per_layer_config"] = {int(layer): dict(values) for layer, values in overrides.items()}
    return fields


def find(part: PretrainedConfig, fields: dict[str, Any], *names: str) -> str | None:
    """The field of ``part`` with a number that has one of ``names``, or that its class calls so; None if there is none."""
    for name in names:
        for candidate in (name, part.attribute_map.get(name, name)):
            if is_int(fields.get(candidate)):
                return candidate
    return None
