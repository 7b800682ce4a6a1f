"""Image sizes of a tiny twin: few patches, with every count of image tokens that the config holds in step."""

from __future__ import annotations

import math
import re
from typing import Any

from transformers import PretrainedConfig

from nemo_automodel._transformers.twin_fields import POSITIONS, is_int

_MERGE = re.compile(
    r"^(spatial_merge_size|merge_size|scale_factor|downsample_factor|adapter_merge_size|pooling_kernel_size)$"
)
_RATIO = re.compile(r"^(downsample_ratio|pixel_shuffle_ratio)$")
_TOKENS = re.compile(r"(tokens|seq_length|seq_len|num_patches|position_embeddings|tokens_per_image|num_query)")


def shrink_images(
    parts: list[PretrainedConfig], old: dict[int, dict[str, Any]], new: dict[int, dict[str, Any]]
) -> None:
    """Set a small image size in ``new`` where the config has one, with the fields that count its patches."""
    seeing = {}
    for part in parts:
        size, patch = side_of(old[id(part)].get("image_size")), side_of(old[id(part)].get("patch_size"))
        if size and patch and size >= patch:
            seeing[id(part)] = (size, patch)
    least = min((size // patch for size, patch in seeing.values()), default=0)
    for key, (size, patch) in seeing.items():
        side = size // patch
        merges = _merges(parts, old, side)
        small = max(2 * math.lcm(*merges) if merges else 4, 4)
        times, rest = divmod(side, least)
        if not rest and 1 < times <= 8:  # one tower's patches are merged into another's
            small *= times
        if small >= side:
            continue
        new[key]["image_size"] = _resize(old[key]["image_size"], small * patch)
        for other in parts:
            _follow(old[id(other)], new[id(other)], (side, small), (size, small * patch))


def _merges(parts: list[PretrainedConfig], old: dict[int, dict[str, Any]], side: int) -> list[int]:
    """By how much patches are merged along one side, as far as the fields tell."""
    found = []
    for part in parts:
        for name, value in old[id(part)].items():
            if is_int(value) and _MERGE.search(name) and 1 < value <= 8:
                found.append(value)
            elif isinstance(value, str) and (rate := re.fullmatch(r"\d+/(\d+)", value)):
                found.append(int(rate[1]))
            elif isinstance(value, float) and _RATIO.search(name) and 0 < value < 1:
                found.append(round(1 / value))
            elif is_int(value) and _TOKENS.search(name) and not POSITIONS.search(name) and value > 1:
                root = math.isqrt(value)
                if root * root == value and side % root == 0 and side // root <= 8:
                    found.append(side // root)
    return found


def _follow(old: dict[str, Any], new: dict[str, Any], sides: tuple[int, int], sizes: tuple[int, int]) -> None:
    side, small = sides
    for name, value in old.items():
        if is_int(value) and _TOKENS.search(name) and not POSITIONS.search(name) and value > 1:
            for extra in (0, 1):
                root = math.isqrt(value - extra)
                if root > 1 and root * root == value - extra and side % root == 0 and small % (side // root) == 0:
                    new[name] = (small * root // side) ** 2 + extra
                    break
            else:
                if (
                    math.isqrt(value) ** 2 == value and value > side * side
                ):  # more tokens than patches: not this image's
                    new[name] = (small // 2) ** 2
        elif isinstance(value, dict) and value and all(is_int(k) and is_int(v) for k, v in value.items()):
            new[name] = {(i + 1) ** 2 * small * small: 4 * (i + 1) for i in range(len(value))}  # patches to queries
        elif name == "image_grid_pinpoints" and value:
            new[name] = [[x * sizes[1] // sizes[0] for x in pair] for pair in value]


def side_of(value: Any) -> int | None:
    """The side of a square given as a number, a pair or a mapping; None where it is none of these."""
    if isinstance(value, dict):
        value = value.get("height")
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value if is_int(value) else None


def _resize(value: Any, size: int) -> Any:
    if isinstance(value, dict):
        return dict.fromkeys(value, size)
    return type(value)(size for _ in value) if isinstance(value, (list, tuple)) else size


__all__ = ["shrink_images", "side_of"]
