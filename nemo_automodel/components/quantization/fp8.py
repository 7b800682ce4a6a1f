"""The ``fp8`` section: frozen linear layers of the decoder blocks compute in FP8; what is trained stays as it is.

The modules keep their class's name, their parameters and the parameters' values: the FP8 copies are derived data, made from
``weight`` and never saved, so checkpoints, merging and exports know nothing of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from nemo_automodel.components.quantization.linears import computes_plainly, frozen_linears, with_mixin
from nemo_automodel.errors import ConfigError
from nemo_automodel.kernels.fp8 import MULTIPLE, fp8_linear, has_units, quantize_rows

logger = logging.getLogger(__name__)


@dataclass
class Fp8Config:
    """Compute with the frozen weights of a LoRA run in FP8: about a third faster on Hopper GPUs, for 2 bytes a weight more.

    Args:
        enabled: False leaves everything as it is.
        min_features: Layers with fewer inputs or outputs stay in bfloat16: routers, say, which cost nothing and whose
            choice is easily changed.
    """

    enabled: bool = True
    min_features: int = 256

    def apply(self, model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
        """Quantise the frozen linear layers inside ``blocks`` of ``model``, in place; return whether it was done.

        Raises:
            ConfigError: nothing in them is frozen, the model does not compute in bfloat16, the device is a GPU without
                FP8, or the run has several ranks.
        """
        if not self.enabled:
            return False
        frozen = frozen_linears(blocks)
        if not frozen:
            raise ConfigError(
                "fp8: only frozen weights are computed in FP8 in this version, and this run trains them all; add a peft "
                "section, or write fp8.enabled: false"
            )
        weight = frozen[0].weight
        if weight.dtype != torch.bfloat16:
            raise ConfigError(
                f"fp8: needs a model in bfloat16, not {str(weight.dtype)[6:]}; write model.dtype: bfloat16"
            )
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ConfigError(
                "fp8: runs on one rank only in this version; start one process, or write fp8.enabled: false"
            )
        if weight.is_cuda and not has_units(weight.device):
            raise ConfigError(
                "fp8: this GPU has no FP8 products (compute capability below 8.9); write fp8.enabled: false"
            )
        if not weight.is_cuda:
            logger.warning("fp8: no GPU, so FP8 is imitated: right, but slower than without")
        taken = [m for m in frozen if _fits(m, self.min_features)]
        for module in taken:
            module.__class__ = with_mixin(type(module), Fp8Linear, "whose base product runs in FP8")
            assert isinstance(module, Fp8Linear)
            module.quantize()
        skipped = len(frozen) - len(taken)
        left = (
            f"; {skipped} stay in bfloat16 (small, sizes no multiples of {MULTIPLE}, or a forward of their own)"
            * bool(skipped)
        )
        logger.info(
            "fp8: %d frozen linear layers compute in FP8, adapters on them in plain PyTorch%s", len(taken), left
        )
        return bool(taken)


class Fp8Linear(nn.Module):
    """Mixin put before ``nn.Linear`` in a layer's class: the product runs in FP8, from copies of ``weight``."""

    quantized = True
    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        y = fp8_linear(x, *self.fp8_copies())
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
        layer.quantize()


def fp8_layers(model: nn.Module) -> Iterator[Fp8Linear]:
    """Every layer of ``model`` that computes in FP8."""
    return (module for module in model.modules() if isinstance(module, Fp8Linear))


def _fits(module: nn.Linear, min_features: int) -> bool:
    sizes = (module.in_features, module.out_features)
    return computes_plainly(module) and all(size % MULTIPLE == 0 and size >= min_features for size in sizes)
