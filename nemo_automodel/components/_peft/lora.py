"""LoRA: ``PeftConfig`` says which linear layers get a low-rank adapter and of what kind, and puts it on them.

Read with ``linear.py`` (what an adapted layer computes), ``experts.py`` (what adapted experts do), ``match.py`` (which of
them), ``export.py`` (how it is saved) and ``merge.py`` (how what was saved becomes full weights).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed
from torch import nn

from nemo_automodel.components._peft.experts import LoRAExperts, adapt_experts, lora_experts
from nemo_automodel.components._peft.export import (
    gathered_adapter_tensors,
    merged_tensors,
    peft_targets,
    weight_merges,
)
from nemo_automodel.components._peft.linear import LoRALinear, adapt, lora_layers
from nemo_automodel.components._peft.match import Selection, select_modules, summarize
from nemo_automodel.errors import ConfigError, ModelError
from nemo_automodel.kernels.lora import is_faster_for, runs_on, unsupported_reason

logger = logging.getLogger(__name__)

_PARTS = ("language_model", "vision_tower", "projector", "all")


@dataclass
class PeftConfig:
    """LoRA (Hu et al. 2021) or DoRA (Liu et al. 2024) on the linear layers of a model; everything else is frozen.

    Args:
        target_modules: Names or patterns of linear layers, a list or one string: whole names
            (``model.layers.3.mlp.down_proj``), their ends (``q_proj``), or with wildcards (``*.layers.0.*.q_proj``).
            ``all-linear`` is the same as ``match_all_linear``. Each must match something.
            A name that no linear layer has may be that of stacked expert weights (``gate_up_proj``, ``down_proj``).
        target_parameters: Stacked expert weights of a mixture of experts, as PEFT names them
            (``mlp.experts.gate_up_proj``) or in the notation of ``target_modules``; beside ``target_modules`` or
            ``match_all_linear``, which leaves them out, or alone. They take neither dropout nor DoRA.
        exclude_modules: Layers to leave out, in the same notation.
        match_all_linear: Every linear layer but the output head.
        parts: Of a vision-language model, the parts whose layers are adapted: ``language_model`` (default),
            ``vision_tower``, ``projector``, a list of them, or ``all``.
        dim: Rank r of the adapters.
        alpha: The low-rank product is scaled by alpha / dim.
        dropout: Probability of dropout in the adapter's branch while training.
        dropout_position: Where: ``pre``, on the adapter's input, as PEFT; ``post``, on its output.
        use_dora: Learn each row's magnitude apart from its direction.
        lora_A_init: ``kaiming`` (uniform, PEFT's default), ``xavier`` (normal) or ``gaussian`` (std 1/dim).
            B starts at zero.
        lora_dtype: Dtype the adapters are kept in; null = float32. They compute in the model's own.
        use_triton: Run base and adapter by the Triton kernels. Where they cannot run, that is said once and plain
            PyTorch is used. null = where they are known to be faster: models in 16 bit on NVIDIA GPUs since Ampere.
    """

    target_modules: list[str] | str | None = None
    target_parameters: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    match_all_linear: bool = False
    parts: list[str] | str | None = None
    dim: int = 8
    alpha: int = 32
    dropout: float = 0.0
    dropout_position: Literal["pre", "post"] = "pre"
    use_dora: bool = False
    lora_A_init: Literal["kaiming", "xavier", "gaussian"] = "kaiming"
    lora_dtype: str | None = None
    use_triton: bool | None = None

    def __post_init__(self) -> None:
        if self.target_modules == "all-linear":
            self.target_modules, self.match_all_linear = None, True
        if self.match_all_linear and self.target_modules:
            raise ConfigError(
                "peft: match_all_linear: true and target_modules are both set; "
                "set match_all_linear: false to adapt only target_modules, or remove target_modules"
            )
        if not self.match_all_linear and not self.target_modules and not self.target_parameters:
            raise ConfigError(
                "peft: no layer is named; set match_all_linear: true, or target_modules: [q_proj, v_proj]"
            )
        if unknown := [part for part in self.chosen_parts if part not in _PARTS]:
            raise ConfigError(f"peft.parts={unknown[0]!r}: must be one of {', '.join(_PARTS)}, or a list of them")
        if self.dim < 1:
            raise ConfigError(f"peft.dim={self.dim}: the rank must be at least 1; 8 to 64 are usual")
        if self.alpha <= 0:
            raise ConfigError(f"peft.alpha={self.alpha}: must be above 0; the adapter is scaled by alpha / dim")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"peft.dropout={self.dropout}: must be at least 0 and below 1")
        _one_of("dropout_position", self.dropout_position, ("pre", "post"))
        _one_of("lora_A_init", self.lora_A_init, ("kaiming", "xavier", "gaussian"))
        _parse_dtype(self.lora_dtype)

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.alpha / self.dim

    @property
    def chosen_parts(self) -> list[str]:
        """The parts of a vision-language model whose layers are adapted; ``all`` alone for every part."""
        chosen = _as_list(self.parts) or ["language_model"]
        return ["all"] if "all" in chosen else chosen

    def apply(
        self, model: nn.Module, device: torch.device | None = None, within: Callable[[str], bool] | None = None
    ) -> list[str]:
        """Freeze ``model`` and adapt its matching linear layers and stacked experts in place; returns their names.

        With an initialised process group every rank must call it, so that all draw the same initial values. ``device``
        is where the model will run, for one on the meta device; default where it is. ``within`` tells by a module's
        name whether it is in ``parts``; default all are.

        Raises:
            ModelError: a pattern that matches nothing, a named layer that cannot be adapted, nothing to adapt, or a
                model that is adapted already.
        """
        if any(True for _ in lora_layers(model)) or any(True for _ in lora_experts(model)):
            raise ModelError("peft: the model carries LoRA adapters already; merge them, or load the base model")
        selection = select_modules(
            model, _as_list(self.target_modules), _as_list(self.exclude_modules), self.match_all_linear, within,
            _as_list(self.target_parameters),
        )  # fmt: skip
        self._require_plain(selection)
        model.requires_grad_(False)
        use_triton = self._choose_kernel(device or next(model.parameters()).device, selection.targets.values())
        dtype = _parse_dtype(self.lora_dtype)
        for module in selection.targets.values():
            adapt(module, self.dim, self.scale, self.dropout, self.dropout_position, self.use_dora,
                  self.lora_A_init, dtype, use_triton)  # fmt: skip
        adapt_experts(model, selection.stacked, self.dim, self.scale, self.lora_A_init, dtype)
        if not any(parameter.is_meta for parameter in model.parameters()):
            reset_adapters(model)
        self._report(model, selection.skipped)
        return [*selection.targets, *selection.stacked]

    def adapter_state_dict(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The adapters under PEFT's key names, whole on every rank (a collective where the model is sharded)."""
        return gathered_adapter_tensors(model)

    def adapter_config(
        self, model: nn.Module, base_model_name_or_path: str, revision: str | None = None
    ) -> dict[str, Any]:
        """What ``adapter_config.json`` holds; ``target_modules`` lists what really is adapted in ``model``."""
        modules, parameters = peft_targets(model)
        named_by_weight = {"target_parameters": parameters} if parameters else {}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,  # PEFT calls it
            "base_model_name_or_path": base_model_name_or_path,
            "revision": revision,
            "r": self.dim,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0 if parameters else self.dropout,  # PEFT knows none on a layer named by its weight
            "target_modules": modules,
            **named_by_weight,
            "exclude_modules": None,
            "bias": "none",
            "use_rslora": False,
            "use_dora": self.use_dora,
            "modules_to_save": None,
            "inference_mode": True,
            "fan_in_fan_out": any(layer.lora_transposed for _, layer in lora_layers(model)),
            "init_lora_weights": "gaussian" if self.lora_A_init == "gaussian" else True,
            "layers_to_transform": None,
            "layers_pattern": None,
            "rank_pattern": {},
            "alpha_pattern": {},
        }

    def merged_state_dict(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The base model's state dict with the adapters merged into it; ``model`` stays as it is.

        Each weight is summed in fp32 and cast to the base's dtype. Sharded weights come back sharded.
        """
        return merged_tensors(model)

    def merges(self, model: nn.Module) -> dict[str, tuple[dict[str, torch.Tensor], Callable[..., torch.Tensor]]]:
        """For each adapted weight, its adapter's tensors and what makes the merged weight of whole ones.

        ``merged_state_dict`` weight by weight: ``combine(weight, **tensors)`` returns the same values.
        """
        return weight_merges(model)

    def _choose_kernel(self, device: torch.device, layers: Iterable[nn.Module]) -> bool:
        """Whether the Triton path serves these adapters; logged once, with the reason where it was asked for in vain."""
        reason = unsupported_reason(self.dim)
        if self.use_dora:
            reason = "DoRA rescales the base layer's output"
        elif self.dropout > 0:
            reason = "dropout is on"
        if self.use_triton is None:
            chosen = reason is None and all(is_faster_for(layer.weight, device) for layer in layers)  # type: ignore[arg-type]
            if chosen:
                logger.info(
                    "LoRA: base and adapter run by the Triton kernels (peft.use_triton: false for plain PyTorch)"
                )
            return chosen
        if not self.use_triton:
            return False
        if reason is not None:
            logger.warning("LoRA: use_triton is on, but %s; plain PyTorch is used", reason)
        elif device.type != "meta" and not runs_on(device.type):
            logger.warning(
                "LoRA: use_triton is on, but Triton does not run on %s; plain PyTorch is used there", device.type
            )
        return reason is None

    def _require_plain(self, selection: Selection) -> None:
        for key, used in (("dropout", self.dropout > 0), ("use_dora", self.use_dora)):
            if used and selection.stacked:
                raise ModelError(
                    f"peft.{key}: {selection.stacked[0]} is a stacked expert weight, whose adapter knows none; leave "
                    f"peft.{key} out, or the experts out of peft.target_modules and peft.target_parameters"
                )

    def _report(self, model: nn.Module, skipped: dict[str, str]) -> None:
        total = sum(p.numel() for p in model.parameters())
        experts = [weight.full_name for weight in lora_experts(model)]
        stacked = f" and on stacked experts: {summarize(experts)}" if experts else ""
        layers = sum(1 for _ in lora_layers(model))
        logger.info("LoRA: r=%d alpha=%s on %d linear layers%s", self.dim, self.alpha, layers, stacked)
        reasons: dict[str, list[str]] = {}
        for name, reason in skipped.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            count = sum(_numel(model, name) for name in names)
            logger.warning(
                "LoRA: NOT adapted (frozen): %s, %.0f%% of the model's parameters: %s",
                summarize(names), 100 * count / total, reason,
            )  # fmt: skip


def reset_adapters(model: nn.Module) -> None:
    """Set every adapter of ``model`` to its start (the model then computes what the base does).

    For a model that was adapted on the meta device: call it once its base weights are loaded. One seed is drawn from
    torch's CPU generator, rank 0's on every rank.
    """
    seed = torch.randint(2**62, (1,))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shared = [int(seed)]
        torch.distributed.broadcast_object_list(shared, src=0)
        seed = torch.tensor(shared)
    generator = torch.Generator().manual_seed(int(seed))
    for _, layer in lora_layers(model):
        layer.reset_adapter(generator)
    for module in model.modules():
        if isinstance(module, LoRAExperts):
            module.reset_adapter(generator)


def _numel(model: nn.Module, name: str) -> int:
    owner, _, last = name.rpartition(".")
    found = getattr(model.get_submodule(owner), last)
    return found.numel() if isinstance(found, torch.Tensor) else sum(p.numel() for p in found.parameters())


def _as_list(value: list[str] | str | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"peft.{key}={value!r}: must be one of {', '.join(allowed)}")


_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float": torch.float32, "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16, "float64": torch.float64,
}  # fmt: skip


def _parse_dtype(value: str | torch.dtype | None) -> torch.dtype:
    name = "float32" if value is None else str(value).removeprefix("torch.")
    if name in ("float16", "fp16", "half"):
        raise ConfigError(
            f"peft.lora_dtype={name!r}: float16 has too little range, AdamW's moments become 0 in it; write float32 or bfloat16"
        )
    if name not in _DTYPES:
        raise ConfigError(f"peft.lora_dtype={name!r}: write float32 or bfloat16")
    return _DTYPES[name]


__all__ = ["LoRALinear", "PeftConfig", "reset_adapters"]
