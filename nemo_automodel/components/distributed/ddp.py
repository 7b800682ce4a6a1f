"""DDP: every rank holds the whole model and gradients are summed over all of them.

It runs on ``fully_shard`` too, over replicas of one shard each, instead of on ``DistributedDataParallel``: the model keeps
its class and its names, fp32 master weights with 16-bit compute mean the same as under FSDP2, and both sum gradients by
the same code, so that moving from one to the other changes memory and time and no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from nemo_automodel.components.distributed.activation_checkpointing import require_mode
from nemo_automodel.components.distributed.fsdp2 import over, shard, sync_gradients
from nemo_automodel.components.distributed.mesh import MeshManager, MeshSizes, data_parallel_size, place

if TYPE_CHECKING:
    from nemo_automodel.components.distributed.env import DistEnv


class DDPManager(MeshManager):
    """Keeps a whole copy of the weights on every rank: for models that fit, with the least communication.

    Args:
        dp_size: Number of data-parallel ranks: ``none`` or ``auto`` for every process, or their number.
        activation_checkpointing: As for ``FSDP2Manager``. Default off.
        env: The process environment (given by the recipe).
    """

    def __init__(
        self,
        dp_size: int | str | None = "none",
        activation_checkpointing: Literal["off", "selective", "full", "auto"] = "off",
        env: DistEnv | None = None,
    ):
        require_mode(activation_checkpointing)
        world_size, device = place(env)
        dp = data_parallel_size(world_size, dp_size, tp_size=1, cp_size=1)
        super().__init__(MeshSizes(dp_replicate=dp, dp_shard=1, cp=1, tp=1), device, env)
        self.activation_checkpointing = activation_checkpointing
        self.reshards = False

    def parallelize(self, model: nn.Module, blocks: Sequence[nn.Module], compute_dtype: torch.dtype) -> nn.Module:
        """Let gradients of ``model`` be summed over ranks in float32, block by block while backward goes on."""
        if not any(p.is_meta for p in model.parameters()):
            model.to(self.device)
        mesh = over(self.mesh, "dp_shard_cp")
        shard(model, blocks, mesh=mesh, compute_dtype=compute_dtype, reduce_dtype=torch.float32, reshard=False)
        return model

    def sync_gradients(self, model: nn.Module, last_micro_batch: bool) -> None:
        """Sum gradients over ranks in the backward of the last micro-batch only; the others accumulate locally."""
        sync_gradients(model, last_micro_batch)
