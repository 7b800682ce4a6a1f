"""What the parts agree on: the batch, the state of a run, and the protocols a user's own component can fill.

Nothing here computes. Shape legend used in every docstring: B batch rows, S sequence positions, T = B*S tokens,
H hidden size, V vocabulary, D documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict, runtime_checkable

import torch
from torch import nn

IGNORE_INDEX = -100
"""Label of a position that is not trained on (the value torch and transformers use)."""


@dataclass(frozen=True)
class VisionInputs:
    """What a row gives a model beside its token ids, by the model's own names.

    How each is put together with those of other rows is all that tells them apart. Packed: what is of tokens stands
    where its document stands, images follow each other, and what is one a row is joined along its images.
    """

    tokens: dict[str, torch.Tensor]  # [S] or [S, ...]: padded along the sequence, then stacked
    rows: dict[str, torch.Tensor]  # [...]: stacked, one a row (zeros for a row without images)
    images: dict[str, torch.Tensor]  # [n, ...], n images, tiles or patches: one after the other, whoever's they are
    num_images: int = 0


@dataclass(frozen=True)
class RowImages:
    """What is of one row among the inputs of a micro-batch that are of images."""

    entries: dict[str, int]  # by the input's name: how many of its images, tiles or patches
    checksum: int  # of some of their numbers, by which the same row with other pixels is told


class _Ids(TypedDict):
    input_ids: list[int]
    labels: list[int]
    """Same length; already shifted: ``labels[t]`` is the token to predict *at* position t, or IGNORE_INDEX."""


class Sample(_Ids, total=False):
    """One tokenised training row, as a dataset returns it."""

    vision: VisionInputs  # of vision-language data, where the row has images or not


@dataclass(frozen=True)
class ContextLayout:
    """Where a batch's sequence lies among context-parallel ranks: cut into equal chunks, several on each rank."""

    group: Any  # the ranks' process group; None: this process holds every chunk
    held: tuple[int, ...]  # the chunks on this rank, in the order in which its tensors have them
    order: tuple[int, ...]  # the chunks in the order in which gathering over ``group`` puts them
    cu_seqlens: tuple[int, ...] | None  # [D+1] boundaries of packed documents along the whole row


class Batch(TypedDict, total=False):
    """One micro-batch, as the loader yields it (tensors on the CPU; the recipe moves them to the device).

    Padded: B rows, right padded. Packed: B = 1 and the row holds every document of the micro-batch one after the
    other; ``position_ids`` restart at each and ``cu_seq_lens_q/k`` hold the D+1 boundaries (the names that
    transformers passes through to its attention functions).
    """

    input_ids: torch.Tensor  # [B, S] int64
    labels: torch.Tensor  # [B, S] int64, pre-shifted, IGNORE_INDEX where untrained
    label_indices: torch.Tensor  # [n] int64: flat positions in [0, B*S) whose label is trained
    num_label_tokens: int  # n, known without asking the device
    num_tokens: int  # tokens of the rows themselves: no padding, no filler
    attention_mask: torch.Tensor  # [B, S] int64, 1 = token; absent when packed or when no row is padded
    right_padded: bool  # no row of attention_mask has padding before a token; ``to_device`` adds it
    position_ids: torch.Tensor  # [1, S] int64; packed only
    cu_seq_lens_q: torch.Tensor  # [D+1] int32; packed only
    cu_seq_lens_k: torch.Tensor  # the same tensor; packed only
    max_length_q: int  # packed only
    max_length_k: int  # packed only
    cp_layout: ContextLayout  # only of a batch sharded along its sequence, whose other tensors are this rank's
    sample_ids: list[int]  # dataset rows in this micro-batch, for traces and messages
    num_images: int  # images of the rows themselves; vision-language only, as are keys that a model names itself
    image_rows: list[RowImages]  # of each of sample_ids; vision-language only


@runtime_checkable
class DistributedManager(Protocol):
    """How a model is spread over processes. ``FSDP2Manager`` is ours; any class with these members can replace it."""

    device: torch.device
    dp_rank: int
    dp_size: int

    def parallelize(self, model: nn.Module, blocks: Sequence[nn.Module], compute_dtype: torch.dtype) -> nn.Module:
        """Shard ``model`` in place and return it; ``blocks`` are its decoder blocks, to be wrapped one by one."""
        ...

    def sync_gradients(self, model: nn.Module, last_micro_batch: bool) -> None:
        """Say before each micro-batch whether its backward must reduce gradients over ranks."""
        ...

    def shard_batch(self, batch: Batch) -> Batch:
        """This rank's part of a micro-batch that ranks share along its sequence; ``batch`` itself where none do.

        Its ``num_tokens`` and ``num_label_tokens`` are this part's: ``all_reduce_sum`` adds them up.
        """
        ...

    def all_reduce_sum(self, value: torch.Tensor | float) -> torch.Tensor:
        """Sum over the ranks that hold different tokens, as a float64 tensor on the device."""
        ...


class LossFunction(Protocol):
    """A loss over logits. Returns the SUM over label tokens; the recipe divides once by the global count.

    A loss with attribute ``takes_hidden_states = True`` is called with hidden states and the output head instead:
    see ``FusedLinearCrossEntropy.__call__``. Some models cannot be run that way (an adapted output head, logits changed
    after it); for them it needs ``from_logits(logits, labels)``, shaped as ``__call__`` here.
    """

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """``logits`` [B, S, V], ``labels`` [B, S] pre-shifted -> scalar sum."""
        ...


class Stateful(Protocol):
    """Anything that can be saved and restored as plain data."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, as JSON-able values and tensors."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        ...


class Loader(Protocol):
    """The order of the data: a pure function of (seed, epoch, global index)."""

    def steps_per_epoch(self, epoch: int) -> int:
        """How many optimizer steps epoch ``epoch`` (from 0) has."""
        ...

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """This rank's micro-batches of every optimizer step of ``epoch``, from its step ``first_step`` on."""
        ...


@dataclass
class TrainState:
    """Everything a checkpoint holds, by name. Built once by the recipe; saving and restoring touch nothing else."""

    model: nn.Module  # the transformers model; LoRA and sharding applied
    tokenizer: Any  # tokenizer (or processor) saved beside the weights
    peft: Any | None  # the PeftConfig, or None for full fine-tuning
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any  # a torch LRScheduler, or anything Stateful
    schedule: Stateful  # step and epoch; the data position follows from it
    rng: Stateful
    fingerprint: dict[str, Any]  # what must not change across a resume: data, batch, model, adapter
    extra: dict[str, Stateful] = field(
        default_factory=dict
    )  # a recipe's own, by name; the same on every rank or sharded
