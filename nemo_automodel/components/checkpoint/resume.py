"""What a run needs to go on exactly: the ``resume/`` directory.

    tensors/             trainable weights and buffers (``model/``), optimizer state (``optimizer/``) and what a recipe
                         adds (``extra/``), through DCP
    state.json           optimizer groups, lr_scheduler, schedule, fingerprint, extra; its tensors in state.safetensors
    rank_00000.json      one a rank: rng; its tensors in rank_00000.safetensors

Names, not positions, say what belongs to what, so another number of ranks reads the same files.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor import empty as empty_dtensor

from nemo_automodel.components.checkpoint import plain
from nemo_automodel.components.checkpoint.dcp import load_tensors, save_tensors, stored_tensors
from nemo_automodel.components.checkpoint.ranks import Ranks
from nemo_automodel.components.checkpoint.shards import like_local, live_tensors, local_of
from nemo_automodel.errors import CheckpointError, first_line
from nemo_automodel.types import TrainState

logger = logging.getLogger(__name__)

TENSORS = "tensors"
_SCHEDULED = (  # of a group, what torch's schedulers set
    "lr", "initial_lr", "max_lr", "min_lr", "betas", "momentum", "base_momentum", "max_momentum",
)  # fmt: skip
_LIVE_KEYS = ("fused", "foreach", "capturable")  # how the optimizer runs here, not what it has learned


@dataclass
class ResumeState:
    """What ``directory`` will hold: tensors (the live ones, until ``on_host``) and JSON."""

    directory: Path
    tensors: dict[str, torch.Tensor]
    document: dict[str, Any]
    aside: dict[str, torch.Tensor]
    rng: Any
    rng_aside: dict[str, torch.Tensor]

    @classmethod
    def of(cls, state: TrainState, directory: Path, ranks: Ranks, extra: Mapping[str, Any]) -> ResumeState:
        """Collect what continues ``state``, and create ``directory``; every rank calls it, nothing in it changes.

        ``extra``: JSON-able entries that ``read_state`` returns again.
        """
        ranks.on_main("Creating the directory", lambda: (directory / TENSORS).mkdir(parents=True))
        tensors, document, aside = ranks.together("Collecting the state", lambda: _collect(state, extra))
        rng_aside: dict[str, torch.Tensor] = {}
        rng = ranks.together("Collecting the random state", lambda: _collect_rng(state, rng_aside))
        return cls(directory, tensors, document, aside, rng, rng_aside)

    def on_host(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Have ``copy`` make a host copy of every tensor."""
        for tensors in (self.tensors, self.aside, self.rng_aside):
            for name, tensor in tensors.items():
                tensors[name] = like_local(tensor, copy(local_of(tensor)))

    def write(self, ranks: Ranks) -> None:
        """Write everything; every rank calls it, on a file system they share."""
        directory, group = self.directory, ranks.group
        ranks.together("Saving the state", lambda: save_tensors(directory / TENSORS, self.tensors, group))
        ranks.on_main("Saving the state", lambda: _write(directory / "state.json", self.document, self.aside))
        mine = _rank_file(directory, ranks.rank)
        ranks.together("Saving the random state", lambda: _write(mine, self.rng, self.rng_aside))


def _collect(
    state: TrainState, extra: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, torch.Tensor]]:
    names = live_tensors(state.model)
    tensors = {f"model/{name}": tensor.detach() for name, tensor in _saved_of(names)}
    aside: dict[str, torch.Tensor] = {}
    own: dict[str, torch.Tensor] = {}  # of ``state.extra``: beside the weights, for they may be as large and sharded
    document = {
        "optimizer": _optimizer_document(state.optimizer, names, tensors, aside),
        "lr_scheduler": plain.encode(state.lr_scheduler.state_dict(), aside, "lr_scheduler"),
        "schedule": plain.encode(state.schedule.state_dict(), aside, "schedule"),
        "fingerprint": json.loads(json.dumps(state.fingerprint, default=str)),
        "extra": {name: plain.encode(part.state_dict(), own, f"extra/{name}") for name, part in state.extra.items()},
        **extra,
    }
    tensors.update(own)
    return tensors, document, aside


