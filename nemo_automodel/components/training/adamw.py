"""AdamW whose state takes less memory: moments in bfloat16 or eight bits, or kept on the host.

With weights in bfloat16 (``model.master_dtype: bfloat16``) updates are rounded at random, so that small ones are not lost:
12 bytes a weight become 6 (moments in bfloat16) or 4. It works on sharded weights, and what it keeps are plain tensors of
the weight's own layout, which checkpoints save and resume bit for bit.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nemo_automodel.errors import ConfigError
from nemo_automodel.kernels.adamw import Update, adamw_, seed_of

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}
_BLOCK = 256  # numbers that share a scale, in eight bits
_SMALLEST = 4096  # tensors below are kept in fp32: they take no room
_AT_ONCE = 2**24  # numbers that are unpacked at a time
_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019), computed in fp32 whatever its parts are kept in.

    Args:
        params: Parameters or groups of them, fp32 or bf16, sharded or not.
        lr: Learning rate. Default 1e-3.
        betas: Decay of the first and second moment. Default 0.9, 0.95.
        eps: Added to the denominator. Default 1e-8.
        weight_decay: Decoupled. Default 0.
        state_dtype: What moments are kept in: ``float32``, ``bfloat16`` (default), or ``int8``: blocks of 256 with a scale
            each (Dettmers et al. 2022, arXiv 2110.02861); needs bitsandbytes.
        stochastic_rounding: Round what is kept in bfloat16, weights too, at random in proportion to nearness. Default true.
        offload: Keep moments in host memory and bring them to the GPU tensor by tensor. Default false.
        seed: Of that rounding. Default 0.
    """

    _step_supports_amp_scaling = (
        True  # ``found_inf`` leaves a step out, ``grad_scale`` divides gradients, on the device
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16",
        stochastic_rounding: bool = True,
        offload: bool = False,
        seed: int = 0,
    ):
        if state_dtype not in _DTYPES:
            raise ConfigError(f"optimizer.state_dtype={state_dtype!r}: write one of {', '.join(_DTYPES)}")
        if state_dtype == "int8" and importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                "optimizer.state_dtype=int8: needs bitsandbytes; pip install 'nemo-automodel[quantization]', or write bfloat16"
            )
        if any(not 0 <= beta < 1 for beta in betas):
            raise ConfigError(f"optimizer.betas={list(betas)}: each must be at least 0 and below 1")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.state_dtype = _DTYPES[state_dtype]
        self.stochastic_rounding = stochastic_rounding
        self.offload = offload
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient, divided by ``grad_scale`` (a tensor) where that is set.

        Nothing changes where ``found_inf`` (a tensor) is set and not 0.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skip: Tensor | None = getattr(self, "found_inf", None)
        scale: Tensor | None = getattr(self, "grad_scale", None)
        numbered = list(enumerate((group, p) for group in self.param_groups for p in group["params"]))
        changed = [(number, group, p) for number, (group, p) in numbered if p.grad is not None]
        for _, _, parameter in changed:
            if not self.state[parameter]:
                self._start(parameter, self.state[parameter])
        if changed:
            steps = [self.state[p]["step"] for _, _, p in changed]
            if skip is None:
                torch._foreach_add_(steps, 1)
            else:  # a list: one tensor for all would be read by the host
                torch._foreach_add_(steps, [1 - skip] * len(steps))
        for number, group, parameter in changed:
            self._update(parameter, group, skip, scale, number)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's; what is on its way to the host has arrived."""
        if self.offload and torch.cuda.is_available():
            torch.cuda.synchronize()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's, except that moments stay what they were saved in; torch's casts them to the weight's dtype."""
        super().load_state_dict(state_dict)
        saved = (number for group in state_dict["param_groups"] for number in group["params"])
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        for number, parameter in zip(saved, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                cast = self.state[parameter][name]
                if isinstance(value, Tensor) and value.dtype != cast.dtype:
                    self.state[parameter][name] = value.to(parameter.device)

    def _update(
        self, parameter: Tensor, group: dict[str, Any], skip: Tensor | None, scale: Tensor | None, number: int
    ) -> None:
        state = self.state[parameter]
        step = state["step"]
        state["updates"] += 1
        (beta1, beta2), seed = group["betas"], seed_of(self.seed, number, _offset(parameter), state["updates"])
        update = Update(
            float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], self.stochastic_rounding, seed
        )
        weight, grad = _local(parameter), _local(parameter.grad)  # type: ignore[arg-type]
        moments = [self._here(state, name, weight.device) for name in _MOMENTS]
        if state["exp_avg"].dtype == torch.uint8:
            scales = [self._here(state, f"{name}_scale", weight.device) for name in _MOMENTS]
            _in_eight_bits(weight, grad, moments, scales, step, skip, update, scale)
            self._back(state, [f"{name}_scale" for name in _MOMENTS], scales)
        else:
            adamw_(weight, grad, moments[0], moments[1], step, skip, update, scale)
        self._back(state, list(_MOMENTS), moments)

    def _start(self, parameter: Tensor, state: dict[str, Any]) -> None:
        local = _local(parameter)
        dtype = self.state_dtype if parameter.numel() >= _SMALLEST else torch.float32  # the same on all ranks
        if dtype == torch.uint8 and (local.ndim < 2 or local.shape[-1] % _BLOCK):
            dtype = torch.bfloat16  # blocks would reach over rows, and so over what other ranks hold
        state["step"] = torch.zeros((), device=local.device)
        state["updates"] = 0  # with those left out: what the rounding's seed is made of
        for name in _MOMENTS:
            values = torch.zeros_like(local, dtype=dtype, memory_format=torch.contiguous_format)
            if dtype == torch.uint8:
                blocks = (*local.shape[:-1], local.shape[-1] // _BLOCK)
                state[f"{name}_scale"] = self._place(_like(parameter, torch.zeros(blocks, device=local.device), _BLOCK))
            state[name] = self._place(_like(parameter, values))

    def _place(self, value: Tensor) -> Tensor:
        """``value`` where it is kept between steps."""
        local = _local(value)
        if not (self.offload and local.is_cuda):
            return value
        host = torch.empty_like(local, device="cpu", pin_memory=True).copy_(local)
        return DTensor(host, value._spec, requires_grad=False) if isinstance(value, DTensor) else host

    def _here(self, state: dict[str, Any], name: str, device: torch.device) -> Tensor:
        """This rank's part of a moment on ``device``, contiguous; what was restored elsewhere is put in its place first."""
        state[name] = self._place(state[name])
        return _local(state[name]).to(device, non_blocking=True)

    def _back(self, state: dict[str, Any], names: list[str], values: list[Tensor]) -> None:
        for name, value in zip(names, values, strict=True):
            kept = _local(state[name])
            if kept.data_ptr() != value.data_ptr():
                kept.copy_(value, non_blocking=True)


def _in_eight_bits(
    weight: Tensor,
    grad: Tensor,
    codes: list[Tensor],
    scales: list[Tensor],
    step: Tensor,
    skip: Tensor | None,
    update: Update,
    grad_scale: Tensor | None,
) -> None:
    """``adamw_`` over moments in eight bits, unpacked some rows at a time."""
    from bitsandbytes import functional

    maps = [_map(name == "exp_avg", weight.device) for name in _MOMENTS]
    columns = weight.shape[-1]
    weight, grad = weight.view(-1, columns), grad.reshape(-1, columns)
    flat = [code.view(-1, columns) for code in codes]
    blocks = [scale.view(-1, columns // _BLOCK) for scale in scales]
    rows = max(1, _AT_ONCE // columns)
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        whole = [
            functional.dequantize_blockwise(c[part].flatten(), absmax=s[part].flatten(), code=m, blocksize=_BLOCK)
            for c, s, m in zip(flat, blocks, maps, strict=True)
        ]
        moments = [moment.view(-1, columns) for moment in whole]
        own = Update(**{**vars(update), "seed": seed_of(update.seed, start)})
        adamw_(weight[part], grad[part], moments[0], moments[1], step, skip, own, grad_scale)
        for code, scale, moment, values in zip(flat, blocks, moments, maps, strict=True):
            packed, packing = functional.quantize_blockwise(moment.flatten(), code=values, blocksize=_BLOCK)
            changed = packed.view(-1, columns), packing.absmax.view(-1, columns // _BLOCK)
            for target, value in zip((code, scale), changed, strict=True):
                target[part] = value if skip is None else torch.where(skip == 0, value, target[part])


@cache
def _map(signed: bool, device: torch.device) -> Tensor:
    """The 256 values that bytes stand for: finer towards 0."""
    from bitsandbytes import functional

    return functional.create_dynamic_map(signed=signed).to(device)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(parameter: Tensor, local: Tensor, block: int = 1) -> Tensor:
    """``local`` as this rank's part of a tensor laid out as ``parameter`` is, its last dimension ``block`` times smaller."""
    if not isinstance(parameter, DTensor):
        return local
    shape = torch.Size((*parameter.shape[:-1], parameter.shape[-1] // block)) if block > 1 else parameter.shape
    stride = torch.empty(shape, device="meta").stride()
    spec = DTensorSpec(parameter.device_mesh, parameter.placements, TensorMeta(shape, stride, local.dtype))
    return DTensor(local, spec, requires_grad=False)  # ``from_local`` would move it to the mesh's device


def _offset(parameter: Tensor) -> int:
    """Where in the whole tensor this rank's part starts: the same on ranks that hold the same, another on the others."""
    if not isinstance(parameter, DTensor):
        return 0
    if all(isinstance(placement, Replicate) or placement.__class__ is Shard for placement in parameter.placements):
        _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        return sum(o * s for o, s in zip(offset, parameter.stride(), strict=True))
    coordinate = list(parameter.device_mesh.get_coordinate() or ())
    return seed_of(*(c for c, p in zip(coordinate, parameter.placements, strict=True) if not isinstance(p, Replicate)))
