"""LoRA on stacked experts: weights ``[E, ...]`` that a mixture of experts keeps in one tensor.

PEFT calls them target parameters. An adapter is a pair of factors an expert, ``W_e + scale * B_e A_e``. Where the experts'
forward multiplies groups of tokens (``_transformers/experts.py``), the factors are multiplied likewise; everywhere else the
sum is made in each forward, as PEFT does.

Shape legend: E experts, r rank; a weight is [E, out, in], or [E, in, out] in a module that says ``is_transposed``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nemo_automodel.components._peft.linear import LoRAWeight, assign, clean_name, full_tensor, like, stored
from nemo_automodel.components._peft.match import stacked_weights

_CHILD = "lora_experts"  # what holds a module's adapters, by the name of the weight


class ExpertFactor(LoRAWeight):
    """One low-rank factor of every expert, ``.weight`` [E, rows, cols]."""

    def __init__(self, shape: tuple[int, int, int], init: str, dtype: torch.dtype, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.init = init
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the values anew, on the CPU in fp32, the experts' rows being those of one factor as in PEFT's file."""
        weight = stored(self, "weight")
        if self.init == "zeros":
            weight.zero_()
            return
        experts, rank, cols = weight.shape
        full = torch.empty(experts * rank, cols)
        if self.init == "kaiming":
            nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
        elif self.init == "xavier":
            nn.init.normal_(full, std=math.sqrt(2.0 / (rank + cols)), generator=generator)  # of one expert's factor
        else:
            nn.init.normal_(full, std=1 / rank, generator=generator)
        assign(weight, full.view(experts, rank, cols))


