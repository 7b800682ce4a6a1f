"""Configs and weights of any transformers model, complete or not at all.

transformers warns of a tensor that is missing and trains a fresh one in its place; here that is an error.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel, __version__

from nemo_automodel._transformers import compat
from nemo_automodel._transformers.hub import explain, fetch, patiently
from nemo_automodel._transformers.weight_files import check_weight_files
from nemo_automodel.errors import ModelError

logger = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
_OTHER_WEIGHTS = ("gguf_file", "variant", "subfolder", "state_dict", "quantization_config")


def parse_dtype(key: str, value: str | torch.dtype) -> torch.dtype:
    """The dtype that a config's ``key: value`` names (``bfloat16``, ``torch.bfloat16``, ``bf16``)."""
    if isinstance(value, torch.dtype):
        return value
    name = str(value).removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name not in _DTYPES:
        raise ModelError(f"model.{key}={value}: not a dtype to train in; write one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def own_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """The dtype that a checkpoint's config says its weights have, if it says."""
    for part in (config, config.get_text_config()):
        value = getattr(part, "dtype", None)
        if isinstance(value, torch.dtype):
            return value
        if isinstance(value, str) and value.removeprefix("torch.") in _DTYPES:
            return _DTYPES[value.removeprefix("torch.")]
    return None


def load_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, **overrides: Any
) -> PretrainedConfig:
    """The config of model ``name`` (a Hub ID or a local directory), with those of ``overrides`` that are its fields.

    Raises ModelError: not found, gated, offline, of a type this transformers does not know, or with code of its own.
    """
    _require_config(name, revision, {k: v for k, v in overrides.items() if k in _HUB_OPTIONS})
    overrides = {k: v for k, v in overrides.items() if k not in _OTHER_WEIGHTS}
    try:
        config, _ = patiently(
            lambda: AutoConfig.from_pretrained(
                name,
                revision=revision,
                trust_remote_code=trust_remote_code,
                return_unused_kwargs=True,
                **overrides,
            )
        )
    except Exception as error:
        raise _explain_config(error, name, revision) from error
    return config


def build_config(
    config: Any, *, revision: str | None = None, trust_remote_code: bool = False, **overrides: Any
) -> PretrainedConfig:
    """A config from a config, a mapping with ``model_type``, or a Hub ID or directory; ``overrides`` are set on it."""
    if isinstance(config, (str, os.PathLike)):
        built = load_config(os.path.expanduser(str(config)), revision=revision, trust_remote_code=trust_remote_code)
    elif isinstance(config, PretrainedConfig):
        built = copy.deepcopy(config)
    elif isinstance(config, Mapping):
        built = _config_from_mapping(dict(config))
    else:
        raise ModelError(
            f"model.config: a {type(config).__name__}; write a mapping with model_type, a Hub ID or a directory"
        )
    _check_fields(built, overrides)
    for key, value in overrides.items():
        setattr(built, key, value)
    return built


def load_weights(
    auto_class: Any,
    name: str,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str | None,
    revision: str | None,
    trust_remote_code: bool,
    **options: Any,
) -> PreTrainedModel:
    """``auto_class.from_pretrained`` that gives every tensor of the model from the checkpoint, or raises ModelError."""
    hub = {k: v for k, v in options.items() if k in _HUB_OPTIONS}
    if not any(options.get(key) for key in _OTHER_WEIGHTS) and not getattr(config, "transformers_weights", None):
        check_weight_files(name, revision, **hub)
    arguments = {k: v for k, v in options.items() if not hasattr(config, k)}
    if attn_implementation is not None and attn_implementation != "automodel":
        arguments["attn_implementation"] = attn_implementation
    # transformers needs accelerate to load on a device; without it the model goes through the CPU's memory.
    direct = device.type != "cpu" and importlib.util.find_spec("accelerate") is not None
    if direct:
        arguments["device_map"] = {"": device}
    try:
        with _own_report():
            model, info = patiently(
                lambda: auto_class.from_pretrained(
                    name,
                    config=config,
                    dtype=dtype,
                    revision=revision,
                    trust_remote_code=trust_remote_code,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # listed in info, and refused below with both shapes
                    **{"use_safetensors": True, **arguments},
                )
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise _explain_config(error, name, revision, auto_class, config) from error
    require_complete(name, info, model)
    _require_finite(name, model)
    return model if direct else model.to(device)


def initialize(
    auto_class: Any,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """A model of ``config`` with fresh weights, on every rank those that the first rank's seed gives."""
    arguments: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None and attn_implementation != "automodel":
        arguments["attn_implementation"] = attn_implementation
    with first_ranks_seed(device):
        try:
            with torch.device(device):
                return auto_class.from_config(config, **arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise _explain_config(error, config.name_or_path or "config", None, auto_class, config) from error


def check_vocabulary(model: PreTrainedModel, tokenizer: Any) -> None:
    """Raise ModelError where ``tokenizer`` makes ids that the model's embedding has no row for."""
    embedding: Any = model.get_input_embeddings()
    rows = next(embedding.parameters()).shape[0]  # the stored weight: ``.weight`` may be this rank's share of it
    if len(tokenizer) > rows:
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path} has {len(tokenizer)} tokens, but the embedding of "
            f"{model.name_or_path or type(model).__name__} has {rows} rows; use the model's own tokenizer, or call "
            f"model.resize_token_embeddings({len(tokenizer)}) and save it first"
        )


def _require_config(name: str, revision: str | None, hub: dict[str, Any]) -> None:
    if fetch(name, "config.json", revision, **hub) is not None:
        return
    if fetch(name, "adapter_config.json", revision, **hub) is not None:
        raise ModelError(f"model {name} is a LoRA adapter: name its base model instead, or merge it (automodel merge)")
    raise ModelError(f"model {name}: no config.json there, so it is not a transformers model")


def _config_from_mapping(fields: dict[str, Any]) -> PretrainedConfig:
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ModelError("model.config: no model_type; write model_type: llama (or another that transformers has)")
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"model.config.model_type={model_type}: not a type that transformers {__version__} has"
            f"{_nearest(str(model_type), CONFIG_MAPPING.keys())}"
        )
    _check_fields(CONFIG_MAPPING[model_type](), fields)
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:
        raise ModelError(f"model.config (model_type {model_type}): {_one_line(error)}") from error


