"""The ``quantization`` section (QLoRA): frozen linear layers of the decoder blocks keep their weight in four bits.

A layer keeps its class's name and its place; its ``weight`` is no parameter any more but is unpacked whenever it is asked
for. The packed weight is derived data, never saved: what is saved of such a run are its adapters.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_automodel.components.quantization.linears import block_linears, computes_plainly, with_mixin
from nemo_automodel.errors import ConfigError
from nemo_automodel.kernels.nf4 import BLOCK, Packed, nf4_linear, nf4_lora_linear, pack, unpack

logger = logging.getLogger(__name__)

_PARTS = ("values", "scales", "scale_scales", "scale_offset", "scale_code")


@dataclass
class QuantizationConfig:
    """Keep the frozen base of a LoRA run in four bits (QLoRA, Dettmers et al. 2023): 0.52 bytes a weight instead of 2.

    The options have the names of transformers' ``BitsAndBytesConfig``. Needs bitsandbytes (``nemo-automodel[quantization]``).

    Args:
        load_in_4bit: False leaves everything as it is.
        bnb_4bit_quant_type: What the four bits mean: ``nf4``, made for normally distributed weights, or ``fp4``.
        bnb_4bit_use_double_quant: Keep the blocks' scales in eight bits instead of 32: 0.4 bits a weight less.
        min_features: Layers with fewer inputs or outputs keep their dtype: routers, say, which take no room and whose
            choice is easily changed.
    """

    load_in_4bit: bool = True
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    min_features: int = 256

    def __post_init__(self) -> None:
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise ConfigError(f"quantization.bnb_4bit_quant_type={self.bnb_4bit_quant_type!r}: write nf4 or fp4")
        if self.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                "quantization: needs bitsandbytes; pip install 'nemo-automodel[quantization]', or write "
                "quantization.load_in_4bit: false"
            )

    def apply(self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> bool:
        """Make the frozen linear layers inside ``blocks`` of ``model`` four-bit ones, in place; return whether it was done.

        A weight is packed on ``device``, where it stays, and one at a time. One on the meta device is packed by
        ``Nf4Linear.quantize`` once there are numbers for it.

        Raises:
            ConfigError: nothing in them is frozen, their weights are shared out (tensor parallelism) or of a dtype
                that cannot be packed.
        """
        if not self.load_in_4bit:
            return False
        linears = block_linears(blocks)
        frozen = [m for m in linears if not m.weight.requires_grad]
        if not linears:
            raise ConfigError(
                "quantization: this model's blocks hold no nn.Linear, and only those are kept in four bits (GPT-2 has Conv1D "
                "layers); write quantization.load_in_4bit: false"
            )
        if not frozen:
            raise ConfigError(
                "quantization: only frozen weights can be kept in four bits, and this run trains them all; add a peft "
                "section, or write quantization.load_in_4bit: false"
            )
        if any(isinstance(m.weight, DTensor) or isinstance(m._parameters["weight"], DTensor) for m in frozen):
            raise ConfigError(
                "quantization: not together with tensor parallelism in this version; write distributed.tp_size: 1"
            )
        taken = [m for m in frozen if _fits(m, self.min_features)]
        for module in taken:
            module.__class__ = with_mixin(type(module), Nf4Linear, "whose weight is kept in four bits")
            assert isinstance(module, Nf4Linear)
            module.begin(self.bnb_4bit_quant_type, self.bnb_4bit_use_double_quant, device)
        self._report(model, len(frozen), len(taken))
        return bool(taken)

    def _report(self, model: nn.Module, frozen: int, taken: int) -> None:
        packed = sum(layer.packed_parameters for layer in nf4_layers(model))
        rest = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        logger.info(
            "quantization: %d of %d frozen linear layers in four bits (%s), %.1f billion weights; %.1f billion frozen "
            "weights stay as they are (embeddings, output head, stacked experts, layers below quantization.min_features)",
            taken, frozen, self.bnb_4bit_quant_type, packed / 1e9, rest / 1e9,
        )  # fmt: skip
        if not taken:
            logger.warning(
                "quantization: no layer is in four bits: all have fewer than %d inputs or outputs (quantization.min_features), "
                "sizes whose product is no multiple of %d, or a forward of their own", self.min_features, 2 * BLOCK,
            )  # fmt: skip


class Nf4Linear(nn.Module):
    """Mixin put before ``nn.Linear`` in a layer's class: the weight is packed, and unpacked for each product.

    Attributes:
        packed_parameters: How many weights are packed; they are not among ``parameters()``.
    """

    quantized = True
    bias: nn.Parameter | None
    nf4_kind: str
    nf4_nested: bool
    nf4_shape: tuple[int, int]
    nf4_dtype: torch.dtype

    def begin(self, kind: str, nested: bool, device: torch.device) -> None:
        """Pack the weight on ``device``; one on the meta device is let go, and ``quantize`` is to be called."""
        weight = self._parameters["weight"]
        assert weight is not None
        self.nf4_kind, self.nf4_nested, self.nf4_dtype = kind, nested, weight.dtype
        self.nf4_shape = (weight.shape[0], weight.shape[1])
        self.packed_parameters = weight.numel()
        for name in _PARTS:
            self.register_buffer(f"nf4_{name}", None, persistent=False)
        self._parameters["weight"] = None
        if not weight.is_meta:
            self.quantize(weight.detach().to(device))

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> None:
        """Pack ``weight`` [out, in], where it is, in place of what was."""
        if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ConfigError(f"quantization: {str(weight.dtype)[6:]} weights cannot be packed in four bits")
        packed = pack(weight.detach(), self.nf4_kind, self.nf4_nested)
        for name in _PARTS:
            self._buffers[f"nf4_{name}"] = getattr(packed, name)
        self._parameters["weight"] = None

    @property
    def weight(self) -> Tensor:
        """The weight [out, in]: unpacked, or on the meta device before there is one."""
        whole = self._parameters.get("weight")  # for as long as it is being set
        if whole is not None:
            return whole
        if self._buffers["nf4_values"] is None:
            return self.placeholder()
        return unpack(self.packed(), self.nf4_shape, self.nf4_dtype, self.nf4_kind)

    def placeholder(self) -> Tensor:
        """The weight's shape and dtype, without memory."""
        return torch.empty(self.nf4_shape, dtype=self.nf4_dtype, device="meta")

    def packed(self) -> Packed:
        """What is kept of the weight."""
        found: Any = self
        return Packed(*(getattr(found, f"nf4_{name}") for name in _PARTS))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        y = nf4_linear(x, self.packed(), self.nf4_shape[0], self.nf4_kind)
        return y if self.bias is None else y + self.bias

    def adapts(self, x: Tensor) -> bool:
        """Whether ``forward_adapted`` takes ``x``."""
        return x.dtype != torch.float64

    def forward_adapted(self, x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
        """``forward(x) + scale * (x @ lora_a^T) @ lora_b^T`` by the Triton kernels."""
        return nf4_lora_linear(x, self.packed(), self.bias, lora_a, lora_b, scale, self.nf4_kind)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = dict(self._buffers)
        result = super()._apply(fn, recurse)
        for name, buffer in before.items():  # moved, but never cast: the scales are no weights
            now = self._buffers[name]
            if name.startswith("nf4_") and buffer is not None and now is not None and now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return result


def nf4_layers(model: nn.Module) -> Iterator[Nf4Linear]:
    """Every four-bit layer of ``model``."""
    return (module for module in model.modules() if isinstance(module, Nf4Linear))


def _fits(module: nn.Linear, min_features: int) -> bool:
    sizes = (module.in_features, module.out_features)
    return (
        computes_plainly(module)
        and min(sizes) >= min_features
        and module.in_features * module.out_features % (2 * BLOCK) == 0
    )
