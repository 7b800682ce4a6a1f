"""A model's tiny twin: its config made narrow and shallow, every structural switch kept.

Nothing here knows a model. A field is shrunk by what its name says it counts (layers, heads, widths, experts, tokens)
and by how its value relates to other values of the same config: what was equal, a multiple or a product stays so.
"""

from __future__ import annotations

import math
import re
from typing import Any

from transformers import PretrainedConfig

from nemo_automodel._transformers.twin_layers import cut_layers, is_layer_count


def tiny_twin(config: PretrainedConfig, *, layers: int = 2, heads: int = 4, vocab_size: int = 128) -> PretrainedConfig:
    """Shrink ``config`` to a model of the same structure that builds in seconds.

    Args:
        config: any transformers config, with its sub-configs.
        layers: how many layers of each kind to keep.
        heads: query heads; grouped key-value heads are half of them, single ones stay single.
        vocab_size: tokens of the vocabulary; special tokens are moved into it.
    """
    parts = _parts(config)
    text = config.get_text_config()
    shrinker = _Shrinker(layers, heads, vocab_size, parts)
    for part in sorted(parts, key=lambda p: p is not text):
        shrinker.shrink(part)
    return _rebuild(config, shrinker.new)


def _parts(config: PretrainedConfig) -> list[PretrainedConfig]:
    found = [config]
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            found += _parts(value)
    return found


def _rebuild(config: PretrainedConfig, new: dict[int, dict[str, Any]]) -> PretrainedConfig:
    return type(config).from_dict(_as_dict(config, new))


def _as_dict(config: PretrainedConfig, new: dict[int, dict[str, Any]]) -> dict[str, Any]:
    data = config.to_dict()
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            data[name] = _as_dict(value, new)
    for name, value in new[id(config)].items():
        data[name] = value
    return data


_TOKEN = re.compile(r"(token_ids?|token_index|_token|_index|im_\w+_id|patch_id|lang_id|suppress_tokens)$")
_NOT_TOKEN = re.compile(r"(start_index|end_index|start_token_index)$")
_VOCAB = re.compile(r"vocab|^num_embeddings$|codebook_size|_types$")
_EXPERTS = re.compile(r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|zero_expert_num|n_experts)$")
_TOP_K = re.compile(r"(experts_per_tok|experts_per_token|moe_top_?k|moe_k|^top_?k(_experts)?)$")
_KV_HEADS = re.compile(r"(key_value_heads|kv_heads|kv_n_heads|query_groups|num_key_heads)$")
_HEADS = re.compile(r"(attention_heads|^n_heads?|num_heads|_heads)$")
_GROUPS = re.compile(r"(n_groups|o_groups|^num_groups|ngroups)$")
_HEAD_DIM = re.compile(r"(head_dim|d_head|dim_head|d_kv|kv_channels|headdim|head_size)$")
_HIDDEN = ("hidden_size", "d_model", "embed_dim", "n_embd", "emb_dim", "dim", "embedding_dim", "hidden_dim")
_WIDTH = re.compile(
    r"(size|dim|width|rank|channels?|d_model|d_ff|dff|inner|ffn|embd|hidden|intermediate|d_inner|d_ssm|features)$"
    r"|^(mlp_hidden|hidden_size|projection|intermediate|ffn)"
)
_NOT_WIDTH = re.compile(
    r"(patch|image|kernel|window|block|chunk|group|merge|crop|tile|batch|conv_|vocab|canvas|parallel|stride|pool"
    r"|img|position|num_|resolution)"
)
_WINDOW = re.compile(r"(sliding_window|attention_window|window_size|local_attention|window_len|sliding_window_size)$")


