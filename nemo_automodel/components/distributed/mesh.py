"""Which process does what: data, sequence and tensor parallel ranks as views of one numbering of the processes.

Rank = ((dp_replicate x dp_shard + dp_shard) x cp + cp) x tp + tp: neighbours share a layer (tensor parallel), then a
sequence (context parallel), then differ in their data. All views are made from this order, so they agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nemo_automodel.components.distributed.context_parallel import shard_sequence
from nemo_automodel.errors import ConfigError
from nemo_automodel.types import Batch

if TYPE_CHECKING:
    from nemo_automodel.components.distributed.env import DistEnv


@dataclass(frozen=True)
class MeshSizes:
    """How many ranks each kind of parallelism has; but for ``ep`` their product is the number of processes.

    ``ep`` ranks, of those that shard the weights, share a layer's experts; it divides ``dp_shard x cp``.
    """

    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    ep: int = 1

    @property
    def dp(self) -> int:
        """Ranks that see different rows."""
        return self.dp_replicate * self.dp_shard


class MeshManager:
    """What every manager of ours is: the views of the processes, and the sums over them.

    Attributes:
        device: Where this rank computes.
        sizes: Ranks of each kind.
        mesh: The view that weights are spread over: ``dp_replicate``, ``dp_shard_cp``, ``tp``.
        cp_mesh, tp_mesh: One-dimensional meshes of the ranks that share this one's rows, and its tokens.
        expert_mesh: The view that experts are spread over: ``dp_replicate``, ``dp_shard_ep``, ``ep``.
        dp_rank, dp_size: This rank among those that see different data.
        takes_meta: That ``parallelize`` shards models that have no memory yet, which are then loaded shard by shard.
        offload: That weights stay in host memory.
    """

    takes_meta = True
    offload = False

    def __init__(self, sizes: MeshSizes, device: torch.device, env: DistEnv | None = None):
        self.device, self.sizes, self._env = device, sizes, env
        weights = (sizes.dp_replicate, sizes.dp_shard * sizes.cp, sizes.tp)
        self.mesh = init_device_mesh(device.type, weights, mesh_dim_names=("dp_replicate", "dp_shard_cp", "tp"))
        data = init_device_mesh(device.type, (sizes.dp, sizes.cp, sizes.tp), mesh_dim_names=("dp", "cp", "tp"))
        of_loss = init_device_mesh(device.type, (sizes.dp * sizes.cp, sizes.tp), mesh_dim_names=("dp_cp", "tp"))
        of_experts = (sizes.dp_replicate, sizes.dp_shard * sizes.cp // sizes.ep, sizes.ep)
        self.expert_mesh: DeviceMesh | None = None
        if sizes.ep > 1:
            self.expert_mesh = init_device_mesh(
                device.type, of_experts, mesh_dim_names=("dp_replicate", "dp_shard_ep", "ep")
            )
        self.tp_mesh: DeviceMesh = self.mesh["tp"]
        self.cp_mesh: DeviceMesh = data["cp"]
        self._loss_mesh: DeviceMesh = of_loss["dp_cp"]
        self.dp_rank, self.dp_size = data["dp"].get_local_rank(), sizes.dp

    def wait_for_all(self) -> None:
        """Wait on the host until every rank is here, however long one takes (to download); needs the environment."""
        if self._env is not None:
            self._env.barrier()

    def shard_batch(self, batch: Batch) -> Batch:
        """This rank's part of a micro-batch that it shares with its context-parallel ranks; the whole without them."""
        return shard_sequence(batch, self.cp_mesh)

    def all_reduce_sum(self, value: torch.Tensor | float) -> torch.Tensor:
        """Sum of ``value`` over the ranks that hold different tokens: a float64 scalar on the device, without waiting."""
        if isinstance(value, torch.Tensor):
            total = value.detach().to(self.device, torch.float64, copy=True)
        else:  # a fill, where a copy from the host would wait for the device
            total = torch.full((), value, dtype=torch.float64, device=self.device)
        if self._loss_mesh.size() > 1:
            dist.all_reduce(total, group=self._loss_mesh.get_group())
        return total


def place(env: DistEnv | None) -> tuple[int, torch.device]:
    """(processes, this one's device), from the environment or, without one, from torch."""
    if env is not None:
        return env.world_size, env.device
    return dist.get_world_size(), torch.device("cuda" if torch.cuda.is_available() else "cpu")


def data_parallel_size(world_size: int, dp_size: int | str | None, tp_size: int, cp_size: int) -> int:
    """Data-parallel ranks: ``dp_size``, or what the others leave of ``world_size`` for ``none`` and ``auto``.

    Raises ConfigError, with the numbers, where the product is not the number of processes.
    """
    for name, size in (("tp_size", tp_size), ("cp_size", cp_size)):
        if size < 1:
            raise ConfigError(f"distributed.{name}={size}: write 1 or more")
    others = tp_size * cp_size
    if dp_size in (None, "none", "auto"):
        if world_size % others:
            raise ConfigError(
                f"distributed: tp_size {tp_size} x cp_size {cp_size} = {others} does not divide the {world_size} "
                f"process(es) that were started; write sizes whose product does, or start a multiple of {others}"
            )
        return world_size // others
    wanted = int(dp_size)
    if wanted < 1 or wanted * others != world_size:
        raise ConfigError(
            f"distributed.dp_size={wanted}: {world_size} process(es) were started, and dp_size x tp_size x cp_size "
            f"= {wanted * others} must equal that; write dp_size: none, or start {max(1, wanted) * others} processes"
        )
    return wanted


def replicas(dp_size: int, dp_replicate_size: int) -> tuple[int, int]:
    """(replicas, shards of each) of the data-parallel ranks; raises ConfigError where they do not divide."""
    if dp_replicate_size < 1 or dp_size % dp_replicate_size:
        fitting = [n for n in range(1, dp_size + 1) if dp_size % n == 0]
        raise ConfigError(
            f"distributed.dp_replicate_size={dp_replicate_size}: does not divide the {dp_size} data-parallel rank(s); "
            f"write one of {', '.join(map(str, fitting))}"
        )
    return dp_replicate_size, dp_size // dp_replicate_size


def require_expert_ranks(ep_size: int, shards: int, tp_size: int) -> None:
    """Raise ConfigError where ``ep_size`` does not divide the ranks that share the weights."""
    if ep_size < 1 or shards % ep_size:
        fitting = [n for n in range(1, shards + 1) if shards % n == 0]
        raise ConfigError(
            f"distributed.ep_size={ep_size}: does not divide the {shards} rank(s) that share the weights "
            f"(dp_size / dp_replicate_size x cp_size); write one of {', '.join(map(str, fitting))}"
        )
    if ep_size > 1 and tp_size > 1:
        raise ConfigError(
            f"distributed.ep_size={ep_size}: not together with tp_size={tp_size} in this release; write tp_size: 1, or "
            "ep_size: 1 (tensor parallelism then shares each expert)"
        )
