"""Tensor parallelism of a model without a plan: what its structure suggests, each suggestion proved before it is used."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from torch import nn

from nemo_automodel._transformers.blocks import find_stacks
from nemo_automodel._transformers.tp_proof import Twin
from nemo_automodel._transformers.tp_regions import ends_of, find_regions
from nemo_automodel._transformers.tp_trace import Chain, find_chains, pattern_of, widths
from nemo_automodel.components.distributed.tensor_parallel import Layer, TensorParallelPlan

logger = logging.getLogger(__name__)


_COUNTS = ("none", "heads", "heads+widths", "heads+config")


@dataclass(frozen=True)
class Pair:
    """Column layers and their row layer, and how the code between them is made to work on a share.

    Args:
        chain: the layers, as patterns.
        fused: for each column, into what its output falls: ``one`` thing, ``equal`` parts as wide as the row's input,
            or ``grouped``: a part as wide as the row's input (queries), and two equal ones (keys, values).
        counts: which integers of the columns' module are divided: one of ``_COUNTS``.
        region: whether the module around them takes its input in once, where there is one.
    """

    chain: Chain
    fused: tuple[str, ...]
    counts: str = "none"
    region: bool = True


@dataclass(frozen=True)
class Inferred:
    """Everything found about a model: its proved pairs, and whether its embedding and head are cut."""

    pairs: tuple[Pair, ...] = ()
    ends: bool = False

    def plan(self, model: nn.Module, tp_size: int) -> TensorParallelPlan:
        """The plan for ``model``, this one or its tiny twin."""
        modules = dict(model.named_modules())
        layers: dict[str, Layer] = {}
        divided: dict[str, tuple[str, ...]] = {}
        alone: set[str] = set()
        for pair in self.pairs:
            fused = dict(zip(pair.chain.columns, pair.fused, strict=True))
            rows = [name for name in modules if pattern_of(name) == pair.chain.row]
            columns = [name for name in modules if pattern_of(name) in fused]
            layers |= {name: Layer("row") for name in rows}
            width = widths(modules[rows[0]])[0]
            for name in columns:
                layers[name] = Layer("column", _parts(widths(modules[name])[1], width, fused[pattern_of(name)]))
                parent = name.rpartition(".")[0]
                divided[parent] = _attributes(model, modules[parent], pair.counts, width)
            if not pair.region:
                alone |= set(rows + columns)
        if self.ends:
            layers |= ends_of(model, tp_size)
        stacks = find_stacks(model)
        regions = find_regions(layers, {block for stack in stacks for block in stack})
        regions = {name for name in regions if not any(layer.startswith(f"{name}.") for layer in alone)}
        return TensorParallelPlan(layers, regions=frozenset(regions), divided=divided, blocks=stacks)


def infer(twin: Twin, tp_size: int, sequence_parallel: bool = False) -> tuple[Inferred, dict[str, str]]:
    """(what can be cut, and for what cannot, by the pattern of its row layer, why the likeliest guess is wrong)."""
    kept = Inferred()
    objections: dict[str, str] = {}
    try:
        chains = find_chains(twin.plain, twin.inputs)
    except Exception as error:  # of any kind, from the model's own code: something in it does not bear being watched
        return kept, {"every layer": f"its tensors cannot be followed ({type(error).__name__})"}
    for chain in chains:
        first: str | None = None
        for pair in _guesses(twin.plain, chain):
            objection = twin.objection(partial(Inferred((pair,)).plan, tp_size=tp_size), sequence_parallel)
            if objection is None:
                kept = replace(kept, pairs=(*kept.pairs, pair))
                break
            first = first or objection
        else:
            objections[chain.row] = first or "nothing to try"
    with_ends = replace(kept, ends=True)
    if ends_of(twin.plain, tp_size):
        objection = twin.objection(partial(with_ends.plan, tp_size=tp_size), sequence_parallel)
        if objection is None:
            return with_ends, objections
        objections["the embedding and the output head"] = objection
    if len(kept.pairs) > 1:
        objection = twin.objection(partial(kept.plan, tp_size=tp_size), sequence_parallel)
        if objection is not None:
            return Inferred(kept.pairs[:1]), {**objections, "together": objection}
    return kept, objections


def _guesses(model: nn.Module, chain: Chain) -> Iterator[Pair]:
    modules = {pattern_of(name): module for name, module in reversed(list(model.named_modules()))}
    width = widths(modules[chain.row])[0]
    options = [_fusions(widths(modules[name])[1], width) for name in chain.columns]
    seen: set[Any] = set()
    for region, counts, fused in product((True, False), _COUNTS, product(*options)):
        divided = tuple(_attributes(model, modules[name.rpartition(".")[0]], counts, width) for name in chain.columns)
        if (region, divided, fused) not in seen:
            seen.add((region, divided, fused))
            yield Pair(chain, fused, counts, region)


def _fusions(out: int, width: int) -> list[str]:
    """What a column layer of ``out`` features may be made of, likeliest first, where its row layer takes ``width``."""
    found = []
    if out > width and out % width == 0:
        found.append("equal")
    if out > width and (out - width) % 2 == 0 and out != 3 * width:
        found.append("grouped")
    return [*found, "one"]


def _parts(out: int, width: int, fused: str) -> tuple[int, ...] | None:
    if fused == "equal":
        return (width,) * (out // width)
    if fused == "grouped":
        return (width, (out - width) // 2, (out - width) // 2)
    return None


def _attributes(model: Any, module: nn.Module, counts: str, width: int) -> tuple[str, ...]:
    """The integer attributes of ``module`` that count heads, with ``widths`` those as wide as all of them too.

    With ``config``, those of the config it reads: ``config.num_attention_heads``.
    """
    if counts == "none":
        return ()
    text = model.config.get_text_config()
    heads = {getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    numbers = {k: v for k, v in vars(module).items() if isinstance(v, int) and not isinstance(v, bool) and v > 1}
    found = [k for k, v in numbers.items() if v in heads and "head" in k and "dim" not in k and "size" not in k]
    if counts == "heads+widths":
        found += [k for k, v in numbers.items() if v == width and k not in found and not k.endswith("_features")]
    if counts == "heads+config" and hasattr(module, "config"):
        names = ("num_attention_heads", "num_key_value_heads")
        found += [f"config.{name}" for name in names if isinstance(getattr(module.config, name, None), int)]
    return tuple(sorted(found))


__all__ = ["Inferred", "Pair", "infer"]
