"""What a LoRA run adapts: names and patterns -> linear layers and stacked experts, with nothing left out in silence."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import nn

from nemo_automodel.errors import ModelError

_WILDCARDS = set("*?[")


@dataclass
class Selection:
    """The linear layers to adapt, by name, the stacked expert weights, and what a user might expect but is not, with the reason."""

    targets: dict[str, nn.Module]
    stacked: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def name_matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` selects module ``name``.

    A pattern without wildcards is a whole name (``model.layers.3.mlp.down_proj``) or its last parts (``q_proj``,
    ``mlp.down_proj``). With ``*``, ``?`` or ``[...]`` it is matched the same way, ``*`` spanning dots
    (``*.layers.0.*.q_proj``).
    """
    if _WILDCARDS & set(pattern):
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
    return name == pattern or name.endswith(f".{pattern}")


def select_modules(
    model: nn.Module,
    patterns: list[str],
    exclude: list[str],
    match_all_linear: bool,
    within: Callable[[str], bool] | None = None,
    parameters: list[str] | None = None,
) -> Selection:
    """Resolve ``patterns`` (or every linear layer but the output head) minus ``exclude`` over ``model``.

    A pattern means linear layers; one that no linear layer matches means stacked expert weights, and so does each of
    ``parameters``, where ``NAME.weight`` of a linear layer is that layer.

    Raises:
        ModelError: a pattern that selects nothing, an explicitly named module that LoRA cannot adapt, or an empty
            result. The message lists the names there are.
    """
    linears, skipped = _linear_modules(model)
    stacked: dict[str, Any] = dict(stacked_weights(model))
    named_weights, of_linears = _split_parameters(parameters or [], linears, stacked)
    if within is not None:
        _require_within([*patterns, *named_weights, *of_linears], linears | stacked, within)
        linears = {name: module for name, module in linears.items() if within(name)}
        stacked = {name: weight for name, weight in stacked.items() if within(name)}
        skipped = {name: reason for name, reason in skipped.items() if within(name)}
    known = _Known(model, linears, stacked)
    known.require_each_matches(exclude, "peft.exclude_modules")
    known.require_each_matches(patterns, "peft.target_modules")
    candidates = {n for n in linears if any(name_matches(p, n) for p in of_linears)}
    if match_all_linear:
        candidates |= set(linears) - _output_heads(model, linears)
    else:
        named = {name for name in [*linears, *skipped] if any(name_matches(p, name) for p in patterns)}
        excluded = {name for name in named if any(name_matches(p, name) for p in exclude)}
        _refuse({name: skipped[name] for name in named - excluded if name in skipped})
        candidates, skipped = candidates | named, {}

    for name, reason in _tied_modules(model, linears).items():
        if name not in candidates or any(name_matches(p, name) for p in exclude):
            continue
        if not match_all_linear:
            _refuse({name: reason})
        candidates.discard(name)
        skipped[name] = reason

    chosen, left = _choose_stacked(stacked, linears, patterns, named_weights, match_all_linear)
    skipped |= left
    kept = [name for name in [*linears, *stacked, *skipped] if not any(name_matches(p, name) for p in exclude)]
    targets = {name: linears[name] for name in kept if name in candidates}
    selection = Selection(targets, [n for n in chosen if n in kept], {n: r for n, r in skipped.items() if n in kept})
    if not targets and not selection.stacked:
        raise ModelError(
            "peft: no linear layer is left to adapt; name some in peft.target_modules or shorten "
            f"peft.exclude_modules. Linear layers of this model: {_suffixes(linears)}"
        )
    return selection


