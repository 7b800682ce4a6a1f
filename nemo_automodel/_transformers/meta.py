"""Models without memory: built on the meta device, sharded there, and given memory once each rank knows its part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from nemo_automodel._transformers import compat
from nemo_automodel.components.checkpoint.shards import like_local, local_of
from nemo_automodel.errors import ModelError


def build(
    auto_class: Any, config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None, **options: Any
) -> PreTrainedModel:
    """The model of ``config`` on the meta device, each tensor of the dtype that it has once it is loaded in ``dtype``."""
    arguments: dict[str, Any] = {"dtype": dtype, **options}
    if attn_implementation is not None and attn_implementation != "automodel":
        arguments["attn_implementation"] = attn_implementation
    with compat.on_meta():
        model: PreTrainedModel = auto_class.from_config(config, **arguments)
    kept = compat.kept_dtype(model, dtype)
    for name, parameter in model.named_parameters():
        wanted = kept(name) or parameter.dtype
        if wanted != parameter.dtype or not parameter.is_meta:  # some constructors do not ask where they are to build
            _replace(parameter, torch.empty_like(parameter, dtype=wanted, device="meta"))
    return model


def is_meta(model: nn.Module) -> bool:
    """Whether ``model`` is still without memory."""
    return any(parameter.is_meta for parameter in model.parameters())


def unplaced(model: nn.Module) -> str | None:
    """The name of a tensor of ``model`` that would stay on the meta device, being neither parameter nor buffer."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                return f"{name}.{key}".removeprefix(".")
    return None


def materialize(model: nn.Module, device: torch.device, weights_on: torch.device) -> None:
    """Give every buffer memory on ``device`` and every parameter on ``weights_on``, of a sharded one this rank's part.

    Parameters stay the objects they are, so that ties, and whoever holds them, keep.
    """
    for parameter in dict.fromkeys(model.parameters()):
        if parameter.is_meta:
            _replace(parameter, _empty(parameter, weights_on))
    placed: dict[int, Tensor] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = placed.setdefault(id(buffer), _empty(buffer, device))


def set_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies, ...) as the model's own code does.

    Raises ModelError where one is left unset. Call it before the weights are set: it may write into some of them.
    """
    buffers = dict(model.named_buffers())
    for buffer in buffers.values():
        local_of(buffer).fill_(_unset(buffer.dtype))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        compat.initialize_where_unset(model, model.parameters())
    saved = set(model.state_dict())
    for name in buffers:
        if name not in saved and _is_unset(local_of(model.get_buffer(name))):
            raise ModelError(f"{type(model).__name__}: its buffer {name} is not set by the model's own initialisation")


def _empty(tensor: Tensor, device: torch.device) -> Tensor:
    if not isinstance(tensor, DTensor):
        return torch.empty_like(tensor, device=device)
    return like_local(tensor, torch.empty_like(tensor.to_local(), device=device))


@torch.no_grad()
def _replace(parameter: nn.Parameter, value: Tensor) -> None:
    torch.utils.swap_tensors(parameter, nn.Parameter(value, requires_grad=parameter.requires_grad))


def _unset(dtype: torch.dtype) -> Any:
    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    return False if dtype == torch.bool else torch.iinfo(dtype).min


def _is_unset(tensor: Tensor) -> bool:
    if tensor.numel() == 0 or tensor.dtype in (torch.bool, torch.uint8):
        return False
    unset = torch.isnan(tensor) if tensor.dtype.is_floating_point else tensor == _unset(tensor.dtype)
    return bool(unset.any())


def reason_against(config: PretrainedConfig, options: Mapping[str, Any], understood: set[str]) -> str | None:
    """Why a model must be loaded whole, None where it can be loaded shard by shard."""
    if getattr(config, "quantization_config", None) is not None:
        return "its checkpoint is quantised"
    if getattr(config, "auto_map", None) and type(config).__module__.startswith("transformers_modules"):
        return "it brings model code of its own"
    if getattr(config, "transformers_weights", None):
        return "its config names weight files of its own"
    for key, value in options.items():
        if value is not None and key not in understood and not hasattr(config, key):
            return f"of model.{key}"
    return None
