"""Context parallelism: one batch's sequence cut among ranks, so that each has the same share of causal attention."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from nemo_automodel.errors import DataError
from nemo_automodel.types import IGNORE_INDEX, Batch, ContextLayout

_OF_DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def shard_sequence(batch: Batch, cp_mesh: DeviceMesh) -> Batch:
    """This rank's part of a micro-batch that is the same on every rank of the one-dimensional ``cp_mesh`` of n ranks.

    The sequence is padded to a multiple of 2n and cut into 2n chunks, of which rank r holds r and 2n-1-r: the later a
    chunk, the more keys its queries see, so that each such pair costs the same. ``position_ids`` (always there then)
    keep their whole-sequence values, ``num_tokens`` and ``num_label_tokens`` become this rank's share of them, and
    ``cp_layout`` tells the attention function where the chunks belong. Call it while the batch is on the CPU.

    Raises DataError for rows with padding before their tokens.
    """
    size, rank = cp_mesh.size(), cp_mesh.get_local_rank()
    if size == 1:
        return batch
    rows, length = batch["input_ids"].shape
    mask = batch.get("attention_mask")
    mask = torch.ones(rows, length, dtype=torch.int64) if mask is None else mask
    if not bool((mask[:, 1:] <= mask[:, :-1]).all()):
        raise DataError("distributed.cp_size: rows are padded before their tokens; pad them after their tokens instead")
    filler = -length % (2 * size)
    boundaries = batch.get("cu_seq_lens_q")
    cu_seqlens = None if boundaries is None else tuple(boundaries.tolist())
    if cu_seqlens is not None and cu_seqlens[-1] < length + filler:
        cu_seqlens = (*cu_seqlens, length + filler)  # the filler is a document of its own
    order = tuple(chunk for r in range(size) for chunk in (r, 2 * size - 1 - r))
    held = order[2 * rank : 2 * rank + 2]

    shard: dict[str, Any] = {k: v for k, v in batch.items() if k not in _OF_DOCUMENTS}
    shard |= {"attention_mask": mask, "position_ids": batch.get("position_ids", torch.arange(length)[None])}
    for name, value in shard.items():
        if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == length:
            padded = F.pad(value, (0, filler), value=IGNORE_INDEX if name == "labels" else 0)
            chunks = padded.chunk(2 * size, dim=1)
            shard[name] = torch.cat([chunks[i] for i in held], dim=1)
    shard["label_indices"] = (shard["labels"].reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)
    shard["num_label_tokens"] = shard["label_indices"].numel()
    if "num_tokens" in batch:  # the shares add up to the whole, however padding and filler fall
        shard["num_tokens"] = batch["num_tokens"] * (rank + 1) // size - batch["num_tokens"] * rank // size
    shard["right_padded"] = True
    shard["cp_layout"] = ContextLayout(cp_mesh.get_group(), held, order, cu_seqlens)
    return cast(Batch, shard)
