"""Images that see all of themselves: kept out of masks, with the loss and gradients of plain transformers' dense mask."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, masking_utils

from nemo_automodel import NeMoAutoModelForImageTextToText
from nemo_automodel._transformers import compat
from nemo_automodel._transformers.forward import forward_loss
from nemo_automodel._transformers.inputs import to_device
from nemo_automodel._transformers.packing import PASSES_DOCUMENTS
from nemo_automodel._transformers.tiny_twin import tiny_twin
from nemo_automodel._transformers.twin_batch import image_batch
from nemo_automodel._transformers.twin_start import start_config
from nemo_automodel.components.attention import function
from nemo_automodel.components.attention.blocks import mask_as_blocks
from nemo_automodel.components.attention.layout import Layout
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from tests.unit.model.models import gradients, shifted, with_labels

WITH_BLOCKS = [  # with how many layers take them: gemma4's full ones are causal
    ("gemma3", {}, 4),
    ("paligemma", {}, 2),
    pytest.param("gemma4", {"use_bidirectional_attention": "vision"}, 2, marks=pytest.mark.full),
    pytest.param("molmo2", {}, 2, marks=pytest.mark.full),
]


def pair(model_type: str, **text: Any) -> tuple[Any, Any]:
    """(ours, plain transformers with eager attention): twins in float32 with the same weights."""
    config = tiny_twin(start_config(model_type, causal=False))
    for key, value in text.items():
        setattr(config.get_text_config(), key, value)
    torch.manual_seed(0)
    plain = AutoModelForImageTextToText.from_config(
        copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in plain.parameters():  # projectors that start at zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = NeMoAutoModelForImageTextToText.from_config(config, dtype="float32")
    ours.load_state_dict(plain.state_dict())
    return ours, plain


def padded(plain: Any) -> dict[str, Any]:
    """A batch with an image in each row, the last row padded on the right."""
    batch = image_batch(plain)
    batch["attention_mask"][-1, -3:] = 0
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def compare(ours: Any, plain: Any, batch: dict[str, Any]) -> None:
    labels = batch["labels"]
    _, shifted_labels = shifted(labels, None, answers_from=0)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    prepared = to_device(with_labels(inputs, shifted_labels), torch.device("cpu"))
    ce_sum, aux = forward_loss(ours, prepared, FusedLinearCrossEntropy())
    loss = ce_sum / prepared["num_label_tokens"] + aux
    loss.backward()
    expected = plain(**batch).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    mine, theirs = gradients(ours), gradients(plain)
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The window of each call of the op, which itself runs as it is."""
    seen: list[int | None] = []
    op = function.block_attention

    def counted(*args: Any) -> Tensor:
        seen.append(args[5])
        return op(*args)

    monkeypatch.setattr(function, "block_attention", counted)
    return seen


@pytest.mark.parametrize(("model_type", "text", "layers"), WITH_BLOCKS)
def test_loss_and_gradients_are_those_of_the_dense_mask(
    model_type: str, text: dict[str, Any], layers: int, calls: list[int | None]
) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    ours, plain = pair(model_type, **text)
    compare(ours, plain, padded(plain))
    assert len(calls) == layers


