"""A PEFT adapter directory added to its base model: reading it, and the sum."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nemo_automodel.components._peft.experts import (
    expert_sum,
    factor_shapes,
    from_file,
    is_transposed_experts,
    split_adapter,
)
from nemo_automodel.components._peft.export import PREFIX
from nemo_automodel.components._peft.linear import low_rank_sum
from nemo_automodel.components._peft.match import is_transposed_linear
from nemo_automodel.errors import CheckpointError, ModelError

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_UNSUPPORTED = ("layer_replication", "trainable_token_indices", "megatron_config", "use_bdlora", "kasa_config")
_UNMERGED = ("alora_invocation_tokens", "arrow_config", "use_qalora")  # PEFT merges them neither
_INITS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")  # that leave the base weight as it is


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """``adapter_config.json`` of a PEFT directory, checked to describe a LoRA or DoRA adapter that can be merged.

    Raises:
        CheckpointError: It is unreadable, or of a kind that cannot be merged.
    """
    path = directory / CONFIG_NAME
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); give a PEFT adapter directory") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA can be merged")
    used = [key for key in _UNMERGED if config.get(key)]
    if used:
        raise CheckpointError(
            f"{path}: with {', '.join(used)} no merged weight is the same; use it with PEFT, unmerged"
        )
    used = [key for key in _UNSUPPORTED if config.get(key)]
    init = config.get("init_lora_weights", True)
    if str(init).lower() not in _INITS:  # pissa, olora, corda, loftq, lora_ga: PEFT changes the base weight
        used.append(f"init_lora_weights={init}")
    if used:
        raise CheckpointError(
            f"{path}: {', '.join(used)} cannot be merged here; merge it with PEFT: "
            "PeftModel.from_pretrained(...).merge_and_unload()"
        )
    return config


def read_adapter_weights(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a PEFT adapter directory, on the CPU.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing"
            + ("; convert adapter_model.bin to safetensors" if path.with_suffix(".bin").exists() else "")
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error})") from error


@torch.no_grad()
def merge_adapter(model: Any, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
    """Add an adapter to ``model`` in place: ``W += scale * B A`` in float32, cast once to the dtype of W.

    Args:
        model: The plain transformers model that the adapter was trained on.
        config: PEFT's adapter config: r, lora_alpha, rank_pattern, alpha_pattern, use_rslora, use_dora, fan_in_fan_out.
        weights: PEFT's tensors, ``base_model.model.<module>.lora_A.weight`` and so on; whole tensors of
            ``modules_to_save`` replace the model's.

    Raises:
        ModelError: A tensor belongs to no module of the model, or does not fit it.
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in weights.items():
        module, _, part = key.removeprefix(PREFIX).partition(".lora_")
        if part:
            layers.setdefault(module, {})[part.removesuffix(".weight")] = tensor
        else:
            layers.setdefault(module.rpartition(".")[0], {})["full." + module.rpartition(".")[2]] = tensor
    stacked, plain = split_adapter(model, list(config.get("target_parameters") or ()), layers)
    for name, parts in stacked.items():
        _merge_experts(model, name, parts, config)
    for name, parts in plain.items():
        _merge_module(model, name, parts, config)


def _merge_experts(model: Any, name: str, parts: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    weight, transposed = model.get_parameter(name), is_transposed_experts(model, name)
    _require_plain(weight, name)
    a, b = parts["A"], parts["B"]
    (experts, rank, n_in), (_, n_out, _) = factor_shapes(model, name, a.shape[0] // weight.shape[0])
    if a.shape != (experts * rank, n_in) or b.shape != (n_out, experts * rank):
        raise ModelError(
            f"the adapter of {name}, A {list(a.shape)} and B {list(b.shape)}, does not fit the base model's "
            f"{list(weight.shape)}; pass the model it was trained on: --base MODEL"
        )
    weight.copy_(expert_sum(weight, *from_file(a, b, experts), _scale(name, rank, config), transposed))


def _merge_module(model: Any, name: str, parts: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ModelError(
            f"the adapter changes {name}, which the base model does not have; pass its own base: --base MODEL"
        )
    if parts.keys() & {"A", "embedding_A", "full.weight"} and not config.get("ensure_weight_tying"):
        _untie(model, module)
    for part, tensor in parts.items():
        if part.startswith("full."):
            own = part.removeprefix("full.")
            _replace(module.get_parameter(own), tensor, f"{name}.{own}")
        elif part == "B.bias":
            scale = _scale(name, parts["A"].shape[0], config)
            _replace(module.bias, module.bias.float() + scale * tensor.float(), f"{name}.bias")
    if "A" in parts or "embedding_A" in parts:
        _add(name, module, parts, config)


def _add(name: str, module: Any, parts: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    embedding = "embedding_A" in parts
    if getattr(module, "weight", None) is None:
        raise ModelError(
            f"the adapter changes a weight of {name} that is neither a layer's nor experts'; merge it with peft"
        )
    _require_plain(module.weight, f"{name}.weight")
    if embedding and "magnitude_vector" in parts:
        raise ModelError(f"the adapter of {name} is DoRA on an embedding; merge it with peft")
    a, b = (parts["embedding_A"], parts["embedding_B"]) if embedding else (parts["A"], parts["B"])
    transposed = embedding or bool(config.get("fan_in_fan_out")) or is_transposed_linear(module)
    dense = module.weight.T if transposed else module.weight  # [out, in]
    if b.shape[0] != dense.shape[0] or a.shape[1] != dense.shape[1]:
        raise ModelError(
            f"the adapter of {name} is for a weight of {[b.shape[0], a.shape[1]]}, the base model's is "
            f"{list(dense.shape)}; pass the model it was trained on: --base MODEL"
        )
    merged = low_rank_sum(dense, a, b, _scale(name, a.shape[0], config), parts.get("magnitude_vector"))
    _replace(module.weight, merged.T if transposed else merged, f"{name}.weight")


def _untie(model: Any, module: Any) -> None:
    """What is trained of one of two tied weights is not trained of the other: give the module its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and module in (embedding, head) and embedding.weight is head.weight:
        module.weight = torch.nn.Parameter(module.weight.detach().clone())
        model.config.tie_word_embeddings = False


def _require_plain(weight: torch.Tensor, name: str) -> None:
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise ModelError(
            f"the base model's {name} is {str(weight.dtype).removeprefix('torch.')}, quantised; "
            "pass its 16-bit original: --base MODEL"
        )


def _replace(parameter: torch.Tensor, value: torch.Tensor, name: str) -> None:
    _require_plain(parameter, name)
    if parameter.shape != value.shape:
        raise ModelError(
            f"the adapter's {name} has shape {list(value.shape)}, the base model's {list(parameter.shape)}"
        )
    parameter.copy_(value)  # casts


def _scale(name: str, rank: int, config: Mapping[str, Any]) -> float:
    """lora_alpha / r, or / sqrt(r) for rank-stabilised LoRA; patterns give modules their own alpha.

    PEFT's rule: a pattern is a regular expression that matches the end of the name, after a dot or whole.
    """
    patterns: Mapping[str, Any] = config.get("alpha_pattern") or {}
    own = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    alpha = next(own, config.get("lora_alpha", 8))
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
