"""Deciding how a model that will be sharded gets its weights: shard by shard, or whole where that is not possible."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from nemo_automodel._transformers import compat, meta
from nemo_automodel._transformers.fill import Checkpoint
from nemo_automodel._transformers.fresh import FreshWeights
from nemo_automodel._transformers.trial import small_copy
from nemo_automodel._transformers.weight_files import check_weight_files
from nemo_automodel.errors import AutoModelError

logger = logging.getLogger(__name__)

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
_UNDERSTOOD = {*_HUB_OPTIONS, "key_mapping", "use_safetensors", "experts_implementation"}


def takes_meta(distributed: Any) -> bool:
    """Whether the ``DistributedManager`` shards models on the meta device (``takes_meta``); others get them whole."""
    return bool(getattr(distributed, "takes_meta", False))


def plan_loading(
    auto_class: Any,
    name: str,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None,
    revision: str | None,
    trust_remote_code: bool,
    **options: Any,
) -> tuple[PreTrainedModel | None, Checkpoint | None]:
    """The model ``name`` on the meta device and how it is filled once sharded; (None, None) where it is loaded whole.

    Raises ModelError: its weight files are missing or damaged.
    """
    reason = meta.reason_against(config, options, _UNDERSTOOD)
    if reason is not None or compat.model_class_for(auto_class, config) is None:
        return _whole(name, reason)
    hub = {key: value for key, value in options.items() if key in _HUB_OPTIONS}
    files = check_weight_files(name, revision, **hub)
    built = {key: options[key] for key in ("experts_implementation",) if options.get(key) is not None}
    try:
        model = meta.build(auto_class, copy.deepcopy(config), dtype, attn_implementation, **built)
        for parameter in model.parameters():
            parameter.requires_grad_(
                parameter.is_floating_point()
            )  # as transformers' loading leaves it, whatever a constructor froze
        small_copy(model)
    except AutoModelError:
        raise
    except Exception as error:  # any model's constructor may want real numbers
        return _whole(name, f"it cannot be built without memory, or not small ({type(error).__name__}: {error})")
    checkpoint = Checkpoint.of(model, name, files, options.get("key_mapping"))
    if (tensor := meta.unplaced(model)) is not None:
        return _whole(name, f"it keeps numbers outside of parameters and buffers ({tensor})")
    if (tensor := checkpoint.untied(model)) is not None:
        return _whole(name, f"its checkpoint has other values for {tensor} than for what that is tied to")
    model.config.name_or_path = name
    compat.load_generation_config(model, name, revision=revision, trust_remote_code=trust_remote_code, **hub)
    return model.eval(), checkpoint


def plan_fresh(
    auto_class: Any,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel | None, FreshWeights | None]:
    """A model of ``config`` on the meta device and how it is filled once sharded; (None, None) where it is made whole."""
    name = f"of config {config.model_type}"
    reason = meta.reason_against(config, {}, _UNDERSTOOD)
    if reason is not None or compat.model_class_for(auto_class, config) is None:
        return _whole(name, reason)
    try:
        model = meta.build(auto_class, copy.deepcopy(config), dtype, attn_implementation)
        small_copy(model)
        tensor, weights = meta.unplaced(model), FreshWeights()
        reason = weights.reason_against(model)
    except Exception as error:  # as above
        return _whole(name, f"it cannot be built without memory, or not small ({type(error).__name__}: {error})")
    if tensor is not None:
        reason = f"it keeps numbers outside of parameters and buffers ({tensor})"
    return _whole(name, reason) if reason is not None else (model, weights)


def _whole(name: str, reason: str | None) -> tuple[None, None]:
    if reason is not None:
        logger.warning("model %s: every rank loads all of it before it is sharded, because %s", name, reason)
    return None, None
