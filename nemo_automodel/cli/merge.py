"""``automodel merge``: add a LoRA adapter to its base model and write the sum as an ordinary HF directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_automodel.errors import CheckpointError, ConfigError, ModelError

if TYPE_CHECKING:
    import torch

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_UNSUPPORTED = ("target_parameters", "layer_replication", "trainable_token_indices", "megatron_config", "use_qalora")


def merge(
    adapter_dir: Annotated[Path, typer.Argument(help="A PEFT adapter directory, or a checkpoint that holds one.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Default: beside it, ending in -merged.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model; default: the one the adapter names.")] = None,
    dtype: Annotated[str, typer.Option(help=f"Dtype to write: {', '.join(_DTYPES)} (the base's own).")] = "auto",
) -> Path:
    """Merge a LoRA or DoRA adapter into its base model and write a full Hugging Face directory.

    Each sum is made in float32 and rounded once. Returns the directory written.

    Raises:
        CheckpointError: No adapter there, or one of a kind that cannot be merged.
        ConfigError: The output exists already, or the dtype is unknown.
        ModelError: The base model is not found or does not fit.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"--dtype {dtype}: unknown; write one of {', '.join(_DTYPES)}")
    directory = find_adapter(adapter_dir)
    target = output or _default_output(adapter_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--output {target}: exists already; remove it or write another one")
    config = _read_config(directory)
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"{directory / _CONFIG} names no base model; pass it: --base MODEL")
    model = _load_base(str(name), config.get("revision") if base is None else None, dtype)
    merge_adapter(model, config, _read_weights(directory))
    _write(target, model, _load_tokenizer(directory, str(name)))
    print(f"Merged {directory} into {name}: {target}\n  serve it:  vllm serve {target}")
    return target


def find_adapter(path: Path) -> Path:
    """The adapter directory at ``path``: itself, or its ``adapter/`` or ``model/`` (a checkpoint).

    Raises:
        CheckpointError: None of them holds an adapter.
    """
    for candidate in (path, path / "adapter", path / "model"):
        if (candidate / _CONFIG).is_file():
            return candidate
    problem = "is not a directory" if not path.is_dir() else f"holds no {_CONFIG}"
    full = next((p for p in (path, path / "model") if (p / "config.json").is_file()), None)
    hint = (
        f"{full} is a full model, with nothing to merge"
        if full
        else "give an adapter directory or an epoch_E_step_S one"
    )
    raise CheckpointError(f"{path}: {problem}; {hint}")


def _default_output(path: Path) -> Path:
    path = path.resolve()
    path = path.parent if path.name in ("model", "adapter") else path
    return path.with_name(path.name + "-merged")


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((directory / _CONFIG).read_text())
    except ValueError as error:
        raise CheckpointError(f"{directory / _CONFIG}: not valid JSON ({error})") from error
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{directory / _CONFIG}: peft_type is {config.get('peft_type')!r}; only LORA can be merged"
        )
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if used:
        raise CheckpointError(f"{directory / _CONFIG}: {', '.join(used)} cannot be merged here; merge it with peft")
    return config


def _read_weights(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / _WEIGHTS
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing"
            + ("; convert adapter_model.bin to safetensors" if path.with_suffix(".bin").exists() else "")
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error})") from error


def _load_base(name: str, revision: str | None, dtype: str) -> Any:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision)
        declared = (getattr(config, "architectures", None) or ["AutoModelForCausalLM"])[0]
        model_class: Any = getattr(transformers, declared, transformers.AutoModelForCausalLM)
        model, info = model_class.from_pretrained(name, revision=revision, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise ModelError(
            f"the base model {name} cannot be loaded ({reason}); pass where it is: --base MODEL"
        ) from error
    if info["missing_keys"]:
        raise ModelError(
            f"the base model {name} lacks tensors: {', '.join(sorted(info['missing_keys'])[:5])}; get it whole"
        )
    return model.eval()


def _load_tokenizer(directory: Path, base: str) -> Any | None:
    """The adapter's own tokenizer (it may carry another chat template), else the base's, else none."""
    from transformers import AutoTokenizer

    for source in (str(directory), base):
        try:
            return AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError):
            continue
    return None


