"""Expert parallelism: each rank holds some of a layer's experts, and tokens travel to the experts they were routed to.

The ranks of an expert group see different tokens. Each sends a token's hidden state to the ranks of its experts by one
all-to-all, those ranks run them, and a second all-to-all brings the results back, where they are weighted and summed
(GShard, arXiv:2006.16668). Gradients take the same way back, so an expert's gradient is the sum over the group by itself.

Shape legend: T this rank's tokens, K experts a token is routed to, H hidden size, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from nemo_automodel.components.distributed.tp_collectives import Ranks, all_to_all, all_to_all_counts
from nemo_automodel.components.distributed.tp_layers import Sharded, Storage, become
from nemo_automodel.errors import ConfigError, ModelError


def expert_parallelize(model: nn.Module, experts: Mapping[str, Sequence[str]], ep_mesh: DeviceMesh) -> nn.Module:
    """Share out the experts of ``model``, in place, over the one-dimensional ``ep_mesh``.

    Args:
        model: Whole (or meta), the same on every rank; LoRA applied.
        experts: Full name of each module of stacked experts -> its parameters ``[E, ...]`` that are to be shared out,
            its own and, by their path, those of modules within (adapters). Its forward takes tokens [T, H], the experts of each [T, K] and their weights [T, K].
        ep_mesh: The ranks of an expert group.

    Raises:
        ConfigError: The number of experts does not divide.
        ModelError: A module's forward is of another kind.
    """
    ranks = Ranks.of(ep_mesh)
    for name, parameters in experts.items():
        module = model.get_submodule(name)
        takes = [p for p in inspect.signature(module.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(takes) != 3:
            raise ModelError(
                f"distributed.ep_size: {name} ({type(module).__name__}) does not take tokens, experts and weights, so "
                "its tokens cannot be sent to other ranks; write ep_size: 1"
            )
        count = module.get_parameter(parameters[0]).shape[0]
        if count % ranks.size:
            raise ConfigError(
                f"distributed.ep_size={ranks.size}: {name} has {count} experts, which {ranks.size} does not divide; "
                f"write a divisor of {count}"
            )
        held = count // ranks.size
        for key in parameters:
            _share_out(module, key, held, ep_mesh, ranks)
        storage = {key: Storage(0 if key in parameters else None) for key, _ in module.named_parameters(recurse=False)}
        become(module, ParallelExperts, ranks, storage, ep_held=held, ep_names=tuple(p.name for p in takes))
        if hasattr(module, "num_experts"):
            module.num_experts = held  # type: ignore[assignment]
    return model


def _share_out(module: nn.Module, key: str, held: int, ep_mesh: DeviceMesh, ranks: Ranks) -> None:
    path, _, last = key.rpartition(".")
    owner, parameter = module.get_submodule(path), module.get_parameter(key)
    local = parameter.detach().narrow(0, held * ranks.rank, held).clone(memory_format=torch.contiguous_format)
    sharded = DTensor.from_local(local, ep_mesh, [Shard(0)], run_check=False)
    owner._parameters[last] = nn.Parameter(sharded, requires_grad=parameter.requires_grad)
    if path:
        become(owner, Sharded, ranks, {last: Storage(0)})


class ParallelExperts(Sharded):
    """Stacked experts of which this rank holds ``ep_held``, in front of the module's own class."""

    ep_held: int
    ep_names: tuple[str, ...]

    @torch.compiler.disable  # how many tokens travel is known at run time only
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens [T, H], experts [T, K], weights [T, K] -> weighted sum of what the experts make of them [T, H]."""
        tokens, experts, weights = (*args, *(kwargs[name] for name in self.ep_names[len(args) :]))
        ranks, flat = self.tp_ranks, experts.reshape(-1)
        order = torch.argsort(flat, stable=True)  # by expert, and so by rank
        per_expert = torch.bincount(flat, minlength=self.ep_held * ranks.size)
        sent, got, arriving = all_to_all_counts(per_expert, ranks)
        received = all_to_all(tokens[order // experts.shape[-1]], got, sent, ranks)
        local = torch.arange(self.ep_held, device=flat.device).repeat(ranks.size).repeat_interleave(arriving)
        results = all_to_all(self._run(received, local), sent, got, ranks)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        outputs = results[back].unflatten(0, experts.shape)
        return (outputs * weights.unsqueeze(-1)).sum(dim=-2).to(tokens.dtype)

    def _run(self, tokens: Tensor, experts: Tensor) -> Tensor:
        """This rank's own experts on what arrived. A row of zeros goes along, so that a rank that got nothing still has
        gradients (of zero) to sum with the others'."""
        tokens = torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])
        experts = torch.cat([experts, experts.new_zeros(1)])[:, None]
        # By position: transformers hands the call on to a function whose parameters may have other names.
        return super().forward(tokens, experts, tokens.new_ones(len(tokens), 1))[:-1]  # type: ignore[misc]
