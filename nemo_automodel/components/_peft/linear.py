"""``LoRALinear``: what a linear layer becomes when it is adapted, in place and under its own names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from nemo_automodel.components._peft.match import is_transposed_linear
from nemo_automodel.kernels.lora import lora_linear, runs_on


class LoRAWeight(nn.Module):
    """One low-rank factor, ``.weight``. Not an ``nn.Linear``, so that no model's own initialisation touches it."""

    cast_where_used = ("weight",)

    def __init__(self, rows: int, cols: int, init: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.empty(rows, cols, dtype=dtype, device=device))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the values anew: on the CPU in fp32, so that every device and every sharding gets the same ones."""
        weight = stored(self, "weight")
        full = torch.empty(weight.shape, dtype=torch.float32)
        if self.init == "zeros":
            full.zero_()
        elif self.init == "kaiming":
            nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
        elif self.init == "xavier":
            nn.init.xavier_normal_(full, generator=generator)
        else:
            nn.init.normal_(full, std=1 / weight.shape[0], generator=generator)
        assign(weight, full)


class LoRALinear(nn.Module):
    """Mixin put before a linear class: ``y = base(x) + scale * B(A(x))``, or DoRA's rescaled form of it.

    The base layer's parameters keep their names; added are ``lora_A.weight`` [r, in], ``lora_B.weight`` [out, r] and,
    for DoRA, ``lora_magnitude_vector`` [out]. Adapters may be fp32 beside a bf16 base: they are cast to the activation's
    dtype in forward, and their gradients come back in their own. ``isinstance`` of the original class still holds.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: LoRAWeight
    lora_B: LoRAWeight
    lora_magnitude_vector: nn.Parameter | None
    lora_scale: float
    lora_dropout: float
    lora_dropout_position: str
    lora_use_triton: bool
    lora_transposed: bool
    cast_where_used = ("lora_magnitude_vector",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        dropout = self.lora_dropout if self.training else 0.0
        quantized = getattr(self, "quantized", False)  # the base product is then not one with ``weight``
        if self.lora_use_triton and dropout == 0.0 and quantized:
            takes = getattr(self, "adapts", None)  # of a base that brings such a product itself
            if takes is not None and runs_on(x.device.type) and x.numel() > 0 and takes(x):
                base: Any = self
                return base.forward_adapted(x, self.lora_A.weight, self.lora_B.weight, self.lora_scale)
        if self.lora_use_triton and dropout == 0.0 and not quantized:
            weight, bias = self.weight, self.bias  # once: under tensor parallelism they may be made here
            if _kernel_takes(x, weight, bias):
                dense = weight.t() if self.lora_transposed else weight
                return lora_linear(x, dense, bias, self.lora_A.weight, self.lora_B.weight, self.lora_scale)
        y = super().forward(x)
        pre = dropout > 0.0 and self.lora_dropout_position == "pre"
        adapter_in = F.dropout(x, dropout) if pre else x
        u = F.linear(adapter_in, self.lora_A.weight.to(x.dtype)) * self.lora_scale
        low_rank = F.linear(u, self.lora_B.weight.to(x.dtype))
        if dropout > 0.0 and not pre:
            low_rank = F.dropout(low_rank, dropout)
        if self.lora_magnitude_vector is None:
            return y + low_rank
        base = super().forward(adapter_in) if pre else y
        if self.bias is not None:
            base = base - self.bias
        magnitude = self.lora_magnitude_vector.float() / self.weight_norm()
        return y + (magnitude - 1).to(x.dtype) * base + magnitude.to(x.dtype) * low_rank

    def dense_weight(self) -> torch.Tensor:
        """The stored base weight as ``[out, in]``, whichever way the layer stores it."""
        weight = self.weight if self._parameters["weight"] is None else stored(self, "weight")  # None: a packed one
        return weight.t() if self.lora_transposed else weight

    @torch.no_grad()
    def weight_norm(self) -> torch.Tensor:
        """DoRA's ``||W + scale * B A||`` per output row, fp32 ``[out]``; without gradient, as the method prescribes."""
        return self.squared_weight_norm().clamp_min(0).sqrt()

    @torch.no_grad()
    def squared_weight_norm(self) -> torch.Tensor:
        """Its square, as a sum over input columns: where they are sharded, the ranks' squares add up.

        Expanded into its three terms, so that no matrix of W's size is made:
        ``|W|^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>``, row by row.
        """
        weight = self.weight.t() if self.lora_transposed else self.weight
        a, b = self.lora_A.weight.float(), self.lora_B.weight.float()
        cross = F.linear(weight, a.to(weight.dtype)).float()
        squared = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        return squared + 2 * self.lora_scale * (cross * b).sum(1) + self.lora_scale**2 * (b @ (a @ a.t()) * b).sum(1)

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """The weight with the adapter in it, in the base's layout and dtype (summed in fp32); sharded as the base is."""
        a, b = stored(self.lora_A, "weight"), stored(self.lora_B, "weight")
        merged = low_rank_sum(self.dense_weight(), a, b, self.lora_scale, self._parameters["lora_magnitude_vector"])
        merged = merged.t() if self.lora_transposed else merged
        return merged.to(stored(self, "weight").dtype).contiguous()

    @torch.no_grad()
    def reset_adapter(self, generator: torch.Generator | None = None) -> None:
        """Start over: A random, B zero, DoRA's magnitude the base weight's own norm, so that the model is the base."""
        self.lora_A.reset_parameters(generator)
        self.lora_B.reset_parameters(generator)
        magnitude = self._parameters["lora_magnitude_vector"]
        if magnitude is not None:
            whole = full_tensor(self.dense_weight())  # summed in one order, whatever the sharding
            assign(magnitude, torch.linalg.vector_norm(whole, dim=1, dtype=torch.float32))


def stored(module: nn.Module, name: str) -> nn.Parameter:
    """Parameter ``name`` as it is stored; the attribute may be this rank's share of it (tensor parallelism)."""
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter


def _kernel_takes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the Triton op can take this call; the rest was settled, and reported, when the adapter was put on."""
    return (
        runs_on(x.device.type)
        and x.dtype == weight.dtype
        and x.dtype != torch.float64
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and not isinstance(x, DTensor)
        and not isinstance(weight, DTensor)
        and x.numel() > 0
    )


def adapt(
    module: nn.Module,
    dim: int,
    scale: float,
    dropout: float,
    dropout_position: str,
    use_dora: bool,
    lora_A_init: str,
    dtype: torch.dtype,
    use_triton: bool,
) -> LoRALinear:
    """Turn a linear layer into a ``LoRALinear`` in place, its adapter's values not yet set (``reset_adapter``)."""
    transposed = is_transposed_linear(module)
    weight: Any = module.weight
    n_out, n_in = reversed(weight.shape) if transposed else weight.shape
    module.__class__ = _adapted_class(type(module))
    assert isinstance(module, LoRALinear)
    module.lora_A = LoRAWeight(dim, n_in, lora_A_init, dtype, weight.device)
    module.lora_B = LoRAWeight(n_out, dim, "zeros", dtype, weight.device)
    magnitude = nn.Parameter(torch.empty(n_out, dtype=dtype, device=weight.device)) if use_dora else None
    module.register_parameter("lora_magnitude_vector", magnitude)
    module.lora_scale = scale
    module.lora_dropout = dropout
    module.lora_dropout_position = dropout_position
    module.lora_use_triton = use_triton
    module.lora_transposed = transposed
    return module


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every adapted layer of ``model`` with its name, free of the prefixes that wrappers put into names."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield clean_name(name), module


def clean_name(name: str) -> str:
    """A module or tensor name without what ``torch.compile`` and activation checkpointing insert."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


_adapted_classes: dict[type, type] = {}


def _adapted_class(cls: type) -> type:
    if cls not in _adapted_classes:  # one class each, so that torch.compile sees the same code in every block
        doc = f"``{cls.__name__}`` with a LoRA adapter."
        _adapted_classes[cls] = type(f"LoRA{cls.__name__}", (LoRALinear, cls), {"__doc__": doc})
    return _adapted_classes[cls]


def low_rank_sum(
    dense: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, magnitude: torch.Tensor | None = None
) -> torch.Tensor:
    """``dense + scale * b @ a`` in fp32, sharded as ``dense`` is; with ``magnitude``, each row is given that norm (DoRA).

    ``dense`` [out, in], ``a`` [r, in], ``b`` [out, r], ``magnitude`` [out], of any dtype.
    """
    product = scale * (full_tensor(b).float() @ full_tensor(a).float())
    merged = like(product, dense) + dense.float()
    if magnitude is None:
        return merged
    norm = full_tensor(torch.linalg.vector_norm(merged, dim=1))
    ratio = (full_tensor(magnitude).float() / norm).unsqueeze(1).expand(merged.shape)
    return merged * like(ratio, merged)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(full: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``full``, sharded as ``other`` is; every rank holds the same values already, so nothing is sent."""
    if not isinstance(other, DTensor):
        return full
    return distribute_tensor(full, other.device_mesh, other.placements, src_data_rank=None)


@torch.no_grad()
def assign(parameter: torch.Tensor, full: torch.Tensor) -> None:
    parameter.copy_(like(full.to(device=parameter.device, dtype=parameter.dtype), parameter))
