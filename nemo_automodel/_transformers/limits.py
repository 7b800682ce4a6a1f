"""Whether the data fits the model: ids that the embedding has rows for, positions that the model was made for."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from nemo_automodel._transformers.loading import check_vocabulary
from nemo_automodel.errors import DataError

logger = logging.getLogger(__name__)


def check_data_fits(model: PreTrainedModel, tokenizer: Any, **datasets: Any) -> None:
    """Compare tokenizer and rows with what ``model`` can take, before the first step.

    Args:
        model: The model, sharded or not.
        tokenizer: Its tokenizer.
        **datasets: By section name; those with ``lengths`` (an array of row lengths in tokens) are checked.

    Raises:
        ModelError: The tokenizer makes ids that the embedding has no row for.
        DataError: A row is longer than a learned position table. Longer than rotary positions were trained for is a
            warning.
    """
    check_vocabulary(model, tokenizer)
    added, embedding = getattr(tokenizer, "tokens_added", 0), model.get_input_embeddings()
    if added and embedding is not None and not any(p.requires_grad for p in embedding.parameters()):
        logger.warning(
            "tokenizer.add_tokens: the embedding is frozen, so the rows of the %d new tokens stay as they are; train all weights "
            "for them to mean something, or write tokens that the model knows", added,
        )  # fmt: skip
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for section, data in datasets.items():
        lengths = getattr(data, "lengths", None)
        if lengths is None or not isinstance(most, int) or len(lengths) == 0 or max(lengths) <= most:
            continue
        problem = (
            f"{section}: {sum(length > most for length in lengths)} of {len(lengths)} rows are longer than the "
            f"{most} positions of {type(model).__name__.removeprefix('FSDP')} (longest: {max(lengths)} tokens)"
        )
        if _has_position_table(model, most):
            raise DataError(f"{problem}; write {section}.seq_length: {most} to cut them, or leave them out")
        logger.warning("%s; training goes on, and %s.seq_length=%d would cut them", problem, section, most)


def _has_position_table(model: nn.Module, positions: int) -> bool:
    """Whether there is an embedding with a row a position (some models keep a few rows more in front)."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return any(
        positions <= table.num_embeddings <= positions + 8 and table is not model.get_input_embeddings()  # type: ignore[operator]
        for table in tables
    )
