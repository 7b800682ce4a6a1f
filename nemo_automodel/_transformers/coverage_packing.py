"""The packing column: documents that share a row have the loss, and give the gradients, that they have as rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_automodel._transformers import packing_trial
from nemo_automodel._transformers.certificate_trial import EXACT, Outcome, gaps
from nemo_automodel._transformers.coverage_cells import Differs
from nemo_automodel._transformers.coverage_steps import loss_function, same_losses, sum_of_losses, with_labels
from nemo_automodel._transformers.forward import forward_loss
from nemo_automodel._transformers.packed_images_trial import Document, documents_with_images, pack_documents
from nemo_automodel._transformers.plain import shifted
from nemo_automodel.types import IGNORE_INDEX


def pack_texts(model: Any, plain: Any) -> None:
    """Two documents in one row of ``model`` have the loss that they have as two rows of ``plain``."""
    documents = packing_trial._documents(model)
    labels = torch.cat([shifted(ids) for ids in documents], 1)
    packed = pack_documents([{"input_ids": ids} for ids in documents])
    with torch.no_grad():
        loss, _ = forward_loss(model, with_labels(packed, labels), loss_function())
        wanted = sum(sum_of_losses(plain, ids) for ids in documents)
    same_losses([float(loss)], [float(wanted)])


def pack_images(model: Any, plain: Any) -> None:
    """Documents with and without images in one row of ``model``: their loss and every gradient.

    Not in training mode: a tower's batch norm would see other images at once.
    """
    documents = documents_with_images(plain)
    labels = torch.cat([shifted(document.pop("labels")) for document in documents], 1)
    wanted = _alone(plain.eval(), documents, labels)
    differs: Exception | None = None
    for axis in (0, 1):
        try:
            found = _packed(model.eval(), pack_documents(documents, axis), labels)
            same_losses([found.loss], [wanted.loss])
            worst, name = gaps(found, wanted).worst
            if not worst <= EXACT:
                raise Differs(f"the gradient of {name} is off by {worst:.1e} of its norm")
            return
        except Exception as error:  # the model's own code, given images as it may not take them
            differs = differs or error
    assert differs is not None
    raise differs


def _packed(model: Any, packed: Document, labels: Tensor) -> Outcome:
    model.zero_grad()
    ce_sum, _ = forward_loss(model, with_labels(packed, labels), loss_function())
    ce_sum.backward()
    return _outcome(model, ce_sum)


def _alone(model: Any, documents: list[Document], labels: Tensor) -> Outcome:
    total = torch.zeros(())
    targets = labels[0].split([document["input_ids"].shape[1] for document in documents])
    for document, wanted in zip(documents, targets, strict=True):
        logits = model(**document).logits[0].float()
        loss = F.cross_entropy(logits, wanted, ignore_index=IGNORE_INDEX, reduction="sum")
        loss.backward()
        total += loss.detach()
    return _outcome(model, total)


def _outcome(model: Any, loss: Tensor) -> Outcome:
    return Outcome(float(loss), {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


__all__ = ["pack_images", "pack_texts"]