class ExpertAdapter(nn.Module):
    """The factors of one stacked weight: ``lora_A.weight`` [E, r, in], ``lora_B.weight`` [E, out, r]."""

    def __init__(self, shapes: tuple[Any, Any], init: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.lora_A = ExpertFactor(shapes[0], init, dtype, device)
        self.lora_B = ExpertFactor(shapes[1], "zeros", dtype, device)


class LoRAExperts(nn.Module):
    """Mixin put before the class of a module of stacked experts; its weights keep their names, and are frozen.

    Its own code sees a weight with the adapter in it, unless it multiplies the factors itself (``lora_by_factors``).
    """

    lora_names: tuple[str, ...]  # of the adapted weights, in the order in which the module has them
    lora_scale: float
    lora_transposed: bool
    lora_sums: dict[str, torch.Tensor] | None  # during a forward that knows nothing of factors
    lora_by_factors: Callable[[nn.Module], bool] | None  # tells whether the module's forward takes the factors itself

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        if self.lora_by_factors is not None and self.lora_by_factors(self):
            return super().forward(*args, **kwargs)
        self.lora_sums = {name: self.lora_sum(name) for name in self.lora_names}
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.lora_sums = None

    def lora_adapter(self, name: str) -> ExpertAdapter:
        """The adapter of weight ``name``."""
        adapter = getattr(self, _CHILD)[name]
        assert isinstance(adapter, ExpertAdapter)
        return adapter

    def lora_sum(self, name: str) -> torch.Tensor:
        """Weight ``name`` with its adapter added, in the weight's dtype; with gradients for the factors."""
        weight, adapter = self._parameters[name], self.lora_adapter(name)
        assert weight is not None
        a, b = adapter.lora_A.weight.to(weight.dtype), adapter.lora_B.weight.to(weight.dtype)
        left, right = (a.mT, b.mT) if self.lora_transposed else (b, a)
        return torch.baddbmm(weight, left, right, alpha=self.lora_scale)

    @torch.no_grad()
    def reset_adapter(self, generator: torch.Generator | None = None) -> None:
        """Start over: A random, B zero, so that the module is the base."""
        for name in self.lora_names:
            adapter = self.lora_adapter(name)
            adapter.lora_A.reset_parameters(generator)
            adapter.lora_B.reset_parameters(generator)


@dataclass(frozen=True)
class ExpertWeight:
    """An adapted stacked weight: the module it is of, and its name there."""

    module_name: str
    module: LoRAExperts
    name: str

    @property
    def full_name(self) -> str:
        """The weight's name in the model."""
        return f"{self.module_name}.{self.name}"

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B as they are stored, sharded or not."""
        adapter = self.module.lora_adapter(self.name)
        return stored(adapter.lora_A, "weight"), stored(adapter.lora_B, "weight")

    @property
    def file_name(self) -> str:
        """What PEFT calls its adapter: one wrapper a weight, the module's first weight innermost."""
        names = self.module.lora_names
        return self.module_name + ".base_layer" * (len(names) - 1 - names.index(self.name))


def adapt_experts(
    model: nn.Module, names: Sequence[str], dim: int, scale: float, init: str, dtype: torch.dtype
) -> None:
    """Turn the modules of the stacked weights ``names`` into ``LoRAExperts``, in place; values not yet set."""
    by_module: dict[str, set[str]] = {}
    for name in names:
        owner, _, last = name.rpartition(".")
        by_module.setdefault(owner, set()).add(last)
    for owner, wanted in by_module.items():
        module = model.get_submodule(owner)
        own = {name: p for name, p in module.named_parameters(recurse=False) if name in wanted}
        transposed = bool(getattr(module, "is_transposed", False))
        adapters = {
            name: ExpertAdapter(factor_shapes(model, f"{owner}.{name}", dim), init, dtype, weight.device)
            for name, weight in own.items()
        }
        module.__class__ = _adapted_class(type(module), tuple(own))
        assert isinstance(module, LoRAExperts)
        setattr(module, _CHILD, nn.ModuleDict(adapters))
        module.lora_names = tuple(own)
        module.lora_scale = scale
        module.lora_transposed = transposed
        module.lora_sums = None
        module.lora_by_factors = None


def expert_adapters(module: nn.Module) -> list[str]:
    """Names, within a module of experts, of the factors ``[E, ...]`` of its adapters."""
    return [name for name, _ in module.named_parameters() if name.startswith(f"{_CHILD}.")]


def is_transposed_experts(model: nn.Module, name: str) -> bool:
    """Whether the stacked weight ``name`` of ``model`` is [E, in, out], as PEFT tells it: its module says so."""
    return bool(getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False))


def factor_names(name: str) -> tuple[str, str]:
    """Names of the parameters A and B of the adapter of the stacked weight ``name``."""
    owner, _, last = name.rpartition(".")
    return f"{owner}.{_CHILD}.{last}.lora_A.weight", f"{owner}.{_CHILD}.{last}.lora_B.weight"


def factor_shapes(model: nn.Module, name: str, dim: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes [E, r, in] and [E, out, r] of the factors of an adapter of rank ``dim`` of the stacked weight ``name``."""
    experts, n_out, n_in = model.get_parameter(name).shape
    if is_transposed_experts(model, name):
        n_out, n_in = n_in, n_out
    return (experts, dim, n_in), (experts, n_out, dim)


def lora_experts(model: nn.Module) -> Iterator[ExpertWeight]:
    """Every adapted stacked weight of ``model``."""
    for raw_name, module in model.named_modules():
        if isinstance(module, LoRAExperts):
            for name in module.lora_names:
                yield ExpertWeight(clean_name(raw_name), module, name)


_adapted_classes: dict[tuple[type, tuple[str, ...]], type] = {}


def _adapted_class(cls: type, names: tuple[str, ...]) -> type:
    key = (cls, names)
    if key not in _adapted_classes:  # one class each, so that torch.compile sees the same code in every block
        namespace: dict[str, Any] = {name: _seen(name) for name in names} | {"forward": _forward_of(cls)}
        namespace |= {"__doc__": f"``{cls.__name__}`` with LoRA adapters.", "__module__": cls.__module__}
        _adapted_classes[key] = type(f"LoRA{cls.__name__}", (LoRAExperts, cls), namespace)
    return _adapted_classes[key]


def _forward_of(cls: Any) -> Callable[..., Any]:
    @functools.wraps(cls.forward)  # with the signature of the module's own, which says how it may be called
    def forward(self: LoRAExperts, *args: Any, **kwargs: Any) -> Any:
        return LoRAExperts.forward(self, *args, **kwargs)

    return forward


def _seen(name: str) -> property:
    return property(lambda self: self._parameters[name] if self.lora_sums is None else self.lora_sums[name])


# --- files and sums -------------------------------------------------------------------------------------------------


def to_file(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors [E, r, in] and [E, out, r] as PEFT stores them: [E r, in], rank within expert, and [out, r E], expert within rank."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1, 2)


def from_file(a: torch.Tensor, b: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The reverse of ``to_file``."""
    return a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)


