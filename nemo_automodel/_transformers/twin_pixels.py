"""Small random images as a vision-language model's forward takes them, told from the names of its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.image_processing_utils import select_best_resolution

from nemo_automodel._transformers import twin_fields as names
from nemo_automodel._transformers.twin_images import side_of


def image_inputs(
    config: PretrainedConfig, accepted: set[str], *, rows: int, seed: int = 0
) -> Iterator[dict[str, Tensor]]:
    """One image a row for a forward that takes the arguments ``accepted``: each way it may be meant, the likeliest first.

    Shapes: C channels, p the patch's side, S the image's side, h and w the image's sides in patches.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    eye = _Eye(config)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for convention in _CONVENTIONS:
        for made in convention(eye, accepted, rows, random):
            if "high_res_pixel_values" in accepted:
                side = side_of(config.high_res_vision_config.image_size) or eye.size
                made["high_res_pixel_values"] = random(rows, eye.channels, side, side)
            made = {k: v for k, v in made.items() if k in accepted}
            if made:
                yield made


class _Eye:
    """What a config says of the images that its model sees."""

    def __init__(self, config: PretrainedConfig) -> None:
        parts = names.parts_of(config)
        see = [p for p in parts if hasattr(p, "patch_size")] or parts
        halvings = len(_get(parts, "channel_multiplier") or [1]) - 1
        self.patch = side_of(_get(see, "patch_size")) or 2**halvings
        merges = (_get(see, "spatial_merge_size"), _get(parts, "spatial_merge_size"), _get(see, "merge_kernel_size"))
        self.merge = next((side_of(m) for m in (*merges, _get(parts, "merge_size")) if m is not None), None) or 2
        self.frames = _get(see, "temporal_patch_size") or _get(see, "patch_temporal") or 1
        self.channels = _get(see, "num_channels") or _get(see, "in_channels") or _get(see, "in_chans") or 3
        self.sizes = [side for p in see if (side := side_of(getattr(p, "image_size", None)))]
        self.width = _get(see, "patch_embed_hidden_size") or self.channels * self.patch**2
        self.size = (
            side_of(_get(see, "image_size")) or side_of(_get(parts, "image_size")) or self.patch * self.merge * 2
        )
        self.pinpoints = _get(parts, "image_grid_pinpoints")
        self.max_tiles = _get(parts, "max_num_tiles") or 1

    @property
    def grid(self) -> int:
        """Patches along one side of a small image that its model can merge."""
        return 2 * self.merge


def _grids(eye: _Eye, accepted: set[str], rows: int, random: Any) -> Iterator[dict[str, Tensor]]:
    """A row of patches for all images, and each image's grid."""
    if not accepted & {"image_grid_thw", "image_grid_hw"}:
        return
    h = w = eye.grid
    n, patch = rows * h * w, eye.patch
    sizes = {
        "image_grid_thw": torch.tensor([[1, h, w]] * rows),
        "image_grid_hw": torch.tensor([[h, w]] * rows),
        "image_merge_sizes": torch.tensor([eye.merge] * rows),
    }
    yield {"pixel_values": random(n, eye.channels * eye.frames * patch**2), **sizes}
    yield {"pixel_values": random(n, eye.channels, patch, patch), **sizes}
    yield {"pixel_values": random(1, n, eye.channels, patch, patch), **sizes}
    yield {"pixel_values": random(n, patch, patch, eye.channels * eye.frames), **sizes}
    merged = eye.merge * patch  # grids may count patches merged already
    yield {"pixel_values": random(n, merged, merged, eye.channels), **sizes}


def _positions(eye: _Eye, accepted: set[str], rows: int, random: Any) -> Iterator[dict[str, Tensor]]:
    if not accepted & {"image_position_ids", "spatial_shapes"}:
        return
    h = w = eye.grid
    places = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).reshape(1, h * w, 2)
    for side in (eye.patch, 2 * eye.patch, 3 * eye.patch, 4 * eye.patch):
        yield {
            "pixel_values": random(rows, h * w, eye.channels * side**2),
            "image_position_ids": places.expand(rows, -1, -1).contiguous(),
            "spatial_shapes": torch.tensor([[h, w]] * rows),
            "pixel_attention_mask": torch.ones(rows, h * w, dtype=torch.long),
        }


def _flattened(eye: _Eye, accepted: set[str], rows: int, random: Any) -> Iterator[dict[str, Tensor]]:
    if "flattened_patches" not in accepted:
        return
    h = w = 4
    places = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).reshape(1, h * w, 2) + 1.0
    pixels = random(rows, h * w, eye.width)
    sides = {"width": torch.tensor([w] * rows), "height": torch.tensor([h] * rows)}
    yield {"flattened_patches": torch.cat([places.expand(rows, -1, -1), pixels], -1), **sides}


