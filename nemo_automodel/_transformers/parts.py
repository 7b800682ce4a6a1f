"""The parts of a vision-language model, found by its structure: what can be frozen, or adapted, by itself.

The language model and the towers are the modules that have a sub-config of their own; the input embedding is what the
model says it is; what is left between them is the projector, and so is a direct child of a tower that is named as one
(a merger). Where the decoder's layers are the model's own, what is left is the language model, but for what is named as
a projector. A model that takes neither pixels nor sound is all language model.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from transformers import PretrainedConfig, PreTrainedModel

from nemo_automodel._transformers import compat
from nemo_automodel.errors import ConfigError, ModelError

logger = logging.getLogger(__name__)

PARTS = ("vision_tower", "projector", "language_model", "embeddings")
_PROJECTOR = re.compile(r"(merger|project|connector|aligner|adapter|resampler|abstractor)", re.IGNORECASE)
_SENSES = re.compile(r"(pixel|image|video|audio|input_features|speech)")
_TOWER = re.compile(r"(vision|visual|image|audio|video|speech)", re.IGNORECASE)


def part_finder(model: nn.Module) -> Callable[[str], str]:
    """What tells the part (one of ``PARTS``) that a module or parameter of ``model`` belongs to, by its full name."""
    roots = _roots(model)

    def part_of(name: str) -> str:
        found = [prefix for prefix in roots if not prefix or name == prefix or name.startswith(f"{prefix}.")]
        return roots[max(found, key=len)]

    return part_of


def has_towers(model: nn.Module) -> bool:
    """Whether ``model`` has a part that sees or hears."""
    return "vision_tower" in _roots(model).values()


def frozen_towers(model: nn.Module) -> tuple[dict[str, nn.Module], str | None]:
    """The outermost modules that see or hear, by name, where nothing within is trained; else none, and why.

    Raises:
        ConfigError: a weight of a tower itself is trained.
    """
    part_of = part_finder(model)
    towers = {name: model.get_submodule(name) for name, part in _roots(model).items() if part == "vision_tower"}
    if not towers:
        return {}, "the model has none"
    for name, tower in towers.items():
        for inner, parameter in tower.named_parameters(prefix=name):
            if parameter.requires_grad and part_of(inner) == "vision_tower":
                raise ConfigError(
                    f"freeze.cache_features_gb: {inner} is trained, so features change with every step; take the vision "
                    "tower out of peft.parts, or leave freeze.cache_features_gb out"
                )
            if parameter.requires_grad:
                return {}, f"{inner} inside it is trained; freeze.projector: true would freeze that"
    return towers, None


def outside_language_model(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that are no part of the language model, its head or its embeddings."""
    roots = _roots(model)
    inside = [name for name, part in roots.items() if name and part in ("language_model", "embeddings")]
    if roots[""] == "language_model":  # its layers are the model's own
        return [
            model.get_submodule(name)
            for name, part in roots.items()
            if name and part not in ("language_model", "embeddings")
        ]
    found: list[nn.Module] = []

    def walk(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            full = f"{path}{name}"
            if full in inside:
                continue
            if any(other.startswith(f"{full}.") for other in inside):
                walk(child, f"{full}.")
            else:
                found.append(child)

    walk(model, "")
    return found


def parameters_by_part(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Every parameter of ``model`` with its name, by part; a tied one counts once, as what it is first."""
    part_of = part_finder(model)
    found: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
    embedding = _input_embedding(model)
    ours = {id(p) for p in embedding.parameters()} if embedding is not None else set()
    for name, parameter in model.named_parameters():
        found["embeddings" if id(parameter) in ours else part_of(name)].append((name, parameter))
    return found


@dataclass
class Freeze:
    """The ``freeze`` section: which parts of a vision-language model are not trained. Under LoRA all of them are frozen.

    Args:
        vision_tower: what turns pixels (or sound) into features (default true).
        projector: what carries those over to the language model (default false).
        language_model: the decoder and its output head (default false).
        embeddings: the input embedding, and a head that is tied to it (default true).
        cache_features_gb: GiB of host memory that features of the frozen vision tower may take, which are then computed
            once for each row, not in every epoch; null (default) = computed anew each time. On one rank only.

    Raises:
        ConfigError: features are to be kept of a tower that is trained, or on several ranks.
    """

    vision_tower: bool = True
    projector: bool = False
    language_model: bool = False
    embeddings: bool = True
    cache_features_gb: float | None = None

    def __post_init__(self) -> None:
        if self.cache_features_gb is None:
            return
        written = f"freeze.cache_features_gb={self.cache_features_gb:g}"
        if self.cache_features_gb <= 0:
            raise ConfigError(f"{written}: must be more than 0; leave it out to compute features anew each time")
        if not self.vision_tower:
            raise ConfigError(
                f"{written}: features of a vision tower that is trained change with every step; write freeze.vision_tower: "
                "true, or leave cache_features_gb out"
            )
        ranks = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
        if ranks > 1:
            raise ConfigError(
                f"{written}: works on one rank only, and this run has {ranks}: a rank sees other rows in each epoch, and "
                "a sharded tower runs on all ranks or on none; leave it out"
            )

    def apply(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        """Freeze the chosen parts of ``model`` in place, kept in ``dtype`` where it insists on no other.

        Raises:
            ModelError: nothing is left to train.
        """
        kept = compat.kept_dtype(model, dtype) if dtype is not None else None
        for part, parameters in parameters_by_part(model).items():
            if not getattr(self, part):
                continue
            for name, parameter in parameters:
                parameter.requires_grad_(False)
                if kept is not None and parameter.is_floating_point():
                    parameter.data = parameter.data.to(kept(name) or dtype)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            frozen = ", ".join(f"{part}: true" for part in PARTS if getattr(self, part))
            raise ModelError(f"freeze: nothing is left to train ({frozen}); write false for one of them")


def report_parts(model: nn.Module) -> None:
    """Log for each part how many of its parameters are trained."""
    counts = []
    for part, parameters in parameters_by_part(model).items():
        total = sum(parameter.numel() for _, parameter in parameters)
        trained = sum(parameter.numel() for _, parameter in parameters if parameter.requires_grad)
        state = "frozen" if not trained else "trained" if trained == total else f"{trained:,} trained"
        counts += [f"{part} {total:,} ({state})"] if total else []
    logger.info("parameters: %s", ", ".join(counts))


def _roots(model: nn.Module) -> dict[str, str]:
    """Module name -> part, for the outermost module of each part (and those of other parts within); "" is what is left."""
    if not _sees_or_hears(model):
        return {"": "language_model"}
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if isinstance(config, PretrainedConfig) else None
    kinds = _sub_configs(config, text)
    roots: dict[str, str] = {}
    for name, module in model.named_modules():
        own = getattr(module, "config", None)
        if not name or any(name.startswith(f"{root}.") for root in roots) or not isinstance(module, PreTrainedModel):
            continue
        if type(own) in kinds and not _holds(module, model):
            roots[name] = "vision_tower"
        elif text is not None and text is not config and type(own) is type(text):
            roots[name] = "language_model"
    if "vision_tower" not in roots.values() and kinds:
        base = getattr(model, getattr(model, "base_model_prefix", ""), model)
        prefix = "" if base is model else f"{model.base_model_prefix}."
        for name, child in base.named_children():
            if _TOWER.search(name) and not _PROJECTOR.search(name) and next(child.parameters(), None) is not None:
                roots[prefix + name] = "vision_tower"
    names = {module: name for name, module in model.named_modules()}
    decoder = names.get(_asked(model, "get_decoder"))
    if decoder and not any(f"{root}.".startswith(f"{decoder}.") for root in roots):  # one beside its towers
        roots[decoder] = "language_model"
    if "language_model" in roots.values():
        roots[""] = "projector"
    else:
        roots |= {name: "projector" for name, _ in model.named_modules() if _is_projector(name) and name not in roots}
        roots[""] = "language_model"
    for tower in [name for name, part in roots.items() if part == "vision_tower"]:
        for name, _ in model.get_submodule(tower).named_children():
            if _PROJECTOR.search(name):
                roots[f"{tower}.{name}"] = "projector"
    for getter, part in (("get_output_embeddings", "language_model"), ("get_input_embeddings", "embeddings")):
        module = _asked(model, getter)
        if module is not None and module in names:
            roots[names[module]] = part
    return roots


def _sub_configs(config: Any, text: Any) -> set[type]:
    """The classes of the configs within ``config`` other than the text model's."""
    if not isinstance(config, PretrainedConfig):
        return set()
    inner = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    return {type(value) for value in inner if value is not text} - {type(text), type(config)}


def _holds(module: nn.Module, model: nn.Module) -> bool:
    """Whether the model's input embedding is inside ``module``."""
    embedding = _input_embedding(model)
    return embedding is not None and any(child is embedding for child in module.modules())


def _input_embedding(model: nn.Module) -> nn.Module | None:
    return _asked(model, "get_input_embeddings")


def _asked(model: nn.Module, getter: str) -> nn.Module | None:
    """What the model says its embedding or head is; None where it cannot say."""
    try:
        found = getattr(model, getter, lambda: None)()
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None


def _is_projector(name: str) -> bool:
    """Whether the last part of a module's name, and no earlier one, is that of a projector."""
    *around, last = name.split(".")
    return bool(_PROJECTOR.search(last)) and not any(part.isdecimal() for part in around)


def _sees_or_hears(model: nn.Module) -> bool:
    """Whether a forward inside ``model`` has an argument for pixels or sound."""
    classes = {type(module) for module in model.modules()}
    return any(_SENSES.search(name) for cls in classes for name in inspect.signature(cls.forward).parameters)


__all__ = ["PARTS", "Freeze", "frozen_towers", "has_towers", "parameters_by_part", "part_finder", "report_parts"]
