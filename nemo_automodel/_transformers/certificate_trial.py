"""One small model trained on a few rows, by plain transformers in float32 and by this package's own stack.

The reference runs first, on transformers' own class: eager attention, padded rows, a loop over experts, whole logits,
adapters merged into the weights they adapt. Then the same model becomes ours, and every optimisation can be switched on and off on it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from nemo_automodel._transformers import compat, experts
from nemo_automodel._transformers.blocks import find_blocks
from nemo_automodel._transformers.certificate_rows import Rows
from nemo_automodel._transformers.forward import forward_loss
from nemo_automodel._transformers.head import forget_head
from nemo_automodel._transformers.inputs import to_device
from nemo_automodel._transformers.mixin import adopt
from nemo_automodel._transformers.plain import plain_loss
from nemo_automodel._transformers.stack import ATTENTION, CHECKPOINTING, EXPERTS, FP8, KERNEL, LOSS, PACKING, Stack
from nemo_automodel.components._peft.experts import factor_names, factor_shapes, is_transposed_experts
from nemo_automodel.components._peft.linear import lora_layers
from nemo_automodel.components._peft.match import is_transposed_linear
from nemo_automodel.components.attention import function
from nemo_automodel.components.distributed.activation_checkpointing import checkpoint_activations
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.errors import ModelError, first_line

EXACT = 1e-3
"""Of the norm of a gradient in float32: what sums in another order may differ by."""
SMALL = 1e-2
"""A gradient smaller than this part of the largest one is measured against that."""
EXACT_LOSS = 1e-4
ROUGH_LOSS = 1e-2
FP8_ERROR = 0.25
"""Of all gradients together: what rounding activations and weights to three bits may do."""
_SAME, _SAME_LOSS = 2e-3, 1e-3
"""What a document's gradient and loss may move by in 16 bit, at the least, when another document changes."""


@dataclass
class Outcome:
    """What one forward and backward gave: the mean loss, and the gradient of every trained parameter."""

    loss: float
    gradients: dict[str, Tensor]


@dataclass
class Gaps:
    """How far an outcome is from another: the loss, each gradient and all of them together, as parts of the other's."""

    loss: float
    each: dict[str, float]
    total: float

    @property
    def worst(self) -> tuple[float, str]:
        """The largest of ``each`` and whose it is."""
        return max(((gap, name) for name, gap in self.each.items()), default=(0.0, ""))


def gaps(found: Outcome, expected: Outcome) -> Gaps:
    """Measure ``found`` against ``expected``; a parameter without gradient has one of zeros."""
    sizes = {name: grad.float().norm() for name, grad in expected.gradients.items()}
    names = [*sizes, *(name for name in found.gradients if name not in sizes)]
    zero = torch.zeros(())
    offs = []
    for name in names:
        ours, theirs = found.gradients.get(name), expected.gradients.get(name)
        if ours is None or theirs is None:
            one = ours if theirs is None else theirs
            offs.append(zero if one is None else one.float().norm().cpu())
        else:
            offs.append((ours.float() - theirs.float()).norm().cpu())
    off = torch.stack(offs)
    size = torch.stack([sizes.get(name, zero).cpu() for name in names])
    each = (off / (size + SMALL * size.max()).clamp(min=1e-30)).tolist()
    total = (off.norm() / size.norm().clamp(min=1e-30)).item()
    loss = abs(found.loss - expected.loss) / max(abs(expected.loss), 1e-30)
    return Gaps(loss, dict(zip(names, each, strict=True)), total)


class NotTaken(ModelError):
    """Transformers' own forward does not take the rows; the message says why."""


