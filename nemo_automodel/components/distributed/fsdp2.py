"""FSDP2: parameters sharded over the data-parallel ranks, one decoder block at a time.

One device goes through the same code: a mesh of one shards and communicates nothing, but keeps the same dtypes (weights
stored in their own, computed with in ``compute_dtype``). What FSDP2 does for a block costs the host more than a millisecond
a step, and the device five copies of its weights, so there weights are cast in the forward that uses them
(``cast_weights``) and no block is a unit of it.

A module may say that it casts weights of its own to the dtype of the activations wherever it uses them, by their names:
``cast_where_used = ("weight",)``. Adapters do, and what holds weights that transformers insists on computing wider.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from nemo_automodel.components.distributed.activation_checkpointing import require_mode
from nemo_automodel.components.distributed.cast_weights import can_be_cast, cast_in_call, cast_in_forward
from nemo_automodel.components.distributed.expert_parallel import ParallelExperts
from nemo_automodel.components.distributed.mesh import (
    MeshManager,
    MeshSizes,
    data_parallel_size,
    place,
    replicas,
    require_expert_ranks,
)
from nemo_automodel.errors import ConfigError

if TYPE_CHECKING:
    from nemo_automodel.components.distributed.env import DistEnv

_REDUCE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class FSDP2Manager(MeshManager):
    """Shards a model with ``fully_shard``, block by block; composes with tensor, sequence and context parallelism.

    Args:
        dp_size: Number of data-parallel ranks: ``none`` or ``auto`` for every process that ``tp_size`` and ``cp_size``
            leave, or their number.
        tp_size: Ranks that share each layer (tensor parallelism). Default 1.
        cp_size: Ranks that share each sequence (context parallelism). Default 1.
        ep_size: Ranks, of the data- and context-parallel ones, that share the experts of each mixture-of-experts layer
            (expert parallelism); not together with ``tp_size``. Default 1.
        sequence_parallel: With ``tp_size`` > 1: shard activations along the sequence between tensor-parallel regions.
        dp_replicate_size: Of the data-parallel ranks, how many hold a copy of the same shards (HSDP): weights are
            gathered within ``dp_size / dp_replicate_size`` ranks, gradients summed over all. Default 1.
        pp_size: Pipeline parallelism is not part of this release; only 1.
        activation_checkpointing: What is computed again in backward instead of kept: ``off`` nothing, ``selective``
            all but matrix products and attention, ``full`` each block whole; ``auto`` the least that fits, measured on
            the first micro-batch. Default off.
        reshard_after_forward: Free a block's gathered weights after its forward and gather them again for its
            backward. Default true; on one rank false, since all it could free are the casts to ``compute_dtype``; true
            frees them there, through FSDP2. False trades memory for one all-gather (or cast) a block. The last block
            always keeps them: its backward comes next.
        reduce_dtype: What gradients are summed over ranks in: ``float32`` (default) or ``bfloat16``.
        prefetch: How many blocks ahead weights are gathered explicitly; 0 (default) leaves it to the order in which
            the host issues the work, which is enough where the host runs ahead of the device.
        offload: Keep weights, gradients and the optimizer's state in host memory, bringing them to the device block by
            block. Default false.
        env: The process environment (given by the recipe).
    """

    def __init__(
        self,
        dp_size: int | str | None = "none",
        tp_size: int = 1,
        cp_size: int = 1,
        ep_size: int = 1,
        sequence_parallel: bool = False,
        dp_replicate_size: int = 1,
        pp_size: int = 1,
        activation_checkpointing: Literal["off", "selective", "full", "auto"] = "off",
        reshard_after_forward: bool | None = None,
        reduce_dtype: Literal["float32", "bfloat16"] = "float32",
        prefetch: int = 0,
        offload: bool = False,
        env: DistEnv | None = None,
    ):
        if pp_size != 1:
            raise ConfigError(
                f"distributed.pp_size={pp_size}: pipeline parallelism is not part of this release; leave it out and "
                "raise dp_size, tp_size or cp_size instead"
            )
        if sequence_parallel and tp_size == 1:
            raise ConfigError(
                "distributed.sequence_parallel=true: it shards activations between tensor-parallel regions, and "
                "tp_size is 1; write tp_size: 2 or more, or leave it out"
            )
        require_mode(activation_checkpointing)
        world_size, device = place(env)
        if offload and device.type == "cpu":
            raise ConfigError("distributed.offload=true: the run is on the CPU already; leave it out")
        dp = data_parallel_size(world_size, dp_size, tp_size, cp_size)
        copies, shards = replicas(dp, dp_replicate_size)
        require_expert_ranks(ep_size, shards * cp_size, tp_size)
        super().__init__(MeshSizes(copies, shards, cp=cp_size, tp=tp_size, ep=ep_size), device, env)
        self.sequence_parallel = sequence_parallel
        self.activation_checkpointing = activation_checkpointing
        self.reshard_after_forward = reshard_after_forward
        self.reduce_dtype = _REDUCE_DTYPES[reduce_dtype]
        self.prefetch = prefetch
        self.offload = offload

    @property
    def reshards(self) -> bool:
        """Whether gathered weights are freed between forward and backward."""
        shards = self.sizes.dp_shard * self.sizes.cp
        return shards > 1 if self.reshard_after_forward is None else self.reshard_after_forward

    def parallelize(self, model: nn.Module, blocks: Sequence[nn.Module], compute_dtype: torch.dtype) -> nn.Module:
        """Shard ``model`` in place: each of ``blocks`` is a unit of communication, the rest one more.

        Parameters keep the dtype they have (that is what the optimizer updates) and are cast to ``compute_dtype``
        when gathered. Gradients are summed over ranks in ``reduce_dtype``, never divided: the loss is already
        normalised by the global number of label tokens. Between the micro-batches of a step gradients add up in
        ``reduce_dtype`` too, except on one rank, where torch adds them in the weight's own dtype.
        """
        if not self.offload and not any(p.is_meta for p in model.parameters()):
            model.to(self.device)
        shard(
            model,
            blocks,
            mesh=over(self.mesh, "dp_shard_cp"),
            expert_mesh=over(self.expert_mesh, "dp_shard_ep") if self.expert_mesh is not None else None,
            compute_dtype=compute_dtype,
            reduce_dtype=self.reduce_dtype,
            reshard=self.reshards,
            offload=CPUOffloadPolicy() if self.offload else OffloadPolicy(),
        )
        _prefetch(blocks, self.prefetch)
        return model

    def sync_gradients(self, model: nn.Module, last_micro_batch: bool) -> None:
        """Reduce gradients over ranks in the backward of the last micro-batch only; the others accumulate locally."""
        sync_gradients(model, last_micro_batch)


def shard(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    *,
    mesh: DeviceMesh,
    expert_mesh: DeviceMesh | None = None,
    compute_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard: bool,
    offload: OffloadPolicy | None = None,
) -> None:
    """``fully_shard`` each of ``blocks`` and what is left, over ``mesh`` (``[shards]`` or ``[replicas, shards]``).

    Modules whose experts are shared out already are sharded by themselves, over what that leaves: ``expert_mesh``.
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if compute_dtype == torch.float64:
        reduce_dtype = compute_dtype
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtypes == {compute_dtype} else compute_dtype, reduce_dtype=reduce_dtype
    )
    # One rank has nothing to gather or to sum: weights stay out of it, and a gradient factor of 1 would only cost a
    # pass over all gradients.
    alone = mesh.size() == 1
    left_out = set()
    if alone and not isinstance(offload, CPUOffloadPolicy):
        left_out = _in_no_need(model, compute_dtype)
        cast = _castable(model) - left_out if not reshard else set()
        for block in blocks:
            cast_in_forward(block, cast, compute_dtype)
        cast_in_call(model, cast, compute_dtype, besides=blocks)
        left_out |= cast
    options: dict[str, Any] = {
        "mp_policy": policy,
        "ignored_params": left_out,
        "offload_policy": offload or OffloadPolicy(),
    }
    experts = [m for m in model.modules() if isinstance(m, ParallelExperts)] if expert_mesh is not None else []
    for expert in experts:
        fully_shard(expert, mesh=expert_mesh, reshard_after_forward=reshard, **options)
    for block in _self_contained(model, blocks):
        if left_out.issuperset(block.parameters()):
            if policy.param_dtype is not None:
                _cast_inputs_of(block, policy.param_dtype)
            continue
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard and block is not blocks[-1], **options)
    fully_shard(model, mesh=mesh, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule) and not alone:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _in_no_need(model: nn.Module, compute_dtype: torch.dtype) -> set[nn.Parameter]:
    """The parameters of ``model`` that FSDP2 need not cast to ``compute_dtype``."""
    casting = [(m, getattr(m, "cast_where_used", ())) for m in model.modules()]
    cast = {p for m, names in casting for name, p in m.named_parameters(recurse=False) if name in names}
    return {p for p in model.parameters() if p.dtype == compute_dtype or p in cast}


