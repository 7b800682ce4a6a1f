"""A Hugging Face directory out of a live, possibly sharded model: what the Hub has, and what old and new readers need.

transformers' own ``save_pretrained`` writes the weights, so that its reverse conversion (names and fused experts as the
original checkpoint had them), tied weights and the sharding index are its own. Around it: the export dtype, the class
name, the keys that older readers look for, the stop token of the chat template, the tokenizer and a model card.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging as hf_logging

from nemo_automodel.components.checkpoint.card import write_card
from nemo_automodel.components.checkpoint.export import as_transformers_class, kept_in_float32

logger = logging.getLogger(__name__)


def gather_weights(
    model: nn.Module, state_dict: Mapping[str, Any] | None, dtype: torch.dtype | None, keep: bool
) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU, in the dtype they are saved in; every rank calls it, the live model stays as it is.

    Args:
        model: The live model.
        state_dict: Its tensors by name, sharded or not; default ``model.state_dict()``.
        dtype: Cast floating-point parameters to it; None keeps theirs. Buffers, and what the model itself insists on
            keeping in float32, are not cast.
        keep: Whether this rank wants the result (the others only take part and get an empty dict).

    Tensors that share memory share it in the result too. One tensor at a time is whole on the device; a tensor that
    is already whole, on the CPU and in ``dtype`` is not copied.
    """
    tensors = model.state_dict(keep_vars=True) if state_dict is None else state_dict
    fixed = {name for name, _ in model.named_buffers()} | kept_in_float32(model, tensors, dtype)
    whole: dict[Any, torch.Tensor] = {}  # tied weights are gathered once
    gathered = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        key = _identity(tensor)
        if key not in whole:
            cast = tensor.is_floating_point() and dtype is not None and name not in fixed
            whole[key] = _whole(tensor, dtype if cast else None, keep)
        if keep:
            gathered[name] = whole[key]
    return gathered


def _identity(tensor: torch.Tensor) -> Any:
    """The same for two names of one tensor. Of a sharded one the object: ranks must agree, and empty shards share 0."""
    if isinstance(tensor, DTensor) or tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _whole(tensor: torch.Tensor, dtype: torch.dtype | None, keep: bool) -> torch.Tensor:
    tensor = tensor.detach()
    if dtype is not None:
        tensor = tensor.to(dtype)  # before gathering: half the traffic
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu() if keep else tensor.new_empty(0)


def write_model(
    directory: Path,
    model: Any,
    weights: dict[str, torch.Tensor],
    tokenizer: Any | None,
    dtype: torch.dtype | None = None,
    datasets: tuple[str, ...] = (),
) -> None:
    """Write a complete HF directory; called on one rank only.

    Args:
        directory: Is created.
        model: A transformers model; its config and class are used and left unchanged.
        weights: What ``gather_weights`` returned; emptied while writing.
        tokenizer: Tokenizer or processor to save beside it, or None.
        dtype: The dtype that ``config.json`` declares. Default: the model's.
        datasets: Hub IDs for the model card.
    """
    write_beside(directory, model, share_tied(model, weights), tokenizer, dtype, datasets, weights)


