"""FSDP2: parameters sharded over the data-parallel ranks, one decoder block at a time.

One device goes through the same code: a mesh of one shards and communicates nothing, and leaves out frozen weights that
need no cast, but keeps the same dtypes (weights stored in their own, computed with in ``compute_dtype``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from nemo_automodel.errors import ConfigError

if TYPE_CHECKING:
    from nemo_automodel.components.distributed.env import DistEnv


class FSDP2Manager:
    """Shards a model with ``fully_shard``, block by block, over every process.

    Args:
        dp_size: Number of data-parallel ranks: ``none`` or ``auto`` for every process, or their number.
        tp_size: Tensor-parallel ranks. Only 1 in this version.
        cp_size: Context-parallel ranks. Only 1 in this version.
        sequence_parallel: Shard activations along the sequence between TP regions. Only false in this version.
        reshard_after_forward: Free a block's gathered weights after its forward and gather them again for its
            backward. Default true; on one rank false, since all it could free are the casts to ``compute_dtype``.
            False trades memory for one all-gather (or cast) a block.
        env: The process environment (given by the recipe).

    Attributes:
        device: Where this rank computes.
        mesh: One-dimensional ``DeviceMesh`` named ``dp``.
        dp_rank, dp_size: This rank among those that see different data.
    """

    takes_meta = True  # ``parallelize`` shards models that have no memory yet

    def __init__(
        self,
        dp_size: int | str | None = "none",
        tp_size: int = 1,
        cp_size: int = 1,
        sequence_parallel: bool = False,
        reshard_after_forward: bool | None = None,
        env: DistEnv | None = None,
    ):
        for name, value in (("tp_size", tp_size), ("cp_size", cp_size)):
            if value != 1:
                raise ConfigError(f"distributed.{name}={value}: only 1 is available in this version; write {name}: 1")
        if sequence_parallel:
            raise ConfigError(
                "distributed.sequence_parallel=true: needs tensor parallelism, not in this version; write false"
            )
        world_size = dist.get_world_size() if env is None else env.world_size
        wanted = world_size if dp_size in (None, "none", "auto") else int(dp_size)
        if wanted != world_size:
            raise ConfigError(
                f"distributed.dp_size={wanted}: {world_size} process(es) were started, and dp_size x tp_size x cp_size "
                f"must equal that; write dp_size: none, or start {wanted} processes"
            )
        self.device = env.device if env is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.mesh = init_device_mesh(self.device.type, (world_size,), mesh_dim_names=("dp",))
        self.dp_rank, self.dp_size = self.mesh.get_local_rank(), world_size
        self.reshard_after_forward = reshard_after_forward

    def parallelize(self, model: nn.Module, blocks: Sequence[nn.Module], compute_dtype: torch.dtype) -> nn.Module:
        """Shard ``model`` in place: each of ``blocks`` is a unit of communication, the rest one more.

        Parameters keep the dtype they have (that is what the optimizer updates) and are cast to ``compute_dtype``
        when gathered. Gradients are summed over ranks in float32, never divided: the loss is already normalised by
        the global number of label tokens. Between the micro-batches of a step gradients add up in float32 too, except
        on one rank where weights are kept in ``compute_dtype`` themselves (pure bf16): there torch adds them in it.
        """
        if not any(p.is_meta for p in model.parameters()):
            model.to(self.device)
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        alone = self.dp_size == 1
        policy = MixedPrecisionPolicy(
            param_dtype=None if dtypes == {compute_dtype} else compute_dtype, reduce_dtype=torch.float32
        )
        # One rank has nothing to gather or to sum: weights that need no cast stay out of it, and a gradient factor of
        # 1 would only cost a pass over all gradients.
        left_out = {p for p in model.parameters() if alone and p.dtype == compute_dtype}
        reshard = not alone if self.reshard_after_forward is None else self.reshard_after_forward
        for block in blocks:
            fully_shard(block, mesh=self.mesh, mp_policy=policy, reshard_after_forward=reshard, ignored_params=left_out)
        fully_shard(model, mesh=self.mesh, mp_policy=policy, ignored_params=left_out)
        for module in model.modules():
            if isinstance(module, FSDPModule) and not alone:
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return model

    def sync_gradients(self, model: nn.Module, last_micro_batch: bool) -> None:
        """Reduce gradients over ranks in the backward of the last micro-batch only; the others accumulate locally."""
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(last_micro_batch)
        model.set_is_last_backward(last_micro_batch)

    def all_reduce_sum(self, value: torch.Tensor | float) -> torch.Tensor:
        """Sum of ``value`` over the data-parallel ranks: a float64 scalar on the device, without waiting for it."""
        if isinstance(value, torch.Tensor):
            total = value.detach().to(self.device, torch.float64, copy=True)
        else:  # a fill, where a copy from the host would wait for the device
            total = torch.full((), value, dtype=torch.float64, device=self.device)
        if self.dp_size > 1:
            dist.all_reduce(total, group=self.mesh.get_group("dp"))
        return total
