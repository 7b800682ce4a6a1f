"""Whether a tensor-parallel plan computes what the model does: tried on a tiny copy, over the run's own ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from nemo_automodel._transformers import compat
from nemo_automodel._transformers.tiny_twin import tiny_twin
from nemo_automodel._transformers.twin_batch import image_batch, takes_images
from nemo_automodel.components.distributed.tensor_parallel import TensorParallelPlan, tensor_parallelize
from nemo_automodel.errors import AutoModelError, ModelError, first_line

_LENGTH = 9  # tokens a row: no multiple of 2, so that sharding the sequence must pad
_TOLERANCE = 1e-3  # of fp32 sums in another order; a part left out of a gradient is off by about half


class Twin:
    """A tiny copy of a model in fp32, its loss and gradients, to which a sharded copy of it is compared.

    Args:
        model: the model, whose class, config and attention are taken; its weights are not looked at.
        tp_mesh: one-dimensional mesh of the ranks to shard over.

    Raises ModelError where the tiny copy cannot be built or does not run.
    """

    def __init__(self, model: nn.Module, tp_mesh: DeviceMesh) -> None:
        self.mesh = tp_mesh
        self.name = compat.base_class(model).__name__
        try:
            twin = _build(model, tp_mesh)
            self.inputs = {
                k: v.to(tp_mesh.device_type) if isinstance(v, Tensor) else v for k, v in _inputs(twin).items()
            }
            self.plain = twin.to(tp_mesh.device_type)
            self._untouched = copy.deepcopy(self.plain)
            self.loss = _backward(self.plain, self.inputs)
        except Exception as error:
            raise ModelError(f"{self.name}: its tiny copy does not run ({first_line(error)})") from error
        self.gradients = {name: p.grad for name, p in self.plain.named_parameters()}
        finite = all(bool(grad.isfinite().all()) for grad in self.gradients.values() if grad is not None)
        if not finite or not bool(self.loss.isfinite()):
            raise ModelError(f"{self.name}: its tiny copy has a loss or gradients that are not finite")

    def objection(
        self, plan_of: Callable[[nn.Module], TensorParallelPlan], sequence_parallel: bool = False
    ) -> str | None:
        """Why ``plan_of`` this model is wrong, the same on every rank; None where loss and every gradient agree."""
        sharded = copy.deepcopy(self._untouched)
        reason = self._agree(self._run(sharded, plan_of, sequence_parallel))
        if reason is not None:
            return reason
        found = {name: _whole(p.grad) for name, p in sharded.named_parameters()}  # a collective: on all ranks, or none
        return self._agree(self._compare(found))

    def _agree(self, reason: str | None) -> str | None:
        """The first rank's reason that has one, the same on every rank."""
        reasons: list[str | None] = [None] * self.mesh.size()
        dist.all_gather_object(reasons, reason, group=self.mesh.get_group())
        return next((found for found in reasons if found is not None), None)

    def _run(
        self, sharded: nn.Module, plan_of: Callable[[nn.Module], TensorParallelPlan], sequence_parallel: bool
    ) -> str | None:
        try:
            tensor_parallelize(sharded, plan_of(sharded), self.mesh, sequence_parallel)
            loss = _backward(sharded, self.inputs)
        except AutoModelError as error:
            return str(error)
        except Exception as error:  # of any kind: it is the model's own code, run in a way it may not expect
            return f"its forward or backward fails ({type(error).__name__}: {first_line(error)})"
        if not bool((loss - self.loss).abs() <= _TOLERANCE * self.loss.abs()):
            return f"its loss is {loss.item():.6g} instead of {self.loss.item():.6g}"
        return None

    def _compare(self, gradients: dict[str, Tensor | None]) -> str | None:
        largest = max(grad.norm().item() for grad in self.gradients.values() if grad is not None)
        for name, found in gradients.items():
            expected = self.gradients[name]
            if found is None or expected is None:  # no gradient is a gradient of zeros
                off, size = (_norm(found) + _norm(expected)), _norm(expected)
            else:
                off, size = _norm(found - expected), _norm(expected)
            if not off <= _TOLERANCE * size + 1e-5 * largest:
                return f"the gradient of {name} is off by {off / max(size, 1e-12):.2g} of its norm"
        return None


def _norm(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None else tensor.norm().item()


def _whole(grad: Tensor | None) -> Tensor | None:
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def _build(model: nn.Module, tp_mesh: DeviceMesh) -> Any:
    base: Any = compat.base_class(model)
    config = tiny_twin(model.config, heads=2 * max(2, tp_mesh.size()))  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        twin = base(config).float()
        with torch.no_grad():
            for parameter in twin.parameters():  # no zero or one may hide a term
                parameter.add_(torch.randn_like(parameter) * 0.05)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in twin.named_parameters():  # loading trains what a constructor froze (sinusoidal positions)
        parameter.requires_grad_(parameter.requires_grad or name in trained)
    if compat.attention_is_pluggable(twin):
        twin.set_attn_implementation(compat.attention_name(model))
    return twin.eval()


def _inputs(twin: Any) -> dict[str, Any]:
    """Text, or text with images for a model that sees: its tower may be cut as well."""
    cacheless = {"use_cache": False} if compat.takes(twin, "use_cache") else {}
    if takes_images(twin):
        batch = image_batch(twin)
        if not compat.is_encoder_decoder(twin):  # whose decoder reads them
            del batch["labels"]
        return batch | cacheless
    generator = torch.Generator().manual_seed(1)
    rows = twin.get_input_embeddings().weight.shape[0]
    return {"input_ids": torch.randint(rows // 8, rows // 2, (2, _LENGTH), generator=generator), **cacheless}


def _backward(twin: Any, inputs: dict[str, Any]) -> Tensor:
    logits = twin(**inputs).logits.flatten(0, 1)
    targets = torch.arange(len(logits), device=logits.device) * 7919 % logits.shape[-1]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    loss.backward()
    return loss.detach()
