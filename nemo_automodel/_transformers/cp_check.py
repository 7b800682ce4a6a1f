"""Whether a model's sequence can be sharded: by what its layers are and do, never by its name."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from nemo_automodel._transformers import compat
from nemo_automodel._transformers.packing import mixing_layers
from nemo_automodel._transformers.parts import has_towers
from nemo_automodel._transformers.window_trial import passes_window, shrunk_windows
from nemo_automodel.components.attention import function
from nemo_automodel.components.attention.layout import Layout, announce
from nemo_automodel.errors import ModelError
from nemo_automodel.types import ContextLayout

_ORDER = (0, 3, 1, 2)  # of the chunks tried: what two ranks hold, one after the other
_CHUNK = 4  # tokens
_WINDOW = 5  # that every sliding window is shrunk to: across a chunk's boundary, and not the whole row


def context_layout(model: nn.Module, context: ContextLayout) -> Layout:
    """What to announce for a forward of sequence-sharded rows; raises ModelError without our attention function."""
    if compat.attention_name(model) != function.NAME:
        _refuse(model, f"it runs its own attention ({compat.attention_name(model)})")
    return Layout(windows_as_argument=passes_window(model), context=context)


def require_context_parallel(model: nn.Module) -> None:
    """Raise ModelError, with the reason, where ``model`` would not compute the same with its sequence sharded.

    Call it on a whole model, before it is sharded: besides what its layers are, 16 tokens are run through it out of
    order, as two ranks would hold them. A model on the meta device is judged by its layers only.
    """
    if has_towers(model):
        _refuse(model, "its images are not shared out with their tokens in this version")
    if not compat.attention_is_pluggable(model) or compat.attention_name(model) != function.NAME:
        _refuse(model, f"it runs its own attention ({compat.attention_name(model)})")
    if compat.chunk_size(model) is not None:
        _refuse(model, "it attends within chunks of the row")
    if mixing := mixing_layers(model):
        _refuse(model, f"it has layers that carry state from token to token without attention ({mixing})")
    if not compat.takes_positions(model):
        _refuse(model, "it takes no position_ids, so a rank could not say where in the row its tokens are")
    if compat.rotates_by_length(model) is not None:
        _refuse(model, "it encodes positions by how long the row is, and each rank would take its own part for it")
    if not any(p.is_meta for p in model.parameters()):
        _try_out_of_order(model)


@torch.no_grad()
def _try_out_of_order(model: nn.Module) -> None:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with shrunk_windows(_WINDOW):
            same = _same_out_of_order(model)
    finally:
        for module, was in training.items():
            module.training = was
    if not same:
        _refuse(model, "something other than its attention makes a token depend on those beside it")


def _same_out_of_order(model: nn.Module) -> bool:
    """Whether every token has the logits it has in order, to what the dtype can tell (as for packed documents)."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    device = embedding.weight.device
    positions = torch.arange(_CHUNK * len(_ORDER), device=device)
    ids = (positions + 7) * 7919 % embedding.weight.shape[0]
    moved = torch.cat([positions.split(_CHUNK)[i] for i in _ORDER])
    context = ContextLayout(None, held=_ORDER, order=_ORDER, cu_seqlens=None)

    def logits(where: Tensor) -> Tensor:
        out = model(
            input_ids=ids[where][None],
            position_ids=where[None],
            attention_mask=torch.ones_like(where)[None],
            use_cache=False,
        )
        if getattr(out, "aux_loss", None) is not None:
            _refuse(
                model, "its routers' balance loss is of whole rows (without it, output_router_logits: false, it can)"
            )
        return out.logits[0].float()

    expected = logits(positions)[moved]
    with announce(context_layout(model, context)):
        found = logits(moved)
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    off = (found - expected).square().mean(-1).sqrt() > (1e-3 if exact else 5e-2) * expected.std()
    return bool(off.float().mean() <= (0.0 if exact else 0.3))


def _refuse(model: nn.Module, reason: str) -> NoReturn:
    name = getattr(type(model), "automodel_base", type(model)).__name__
    raise ModelError(
        f"distributed.cp_size: {name} cannot be sharded along its sequence, because {reason}; write cp_size: 1"
    )