@pytest.mark.parametrize("window", [3, 512])
def test_packed_rows_equal_rows_apart(window: int, calls: list[int | None]) -> None:
    """Documents and windows reach the op as arguments; an image at a document's start stays apart from the one before."""
    ours, plain = pair("gemma3", sliding_window=window)
    batch = image_batch(plain)
    ours.__dict__[PASSES_DOCUMENTS] = True
    length = batch["input_ids"].shape[1]
    kinds = batch["token_type_ids"]
    images = int(kinds[0].sum())
    kinds.zero_()
    kinds[0, length - images :] = kinds[1, :images] = 1
    image, text = ours.config.image_token_id, batch["input_ids"][0, -1]
    words = batch["input_ids"].where(batch["input_ids"] != image, text)
    batch["input_ids"] = words.masked_fill(kinds == 1, image)
    batch["labels"] = words.masked_fill(kinds == 1, -100)
    _, shifted_labels = shifted(batch["labels"], None, answers_from=0)
    bounds = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    row = {key: batch[key].reshape(1, -1) for key in ("input_ids", "token_type_ids")} | {
        "pixel_values": batch["pixel_values"],
        "position_ids": torch.arange(length).repeat(2)[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": length,
        "max_length_k": length,
    }
    prepared = with_labels(row, shifted_labels.reshape(1, -1))
    ce_sum, _ = forward_loss(ours, prepared, FusedLinearCrossEntropy())
    (ce_sum / prepared["num_label_tokens"]).backward()
    plain(**batch).loss.backward()
    assert set(calls) == {None if window > length else window, None}
    theirs = gradients(plain)
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_window_shorter_than_the_image(calls: list[int | None]) -> None:
    ours, plain = pair("gemma3", sliding_window=3)
    compare(ours, plain, padded(plain))
    assert set(calls) == {3, None}


def test_a_window_that_nobody_hands_on_keeps_its_mask(calls: list[int | None]) -> None:
    from nemo_automodel._transformers.window_trial import PASSES_WINDOW

    ours, plain = pair("gemma3", sliding_window=3)
    ours.__dict__[PASSES_WINDOW] = False
    compare(ours, plain, padded(plain))
    assert set(calls) == {None}


def test_what_is_recognised() -> None:
    ids = torch.tensor([[-1, 0, 0, -1]])
    blocks = masking_utils.blockwise_overlay(ids)
    causal, window = masking_utils.causal_mask_function, masking_utils.sliding_window_overlay
    or_masks, and_masks = masking_utils.or_masks, masking_utils.and_masks
    found = compat.read_blocks(or_masks(causal, blocks))
    assert found is not None
    assert found.ids is ids
    assert found.window is None
    found = compat.read_blocks(and_masks(or_masks(causal, blocks), window(3)))
    assert found is not None
    assert (found.ids is ids, found.window) == (True, 3)
    for other in (
        causal,
        blocks,
        or_masks(causal, lambda *_: torch.tensor(True)),
        or_masks(masking_utils.bidirectional_mask_function, blocks),
        and_masks(or_masks(causal, blocks), lambda *_: torch.tensor(True)),
        or_masks(masking_utils.sliding_window_causal_mask_function(3), blocks),  # blocks not cut by the window
        or_masks(causal, blocks, blocks),
    ):
        assert compat.read_blocks(other) is None


def test_padding_and_documents_end_a_block() -> None:
    ids = torch.tensor([[7, 7, -1, 7, 2, 2, 7, 7]])
    mask = masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.blockwise_overlay(ids))
    padding = torch.tensor([[True] * 7 + [False]])
    layout = Layout(read_blocks=compat.read_blocks)
    made = mask_as_blocks(layout, mask, padding, 8, "cpu", torch.float32)
    assert made is not None
    assert made[0, 0, :, 1].tolist() == [0, 0, -1, 0, 4, 4, 0, -1]
    assert made[0, 0, :, 2].tolist() == [6, 6, -1, 6, 5, 5, 6, -1]
    packed = Layout(torch.tensor([0, 5, 8], dtype=torch.int32), read_blocks=compat.read_blocks)
    made = mask_as_blocks(packed, mask, None, 8, "cpu", torch.float32)
    assert made is not None
    assert made[0, 0, :, 1].tolist() == [0, 0, -1, 0, 4, 5, 6, 6]
    assert made[0, 0, :, 2].tolist() == [3, 3, -1, 3, 4, 5, 7, 7]
    assert mask_as_blocks(Layout(), mask, padding, 8, "cpu", torch.float32) is None
    assert mask_as_blocks(layout, mask, padding, 8, "cuda", torch.float32) is None
