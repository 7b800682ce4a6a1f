"""A small valid batch for a tiny model of any architecture: text, or text with one small image a row.

Images are made as the model's forward takes them (grids of patches, squares, tiles), told from the names of its
arguments. How many image tokens a row needs is asked of the model: as many as it makes features.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from nemo_automodel._transformers import twin_fields as names
from nemo_automodel._transformers.twin_codes import image_id
from nemo_automodel._transformers.twin_pixels import image_inputs

_IMAGE_TOKEN = ("image_token_id", "image_token_index", "image_patch_id", "image_token", "video_token_index")
_BEFORE = ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index", "im_start_id")
_AFTER = ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index", "im_end_id")


def text_batch(*, rows: int = 2, length: int = 24, vocab_size: int = 128, seed: int = 0) -> dict[str, Any]:
    """``input_ids``, ``attention_mask`` and ``labels`` (the same ids, unshifted), each [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, vocab_size // 2, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def image_batch(model: nn.Module, *, rows: int = 2, length: int = 24, seed: int = 0) -> dict[str, Any]:
    """A ``text_batch`` with one random image a row, and what else ``model``'s forward needs with it.

    Image tokens are not label tokens; all is on the CPU, wherever ``model`` is. Raises what the model raises where it takes no such images.
    """
    config: Any = model.config
    accepted = _arguments(model)
    first: Exception | None = None
    for images in image_inputs(config, accepted, rows=rows, seed=seed):
        batch = text_batch(rows=rows, length=length, seed=seed)
        try:
            batch = _fit(model, batch, images, accepted, rows)
            with torch.no_grad():
                model(**_beside(model, batch))
        except Exception as error:  # not meant that way; the first way's own error is raised below
            first = first or error
            continue
        return batch
    if first is None:
        raise ValueError(f"{type(model).__name__} takes no images")
    raise first


def takes_images(model: nn.Module) -> bool:
    """Whether the model's forward has an argument for images."""
    accepted = _arguments(model)
    return next(image_inputs(model.config, accepted, rows=1), None) is not None  # type: ignore[arg-type]


def _arguments(model: nn.Module) -> set[str]:
    """What the model's forward takes, and labels; where it hands on whatever it gets, what the part that sees takes."""
    own = inspect.signature(type(model).forward).parameters
    found = {*own, "labels"}
    if "pixel_values" in own or not any(p.kind is p.VAR_KEYWORD for p in own.values()):
        return found
    for module in model.modules():
        inner = inspect.signature(type(module).forward).parameters
        if {"pixel_values", "input_ids"} <= inner.keys():
            return found | set(inner)
    return found


def _fit(
    model: nn.Module, batch: dict[str, Any], images: dict[str, Tensor], accepted: set[str], rows: int
) -> dict[str, Any]:
    """``batch`` with as many image tokens as the model makes features of ``images``, and the arguments that follow."""
    config: Any = model.config
    token = image_id(config) or _first_token(config, _IMAGE_TOKEN)
    if token is not None:
        count = _features_per_row(model, {**_extras(config, accepted, batch, None, rows), **images}, rows)
        if count is None:
            more = _extras(config, accepted, batch, token, rows)
            count = _told_by_error(model, {**batch, **images, **more}, token, rows)
        if count:
            batch = _with_image_tokens(config, batch, token, count)
    extras = _extras(config, accepted, batch, token, rows)
    return {k: v for k, v in {**batch, **images, **extras}.items() if k in accepted}


def _beside(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """``inputs`` where the model is."""
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _with_image_tokens(config: Any, batch: dict[str, Any], token: int, count: int) -> dict[str, Any]:
    rows = batch["input_ids"].shape[0]
    before, after = _first_token(config, _BEFORE), _first_token(config, _AFTER)
    middle = [t for t in (before,) if t is not None] + [token] * count + [t for t in (after,) if t is not None]
    image = torch.tensor(middle).expand(rows, -1)
    ids, labels = batch["input_ids"], batch["labels"]
    ids = torch.cat([ids[:, :4], image, ids[:, 4:]], 1)
    labels = torch.cat([labels[:, :4], torch.full_like(image, -100), labels[:, 4:]], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _features_per_row(model: nn.Module, images: dict[str, Tensor], rows: int) -> int | None:
    """How many image features the model makes of each row's image; None where it has no method that tells."""
    kinds = ("get_image_features", "get_video_features")
    method: Any = next((getattr(m, kind) for kind in kinds for m in model.modules() if hasattr(m, kind)), None)
    if method is None or not images:
        return None
    wanted = inspect.signature(method).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in wanted.values())
    inputs = {
        k: v for k, v in images.items() if k in wanted or (open_ended and "token_type" not in k and "mask" not in k)
    }
    try:
        with torch.no_grad():
            found = method(**_beside(model, inputs))
    except (ValueError, TypeError, RuntimeError):
        return None
    found = getattr(found, "pooler_output", found)
    while isinstance(found, (list, tuple)) and len(found) == 1:
        found = found[0]
    if isinstance(found, (list, tuple)) and found and isinstance(found[0], Tensor):
        return sum(_positions(f) for f in found) // rows
    return _positions(found) // rows if isinstance(found, Tensor) else None


def _positions(features: Tensor) -> int:
    return features.numel() // features.shape[-1]


def _told_by_error(model: nn.Module, batch: dict[str, Any], token: int, rows: int) -> int | None:
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][:, 4] = token
    try:
        with torch.no_grad():
            model(**_beside(model, {k: v for k, v in batch.items() if k in _arguments(model)}))
    except (ValueError, RuntimeError) as error:
        found = re.search(r"features:? (\d+)", str(error))
        return int(found.group(1)) // rows if found else None
    return 1


def _extras(config: Any, accepted: set[str], batch: dict[str, Any], token: int | None, rows: int) -> dict[str, Any]:
    ids = batch["input_ids"]
    is_image = (ids == token).long() if token is not None else torch.zeros_like(ids)
    made: dict[str, Any] = {
        "mm_token_type_ids": is_image,
        "moe_mm_token_type_ids": is_image,
        "token_type_ids": is_image,
        "qformer_input_ids": ids[:, :8],
        "qformer_attention_mask": torch.ones_like(ids[:, :8]),
        "cross_attention_mask": torch.ones(rows, ids.shape[1], 1, _tiles(config), dtype=torch.long),
        "image_attention_mask": torch.ones(rows, ids.shape[1], 1, dtype=torch.long),
        "bbox": torch.arange(4).expand(*ids.shape, 4) * 100,
    }
    if getattr(config, "canvas_length", None):  # what it writes, all at once; random where it is not given
        made["decoder_input_ids"] = ids
    queries = getattr(config, "latent_query_num", None)
    if queries and "image_embeds_position_mask" in accepted:
        mask = torch.zeros_like(ids)
        mask[:, 1 : 1 + queries] = 1
        made["image_embeds_position_mask"] = mask
    return {k: v for k, v in made.items() if k in accepted}


def _tiles(config: Any) -> int:
    return next((p.max_num_tiles for p in names.parts_of(config) if hasattr(p, "max_num_tiles")), 1)


def _first_token(config: Any, candidates: tuple[str, ...]) -> int | None:
    for part in names.parts_of(config):
        for name in candidates:
            value = getattr(part, name, None)
            if names.is_int(value):
                return value
    return None


__all__ = ["image_batch", "takes_images", "text_batch"]