@torch.no_grad()
def expert_sum(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, transposed: bool) -> torch.Tensor:
    """``weight + scale * B A`` of each expert, summed in fp32 and cast to the weight's dtype."""
    merged = torch.empty_like(weight)
    for i in range(len(weight)):  # one at a time: together their fp32 sums may be larger than the model
        product = b[i].float() @ a[i].float()
        merged[i] = weight[i].float() + scale * (product.t() if transposed else product)
    return merged


def merge_of(weight: ExpertWeight) -> tuple[dict[str, torch.Tensor], Callable[..., torch.Tensor]]:
    """The factors of ``weight``, and the function of it and them, all whole, that is the sum."""
    a, b = weight.factors
    scale, transposed = weight.module.lora_scale, weight.module.lora_transposed
    return {"a": a, "b": b}, lambda weight, a, b: expert_sum(weight, a, b, scale, transposed)


def merged_experts(stored_weight: torch.Tensor, weight: ExpertWeight) -> torch.Tensor:
    """``weight``, stored as ``stored_weight``, with its adapter in it; sharded as it is stored."""
    a, b = (full_tensor(factor.detach()) for factor in weight.factors)
    scale, transposed = weight.module.lora_scale, weight.module.lora_transposed
    return like(expert_sum(full_tensor(stored_weight), a, b, scale, transposed), stored_weight)


def nested_weights(module: nn.Module, targets: Sequence[str], module_name: str) -> list[str]:
    """Weights of ``module`` that PEFT's ``target_parameters`` name, outermost wrapper first."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    return [name for name in reversed(own) if any(is_target(t, f"{module_name}.{name}") for t in targets)]


def is_target(target: str, name: str) -> bool:
    """PEFT's rule: a target parameter is a whole name, or its end after a dot."""
    return name == target or name.endswith(f".{target}")


def split_adapter(
    model: nn.Module, targets: Sequence[str], layers: Mapping[str, dict[str, torch.Tensor]]
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, dict[str, torch.Tensor]]]:
    """Of the adapters of a file, those of stacked weights (by the weight's full name), and the others as they came.

    ``layers`` are the file's, by PEFT's name of the module with ``.base_layer`` for each wrapper that is around.
    """
    stacked: dict[str, dict[str, torch.Tensor]] = {}
    others: dict[str, dict[str, torch.Tensor]] = {}
    weights = stacked_weights(model)
    owners = {name.rpartition(".")[0] for name in weights if any(is_target(target, name) for target in targets)}
    for key, parts in layers.items():
        name = key.replace(".base_layer", "")
        depth = key.count(".base_layer")
        nested = nested_weights(model.get_submodule(name), targets, name) if name in owners else []
        full = f"{name}.{nested[depth]}" if depth < len(nested) else ""
        if full in weights and parts.keys() >= {"A", "B"}:
            stacked[full] = parts
        else:
            others.setdefault(name, {}).update(parts)
    return stacked, others