def _write(target: Path, model: Any, tokenizer: Any | None) -> None:
    """Write aside and rename, so that a directory of that name is always whole."""
    from nemo_automodel.components.checkpoint.hf import gather_weights, write_model
    from nemo_automodel.components.checkpoint.publish import temporary_directory

    try:
        temporary = temporary_directory(target.absolute().parent, target.name)
        write_model(temporary, model, gather_weights(model, None, None, keep=True), tokenizer, model.dtype)
        if target.exists():
            target.rmdir()  # empty, as checked
        temporary.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error


# --- the arithmetic -------------------------------------------------------------------------------------------------


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
    import torch

    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in weights.items():
        module, _, part = key.removeprefix(_PREFIX).partition(".lora_")
        module = module.replace(".base_layer", "")  # PEFT's wrapper, where it saves the wrapped weight too
        if part:
            layers.setdefault(module, {})[part.removesuffix(".weight")] = tensor
        else:
            layers.setdefault(module.rpartition(".")[0], {})["full." + module.rpartition(".")[2]] = tensor
    with torch.no_grad():
        for name, parts in layers.items():
            _merge_module(model, name, parts, config)


def _merge_module(model: Any, name: str, parts: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ModelError(
            f"the adapter changes {name}, which the base model does not have; pass its own base: --base MODEL"
        )
    for part, tensor in parts.items():
        if part.startswith("full."):
            _assign(module.get_parameter(part.removeprefix("full.")), tensor, f"{name}.{part.removeprefix('full.')}")
        elif part == "B.bias":
            scale = _scale(name, parts["A"].shape[0], config)
            _assign(module.bias, module.bias.float() + scale * tensor.float(), f"{name}.bias")
    low_rank = [part for part in parts if part in ("A", "B", "embedding_A", "embedding_B")]
    if not low_rank:
        return
    if "embedding_A" in parts and "magnitude_vector" in parts:
        raise ModelError(f"the adapter of {name} is DoRA on an embedding; merge it with peft")
    _untie(model, module)
    down, up = (parts[p].float() for p in (("embedding_A", "embedding_B") if "embedding_A" in parts else ("A", "B")))
    transposed = "embedding_A" in parts or bool(config.get("fan_in_fan_out")) or type(module).__name__ == "Conv1D"
    dense = module.weight.T if transposed else module.weight  # [out, in]
    if up.shape[0] != dense.shape[0] or down.shape[1] != dense.shape[1]:
        raise ModelError(
            f"the adapter of {name} is for a weight of {[up.shape[0], down.shape[1]]}, the base model's is "
            f"{list(dense.shape)}; pass the model it was trained on: --base MODEL"
        )
    merged = dense.float() + _scale(name, down.shape[0], config) * (up @ down)
    magnitude = parts.get("magnitude_vector")
    if magnitude is not None:
        merged *= (magnitude.float() / merged.norm(dim=1)).unsqueeze(1)
    _assign(module.weight, merged.T if transposed else merged, f"{name}.weight")


def _untie(model: Any, module: Any) -> None:
    """An adapter on one of two tied weights is not one on the other: give the module its own."""
    import torch

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and module in (embedding, head) and embedding.weight is head.weight:
        module.weight = torch.nn.Parameter(module.weight.detach().clone())
        model.config.tie_word_embeddings = False


def _assign(parameter: torch.Tensor, value: torch.Tensor, name: str) -> None:
    if parameter.shape != value.shape:
        raise ModelError(
            f"the adapter's {name} has shape {list(value.shape)}, the base model's {list(parameter.shape)}"
        )
    parameter.copy_(value)  # casts


def _scale(name: str, rank: int, config: Mapping[str, Any]) -> float:
    """lora_alpha / r, or / sqrt(r) for rank-stabilised LoRA; patterns give modules their own values."""
    alpha = _of_pattern(name, config.get("alpha_pattern"), config.get("lora_alpha", 8))
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _of_pattern(name: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """PEFT's rule: a pattern is a regular expression that matches the end of the name, after a dot or whole."""
    import re

    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)