def _check_fields(config: PretrainedConfig, fields: Mapping[str, Any]) -> None:
    for key in fields:
        if not hasattr(config, key):
            names = [*vars(config), *config.attribute_map]
            raise ModelError(f"model.config.{key}: {type(config).__name__} has no such field{_nearest(key, names)}")


def require_complete(name: str, info: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Raise ModelError where ``info`` (transformers' loading info) says that ``model`` is not what was loaded."""
    if mismatched := sorted(info.get("mismatched_keys") or ()):
        key, found, wanted = mismatched[0]
        more = f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else ""
        raise ModelError(
            f"model {name}: tensor {key} is {list(found)} in the checkpoint and {list(wanted)} in the model{more}; "
            f"config.json and the weights do not belong together"
        )
    if missing := sorted(info.get("missing_keys") or ()):
        raise ModelError(
            f"model {name}: {len(missing)} tensors of the model are not in the checkpoint "
            f"({', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}); download it again, or use a checkpoint "
            f"of this model with its output head"
        )
    if errors := info.get("error_msgs"):
        raise ModelError(f"model {name}: {_one_line(errors[0])}")
    unexpected = sorted(info.get("unexpected_keys") or ())
    if adapters := [key for key in unexpected if ".lora_" in key]:
        raise ModelError(
            f"model {name}: {len(adapters)} of its tensors belong to a LoRA adapter ({adapters[0]}, ...), which loading "
            f"it would drop; name the base model, and load the adapter with PEFT or merge it (automodel merge)"
        )
    if further := _further_blocks(unexpected, model):
        raise ModelError(
            f"model {name}: the checkpoint has more blocks than config.json says ({further[0]}, ...: {len(further)} "
            f"tensors); correct the number of layers in config.json, or use the checkpoint it belongs to"
        )
    if unexpected:
        logger.warning(
            "model %s: %d tensors of the checkpoint are not part of the model and stay unused (%s%s)",
            name,
            len(unexpected),
            ", ".join(unexpected[:5]),
            ", ..." if len(unexpected) > 5 else "",
        )


def _further_blocks(unexpected: list[str], model: PreTrainedModel) -> list[str]:
    """Unexpected tensors that have the name of the model's own but for the number of the block."""
    if getattr(model.config.get_text_config(), "num_nextn_predict_layers", 0):
        return []  # multi-token prediction: published as further blocks, which transformers does not build
    own = {re.sub(r"\.\d+\.", ".*.", key) for key in model.state_dict() if re.search(r"\.\d+\.", key)}
    return [key for key in unexpected if re.sub(r"\.\d+\.", ".*.", key) in own]


def _require_finite(name: str, model: PreTrainedModel) -> None:
    tensors = [(key, p) for key, p in model.named_parameters() if p.is_floating_point() and p.device.type != "meta"]
    if not tensors:
        return
    sums = torch.stack([p.detach().sum(dtype=torch.float32) for _, p in tensors])
    for i in (~torch.isfinite(sums)).nonzero().flatten().tolist():
        key, parameter = tensors[i]
        if not torch.isfinite(parameter).all():
            raise ModelError(f"model {name}: tensor {key} holds NaN or infinity; the checkpoint is damaged")


@contextmanager
def _own_report() -> Iterator[None]:
    """Keep transformers' table of missing and unexpected tensors off the screen: each is reported, or raised, here."""
    theirs = logging.getLogger("transformers.modeling_utils")

    def errors_only(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    theirs.addFilter(errors_only)  # not its level: at WARNING and above transformers checks a TP plan nobody asked for
    try:
        yield
    finally:
        theirs.removeFilter(errors_only)


@contextmanager
def first_ranks_seed(device: torch.device) -> Iterator[None]:
    """Draw from rank 0's seed inside; the generators go on outside as if nothing had been drawn."""
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    holder = [torch.initial_seed()]
    dist.broadcast_object_list(holder, src=0)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(holder[0])
        yield


def _explain_config(
    error: Exception,
    name: str,
    revision: str | None,
    auto_class: Any = None,
    config: PretrainedConfig | None = None,
) -> Exception:
    text = str(error)
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        if "model type `" not in text:
            return ModelError(f"model {name}: config.json has no model_type; write the one it is (llama, qwen3, ...)")
        found = text.split("model type `")[1].split("`")[0]
        return ModelError(
            f"model {name}: its model_type ({found}) is not one that transformers {__version__} has; upgrade: "
            f"pip install -U transformers"
        )
    if "trust_remote_code" in text:
        return ModelError(
            f"model {name} brings model code of its own; to run it, read it first, then write "
            f"model.trust_remote_code: true and model.revision: <the commit you read>"
        )
    if auto_class is not None and config is not None and compat.model_class_for(auto_class, config) is None:
        return ModelError(
            f"model {name} (model_type {config.model_type}) is not one that {auto_class.__name__} can build; use the "
            f"autoclass of its task"
        )
    if isinstance(error, TypeError):
        return ModelError(f"model {name}: {_one_line(error)}")
    return explain(error, name, revision)


def _nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, [str(n) for n in names], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:500]
