"""A twin's step on two ranks, which must be its step on one: sharded by FSDP2, cut by tensor parallelism.

The second rank is a copy of the process, made before torch has started anything in it, so it costs no import.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM, NeMoAutoModelForImageTextToText
from nemo_automodel._transformers.coverage_cells import Differs, attempt
from nemo_automodel._transformers.coverage_steps import loss_function, optimizer_for, prepared, same_losses
from nemo_automodel._transformers.forward import forward_loss
from nemo_automodel.components.distributed.fsdp2 import FSDP2Manager

LAYOUTS: dict[str, dict[str, Any]] = {"fsdp2": {}, "tp2": {"tp_size": 2}}
_GRADIENT = 1e-3  # of sums in another order; a rank's share left out is off by about half
_TIMEOUT = timedelta(seconds=40)
_SECONDS = 200


@dataclass
class Step:
    """The loss of a step, every parameter's gradient, and the loss after the update."""

    losses: list[float]
    gradients: dict[str, Tensor | None]


class Pair:
    """This process, rank 0, and a copy of it, rank 1, which waits until it is asked to measure.

    Args:
        directory: holds ``base``, the twin's directory, and ``batches.pt``, a micro-batch for each rank.
        kind: causal or vlm.
    """

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory, self.kind = directory, kind
        end, self._go = os.pipe()
        self._rank1 = os.fork()
        if self._rank1 == 0:
            try:
                os.close(self._go)
                signal.alarm(10 * _SECONDS)
                if port := os.read(end, 8):
                    signal.alarm(_SECONDS)
                    _measure(1, _store(int(port)), directory, kind, None)
            finally:
                os._exit(0)
        os.close(end)

    def measure(self, wanted: Step) -> dict[str, str]:
        """The cells of both layouts; ``wanted`` is what one rank gets."""
        store = _store()
        os.write(self._go, str(store.port).encode())
        return _measure(0, store, self.directory, self.kind, wanted)

    def end(self) -> None:
        """Leave no second process behind."""
        os.close(self._go)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._rank1, signal.SIGKILL)
        os.waitpid(self._rank1, 0)


def one_rank(model: Any, batches: list[dict[str, Any]]) -> Step:
    """A step of ``model`` over all ``batches``, as micro-batches."""
    return _step(model, batches, len(batches), lambda last: None)


def _store(port: int = 0) -> dist.TCPStore:
    """Where the two ranks meet: rank 0 opens it on a free port. (A ``FileStore`` read while torn is read forever.)"""
    return dist.TCPStore("127.0.0.1", port, is_master=not port, timeout=_TIMEOUT, wait_for_workers=False)


def _measure(rank: int, store: dist.TCPStore, directory: Path, kind: str, wanted: Step | None) -> dict[str, str]:
    batches = torch.load(directory / "batches.pt", weights_only=True)
    cells = {}
    for column, sizes in LAYOUTS.items():

        def trial(column: str = column, sizes: dict[str, Any] = sizes) -> None:
            apart = dist.PrefixStore(column, store)
            dist.init_process_group("gloo", store=apart, rank=rank, world_size=2, timeout=_TIMEOUT)
            found = _on_two_ranks(directory, kind, batches, sizes)
            if wanted is not None:
                _compare(found, wanted)

        cells[column] = attempt(trial)
        if dist.is_initialized():
            dist.destroy_process_group()
    return cells


def _on_two_ranks(directory: Path, kind: str, batches: list[dict[str, Any]], sizes: dict[str, Any]) -> Step:
    our_class: Any = NeMoAutoModelForCausalLM if kind == "causal" else NeMoAutoModelForImageTextToText
    manager = FSDP2Manager(**sizes)
    model = our_class.from_pretrained(str(directory / "base"), dtype="float32", distributed=manager)
    mine = batches[manager.dp_rank :: manager.dp_size]
    return _step(model, mine, len(batches), lambda last: manager.sync_gradients(model, last), manager.all_reduce_sum)


def _step(
    model: Any,
    batches: list[dict[str, Any]],
    in_all: int,
    sync: Callable[[bool], None],
    total: Callable[[Any], Any] = lambda value: value,
) -> Step:
    model.train()
    optimizer, ours = optimizer_for(model), [prepared(model, batch) for batch in batches]
    tokens = float(total(torch.tensor(float(sum(batch["num_label_tokens"] for batch in ours)))))
    losses, gradients = [], {}
    for step in range(2):
        loss = torch.zeros(())
        for i, batch in enumerate(ours):
            sync(i == len(ours) - 1)
            ce_sum, aux = forward_loss(model, batch, loss_function())
            part = ce_sum / tokens + aux / in_all
            part.backward()
            loss += part.detach()
        losses.append(float(total(loss)))
        if step == 0:
            gradients = {name: _whole(p.grad) for name, p in model.named_parameters()}
            optimizer.step()
        optimizer.zero_grad()
    return Step(losses, gradients)


def _whole(gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


def _compare(found: Step, wanted: Step) -> None:
    same_losses(found.losses[:1], wanted.losses[:1])
    if found.gradients.keys() != wanted.gradients.keys():
        names = sorted(found.gradients.keys() ^ wanted.gradients.keys())
        raise Differs(f"other parameters than on one rank ({', '.join(names[:3])})")
    largest = max((_norm(gradient) for gradient in wanted.gradients.values()), default=0.0)
    for name, expected in wanted.gradients.items():
        gradient = found.gradients[name]
        off = _norm(gradient) + _norm(expected) if gradient is None or expected is None else _norm(gradient - expected)
        if not off <= _GRADIENT * _norm(expected) + 1e-5 * largest:
            raise Differs(f"the gradient of {name} is off by {off / max(_norm(expected), 1e-12):.2g} of its norm")
    same_losses(found.losses, wanted.losses)


def _norm(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None else tensor.norm().item()


__all__ = ["Pair", "Step", "one_rank"]