def _castable(model: nn.Module) -> set[nn.Parameter]:
    others = {p for m in model.modules() if not can_be_cast(m) for p in m.parameters(recurse=False)}
    return {p for p in model.parameters() if p.is_floating_point()} - others


def _cast_inputs_of(block: nn.Module, dtype: torch.dtype) -> None:
    """Let floating tensors among the inputs of ``block`` come in ``dtype``, as they do where FSDP2 manages it."""

    @torch.compiler.disable  # compiled, three casts that do nothing would cost more than the check that they do
    def cast(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return _cast(args, dtype), _cast(kwargs, dtype)

    block.register_forward_pre_hook(cast, prepend=True, with_kwargs=True)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(v, dtype) for v in value)
    return {key: _cast(v, dtype) for key, v in value.items()} if type(value) is dict else value


def _self_contained(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The blocks that share no weight with another block or with what is around them: a tie ends where sharding does."""
    inside = {module for block in blocks for module in block.modules()}
    owners = [list(block.parameters()) for block in blocks]
    owners.append([p for m in model.modules() if m not in inside for p in m.parameters(recurse=False)])
    times = Counter(p for owner in owners for p in dict.fromkeys(owner))
    return [block for block, own in zip(blocks, owners, strict=False) if all(times[p] == 1 for p in own)]


def over(mesh: DeviceMesh, shards: str) -> DeviceMesh:
    """The dimensions of ``mesh`` that ``fully_shard`` is given: replicas, where there are any, and ``shards``."""
    return mesh["dp_replicate", shards] if mesh["dp_replicate"].size() > 1 else mesh[shards]


def sync_gradients(model: nn.Module, last_micro_batch: bool) -> None:
    """Say whether the next backward of a sharded ``model`` sums gradients over ranks."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(last_micro_batch)
    model.set_is_last_backward(last_micro_batch)


def _prefetch(blocks: Sequence[nn.Module], ahead: int) -> None:
    if ahead < 1:
        return
    forward: list[FSDPModule] = [block for block in blocks if isinstance(block, FSDPModule)]
    backward = forward[::-1]
    for i in range(len(forward)):
        forward[i].set_modules_to_forward_prefetch(forward[i + 1 : i + 1 + ahead])
        backward[i].set_modules_to_backward_prefetch(backward[i + 1 : i + 1 + ahead])
