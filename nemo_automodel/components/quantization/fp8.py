"""The ``fp8`` section: the linear layers of the decoder blocks compute in FP8; weights stay what they are.

The modules keep their class's name, their parameters and the parameters' values. Frozen weights of an unsharded model have
FP8 copies, made once: derived data, never saved, so checkpoints, merging and exports know nothing of them. All others are
quantised whenever they are used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_automodel.components.quantization.linears import block_linears, computes_plainly, with_mixin
from nemo_automodel.errors import ConfigError
from nemo_automodel.kernels.fp8 import (
    MULTIPLE,
    fp8_dynamic_linear,
    fp8_linear,
    fp8_lora_linear,
    has_units,
    joins_products,
    quantize_rows,
)

logger = logging.getLogger(__name__)


@dataclass
class Fp8Config:
    """Compute the linear layers of the decoder blocks in FP8 (e4m3, a scale for each row) on Hopper GPUs and later.

    Under LoRA on one rank the frozen weights are quantised once, for 2 bytes a weight more. In full fine-tuning, and on
    several ranks, weights are quantised in each forward and backward. What is trained, saved and summed stays as it is.

    Args:
        enabled: False leaves everything as it is.
        min_features: Layers with fewer inputs or outputs stay in bfloat16: routers, say, which cost nothing and whose
            choice is easily changed.
        grad_weight: What the gradient of a trained weight is computed in: ``bfloat16``, the safer, or ``float8``, the faster.
    """

    enabled: bool = True
    min_features: int = 256
    grad_weight: Literal["bfloat16", "float8"] = "bfloat16"

    def __post_init__(self) -> None:
        if self.grad_weight not in ("bfloat16", "float8"):
            raise ConfigError(f"fp8.grad_weight={self.grad_weight!r}: write bfloat16 or float8")

    def keeps_copies(self, peft: Any) -> bool:
        """Whether frozen weights get FP8 copies, so that weights must be there when ``apply`` is called.

        Args:
            peft: the run's ``PeftConfig`` or None.
        """
        return self.enabled and peft is not None and not _has_ranks()

    def apply(self, blocks: Sequence[nn.Module], compute_dtype: torch.dtype, device: torch.device, peft: Any) -> bool:
        """Let the linear layers inside ``blocks`` compute in FP8, in place; return whether any does.

        Args:
            blocks: of a whole model, with adapters if it gets any.
            compute_dtype: what its forward computes in.
            device: where it will run.
            peft: as in ``keeps_copies``.

        Raises:
            ConfigError: the model does not compute in bfloat16, the device is a GPU without FP8, or tensor parallelism
                cuts its layers.
        """
        if not self.enabled:
            return False
        if compute_dtype != torch.bfloat16:
            raise ConfigError(
                f"fp8: needs a model in bfloat16, not {str(compute_dtype)[6:]}; write model.dtype: bfloat16"
            )
        linears = block_linears(blocks)
        if any(isinstance(weight, DTensor) for m in linears for weight in (m.weight, m._parameters["weight"])):
            raise ConfigError(
                "fp8: not together with tensor parallelism in this version; write distributed.tp_size: 1, or "
                "fp8.enabled: false"
            )
        if device.type == "cuda" and not has_units(device):
            raise ConfigError(
                "fp8: this GPU has no FP8 products (compute capability below 8.9); write fp8.enabled: false"
            )
        taken = [m for m in linears if _fits(m, self.min_features)]
        if not taken:
            logger.warning(
                "fp8: no layer computes in FP8: this model's blocks hold %s",
                f"{len(linears)} nn.Linear, each with fewer than {self.min_features} inputs or outputs (fp8.min_features), sizes no "
                f"multiples of {MULTIPLE}, or a forward of its own" if linears else "no nn.Linear (GPT-2 has Conv1D layers, say)",
            )  # fmt: skip
        elif device.type != "cuda":
            logger.warning("fp8: no GPU, so FP8 is imitated: right, but slower than without")
        for module in taken:
            self._change(module, self.keeps_copies(peft) and not module.weight.requires_grad, device)
        self._report(len(linears), taken)
        return bool(taken)

    def _change(self, module: nn.Linear, copies: bool, device: torch.device) -> None:
        mixin = Fp8Linear if copies else Fp8DynamicLinear
        module.__class__ = with_mixin(type(module), mixin, "whose base product runs in FP8")
        if isinstance(module, Fp8Linear):
            module.fp8_joins = joins_products(device)
            module.quantize()
        else:
            assert isinstance(module, Fp8DynamicLinear)
            module.fp8_grad_weight = self.grad_weight

    def _report(self, number: int, taken: Sequence[nn.Module]) -> None:
        copied = sum(isinstance(m, Fp8Linear) for m in taken)
        trained = sum(m.weight.requires_grad for m in taken)  # type: ignore[misc]
        said = [f"{copied} from copies made once"] * bool(copied)
        said += [f"{trained} trained, their gradients in {self.grad_weight}"] * bool(trained)
        left = f"; {number - len(taken)} stay in bfloat16 (small, sizes no multiples of {MULTIPLE}, or a forward of their own)"
        logger.info(
            "fp8: %d linear layers compute in FP8%s%s",
            len(taken), f" ({'; '.join(said)})" * bool(said), left * (number > len(taken)),
        )  # fmt: skip


class Fp8DynamicLinear(nn.Module):
    """Mixin put before ``nn.Linear`` in a layer's class: the product runs in FP8, ``weight`` quantised each time.

    Attributes:
        fp8_grad_weight: what the gradient of ``weight`` is computed in, ``bfloat16`` or ``float8``.
    """

    quantized = True
    fp8_grad_weight: Literal["bfloat16", "float8"]
    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        y = fp8_dynamic_linear(x, self.weight, self.fp8_grad_weight == "float8")
        return y if self.bias is None else y + self.bias


class Fp8Linear(nn.Module):
    """Mixin put before ``nn.Linear`` in a layer's class: the product runs in FP8, from copies of ``weight``.

    Attributes:
        fp8_joins: whether the device has the kernel that adds an adapter's product in the same sum.
    """

    quantized = True
    fp8_joins: bool
    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        y = fp8_linear(x, *self.fp8_copies())
        return y if self.bias is None else y + self.bias

    def adapts(self, x: Tensor) -> bool:
        """Whether ``forward_adapted`` takes ``x``, and is the faster way."""
        return self.fp8_joins and x.dtype == torch.bfloat16

    def forward_adapted(self, x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
        """``forward(x) + scale * (x @ lora_a^T) @ lora_b^T``, both products by one kernel."""
        y = fp8_lora_linear(x, *self.fp8_copies(), lora_a, lora_b, scale)
        return y if self.bias is None else y + self.bias

    def fp8_copies(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight [out, in], its scales, the transposed weight [in, out], its scales."""
        found: Any = self
        return found.fp8_weight, found.fp8_scales, found.fp8_transposed, found.fp8_transposed_scales

    @torch.no_grad()
    def quantize(self) -> None:
        """Make the copies anew; to be called where ``weight`` was written to directly."""
        copies = (*quantize_rows(self.weight), *quantize_rows(self.weight.t().contiguous()))
        for name, copy in zip(("weight", "scales", "transposed", "transposed_scales"), copies, strict=True):
            self.register_buffer(f"fp8_{name}", copy, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        result = super()._apply(fn, recurse)  # a cast or a move, which FP8 copies do not survive in general
        if not self.weight.is_meta:
            self.quantize()
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.quantize()


def quantize(model: nn.Module) -> None:
    """Make every FP8 copy in ``model`` anew from its weight."""
    for layer in fp8_layers(model):
        if isinstance(layer, Fp8Linear):
            layer.quantize()


def fp8_layers(model: nn.Module) -> Iterator[Any]:
    """Every layer of ``model`` that computes in FP8."""
    return (module for module in model.modules() if isinstance(module, (Fp8Linear, Fp8DynamicLinear)))


def _has_ranks() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _fits(module: nn.Linear, min_features: int) -> bool:
    sizes = (module.in_features, module.out_features)
    return computes_plainly(module) and all(size % MULTIPLE == 0 and size >= min_features for size in sizes)