def _saved_of(names: Mapping[str, torch.Tensor]) -> Iterable[tuple[str, torch.Tensor]]:
    """What training can have changed: trainable parameters, the first name of each tied one, and buffers."""
    seen: set[int] = set()
    for name, tensor in names.items():
        if id(tensor) not in seen and (tensor.requires_grad or not isinstance(tensor, nn.Parameter)):
            seen.add(id(tensor))
            yield name, tensor


# --- the optimizer ------------------------------------------------------------------------------------------------


def _parameters(optimizer: torch.optim.Optimizer, names: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """The optimizer's parameters in its own order (the ids of its state_dict), with their names."""
    name_of: dict[int, str] = {}
    for name, tensor in names.items():
        name_of.setdefault(id(tensor), name)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [(name_of.get(id(p), f"extra.{i}"), p) for i, p in enumerate(params)]


def _optimizer_document(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, torch.Tensor],
    tensors: dict[str, torch.Tensor],
    aside: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """Everything but the tensors, which go into ``tensors`` by parameter name; what else there is, by kind."""
    content = dict(optimizer.state_dict())
    per_parameter, groups = content.pop("state"), content.pop("param_groups")
    params = _parameters(optimizer, names)
    entries: dict[str, Any] = {}
    for index, values in per_parameter.items():
        name, param = params[index]
        entry: dict[str, Any] = {"tensors": {}, "values": {}}
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{name}/{key}"] = value.detach()
                entry["tensors"][key] = {"placements": _placements(value), "with_param": value.device == param.device}
            else:
                entry["values"][key] = plain.encode(value, aside, f"optimizer.{name}.{key}")
        entries[name] = entry
    by_name = [{**group, "params": [params[index][0] for index in group["params"]]} for group in groups]
    return {
        "state": entries,
        "param_groups": plain.encode(by_name, aside, "optimizer.param_groups"),
        "more": plain.encode(content, aside, "optimizer.more"),
    }


def _placements(value: torch.Tensor) -> list[int] | None:
    """Of a sharded tensor, per mesh dimension: the sharded dimension, or -1 where it is replicated."""
    if not isinstance(value, DTensor):
        return None
    if any(isinstance(placement, Partial) for placement in value.placements):
        raise CheckpointError(
            f"optimizer state with placements {value.placements} cannot be saved; shard or replicate it"
        )
    return [getattr(placement, "dim", -1) for placement in value.placements]


def _empty_state(param: torch.Tensor, dtype: torch.dtype, size: torch.Size, entry: Mapping[str, Any]) -> torch.Tensor:
    """Where one tensor of the optimizer's state is loaded into: sharded as ``param`` if it has its shape."""
    sharded = entry["placements"] is not None
    if isinstance(param, DTensor) and size == param.size() and (sharded or size.numel() > 1):
        return torch.empty_like(param.detach(), dtype=dtype)
    if isinstance(param, DTensor) and sharded:
        placements = [Shard(dim) if dim >= 0 else Replicate() for dim in entry["placements"]]
        if len(placements) != param.device_mesh.ndim:
            placements = [Replicate()] * param.device_mesh.ndim
        return empty_dtensor(size, dtype=dtype, device_mesh=param.device_mesh, placements=placements)
    return torch.empty(size, dtype=dtype, device=param.device if entry["with_param"] else "cpu")


# --- reading ------------------------------------------------------------------------------------------------------


def read_state(directory: Path) -> dict[str, Any]:
    """``state.json`` as it was written, its tensors not yet in place (JSON only, so it is cheap to look at)."""
    content: dict[str, Any] = json.loads((directory / "state.json").read_text())
    return content


def load_resume(state: TrainState, directory: Path, ranks: Ranks, new_plan: bool = False) -> None:
    """Put everything in ``directory`` into ``state``, in place; every rank calls it.

    With ``new_plan`` the learning rate is not what the checkpoint says but where ``state.lr_scheduler``, a fresh one, is
    after as many steps.

    Raises:
        CheckpointError: The model or the optimizer is another one; the message lists what differs.
    """
    document, aside = read_state(directory), _aside(directory / "state.json")
    names = live_tensors(state.model)
    stored = ranks.together("Reading the index", lambda: stored_tensors(directory / TENSORS))
    _check_weights(names, stored)
    targets = {f"model/{name}": tensor.detach() for name, tensor in _saved_of(names)}
    loaded = _optimizer_targets(state.optimizer, names, stored, document["optimizer"])
    targets |= {f"optimizer/{name}/{key}": t for name, values in loaded.items() for key, t in values.items()}
    own = ranks.together("Reading the extra state", lambda: _extra_targets(state, stored, document.get("extra", {})))
    targets |= own
    ranks.together("Loading the state", lambda: load_tensors(directory / TENSORS, targets))

    def restore_the_rest() -> None:
        schedule = plain.decode(document["schedule"], aside)
        planned = _planned_rates(state, schedule["step"]) if new_plan else None
        _load_optimizer(state.optimizer, names, document["optimizer"], loaded, aside)
        if planned is None:
            state.lr_scheduler.load_state_dict(plain.decode(document["lr_scheduler"], aside))
        else:
            _set_rates(state.optimizer, planned)
        state.schedule.load_state_dict(schedule)
        for name, part in state.extra.items():
            part.load_state_dict(plain.decode(document["extra"][name], own))
        _load_rng(state, directory, ranks.rank)

    ranks.together("Restoring optimizer, lr_scheduler, schedule, extra and rng", restore_the_rest)


def _extra_targets(
    state: TrainState, stored: Mapping[str, tuple[torch.dtype, torch.Size]], document: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Where the tensors of ``state.extra`` are loaded into: sharded as the live ones of the same name and shape are."""
    if missing := sorted(state.extra.keys() - document.keys()):
        raise CheckpointError(
            f"the checkpoint has no state.extra {', '.join(missing)}; resume without it, or start anew from the weights"
        )
    if unknown := sorted(document.keys() - state.extra.keys()):
        logger.warning("The checkpoint's state.extra %s is not in this run; it is not restored.", ", ".join(unknown))
    live: dict[str, torch.Tensor] = {}
    for name, part in state.extra.items():
        plain.encode(part.state_dict(), live, f"extra/{name}")
    targets = {}
    for key, (dtype, size) in stored.items():
        if not any(key == f"extra/{name}" or key.startswith(f"extra/{name}.") for name in state.extra):
            continue
        like = live.get(key)
        if like is not None and like.size() == size:
            targets[key] = torch.empty_like(like.detach(), dtype=dtype)
        else:
            targets[key] = torch.empty(size, dtype=dtype)
    return targets


def _check_weights(names: Mapping[str, torch.Tensor], stored: Mapping[str, tuple[torch.dtype, torch.Size]]) -> None:
    live = {name: (tensor.dtype, tensor.size()) for name, tensor in _saved_of(names)}
    saved = {name.removeprefix("model/"): what for name, what in stored.items() if name.startswith("model/")}
    differences = [
        f"{name}: {_shown(saved.get(name))} -> {_shown(live.get(name))}"
        for name in {**saved, **live}
        if saved.get(name) != live.get(name)
    ]
    if differences:
        more = f"\n  and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise CheckpointError(
            "this run's trainable weights are not the checkpoint's (checkpoint -> this run):\n  "
            + "\n  ".join(differences[:8])
            + more
            + "\nresume with the model, adapter and dtypes it was saved with, or start anew without restore_from"
        )


def _shown(what: tuple[torch.dtype, torch.Size] | None) -> str:
    return "absent" if what is None else f"{str(what[0]).removeprefix('torch.')}{list(what[1])}"


def _optimizer_targets(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, torch.Tensor],
    stored: Mapping[str, Any],
    document: Mapping[str, Any],
) -> dict[str, dict[str, torch.Tensor]]:
    targets: dict[str, dict[str, torch.Tensor]] = {}
    for name, param in _parameters(optimizer, names):
        for key, entry in document["state"].get(name, {}).get("tensors", {}).items():
            dtype, size = stored[f"optimizer/{name}/{key}"]
            targets.setdefault(name, {})[key] = _empty_state(param, dtype, size, entry)
    return targets


def _load_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, torch.Tensor],
    document: Mapping[str, Any],
    loaded: Mapping[str, dict[str, torch.Tensor]],
    aside: dict[str, torch.Tensor],
) -> None:
    params = _parameters(optimizer, names)
    index_of = {name: index for index, (name, _) in enumerate(params)}
    groups = plain.decode(document["param_groups"], aside)
    live = [[name for name, _ in params[start:stop]] for start, stop in _spans(optimizer)]
    if [group["params"] for group in groups] != live:
        raise CheckpointError(
            "the optimizer's parameter groups are not the checkpoint's; resume with the same optimizer section"
        )
    for group, current in zip(groups, optimizer.param_groups, strict=True):
        group["params"] = [index_of[name] for name in group["params"]]
        group.update({key: current[key] for key in _LIVE_KEYS if key in group and key in current})
    per_parameter = {
        index_of[name]: {**plain.decode(entry["values"], aside), **loaded.get(name, {})}
        for name, entry in document["state"].items()
    }
    optimizer.load_state_dict({"state": per_parameter, "param_groups": groups, **plain.decode(document["more"], aside)})
    for (
        name,
        param,
    ) in params:  # load_state_dict casts to the parameter's dtype; moments keep the one they were saved in
        for key, tensor in loaded.get(name, {}).items():
            current = optimizer.state[param].get(key)
            if isinstance(current, torch.Tensor) and current.dtype != tensor.dtype:
                optimizer.state[param][key] = tensor


def _planned_rates(state: TrainState, steps: int) -> list[dict[str, Any]]:
    """What the fresh scheduler sets in each of the optimizer's groups after ``steps`` steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: that the optimizer has taken no step
        try:
            for _ in range(steps):
                state.lr_scheduler.step()
        except Exception as error:
            raise CheckpointError(
                f"checkpoint.extend=true: lr_scheduler cannot be brought to step {steps} of the new plan: {first_line(error)}"
            ) from error
    return [{key: group[key] for key in _SCHEDULED if key in group} for group in state.optimizer.param_groups]


def _set_rates(optimizer: torch.optim.Optimizer, planned: list[dict[str, Any]]) -> None:
    before = optimizer.param_groups[0]["lr"]
    for group, values in zip(optimizer.param_groups, planned, strict=True):
        group.update(values)
    logger.info(
        "The next step's learning rate is %.4g under the new plan, where it was to be %.4g.",
        optimizer.param_groups[0]["lr"], before,
    )  # fmt: skip


def _spans(optimizer: torch.optim.Optimizer) -> Iterable[tuple[int, int]]:
    start = 0
    for group in optimizer.param_groups:
        yield start, start + len(group["params"])
        start += len(group["params"])


def _collect_rng(state: TrainState, aside: dict[str, torch.Tensor]) -> Any:
    return plain.encode(state.rng.state_dict(), aside, "rng")


def _load_rng(state: TrainState, directory: Path, rank: int) -> None:
    path = _rank_file(directory, rank)
    if not path.exists():
        logger.warning("The checkpoint was saved by fewer ranks: rank %d takes rank 0's random state.", rank)
        path = _rank_file(directory, 0)
    state.rng.load_state_dict(plain.decode(json.loads(path.read_text()), _aside(path)))


# --- files --------------------------------------------------------------------------------------------------------


def _rank_file(directory: Path, rank: int) -> Path:
    return directory / f"rank_{rank:05d}.json"


def _write(path: Path, document: Any, aside: Mapping[str, torch.Tensor]) -> None:
    if sharded := [key for key, t in aside.items() if isinstance(t, DTensor)]:
        raise CheckpointError(f"state {sharded[0]!r} is sharded over ranks; keep it in TrainState.extra")
    path.write_text(json.dumps(document, indent=1))
    if aside:
        save_file({key: t.cpu().contiguous().clone() for key, t in aside.items()}, path.with_suffix(".safetensors"))


def _aside(path: Path) -> dict[str, torch.Tensor]:
    tensors = path.with_suffix(".safetensors")
    return load_file(tensors) if tensors.exists() else {}
