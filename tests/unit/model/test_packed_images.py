"""Packed rows with images: each document is worth what plain transformers makes of it alone, and sees no other's image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForImageTextToText

from nemo_automodel import NeMoAutoModelForImageTextToText
from nemo_automodel._transformers import compat, packed_rows
from nemo_automodel._transformers.forward import forward_loss
from nemo_automodel._transformers.packed_images_trial import require_packed_images
from nemo_automodel._transformers.parts import outside_language_model
from nemo_automodel._transformers.plain import sharpen
from nemo_automodel._transformers.processor import load_processor
from nemo_automodel._transformers.tiny_twin import tiny_twin
from nemo_automodel._transformers.twin_start import start_config
from nemo_automodel.components.attention.layout import current_layout
from nemo_automodel.components.datasets.loader import DataLoader
from nemo_automodel.components.datasets.packing import PackedSequence
from nemo_automodel.components.datasets.vlm.conversation import make_vlm_chat_dataset
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from nemo_automodel.errors import ModelError
from nemo_automodel.types import IGNORE_INDEX
from tests.recipes.test_vision import OURS
from tests.vlm_builders import write_vlm

# One square an image; tiles and their whole; M-RoPE over grids; several tiles a row; an image's tokens see each other
FAMILIES = ("llava", "internvl", "llava_onevision", "qwen3_vl", "smolvlm", "gemma3", "paligemma")
_ROOM = 13  # tokens of the pack that nothing fills


class Case:
    """A tiny model of a family, as ours and as plain transformers has it, and four documents: with an image, with
    two, with none and with one of another shape; where the processor wants exactly one, each has one."""

    def __init__(self, family: str, path: Path) -> None:
        try:
            self.model_path = write_vlm(family, path / "model")
        except ImportError:  # transformers 5.17 and SmolVLM
            pytest.skip(f"{family}: its PIL image processor wants torchvision in this transformers")
        self.path, self.processor = path, load_processor(str(path / "model"))
        rng = np.random.default_rng(0)
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (40 + 30 * i, 60, 3), dtype=np.uint8)).save(path / f"{i}.png")
        images = [["0.png"], ["1.png", "2.png"], [], ["3.png"]]
        if family == "paligemma":
            images = [[f"{i}.png"] for i in range(4)]
        answers = ["It jumps over the dog.", "Two.", "my name is Ada", "four of them"]
        rows = []
        for names, answer in zip(images, answers, strict=True):
            parts = [{"type": "image", "path": name} for name in names] + [{"type": "text", "text": "What is it?"}]
            rows.append({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]})
        (path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        self.ours = self._sharp(
            NeMoAutoModelForImageTextToText.from_pretrained(str(self.model_path), dtype="float32", packed="images")
        )
        plain = AutoModelForImageTextToText.from_pretrained(
            self.model_path, dtype=torch.float32, attn_implementation="eager"
        )
        self.plain = self._sharp(plain)

    @staticmethod
    def _sharp(model: Any) -> Any:
        torch.manual_seed(0)
        sharpen(model)
        return model.train()

    def samples(self) -> Any:
        return make_vlm_chat_dataset(self.processor, str(self.path / "data.jsonl"))

    def packed(self) -> Any:
        """The four documents in one row, as the loader makes it."""
        data = self.samples()
        packing = PackedSequence(int(data.lengths.sum()) + _ROOM)
        loader = DataLoader(data, self.processor.tokenizer, packing, shuffle=False)
        ((batch,),) = loader.steps(0)
        return batch

    def gradients(self, batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
        """Ours: the summed loss of a packed batch, and its gradients."""
        self.ours.zero_grad()
        loss, _ = forward_loss(self.ours, batch, FusedLinearCrossEntropy())
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in self.ours.named_parameters() if p.grad is not None}

    def alone(self) -> tuple[float, dict[str, torch.Tensor]]:
        """Plain transformers: the same of the documents one by one."""
        total, data = 0.0, self.samples()
        for i in range(len(data)):
            loader = DataLoader([data[i]], shuffle=False, pad_to_multiple_of=1)
            ((batch,),) = loader.steps(0)
            logits = self.plain(**{k: v for k, v in batch.items() if k not in OURS}).logits.flatten(0, 1)
            loss = F.cross_entropy(logits, batch["labels"].flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
            loss.backward()
            total += loss.item()
        return total, {name: p.grad for name, p in self.plain.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    made: dict[str, Case] = {}

    def get(family: str) -> Case:
        if family not in made:
            made[family] = Case(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


def worst_gap(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest difference of a gradient, over its norm and a tenth of the largest (a bias of keys has none itself)."""
    assert found.keys() == wanted.keys()
    largest = max(float(grad.norm()) for grad in wanted.values())
    return max((float((found[n] - g).norm()) / (float(g.norm()) + 0.1 * largest), n) for n, g in wanted.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_is_worth_its_documents(cases, family: str) -> None:
    case = cases(family)
    batch = case.packed()
    assert batch["num_images"] == 4
    assert batch["cu_seq_lens_q"].numel() == 4 + 2  # and what is left of the pack
    loss, gradients = case.gradients(batch)
    wanted, alone = case.alone()
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert any("vision" in name or "visual" in name for name in gradients)
    gap, name = worst_gap(gradients, alone)
    assert gap <= 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_other_pixels_move_no_other_document(cases, family: str) -> None:
    """With the first document's labels left out, its image moves no gradient; with them, it does."""
    case = cases(family)
    before = case.packed()
    original = Image.open(case.path / "0.png").copy()
    try:
        Image.fromarray(255 - np.array(original)).save(case.path / "0.png")
        after = case.packed()
    finally:
        original.save(case.path / "0.png")
    assert not before["pixel_values"].equal(after["pixel_values"])
    whole = [case.gradients(batch)[0] for batch in (before, after)]
    assert whole[0] != pytest.approx(whole[1], rel=1e-5)
    end = int(before["cu_seq_lens_q"][1])
    others = []
    for batch in (before, after):
        labels = batch["labels"].clone()
        labels[:, :end] = IGNORE_INDEX
        indices = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
        others.append(case.gradients({**batch, "labels": labels, "label_indices": indices}))
    assert others[0][0] == pytest.approx(others[1][0], rel=1e-6)
    gap, name = worst_gap(others[0][1], others[1][1])
    assert gap <= 1e-6, name


def test_positions_that_follow_images_start_anew(cases, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the model counts them for each document alone; ordinary ones give another loss, and are found out."""
    case = cases("qwen3_vl")
    batch = case.packed()
    inputs = dict(batch)
    packed_rows.prepare_packed(case.ours, inputs)
    count, expected = compat.position_counter(case.plain), []
    bounds, data = batch["cu_seq_lens_q"].tolist(), case.samples()
    for i in range(len(data)):
        vision = data[i]["vision"]
        found = count(
            torch.tensor([data[i]["input_ids"]]), vision.tokens["mm_token_type_ids"][None], vision.images.get("image_grid_thw")
        )  # fmt: skip
        expected.append(found[0])
    expected.append(torch.arange(bounds[-1] - bounds[-2]).expand(3, 1, -1))
    assert inputs["position_ids"].equal(torch.cat(expected, -1))
    right = case.gradients(batch)[0]
    monkeypatch.setattr(compat, "position_counter", lambda model: None)
    monkeypatch.setitem(case.ours.__dict__, packed_rows._COUNTER, None)  # found once a model
    assert case.gradients(batch)[0] != pytest.approx(right, rel=1e-4)
    with pytest.raises(ModelError, match="other logits than the same document by itself; write packed_sequence"):
        require_packed_images(case.ours)


def test_an_image_that_sees_across_documents_is_found_out(cases, monkeypatch: pytest.MonkeyPatch) -> None:
    """The boundaries cut the model's own blocks; without that PaliGemma's prefixes would see each other."""
    from nemo_automodel.components.attention import blocks

    case, cut = cases("paligemma"), blocks._with_bounds
    monkeypatch.setattr(blocks, "_with_bounds", lambda ids, cu_seqlens: cut(ids, None))
    with pytest.raises(ModelError, match="other logits than the same document by itself"):
        require_packed_images(case.ours)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_towers_know_nothing_of_documents(cases, family: str) -> None:
    case = cases(family)
    names = {module: name for name, module in case.ours.named_modules()}
    outside = {names[module] for module in outside_language_model(case.ours)}
    assert (
        outside
        == {
            "qwen3_vl": {"model.visual"},
            "gemma3": {"model.vision_tower", "model.multi_modal_projector"},
        }[family]
    )
    seen: list[Any] = []
    hook = case.ours.get_submodule(min(outside)).register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs, current_layout())), with_kwargs=True
    )
    case.gradients(case.packed())
    hook.remove()
    assert seen
    assert all(not set(packed_rows.BOUNDARIES) & set(kwargs) and layout is None for kwargs, layout in seen)


REFUSED = {
    "mllama": "packed",
    "blip-2": "takes no position_ids",
    "git": "runs its own attention",
    "hunyuan_vl": "beside images other logits than the same document by itself",  # numbers images along a batch's rows
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_packing_is_refused_with_the_reason(model_type: str) -> None:
    config = tiny_twin(start_config(model_type, causal=False))
    with pytest.raises(ModelError, match=REFUSED[model_type]) as error:
        NeMoAutoModelForImageTextToText.from_config(config, dtype="float32", packed="images")
    assert "write packed_sequence.packed_sequence_size: 0" in str(error.value)
