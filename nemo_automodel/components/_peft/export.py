"""Adapters as PEFT writes and reads them, and the merged weights as the base model's own files hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from nemo_automodel.components._peft.linear import LoRALinear, assign, clean_name, full_tensor, lora_layers
from nemo_automodel.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ADAPTER_PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every adapter parameter of ``model`` (the live ones, sharded or not) under its key in an adapter file."""
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in lora_layers(model):
        for part in _ADAPTER_PARTS:
            parameter = getattr(layer, part) if "." not in part else getattr(layer, part.split(".")[0]).weight
            if parameter is not None:
                tensors[f"{_PREFIX}{name}.{part}"] = parameter
    return tensors


def gathered_adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """``adapter_tensors``, whole on every rank and detached. A collective where the model is sharded."""
    return {key: full_tensor(tensor.detach()).contiguous() for key, tensor in adapter_tensors(model).items()}


def merged_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """``model.state_dict()`` as the base model would have it, with every adapter added to its weight.

    Each sum is made in fp32, one weight at a time, and cast to the base's dtype; the model itself is not changed.
    Sharded weights stay sharded. A collective where the model is sharded.
    """
    merged = {f"{name}.weight": layer for name, layer in lora_layers(model)}
    tensors: dict[str, torch.Tensor] = {}
    for raw_key, tensor in model.state_dict().items():
        key = clean_name(raw_key)
        if key.endswith(_ADAPTER_PARTS):
            continue
        tensors[key] = merged[key].merged_weight() if key in merged else tensor
    return tensors


def peft_target_modules(model: nn.Module) -> list[str]:
    """The shortest list from which PEFT adapts exactly the layers adapted here.

    PEFT takes an entry as a whole name or as its end after a dot. A last part (``q_proj``) is enough where every module
    that ends so is adapted; otherwise the whole names stand.
    """
    adapted: dict[str, list[str]] = {}
    others: set[str] = set()
    for raw_name, module in model.named_modules():
        name = clean_name(raw_name)
        last = name.rsplit(".", 1)[-1]
        if isinstance(module, LoRALinear):
            adapted.setdefault(last, []).append(name)
        else:
            others.add(last)
    return sorted(
        target for last, names in adapted.items() for target in (names if last in others else [last])
    )  # fmt: skip


def read_adapter_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a PEFT adapter directory, on the CPU."""
    path = directory / WEIGHTS_NAME
    try:
        return load_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: the adapter's weights cannot be read ({error})") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file, or a damaged one ({error})") from error


def adapted_names(saved: dict[str, torch.Tensor]) -> list[str]:
    """The layers that the tensors of an adapter file belong to. (``target_modules`` may be a regular expression.)"""
    end = ".lora_A.weight"
    return [key.removeprefix(_PREFIX).removesuffix(end) for key in saved if key.endswith(end)]


def load_tensors(model: nn.Module, saved: dict[str, torch.Tensor], path: Path) -> None:
    """Copy the tensors of an adapter file into the adapters of ``model``, all of them and no others."""
    wanted = adapter_tensors(model)
    missing, unexpected = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{path}: the adapter does not fit the model: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(unexpected)} have no layer {unexpected[:3]}; load it onto the base model it was trained on"
        )
    for key, parameter in wanted.items():
        if saved[key].shape != parameter.shape:
            raise CheckpointError(
                f"{path}: {key} has shape {tuple(saved[key].shape)}, the model's adapter {tuple(parameter.shape)}"
            )
        assign(parameter, saved[key])


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """``adapter_config.json`` of a PEFT directory, checked to be one that this implementation computes the same way."""
    path = directory / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); give a PEFT adapter directory") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be loaded")
    unsupported = [
        key
        for key in ("use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "target_parameters",
                    "layers_to_transform", "layer_replication", "trainable_token_indices")
        if config.get(key)
    ]  # fmt: skip
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if unsupported:
        raise CheckpointError(f"{path}: uses {', '.join(unsupported)}, which is not supported; load it with peft")
    return config