def write_beside(
    directory: Path,
    model: Any,
    still_tied: bool,
    tokenizer: Any | None,
    dtype: torch.dtype | None = None,
    datasets: tuple[str, ...] = (),
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """``write_model`` without its weights (unless they are given): config, generation config, tokenizer, card, code.

    ``still_tied``: whether the weights that the model ties are saved as one.
    """
    with as_transformers_class(model):
        if not still_tied:  # an adapter on the head was merged into it and not into the embedding
            model.config.tie_word_embeddings = False
        if getattr(model, "generation_config", None) is not None:
            model.generation_config = generation_config(model.generation_config, tokenizer)
        with _no_progress_bar():  # it would tear the run's own display
            model.save_pretrained(directory, state_dict={} if weights is None else weights)
    complete_config(directory / "config.json", type(model.config), dtype)
    if tokenizer is not None:
        write_tokenizer(directory, tokenizer)
    write_card(directory, model.config, datasets)


def share_tied(model: nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    """Make the weights that ``model`` ties one tensor again where gathering copied them; False where values differ."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    same = True
    for first, *others in groups.values():
        for other in (name for name in others if name in weights and first in weights):
            if torch.equal(weights[first], weights[other]):
                weights[other] = weights[first]
            else:
                same = False
    return same


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


# --- config.json ------------------------------------------------------------------------------------------------


def complete_config(path: Path, config_class: type, dtype: torch.dtype | None) -> None:
    """Declare the saved dtype, and add the keys under which transformers 4 and its readers look for RoPE.

    A key is only added where this transformers reads the same config back with it.
    """
    config = json.loads(path.read_text())
    if dtype is not None:
        for section in _sections(config):
            if section is config or "dtype" in section:
                section["dtype"] = str(dtype).removeprefix("torch.")
    wanted = _reads_as(config_class, config)
    for section in _sections(config):
        for key, value in _legacy_rope(section).items():
            if key not in section:
                section[key] = value
                if _reads_as(config_class, config) != wanted:
                    del section[key]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    nested = [value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)]
    return [config, *(section for part in nested for section in _sections(part))]


def _reads_as(config_class: Any, config: dict[str, Any]) -> Any:
    try:
        return config_class.from_dict(copy.deepcopy(config)).to_dict()
    except Exception as error:  # a config of remote code may refuse anything
        return repr(error)


def _legacy_rope(section: Mapping[str, Any]) -> dict[str, Any]:
    rope = section.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    local: dict[str, Any] = {}
    if isinstance(rope.get("full_attention"), dict):  # one entry a layer type
        local = rope.get("sliding_attention") or {}
        rope = rope["full_attention"]
    legacy = {"rope_theta": rope.get("rope_theta"), "partial_rotary_factor": rope.get("partial_rotary_factor")}
    legacy["rope_local_base_freq"] = local.get("rope_theta")
    if rope.get("rope_type", "default") != "default":
        legacy["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return {key: value for key, value in legacy.items() if value is not None}


# --- generation_config.json and the tokenizer ---------------------------------------------------------------------


def generation_config(live: Any, tokenizer: Any | None) -> Any:
    """A copy of ``live`` that stops where the chat template ends a turn, and that transformers agrees to save."""
    config = copy.deepcopy(live)
    stop = end_of_turn_id(tokenizer)
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    known = [token for token in known if token is not None]
    if stop is not None and stop not in known:
        config.eos_token_id = [*known, stop] if known else stop
    try:
        config.validate(strict=True)
    except ValueError:  # sampling values without do_sample, as many published configs have them
        config.do_sample = True
        try:
            config.validate(strict=True)
        except ValueError as error:
            logger.warning("generation_config.json is saved as it was loaded: %s", error)
            return live
    return config


def end_of_turn_id(tokenizer: Any | None) -> int | None:
    """The first special token that the chat template puts after an assistant's answer; None without a template."""
    template = getattr(tokenizer, "chat_template", None)  # of a processor: its own
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    template = (template.get("default") if isinstance(template, dict) else template) or getattr(
        tokenizer, "chat_template", None
    )
    if tokenizer is None or not template:
        return None
    answer, text = "Fine", ""
    for content in (lambda words: words, lambda words: [{"type": "text", "text": words}]):  # templates take either
        messages = [
            {"role": "user", "content": content("Hello")},
            {"role": "assistant", "content": content(answer)},
        ]
        try:
            text = text or tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template)
        except Exception:  # any Jinja error: a template for other roles than these
            continue
        text = text if answer in text else ""
    tail = text.rpartition(answer)[2]
    special = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in special), None)


def write_tokenizer(directory: Path, tokenizer: Any) -> None:
    """Save a tokenizer or processor with its chat template, under a class name that transformers 4 knows too."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    if not path.exists():
        return
    config = json.loads(path.read_text())
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