def _target_sizes(eye: _Eye, accepted: set[str], rows: int, random: Any) -> Iterator[dict[str, Tensor]]:
    if "target_sizes" not in accepted:
        return
    h = w = 2 * eye.grid
    yield {
        "pixel_values": random(1, eye.channels, eye.patch, eye.patch * h * w * rows),
        "target_sizes": torch.tensor([[h, w]] * rows),
    }


def _tiles(eye: _Eye, accepted: set[str], rows: int, random: Any) -> Iterator[dict[str, Tensor]]:
    """The whole image and its tiles, where the config lists the resolutions that images are cut for."""
    if eye.pinpoints is None or "image_sizes" not in accepted:
        return
    height, width = select_best_resolution((eye.size, eye.size), eye.pinpoints)
    tiles = (height // eye.size) * (width // eye.size) + 1
    yield {
        "pixel_values": random(rows, tiles, eye.channels, eye.size, eye.size),
        "image_sizes": torch.tensor([[eye.size, eye.size]] * rows),
        "batch_num_images": torch.ones(rows, dtype=torch.long),
    }


def _aspect_ratios(eye: _Eye, accepted: set[str], rows: int, random: Any) -> Iterator[dict[str, Tensor]]:
    if "aspect_ratio_ids" not in accepted:
        return
    mask = torch.zeros(rows, 1, eye.max_tiles, dtype=torch.long)
    mask[..., 0] = 1
    yield {
        "pixel_values": random(rows, 1, eye.max_tiles, eye.channels, eye.size, eye.size),
        "aspect_ratio_ids": torch.ones(rows, 1, dtype=torch.long),
        "aspect_ratio_mask": mask,
    }


def _crops(eye: _Eye, accepted: set[str], rows: int, random: Any) -> Iterator[dict[str, Tensor]]:
    """Several images a row, as one more dimension."""
    if not accepted & {"pixel_attention_mask", "image_attention_mask"}:
        return
    yield {
        "pixel_values": random(rows, 1, eye.channels, eye.size, eye.size),
        "pixel_attention_mask": torch.ones(rows, 1, eye.size, eye.size, dtype=torch.bool),
    }
    for kind in (torch.bool, torch.long):
        yield {
            "pixel_values": random(rows, 1, eye.channels, eye.size, eye.size),
            "pixel_attention_mask": torch.ones(rows, 1, dtype=kind),
        }


def _pooled(eye: _Eye, accepted: set[str], rows: int, random: Any) -> Iterator[dict[str, Tensor]]:
    """Patches of a square each, and for each token of the text the patches that it pools."""
    if "image_token_pooling" not in accepted:
        return
    side = eye.size // eye.patch
    places = torch.arange(rows * side * side).reshape(rows, side, side)
    blocks = places[:, : side // 2 * 2, : side // 2 * 2].unfold(1, 2, 2).unfold(2, 2, 2)  # [rows, h, w, 2, 2]
    yield {
        "pixel_values": random(rows, side * side, eye.channels * eye.patch**2),
        "image_token_pooling": blocks.reshape(-1, 4),
        "image_grids": torch.tensor([[side // 2, side // 2, 0, 0]] * rows),
        "image_num_crops": torch.ones(rows, dtype=torch.long),
    }


def _cubes(eye: _Eye, accepted: set[str], rows: int, random: Any) -> Iterator[dict[str, Tensor]]:
    """Patches with their channels last, one or several frames each."""
    yield {"pixel_values": random(4 * rows, eye.frames, eye.patch, eye.patch, eye.channels)}


def _squares(eye: _Eye, accepted: set[str], rows: int, random: Any) -> Iterator[dict[str, Tensor]]:
    for size in dict.fromkeys((eye.size, *eye.sizes)):
        pixels = random(rows, eye.channels, size, size)
        square = {"pixel_values": pixels, "pixel_values_images": pixels}
        yield square | {"pixel_mask": torch.ones(rows, size, size, dtype=torch.bool)}
        yield square | {"image_sizes": torch.tensor([[size, size]] * rows)}
        yield {"pixel_values": pixels[:, None]}
    yield {"pixel_values": random(rows, (eye.size // eye.patch) ** 2, eye.channels * eye.patch**2)}


_CONVENTIONS = (
    _grids,
    _positions,
    _flattened,
    _target_sizes,
    _tiles,
    _aspect_ratios,
    _pooled,
    _crops,
    _squares,
    _cubes,
)


def _get(parts: list[PretrainedConfig], name: str) -> Any:
    return next((v for p in parts if (v := getattr(p, name, None)) is not None), None)


__all__ = ["image_inputs"]
