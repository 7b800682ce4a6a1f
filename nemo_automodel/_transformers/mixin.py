"""The few methods that our models have beside those of their transformers class, and how they get them.

A model stays what it is: its class becomes a subclass of the transformers class that has the same name and module.
"""

from __future__ import annotations

import copy
import functools
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from nemo_automodel._transformers import compat
from nemo_automodel._transformers import forward as forward_module
from nemo_automodel.components._peft.linear import lora_layers
from nemo_automodel.components.checkpoint.adapters import write_adapter
from nemo_automodel.errors import ModelError

DEFAULT_NEW_TOKENS = 64
"""How much ``generate`` writes after plain strings when neither the call nor the model says."""


class AutoModelMixin:
    """``generate`` on plain strings, and a loss that makes no logits when ``labels`` are passed."""

    automodel_base: type

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' ``generate``; given a string or a list of strings, it returns a list of whole texts.

        The model's own tokenizer is loaded at first use; ``tokenizer=`` uses another.
        """
        base = self.automodel_base.generate  # type: ignore[attr-defined]
        texts = [inputs] if isinstance(inputs, str) else inputs
        if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
            return base(self, inputs, *args, **kwargs)
        assert isinstance(self, PreTrainedModel)
        tokenizer = kwargs.pop("tokenizer", None) or _own_tokenizer(self)
        encoded = _encode_left_padded(tokenizer, texts).to(self.device)
        lengths = {"max_new_tokens", "max_length", "generation_config"}
        if not lengths & set(kwargs) and getattr(self.generation_config, "max_new_tokens", None) is None:
            kwargs["max_new_tokens"] = DEFAULT_NEW_TOKENS
        kwargs.setdefault("pad_token_id", tokenizer.pad_token_id)
        ids = base(self, encoded["input_ids"], *args, attention_mask=encoded["attention_mask"], **kwargs)
        if not isinstance(ids, torch.Tensor):  # return_dict_in_generate: scores and all, as asked for
            return ids
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers' ``save_pretrained``; a model with LoRA adapters writes those, as a PEFT adapter directory.

        Where the model is sharded, every rank calls it. ``is_main_process=False`` takes part and writes nothing.
        With ``state_dict=peft.merged_state_dict(model)`` the whole model is written, adapters merged.
        Raises ModelError: the adapter cannot be described, or an argument is not one for an adapter.
        """
        assert isinstance(self, PreTrainedModel)
        given = args[1] if len(args) > 1 else kwargs.get("state_dict")
        merged = given is not None and not any(".lora_" in name for name in given)
        if merged or not any(True for _ in lora_layers(self)):
            return self.automodel_base.save_pretrained(self, save_directory, *args, **kwargs)  # type: ignore[attr-defined]
        is_main = args[0] if args else kwargs.get("is_main_process", True)
        if kwargs.get("push_to_hub") or any(args[2:3]):
            raise ModelError(
                "save_pretrained of a LoRA adapter: push_to_hub is not for adapters; write hf upload after it"
            )
        return _save_adapter(self, Path(save_directory), bool(is_main))

    def export_groups(self, tensors: Any) -> Any:
        """How ``tensors`` (on the meta device, by name) become those of a checkpoint; see ``compat.ExportGroup``."""
        assert isinstance(self, PreTrainedModel)
        return compat.export_groups(self, tensors)

    def __reduce__(self) -> tuple[Any, ...]:
        # By name, pickle would find the transformers class and refuse: it is not this one.
        return _rebuild, (self.automodel_base,), self.__dict__


def _save_adapter(model: PreTrainedModel, directory: Path, is_main: bool) -> None:
    peft = model.__dict__.get("_automodel_peft")
    if peft is None:
        raise ModelError(
            "save_pretrained: the model's LoRA adapters did not come from from_pretrained(..., peft=...), so how they "
            "are scaled is not known; set model._automodel_peft to their PeftConfig first"
        )
    weights = peft.adapter_state_dict(model)
    if is_main:
        revision = model.__dict__.get("_automodel_source", {}).get("revision")
        config = peft.adapter_config(model, model.config.name_or_path, revision)
        write_adapter(directory, {name: t.detach().cpu() for name, t in weights.items()}, config, None, model.config)


def adopt(model: PreTrainedModel) -> PreTrainedModel:
    """Give ``model`` the mixin, in place; a model that has it is left alone."""
    if not isinstance(model, AutoModelMixin):
        base: Any = type(model)
        model.__class__ = _subclass(base)
    return model


@cache
def _subclass(base: type) -> type:
    base_forward: Any = base.forward  # type: ignore[attr-defined]

    @functools.wraps(base_forward)  # keeps the signature, from which transformers reads what a model accepts
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward_module.run(base_forward, self, args, kwargs)

    namespace = {
        "automodel_base": base,
        "forward": forward,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (AutoModelMixin, base), namespace)


def _rebuild(base: type) -> Any:
    cls: Any = _subclass(base)
    return cls.__new__(cls)


def _own_tokenizer(model: PreTrainedModel) -> Any:
    cached = model.__dict__.get("_automodel_tokenizer")
    if cached is not None:
        return cached
    name = model.name_or_path
    if not name:
        raise ModelError("generate on plain strings: this model has no tokenizer of its own; pass tokenizer=...")
    options = model.__dict__.get("_automodel_source", {})
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(f"generate on plain strings: no tokenizer in {name} ({first}); pass tokenizer=...") from error
    model.__dict__["_automodel_tokenizer"] = tokenizer
    return tokenizer


def _encode_left_padded(tokenizer: Any, texts: list[str]) -> Any:
    """Ids and mask [B, S] of ``texts``, padded on the left so that every row goes on from its last token."""
    if tokenizer.pad_token_id is None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    with torch.no_grad():
        return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