def _split_parameters(
    parameters: list[str], linears: Mapping[str, Any], stacked: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Of ``peft.target_parameters``: those that name stacked weights, and the layers of which others name the weight."""
    weights, layers = [], []
    for target in parameters:
        layer = target.removesuffix(".weight")
        if any(name_matches(target, name) for name in stacked):
            weights.append(target)
        elif layer != target and any(name_matches(layer, name) for name in linears):
            layers.append(layer)
        else:
            raise ModelError(
                f"peft.target_parameters: {target!r} matches no stacked expert weight{_did_you_mean(target, stacked)} "
                f"Stacked expert weights of this model: {summarize(stacked) or 'none'}"
            )
    return weights, layers


def _choose_stacked(
    stacked: Mapping[str, nn.Parameter],
    linears: Mapping[str, Any],
    patterns: list[str],
    named_weights: list[str],
    match_all_linear: bool,
) -> tuple[list[str], dict[str, str]]:
    """The stacked weights to adapt, and those that a user might expect among them, with the reason."""
    alone = [p for p in patterns if not any(name_matches(p, name) for name in linears)]
    chosen = [name for name in stacked if any(name_matches(p, name) for p in [*alone, *named_weights])]
    left = {}
    for name, weight in stacked.items():
        if name not in chosen and (match_all_linear or any(name_matches(p, name) for p in patterns)):
            left[name] = (
                f"stacked expert weights ({weight.shape[0]} experts in one tensor); "
                "name them in peft.target_parameters to adapt them"
            )
    return chosen, left


def summarize(names: Iterable[str]) -> str:
    """Names with their layer numbers folded: ``model.layers.*.mlp.experts.down_proj (x32)``, comma separated."""
    counts: dict[str, int] = {}
    for name in names:
        folded = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        counts[folded] = counts.get(folded, 0) + 1
    return ", ".join(name if n == 1 else f"{name} (x{n})" for name, n in counts.items())


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D`` (GPT-2): a linear layer whose weight is ``[in, out]``."""
    weight = getattr(module, "weight", None)
    features = getattr(module, "nf", None)
    return features is not None and weight is not None and weight.ndim == 2 and weight.shape[1] == features


def _linear_modules(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Every linear layer that can carry an adapter, and those that look like one but cannot, with the reason."""
    linears: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    inside_attention: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            inside_attention.update(id(child) for child in module.modules())
        if not isinstance(module, nn.Linear) and not is_transposed_linear(module):
            continue
        if id(module) in inside_attention:
            skipped[name] = "torch.nn.MultiheadAttention uses its weight without calling the layer"
        elif "forward" in module.__dict__:
            skipped[name] = "its forward is replaced on the instance, which would bypass the adapter"
        elif _weight_is_used_outside(model, name):
            skipped[name] = "the module around it takes its weight itself, which would bypass the adapter"
        elif not _computes_a_linear_map(module):
            skipped[name] = f"{type(module).__name__}.forward does not map [..., in] to one [..., out] tensor"
        else:
            linears[name] = module
    return linears, skipped


def _weight_is_used_outside(model: nn.Module, name: str) -> bool:
    """Whether the code of the module around a layer takes the layer's weight itself (state space layers do)."""
    owner, _, last = name.rpartition(".")
    use = re.compile(rf"self\.{re.escape(last)}\.weight(\s*[,)@]|\.(data|float|to|type|clamp|t|T)\b)")
    lines = _source_of(type(model.get_submodule(owner))).splitlines()  # type: ignore[arg-type]
    return any(use.search(line) and "init" not in line for line in lines)


@cache
def _source_of(kind: Any) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def _computes_a_linear_map(module: nn.Module) -> bool:
    """Probe a subclass with its own ``forward`` on the meta device: routers, say, are Linears that return tuples."""
    if type(module).forward is nn.Linear.forward:
        return True
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    n_out, n_in = reversed(weight.shape) if is_transposed_linear(module) else weight.shape
    parameters = {n: torch.empty_like(p, device="meta") for n, p in module.named_parameters()}
    x = torch.empty(1, 2, n_in, dtype=weight.dtype, device="meta")
    try:
        with torch.no_grad():
            y = torch.func.functional_call(module, parameters, (x,))
    except Exception:  # whatever such a forward raises on a plain [..., in] tensor, it is not a plain linear layer
        return False
    return isinstance(y, torch.Tensor) and y.shape == (1, 2, n_out)


def _output_heads(model: nn.Module, linears: dict[str, nn.Module]) -> set[str]:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    return {name for name, module in linears.items() if module is head}


def _tied_modules(model: nn.Module, linears: dict[str, nn.Module]) -> dict[str, str]:
    """Linear layers whose weight another module owns too: a merged adapter would change both."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    tied: dict[str, str] = {}
    for name, module in linears.items():
        others = [other for other in owners[id(module.weight)] if other != name]
        if others:
            tied[name] = f"its weight is tied to {others[0]}, and merging the adapter would change both"
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text_config, "tie_word_embeddings", False):
        for name in _output_heads(model, linears) - set(tied):
            tied[name] = "the config ties it to the input embeddings, and merging the adapter would change both"
    return tied


def stacked_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Expert weights ``[E, ...]`` by their full name: most of a mixture of experts, in tensors that are no modules.

    Kernels of convolutions look alike but are none.
    """
    found: dict[str, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) or not module_name:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape) > 1:
                found[f"{module_name}.{name}"] = parameter
    return found


@dataclass(frozen=True)
class _Known:
    """What there is in a model that patterns may name."""

    model: nn.Module
    linears: dict[str, nn.Module]
    stacked: dict[str, nn.Parameter]

    def require_each_matches(self, patterns: list[str], key: str) -> None:
        """Raise ModelError for a pattern that names nothing that can be adapted."""
        for pattern in patterns:
            if not any(name_matches(pattern, name) for name in [*self.linears, *self.stacked]):
                self._refuse(pattern, key)

    def _refuse(self, pattern: str, key: str) -> None:
        modules = dict(self.model.named_modules())
        others = [name for name in modules if name_matches(pattern, name)]
        if any(isinstance(modules[n], nn.Linear) or is_transposed_linear(modules[n]) for n in others):
            return  # linear, but not adaptable: the caller says why
        if others:
            raise ModelError(
                f"{key}: {pattern!r} matches {others[0]}, a {type(modules[others[0]]).__name__}, but no linear layer; "
                f"name linear layers: {_suffixes(self.linears)}"
            )
        experts = f"; stacked expert weights: {_suffixes(self.stacked)}" if self.stacked else ""
        raise ModelError(
            f"{key}: {pattern!r} matches no module{_did_you_mean(pattern, [*self.linears, *self.stacked])} "
            f"Linear layers of this model: {_suffixes(self.linears)}{experts}"
        )


def _require_within(patterns: list[str], known: Mapping[str, Any], within: Callable[[str], bool]) -> None:
    for pattern in patterns:
        names = [name for name in known if name_matches(pattern, name)]
        if names and not any(within(name) for name in names):
            raise ModelError(
                f"peft.target_modules: {pattern!r} matches {names[0]}, which is in a part that is not adapted; "
                "add its part to peft.parts (language_model, vision_tower, projector, or all)"
            )


def _refuse(reasons: dict[str, str]) -> None:
    if reasons:
        name, reason = next(iter(reasons.items()))
        raise ModelError(
            f"peft.target_modules: {name} cannot be adapted: {reason}. "
            f"Take it out of peft.target_modules, or add it to peft.exclude_modules"
        )


def _suffixes(linears: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linears)) or "none"


def _did_you_mean(pattern: str, linears: Iterable[str]) -> str:
    names = list(linears) if "." in pattern else list({name.rsplit(".", 1)[-1] for name in linears})
    close = difflib.get_close_matches(pattern, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."
