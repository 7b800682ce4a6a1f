"""``activation_checkpointing: auto``: what a block keeps for its backward is measured, and what fits is chosen.

It is measured in the first training forward, on a real block and a real micro-batch, with weights as they are then: the
forward of one block is run once more and the tensors that autograd keeps are counted. Nothing is learned from names.

Between two modes, as many blocks as fit keep more than the others: the last ones, whose backward comes first and frees it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_automodel.components.distributed.activation_checkpointing import MODES, checkpoint_activations, keeps
from nemo_automodel.components.distributed.cast_weights import casts

logger = logging.getLogger(__name__)

_RESERVE = 0.08  # of the device: fragments, communication buffers, libraries' work space
_LOSS_ROWS = 8192  # of logits that exist at a time, in the fused loss
GIB = 2**30


@dataclass
class Estimate:
    """Bytes that a training step will need on top of what is allocated when the first block runs.

    Attributes:
        kept: Mode -> what one block keeps for its backward, as far as it was measured; casts of its weights aside.
        blocks: How many blocks there are.
        working: What one block needs while its backward runs.
        fixed: Gradients, optimizer state, casts of other weights, logits.
        tokens: Of the micro-batch measured.
        casts: Of one block's weights, where it casts them itself: kept under ``off``, made again under the others.
    """

    kept: dict[str, int]
    blocks: int
    working: int
    fixed: int
    tokens: int
    casts: int = 0

    def total(self, mode: str, tokens: int, laxer: int = 0) -> float:
        """Bytes for a micro-batch of ``tokens``, ``laxer`` blocks under the mode before ``mode`` and the others under it.

        What blocks keep grows with the tokens, but for casts of weights.
        """
        kept = self._kept(mode, tokens) * self.blocks + self._more(mode, tokens) * laxer
        return self.fixed + kept + self.working * tokens / self.tokens

    def laxer(self, mode: str, tokens: int, budget: float) -> int:
        """How many blocks may keep what the mode before ``mode`` keeps, within ``budget`` bytes."""
        room, each = budget - self.total(mode, tokens), self._more(mode, tokens)
        return min(self.blocks - 1, int(room / each)) if room > 0 and each > 0 else 0

    def _kept(self, mode: str, tokens: int) -> float:
        return self.kept[mode] * tokens / self.tokens + (self.casts if mode == "off" else 0)

    def _more(self, mode: str, tokens: int) -> float:
        """Bytes that a block keeps more under the mode before ``mode``; 0 where that was not measured."""
        before = _before(mode)
        return self._kept(before, tokens) - self._kept(mode, tokens) if before in self.kept else 0


class AutoCheckpointing:
    """Chooses ``off``, ``selective`` or ``full``, or a mix of two neighbours, for ``blocks`` in the first training forward.

    Args:
        model: The model, not yet sharded. A later, larger micro-batch may make the choice stricter.
        blocks: Its blocks, not yet compiled. Those of the kind that holds most weights are measured and changed.
        compiled: What makes a forward that is compiled as the blocks will be (or gives it back as it is).
        then: Called once the choice is made: compiles the blocks.
        compute_dtype: What weights are cast to.
        keeps_casts: Whether casts of weights stay from forward to backward (nothing is resharded).
        free: Free bytes of the device, None where there is no limit. Default: asks the device.
        shared: Whether ranks share a block's work, and so exchange tensors in its forward. Each must then run it as often
            as the others do, in backward too, so that the choice is final.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        device: torch.device,
        compiled: Callable[[Any], Any],
        then: Callable[[], Any],
        compute_dtype: torch.dtype = torch.bfloat16,
        keeps_casts: bool = True,
        free: Callable[[], int | None] | None = None,
        shared: bool = False,
    ):
        self._shared = shared
        self._model, self._device, self._compiled, self._then = model, device, compiled, then
        self._compute_dtype, self._keeps_casts = compute_dtype, keeps_casts
        self._free = free or (lambda: free_bytes(device))
        self._blocks = _largest_kind(blocks)
        self._tokens, self._fixed = 1, 0
        self.mode: str | None = None  # the strictest in use
        self.laxer = 0  # of the last blocks, under the mode before it
        self.estimate: Estimate | None = None
        sizes = [_weights(block) for block in self._blocks]
        measured = self._blocks[sizes.index(max(sizes))]
        self._hooks = [
            model.register_forward_pre_hook(self._see_batch, with_kwargs=True),
            measured.register_forward_pre_hook(self._first_forward, with_kwargs=True),
        ]

    def _see_batch(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs_embeds"))
        tokens = inputs.shape[:2].numel() if isinstance(inputs, Tensor) else 1
        if self.estimate is not None and tokens > self._tokens and torch.is_grad_enabled():
            self._tokens = tokens
            mode = self.mode or "off"
            if self._shared:
                logger.info("activation checkpointing: stays %s at %d tokens: ranks share the blocks", mode, tokens)
            elif mode in self.estimate.kept and self.estimate.total(mode, tokens, self.laxer) > self._budget:
                self._apply(*self._plan([m for m in MODES[MODES.index(mode) :] if m in self.estimate.kept]))
                self._say()
        elif self.mode is None and torch.is_grad_enabled():
            self._tokens = tokens
            self._fixed = self._fixed_bytes()  # here, where weights are still in the dtype that they are stored in

    def _first_forward(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled() or not block.training:
            return
        self._hooks.pop().remove()
        free = self._free()
        if free is None:
            self._apply("off")
            logger.info("activation checkpointing: off (auto: %s has no limit that is known)", self._device.type)
        else:
            self._choose(block, args, kwargs, free)
            self._say()
        self._then()

    def _choose(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], free: int) -> None:
        """Measure mode after mode until one fits."""
        self._budget = free
        kept: dict[str, int] = {}
        inputs = sum(t.nbytes for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point())
        own = sum(weight.numel() for weight in casts(block)) * self._compute_dtype.itemsize
        estimate = self.estimate = Estimate(kept, len(self._blocks), 0, self._fixed, self._tokens, own)
        kept["full"] = inputs
        for mode in MODES:
            if mode != "full":
                kept[mode] = _kept_by(block, args, kwargs, mode, self._compiled)
            if mode == "off":
                kept[mode] = max(0, kept[mode] - own)
                estimate.working = kept["off"]
            too_much = estimate.total(mode, self._tokens) > self._budget
            if mode == MODES[-1] or not self._largest(int(too_much)):  # all ranks run as many forwards
                break
        mode, laxer = self._plan([mode])
        each = len(self._blocks) + 1
        strictness = self._largest(MODES.index(mode) * each - laxer)  # the rank with the least room decides for all
        index = -(-strictness // each)
        self._apply(MODES[index], index * each - strictness)

    def _largest(self, number: int) -> int:
        """The largest of all ranks' ``number``."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return number
        found = torch.tensor(number, device=self._device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def _plan(self, modes: Sequence[str]) -> tuple[str, int]:
        """The first of ``modes`` that fits, else the last, and how many blocks may be laxer."""
        assert self.estimate is not None
        e, tokens = self.estimate, self._tokens
        mode = next((m for m in modes if e.total(m, tokens) <= self._budget), modes[-1])
        return mode, e.laxer(mode, tokens, self._budget)

    def _apply(self, mode: str, laxer: int = 0) -> None:
        for block in self._blocks:
            block.__dict__.pop("forward", None)  # the class's own, where an earlier choice replaced it
        strict = len(self._blocks) - laxer
        checkpoint_activations(self._blocks[:strict], mode)
        checkpoint_activations(self._blocks[strict:], _before(mode))
        self.mode, self.laxer = mode, laxer

    def _say(self) -> None:
        assert self.estimate is not None
        assert self.mode is not None
        e = self.estimate
        if self.mode not in e.kept:  # another rank's choice
            e.kept[self.mode] = e.kept["full"]
        tries = ", ".join(f"{m} {e.total(m, self._tokens) / GIB:.1f}" for m in MODES if m in e.kept)
        mixed = f", {_before(self.mode)} in the last {self.laxer} of {e.blocks} blocks" if self.laxer else ""
        logger.info(
            "activation checkpointing: %s%s (auto: a step of %d tokens needs, in GiB, %s; free are %.1f; %d blocks keep %s MiB each)",
            self.mode, mixed, self._tokens, tries, self._budget / GIB, e.blocks, f"{e.kept[self.mode] / 2**20:,.1f}",
        )  # fmt: skip

    def _fixed_bytes(self) -> int:
        """Gradients and two moments in the weights' own dtype, casts that no block measured makes, and the loss."""
        fixed = 0
        measured = set().union(*map(casts, self._blocks))
        others = set().union(*map(casts, self._model.modules()))
        for parameter in self._model.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if parameter.requires_grad:
                fixed += 3 * local.nbytes
            cast = parameter.dtype != self._compute_dtype and (isinstance(parameter, DTensor) or parameter in others)
            if self._keeps_casts and cast and parameter not in measured:
                fixed += parameter.numel() * self._compute_dtype.itemsize
        head = getattr(self._model, "get_output_embeddings", lambda: None)()
        weight = next(iter(head.parameters()), None) if head is not None else None
        if weight is not None:
            rows = min(self._tokens, _LOSS_ROWS)
            fixed += 2 * rows * weight.shape[0] * self._compute_dtype.itemsize
            fixed += 6 * weight.numel() if weight.requires_grad else 0  # its gradient, summed in fp32 and cast
        return fixed


def _before(mode: str) -> str:
    """The next laxer mode; ``off`` where there is none."""
    return MODES[max(0, MODES.index(mode) - 1)]


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated on ``device``, less a reserve; None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + cached - _RESERVE * total)


def _kept_by(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str, compiled: Callable[[Any], Any]
) -> int:
    """Bytes that the forward of ``block`` keeps for its backward under ``mode``, weights aside."""
    own = block.__dict__.get("forward")
    checkpoint_activations([block], mode)
    forward = compiled(block.forward)
    if own is None:
        block.__dict__.pop("forward", None)
    else:
        block.forward = own

    def run() -> Any:
        # the first argument is what the block before made, and so needs a gradient, even where this is the first block
        return forward(*(_as_input(a) if i == 0 else a for i, a in enumerate(args)), **kwargs)

    device = next(block.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if device.type == "cuda":
            run()  # compiles, and lets libraries allocate what they keep
            before = torch.cuda.memory_allocated(device)
            result = run()  # held until memory is read
            kept = torch.cuda.memory_allocated(device) - before
            del result
            return max(0, kept)
        weights = {_address(t) for t in (*block.parameters(), *block.buffers())}
        return _counted(run, weights, stored_aside=mode == "selective")


def _counted(run: Callable[[], Any], weights: set[int], stored_aside: bool) -> int:
    """Where an allocator keeps no count: bytes of what autograd saves in ``run``, and of what selective mode stores aside."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _Outputs() as aside:
        result = run()
    sizes = {_address(t): t.untyped_storage().nbytes() for t in map(_plain, kept)}
    found = sum(size for address, size in sizes.items() if address not in weights)
    del result
    return found + aside.bytes if stored_aside else found


class _Outputs(TorchDispatchMode):
    """Counts what operators make whose results selective checkpointing keeps."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``; add up its results where they are kept."""
        result = func(*args, **(kwargs or {}))
        if keeps(func):
            results = result if isinstance(result, tuple | list) else (result,)
            self.bytes += sum(t.nbytes for t in results if isinstance(t, Tensor))
        return result


def _as_input(value: Any) -> Any:
    wanted = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if wanted else value


def _plain(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _address(tensor: Tensor) -> int:
    return _plain(tensor.detach()).untyped_storage().data_ptr()


def _weights(module: nn.Module) -> int:
    packed = sum(getattr(inner, "packed_parameters", 0) for inner in module.modules())
    return packed + sum(p.numel() for p in module.parameters())


def _largest_kind(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The blocks of the class that holds most weights: a decoder's, not its vision tower's."""
    kinds: dict[type, list[nn.Module]] = {}
    for block in blocks:
        kinds.setdefault(type(block), []).append(block)
    return max(kinds.values(), key=lambda members: sum(map(_weights, members)))