class Trial:
    """Try a stack on one model; ``model`` is used up.

    Args:
        model: of a transformers class, whole, in float32, where it is to run.
        stack: what the run uses.
        rows: what it is trained on.
        dtype: what ours computes in.
        seed: of the adapters' values.

    Raises NotTaken where transformers cannot train it on such rows, and whatever else the model raises.
    """

    def __init__(self, model: Any, stack: Stack, rows: Rows, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.stack, self.model, self.rows, self.dtype = stack, model, rows, dtype
        self.device = next(model.parameters()).device
        self.generator = torch.Generator().manual_seed(seed)
        self.pluggable = compat.attention_is_pluggable(model)
        self.own_attention = "eager" if self.pluggable else compat.attention_name(model)
        self.grouped = EXPERTS in stack.optimisations
        self._start()
        try:
            self.expected = self._reference()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind: it is any model's own code
            raise NotTaken(f"{type(error).__name__}: {first_line(error)}") from error
        self._become_ours()
        self.yardstick: Gaps | None = None
        if dtype != torch.float32:
            self.yardstick = gaps(self.run(()), self.expected)
        if stack.fp8 is not None and FP8 in stack.optimisations:
            stack.fp8.apply(self.blocks, dtype, self.device, stack.adapters)
        self.worst = 0.0

    def objection(self, on: Collection[str]) -> str | None:
        """Why the optimisations ``on`` together are wrong, None where they compute what plain transformers does."""
        try:
            outcome = self.run(on)
            reason = self._compare(gaps(outcome, self.expected), FP8 in on)
            if reason is None and PACKING in on:
                reason = self._leak(on)
            if reason is None and self.rows.sees and self.run(on, changed=True).loss == outcome.loss:
                reason = "other pixels leave its loss as it is"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind: it is the model's own code, run in a way it may not expect
            return f"its forward or backward fails ({type(error).__name__}: {first_line(error)})"
        return reason

    def run(self, on: Collection[str], changed: bool | None = None) -> Outcome:
        """One forward and backward with the optimisations ``on``; ``changed`` is what ``rows`` make of it."""
        model = self.model
        batch = self.rows.ours(PACKING in on, changed)
        forget_head(model)
        loss_fn = self.stack.loss_fn if LOSS in on else MaskedCrossEntropy()
        with self._switched(on):
            ce_sum, aux = forward_loss(model, to_device(batch, self.device), loss_fn)
            mean = ce_sum / batch["num_label_tokens"]
            whole = mean + aux if changed is None or self.rows.sees else mean  # aux: of all documents, the changed too
            whole.backward()
        loss = whole.item()
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        model.zero_grad(set_to_none=True)
        return Outcome(loss, found)

    def choose_attention(self, on: Collection[str]) -> str:
        """The faster of transformers' own attentions that computes the same, for a model that goes on without ours."""
        if self.pluggable and self.model._supports_sdpa:
            self.own_attention = "sdpa"
            if self.objection(on) is not None:
                self.own_attention = "eager"
        return self.own_attention

    # --- the reference ------------------------------------------------------------------------------------------

    def _start(self) -> None:
        model, adapters = self.model, self.stack.adapters
        if self.pluggable:
            model.set_attn_implementation(self.own_attention)
        if self.grouped:
            model.set_experts_implementation("eager")
        model.train()
        kept = compat.kept_dtype(model, self.dtype)
        self.dtypes = {name: kept(name) or self.dtype for name, p in model.named_parameters() if p.is_floating_point()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():  # weights that the dtype can hold
                if (held := self.dtypes.get(name, parameter.dtype)) != parameter.dtype:
                    parameter.copy_(parameter.to(held))
        self.values: dict[str, Tensor] = {}
        for name, module in [] if adapters is None else adapters.targets(model):
            self.values |= self._adapter_values(name, module)
        for name in [] if adapters is None else adapters.experts(model):
            self.values |= self._expert_values(name)

    def _expert_values(self, name: str) -> dict[str, Tensor]:
        adapters = self.stack.adapters
        assert adapters is not None
        a_shape, b_shape = factor_shapes(self.model, name, adapters.dim)
        a = torch.randn(a_shape, generator=self.generator) * a_shape[-1] ** -0.5
        b = torch.randn(b_shape, generator=self.generator) * (0.3 / (adapters.scale * adapters.dim**0.5))
        values = dict(zip(factor_names(name), (a, b), strict=True))
        return {key: value.to(self.device, adapters.dtype) for key, value in values.items()}

    def _adapter_values(self, name: str, module: Any) -> dict[str, Tensor]:
        adapters, weight = self.stack.adapters, module.weight.detach()
        assert adapters is not None
        dense = weight.t() if is_transposed_linear(module) else weight
        a = torch.randn(adapters.dim, dense.shape[1], generator=self.generator) * dense.shape[1] ** -0.5
        b = torch.randn(dense.shape[0], adapters.dim, generator=self.generator)
        b *= 0.3 / (adapters.scale * adapters.dim**0.5)
        values = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        if adapters.dora:
            values[f"{name}.lora_magnitude_vector"] = dense.float().norm(dim=1).cpu() * 1.1
        return {key: value.to(self.device, adapters.dtype) for key, value in values.items()}

    def _reference(self) -> Outcome:
        """Loss and gradients of transformers' own class, adapters merged into the weights."""
        model, adapters = self.model, self.stack.adapters
        batch = {name: value.to(self.device) for name, value in self.rows.plain().items()}
        if adapters is None:
            loss = plain_loss(model, batch)
            assert loss is not None
            loss.backward()
            found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        else:
            model.requires_grad_(False)
            leaves = {name: value.float().requires_grad_() for name, value in self.values.items()}
            merged = dict(self._merged(leaves))
            outputs = functional_call(model, merged, (), batch, tie_weights=False)
            loss = plain_loss(model, batch, outputs)
            assert loss is not None
            loss.backward()
            found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        if not math.isfinite(loss.item()):
            raise ValueError(f"transformers' own loss is {loss.item()}")
        model.zero_grad(set_to_none=True)
        return Outcome(loss.item(), found)

    def _merged(self, leaves: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        adapters = self.stack.adapters
        assert adapters is not None
        for name, module in adapters.targets(self.model):
            weight: Any = module.weight
            transposed = is_transposed_linear(module)
            dense = weight.t() if transposed else weight
            merged = dense + adapters.scale * leaves[f"{name}.lora_B.weight"] @ leaves[f"{name}.lora_A.weight"]
            if adapters.dora:  # the norm is a constant of the method
                merged = merged * (leaves[f"{name}.lora_magnitude_vector"] / merged.detach().norm(dim=1))[:, None]
            yield f"{name}.weight", merged.t() if transposed else merged
        for name, weight in adapters.experts(self.model).items():
            a, b = (leaves[factor] for factor in factor_names(name))
            product = adapters.scale * b @ a
            yield name, weight + (product.mT if is_transposed_experts(self.model, name) else product)

    # --- ours ---------------------------------------------------------------------------------------------------

    def _become_ours(self) -> None:
        model, adapters = adopt(self.model), self.stack.adapters
        function.register()
        model.__dict__.update(self.stack.found)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(self.dtypes.get(name, parameter.dtype))
        self._cast_buffers()
        if adapters is not None:
            adapters.put_on(model, kernel=False)
            experts.multiply_factors(model)
            for name, value in self.values.items():
                parameter = model.get_parameter(name)
                if self.dtype == torch.float32:  # gradients in adapters kept in bfloat16 would be rounded to it
                    parameter.data = parameter.data.float()
                parameter.data.copy_(value)
        self.blocks = find_blocks(model)

    def _cast_buffers(self) -> None:
        """Give each buffer the dtype that transformers builds it in for a model of ``dtype``; rotary ones stay float32."""
        if self.dtype == torch.float32:
            return
        with compat.on_meta():
            built = type(self.model)._from_config(self.model.config, dtype=self.dtype)
        dtypes = {name: buffer.dtype for name, buffer in built.named_buffers()}
        for path, module in self.model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    full = f"{path}.{name}".removeprefix(".")
                    module._buffers[name] = buffer.to(dtypes.get(full, buffer.dtype))

    @contextmanager
    def _switched(self, on: Collection[str]) -> Iterator[None]:
        model = self.model
        if self.pluggable:
            model.set_attn_implementation(function.NAME if ATTENTION in on else self.own_attention)
        if self.grouped:
            model.set_experts_implementation(experts.NAME if EXPERTS in on else "eager")
        for _, layer in lora_layers(model):
            layer.lora_use_triton = KERNEL in on
        if CHECKPOINTING in on:
            checkpoint_activations(self.blocks, self.stack.checkpointing)
        try:
            yield
        finally:
            for block in self.blocks if CHECKPOINTING in on else ():
                del block.forward

    def _compare(self, found: Gaps, fp8: bool) -> str | None:
        loss_limit = EXACT_LOSS if self.yardstick is None else max(ROUGH_LOSS, 2 * self.yardstick.loss)
        worst, name = found.worst
        if not found.loss <= loss_limit * (5 if fp8 else 1):
            return f"its loss is off by {found.loss:.2g} of itself, the gradient of {name} by {worst:.2g} of its norm"
        if fp8:
            self.worst = max(self.worst, found.total)
            return None if found.total <= FP8_ERROR else f"all gradients together are off by {found.total:.2g}"
        plain = self.yardstick
        if plain is None:
            self.worst = max(self.worst, worst)
            wrong = [name for name, gap in found.each.items() if not gap <= EXACT]
            if all(found.each[name] <= 4 * self._rounding.each.get(name, 0.0) for name in wrong):
                return None
            return f"the gradient of {name} is off by {worst:.2g} of its norm"
        if not found.total <= 2 * plain.total:
            return (
                f"all gradients together are off by {found.total:.2g}, that of {name} by {worst:.2g} (plain torch in "
                f"{str(self.dtype)[6:]}: {plain.total:.2g})"
            )
        mean = sum(plain.each.values()) / max(len(plain.each), 1)
        self.worst = max(self.worst, found.total / max(plain.total, 1e-30))
        for name, gap in found.each.items():
            allowed = 4 * max(plain.each.get(name, 0.0), mean)
            if not gap <= allowed:
                return f"the gradient of {name} is off by {gap:.2g} of its norm (allowed: {allowed:.2g})"
        return None

    @cached_property
    def _rounding(self) -> Gaps:
        """How far gradients move when the last digit of every weight does, nothing of ours on: not all are well-posed."""
        before, generator = self.run(()), torch.Generator().manual_seed(0)
        weights = [(parameter, parameter.detach().clone()) for parameter in self.model.parameters()]
        with torch.no_grad():
            for parameter, value in weights:
                up = torch.randint(2, value.shape, generator=generator).to(value.device)
                parameter.copy_(value * (1 + torch.finfo(torch.float32).eps * (2 * up - 1)))
        after = self.run(())
        with torch.no_grad():
            for parameter, value in weights:
                parameter.copy_(value)
        return gaps(after, before)

    def _leak(self, on: Collection[str]) -> str | None:
        """Whether other tokens in the middle document move the loss or a gradient of the others."""
        found, plain = gaps(self.run(on, changed=True), self.run(on, changed=False)), self.yardstick
        limit, loss_limit, of_plain = EXACT, EXACT_LOSS, 0.0
        if plain is not None:  # sums over experts are in another order when tokens are, in 16 bit
            limit, loss_limit, of_plain = _SAME, _SAME_LOSS, sum(plain.each.values()) / max(len(plain.each), 1)
        moved = "other tokens in one packed document move, for the documents beside it,"
        for name, gap in found.each.items():
            if not gap <= max(limit, of_plain, 0.0 if plain is None else plain.each.get(name, 0.0)):
                return f"{moved} the gradient of {name} by {gap:.2g} of its norm"
        return None if found.loss <= loss_limit else f"{moved} their loss by {found.loss:.2g}"


__all__ = ["Gaps", "NotTaken", "Outcome", "Trial", "gaps"]