class _Shrinker:
    """Values chosen so far, shared by all parts of one config."""

    def __init__(self, layers: int, heads: int, vocab_size: int, parts: list[PretrainedConfig]) -> None:
        self.layers, self.heads, self.vocab_size = layers, heads, vocab_size
        self.new: dict[int, dict[str, Any]] = {}
        self.widths: dict[int, int] = {}
        self.spare = [64, 32, 96, 48, 128, 160, 192, 224, 256]
        self.tokens = _token_map(parts, vocab_size)

    def shrink(self, part: PretrainedConfig) -> None:
        old = {k: v for k, v in vars(part).items() if not k.startswith("_")}
        new: dict[str, Any] = {}
        self.new[id(part)] = new
        names = {v: k for k, v in part.attribute_map.items()}
        canon = {k: names.get(k, k) for k in old}

        total = _first_int(old, canon, "num_hidden_layers") or _layer_count(old)
        new.update(cut_layers(old, total, self.layers))
        self._heads(old, new, canon)
        self._widths(part, old, new, canon)
        self._counts(old, new)

    def _heads(self, old: dict[str, Any], new: dict[str, Any], canon: dict[str, str]) -> None:
        for k, v in old.items():
            if _is_int(v) and v > 0 and _HEADS.search(canon[k]) and not _KV_HEADS.search(canon[k]):
                new[k] = min(v, self.heads) if v > 1 else v
        queries = _first(old, canon, "num_attention_heads")
        for k, v in old.items():
            if _is_int(v) and v > 0 and _KV_HEADS.search(canon[k]):
                q = old.get(queries) if queries else None
                new[k] = 1 if v == 1 else self.heads if v == q else max(self.heads // 2, 1)
            elif isinstance(v, (list, tuple)) and k.startswith("num_attention_heads") and v:
                pass
        for k, v in old.items():
            if _is_int(v) and _GROUPS.search(k):
                new[k] = 1 if v == 1 else 2

    def _widths(self, part: PretrainedConfig, old: dict[str, Any], new: dict[str, Any], canon: dict[str, str]) -> None:
        hidden_key = next((k for h in _HIDDEN for k in old if canon[k] == h and _is_int(old[k])), None)
        dims = {k: v for k, v in old.items() if _is_int(v) and v > 0 and _HEAD_DIM.search(k)}
        unit = math.gcd(*dims.values()) if dims else 1
        largest = max(dims.values(), default=0) // unit
        step = 16 if largest <= 1 else 8
        for k, v in dims.items():
            new[k] = v // unit * step if largest <= 8 else max(8, round(v / max(dims.values()) * 64 / 8) * 8)
        hidden = old.get(hidden_key) if hidden_key else None
        if hidden_key is None or not hidden:
            return self._ratios(old, new, canon, None, None)
        heads_key = _first(old, canon, "num_attention_heads")
        heads = old.get(heads_key) if heads_key else None
        dim_key = next((k for k in old if canon[k] == "head_dim" and k in dims), None)
        narrow = self.widths.get(hidden)
        if narrow is None:
            narrow = next(w for w in self.spare if w not in self.widths.values())
            if heads_key and heads and dim_key:
                whole = new[heads_key] * new[dim_key]
                ratio = heads * old[dim_key] / hidden
                narrow = whole if ratio == 1 else whole // 2 if ratio > 1 else whole * 2
            self.widths[hidden] = narrow
        new[hidden_key] = narrow
        if heads_key and heads and dim_key and heads * old[dim_key] == hidden:
            new[dim_key] = narrow // new[heads_key]
        for k, v in old.items():
            if k in new and _HEADS.search(canon[k]) and k != heads_key and not _KV_HEADS.search(canon[k]):
                for d, w in dims.items():
                    if (v * w) % hidden == 0 and v * w // hidden <= 4:
                        exact = v * w // hidden * narrow / new[d]
                        if exact == int(exact) and 1 <= exact <= 32:
                            new[k] = int(exact)
                            break
        return self._ratios(old, new, canon, hidden, narrow)

    def _ratios(
        self, old: dict[str, Any], new: dict[str, Any], canon: dict[str, str], hidden: int | None, narrow: int | None
    ) -> None:
        for k, v in old.items():
            if k in new or not _WIDTH.search(k) or _NOT_WIDTH.search(k):
                continue
            if _is_int(v) and v >= 16:
                new[k] = self._width(v, hidden, narrow)
            elif isinstance(v, (list, tuple)) and v and all(_is_int(x) and x >= 16 for x in v):
                new[k] = type(v)(self._width(x, hidden, narrow) for x in v)

    def _width(self, value: int, hidden: int | None, narrow: int | None) -> int:
        if value in self.widths:
            return self.widths[value]
        if hidden is None or narrow is None:
            hidden, narrow = next(iter(self.widths.items()), (1024, 64))
        return min(4 * narrow, max(8, round(value * narrow / hidden / 8) * 8))

    def _counts(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        for k, v in old.items():
            if _is_token(k):
                new[k] = _map_ints(v, self.tokens)
            elif k in new or not _is_int(v):
                continue
            elif _VOCAB.search(k) and v > self.vocab_size:
                new[k] = self.vocab_size
            elif _EXPERTS.search(k):
                new[k] = min(v, 4)
            elif _TOP_K.search(k) or k in ("n_group", "num_expert_group"):
                new[k] = min(v, 2)
            elif k == "topk_group":
                new[k] = 1
            elif _WINDOW.search(k):
                new[k] = min(v, 8)
            elif k == "attention_chunk_size":
                new[k] = min(v, 16)


def _token_map(parts: list[PretrainedConfig], vocab_size: int) -> dict[int, int]:
    found: set[int] = set()
    for part in parts:
        for k, v in vars(part).items():
            if _is_token(k):
                found.update(x for x in (v if isinstance(v, (list, tuple)) else [v]) if _is_int(x) and x >= 0)
    small = {i for i in found if i < 8}
    large = sorted(found - small)
    first = vocab_size - len(large)
    return {i: i for i in small} | {v: first + n for n, v in enumerate(large)}


def _map_ints(value: Any, table: dict[int, int]) -> Any:
    if _is_int(value):
        return table.get(value, value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map_ints(v, table) for v in value)
    return value


def _is_token(name: str) -> bool:
    return bool(_TOKEN.search(name)) and not _NOT_TOKEN.search(name)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _first(old: dict[str, Any], canon: dict[str, str], name: str) -> str | None:
    return next((k for k in old if canon[k] == name and _is_int(old[k])), None)


def _first_int(old: dict[str, Any], canon: dict[str, str], name: str) -> int | None:
    key = _first(old, canon, name)
    return old[key] if key else None


def _layer_count(old: dict[str, Any]) -> int | None:
    return next((v for k, v in old.items() if is_layer_count(k) and _is_int(v)), None)


__all__ = ["tiny_twin"]
