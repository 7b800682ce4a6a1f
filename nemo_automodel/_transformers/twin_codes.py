"""Vocabularies that name the codes of an image tokenizer: a mapping from a token's text to its id, in a config."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from transformers import PretrainedConfig

from nemo_automodel._transformers import twin_fields as names
from nemo_automodel._transformers.twin_fields import is_int

IMAGE = "<image>"
_ALIKE = 6  # letters that the names of all codes begin with
_OTHERS = 16


def name_codes(part: PretrainedConfig, parts: list[PretrainedConfig], source: str) -> None:
    """Fill a vocabulary map that is None with the names that the model's ``source`` looks up in it."""
    unset = [k for k, v in names.fields_of(part).items() if v is None and names.CODE_NAMES.search(k)]
    sizes = [v for p in parts for k, v in names.fields_of(p).items() if is_int(v) and names.CODES.search(k)]
    prefixes = re.findall(r"name\.startswith\(\"([^\"]+)\"\)", source)
    if not unset or not sizes or not prefixes:
        return
    vocab_size = getattr(names.text_part(part), "vocab_size", 4 * sizes[0])
    lettered = 'ord("A")' in source
    found = {_name(prefixes[0], i, lettered): vocab_size // 2 + i for i in range(sizes[0])}
    wanted = dict.fromkeys(re.findall(r"vocab_map\.get\(\"([^\"]+)\"\)", source))
    found |= {name: vocab_size - 1 - i for i, name in enumerate(wanted)}
    for name in unset:
        setattr(part, name, found)


def shrink_codes(
    old: dict[int, dict[str, Any]], new: dict[int, dict[str, Any]], tokens: dict[int, int], vocab_size: int
) -> None:
    """Keep a quarter of the twin's vocabulary for codes, in every vocabulary map and in the codebook itself."""
    maps = [(key, k) for key, fields in old.items() for k, v in fields.items() if v and names.CODE_NAMES.search(k)]
    for key, name in maps:
        new[key][name] = _fewer(old[key][name], tokens, vocab_size)
        for part, fields in old.items():
            for field, value in fields.items():
                if is_int(value) and names.CODES.search(field):
                    new[part][field] = min(value, vocab_size // 4)


def image_id(part: PretrainedConfig) -> int | None:
    """The image placeholder's id where only a vocabulary map tells it."""
    maps = [v for k, v in names.fields_of(part).items() if v and names.CODE_NAMES.search(k)]
    return next((found[IMAGE] for found in maps if IMAGE in found), None)


def _fewer(whole: dict[str, int], tokens: dict[int, int], vocab_size: int) -> dict[str, int]:
    (alike, _), *_ = Counter(name[:_ALIKE] for name in whole).most_common(1)
    codes = sorted((name for name in whole if name.startswith(alike)), key=whole.__getitem__)[: vocab_size // 4]
    others = [name for name in whole if name.startswith("<") and not name.startswith(alike)]
    others = sorted(others, key=lambda name: name != IMAGE)[:_OTHERS]
    kept = {name: vocab_size // 2 + i for i, name in enumerate(codes)}
    return kept | {name: tokens.get(whole[name], vocab_size * 3 // 4 + i) for i, name in enumerate(others)}


def _name(prefix: str, number: int, lettered: bool) -> str:
    if lettered:  # digits as letters, closed by one that is none
        return prefix + "".join(chr(ord("A") + int(digit)) for digit in str(number)) + "Z"
    return f"{prefix} {number:06d}|>"


__all__ = ["image_id", "name_codes", "shrink_codes"]
