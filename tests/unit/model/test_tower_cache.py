"""Features of a frozen tower are kept for each row: served in place of its forward, or not at all and said why."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nemo_automodel import NeMoAutoModelForImageTextToText
from nemo_automodel._transformers.forward import forward_loss
from nemo_automodel._transformers.parts import Freeze, frozen_towers
from nemo_automodel._transformers.processor import load_processor
from nemo_automodel._transformers.tower_cache import TowerCache, cache_tower
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.datasets.loader import DataLoader
from nemo_automodel.components.datasets.packing import PackedSequence
from nemo_automodel.components.datasets.vlm.conversation import make_vlm_chat_dataset
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from nemo_automodel.errors import ConfigError
from tests.vlm_builders import write_vlm

# One square an image, all hidden states returned and one read, patches with grids and a merger within, tiles of a row
FAST = [("gemma3", "alone"), ("gemma3", "padded"), ("llava", "alone"), ("qwen3_vl", "alone"), ("qwen3_vl", "packed")]
FAMILIES = ("gemma3", "llava", "qwen3_vl", "smolvlm", "internvl")
CASES = [pytest.param(f, rows, marks=[] if (f, rows) in FAST else pytest.mark.full) for f in FAMILIES for rows in ("alone", "padded", "packed")]  # fmt: skip
ROWS = 6


class Case:
    """A tiny model of a family, and rows with one, two and no images of several sizes."""

    def __init__(self, family: str, path: Path) -> None:
        self.path, self.model_path = path, write_vlm(family, path / "model")
        self.processor = load_processor(str(self.model_path))
        rng = np.random.default_rng(0)
        rows = []
        for i in range(ROWS):
            Image.fromarray(rng.integers(0, 255, (40 + 30 * (i % 3), 60, 3), dtype=np.uint8)).save(path / f"{i}.png")
            images = [{"type": "image", "path": f"{i}.png"}] * (1 if i < 4 else 6 - i)
            images += [{"type": "image", "path": "0.png"}] * (i == 1)
            if i == 5:
                images = []
            parts = [*images, {"type": "text", "text": "What is it?"}]
            answer = {"role": "assistant", "content": "It jumps over the dog."[: 6 + 2 * i]}
            rows.append({"messages": [{"role": "user", "content": parts}, answer]})
        (path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def data(self) -> Any:
        return make_vlm_chat_dataset(self.processor, str(self.path / "data.jsonl"))

    def loader(self, packed: bool = False, data: Any = None, size: int = 2, **options: Any) -> DataLoader:
        data = data or self.data()
        packing = PackedSequence(int(data.lengths.max()) + 60) if packed else None
        sizes = {"global_batch_size": size, "local_batch_size": size, "drop_last": False}
        return DataLoader(data, self.processor.tokenizer, packing, **(sizes | options))

    def model(self, packed: bool = False, peft: Any = None, freeze: Freeze | None = None) -> Any:
        freeze = freeze or Freeze(projector=True)
        path, packed_as = str(self.model_path), "images" if packed else False
        return NeMoAutoModelForImageTextToText.from_pretrained(
            path, dtype="float32", packed=packed_as, freeze=freeze, peft=peft
        ).train()


class Run:
    """Trains ``model``, with features kept as ``freeze`` says, and counts the tower's own forwards."""

    def __init__(self, model: Any, gigabytes: float | None, rows: int = ROWS) -> None:
        self.model, self.calls = model, 0
        freeze = Freeze(projector=True, cache_features_gb=gigabytes)
        self.cache: TowerCache = cache_tower(model, freeze, rows=rows)
        params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(params, lr=0.01)
        towers, _ = frozen_towers(model)
        for tower in towers.values():  # a leaf inside: what replaces the tower's forward does not run it
            next(m for m in tower.modules() if not any(m.children())).register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def loss(self, batch: Any) -> torch.Tensor:
        with self.cache.serve(batch):
            return forward_loss(self.model, batch, FusedLinearCrossEntropy())[0]

    def epoch(self, loader: DataLoader, epoch: int) -> list[str]:
        """The losses of an epoch, to the bit."""
        losses = []
        for (batch,) in loader.steps(epoch):
            loss = self.loss(batch)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item().hex())
        return losses


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    made: dict[str, Case] = {}

    def get(family: str) -> Case:
        if family not in made:
            try:
                made[family] = Case(family, tmp_path_factory.mktemp(family))
            except ImportError:  # transformers 5.17 and SmolVLM
                pytest.skip(f"{family}: its PIL image processor wants torchvision in this transformers")
        return made[family]

    return get


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def close(found: list[str], wanted: list[str], exactly: bool) -> bool:
    if exactly:
        return found == wanted
    return [float.fromhex(x) for x in found] == pytest.approx([float.fromhex(x) for x in wanted], rel=2e-6)


@pytest.mark.parametrize(("family", "rows"), CASES)
def test_it_trains_as_without_and_the_tower_runs_in_the_first_epoch_only(cases, family, rows, caplog):
    """To the bit where a micro-batch is a row; beside other rows the tower's own sums may be of another order."""
    caplog.set_level(logging.INFO)
    case, packed, exactly = cases(family), rows == "packed", rows == "alone"
    loader = case.loader(packed, size=2 if rows == "padded" else 1)
    plain, cached = Run(case.model(packed), None), Run(case.model(packed), 1.0)
    before = {name: p.clone() for name, p in cached.model.named_parameters()}
    assert close(cached.epoch(loader, 0), plain.epoch(loader, 0), exactly)
    assert "are kept in host memory: 6 rows of" in caplog.text
    fillers = sum(batch["num_images"] == 0 for (batch,) in loader.steps(1))
    calls, plain_calls = cached.calls, plain.calls
    assert calls > ROWS - 1  # five rows with images, one by one, and the trial
    assert close(cached.epoch(loader, 1), plain.epoch(loader, 1), exactly)
    assert cached.calls - calls == fillers < plain.calls - plain_calls
    if exactly:
        assert same_weights(cached.model, plain.model)
    for one, other in zip(cached.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(p, before[name]) for name, p in cached.model.named_parameters())
    assert "computed anew" not in caplog.text


def test_only_what_the_model_reads_is_kept(cases):
    """LLaVA's tower returns the hidden states of every layer, of which its model reads one."""
    case = cases("llava")
    run = Run(case.model(), 1.0)
    run.epoch(case.loader(), 0)
    for held in run.cache._held.values():
        assert sum(isinstance(leaf, torch.Tensor) for leaf in held.leaves) == 1
        assert len(held.leaves) > 3


def test_what_was_not_read_at_first_is_computed_when_it_is(cases):
    case = cases("llava")
    run = Run(case.model(), 1.0)
    ((batch,), *_) = case.loader(shuffle=False).steps(0)
    run.loss(batch)
    tower = run.model.model.vision_tower
    with run.cache.serve(batch), torch.no_grad():
        served = tower(batch["pixel_values"], return_dict=True, output_hidden_states=True)
        found = served.hidden_states[0] + 0
    assert torch.equal(found, tower(batch["pixel_values"], output_hidden_states=True).hidden_states[0])


def test_features_are_a_rows_own(cases):
    """Served in another micro-batch and order they still give the loss that the rows give without."""
    case = cases("gemma3")
    run, plain = Run(case.model(), 1.0), Run(case.model(), None)
    for (batch,) in case.loader(shuffle=False).steps(0):
        run.loss(batch)
    calls, data = run.calls, case.data()
    for batch in [b for (b,) in case.loader(size=3, seed=5).steps(0)]:
        assert run.loss(batch).item() == pytest.approx(plain.loss(batch).item(), rel=1e-6)
    assert run.calls == calls
    losses = {run.loss(batch).item() for (batch,) in case.loader(data=data, size=1, shuffle=False).steps(0)}
    assert len(losses) == ROWS


def test_other_pixels_of_a_row_end_it(cases, caplog):
    case = cases("gemma3")
    run, plain = Run(case.model(), 1.0), Run(case.model(), None)
    ((batch,), *_) = case.loader(shuffle=False).steps(0)
    run.loss(batch)
    Image.fromarray(np.full((40, 60, 3), 200, dtype=np.uint8)).save(case.path / "0.png")
    try:
        ((changed,), *_) = case.loader(shuffle=False).steps(0)
        assert not torch.equal(changed["pixel_values"], batch["pixel_values"])
        assert run.loss(changed).item() == plain.loss(changed).item()
    finally:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(
            case.path / "0.png"
        )
    assert "the images of row 0 are others than they were before" in caplog.text


def batch_norm(width: int) -> nn.Module:
    return nn.BatchNorm1d(width).requires_grad_(False)


def over_channels(norm: nn.Module) -> Any:
    return lambda _, __, out: norm(out.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(("fault", "said"), [("mean", "other features beside other rows"), ("dropout", "dropout of 0.1"), ("functional", "other ones each time"), ("batch norm", "beside other rows")])  # fmt: skip
def test_a_tower_whose_rows_are_not_their_own_is_left_alone(cases, caplog, fault, said):
    case = cases("gemma3")
    losses, buffers = [], []
    for gigabytes in (None, 1.0):
        run = Run(case.model(), gigabytes)
        tower = run.model.model.vision_tower
        embeddings = next(m for m in tower.modules() if hasattr(m, "position_embedding"))
        if fault == "mean":
            embeddings.register_forward_hook(lambda _, __, out: out - out.mean(0, keepdim=True))
        elif fault == "dropout":
            tower.add_module("drop", nn.Dropout(0.1))
            embeddings.register_forward_hook(lambda _, __, out, drop=tower.drop: drop(out))
        elif fault == "functional":
            embeddings.register_forward_hook(lambda _, __, out: nn.functional.dropout(out, 0.1))
        else:
            tower.add_module("norm", batch_norm(embeddings.position_embedding.embedding_dim))
            embeddings.register_forward_hook(over_channels(tower.norm))
        torch.manual_seed(3)
        losses.append(run.epoch(case.loader(), 0))
        buffers.append([b.clone() for b in tower.buffers()])
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))
    assert [r.message.count("computed anew") for r in caplog.records if "cache_features_gb" in r.message] == [1]
    assert said in caplog.text


def test_over_the_budget_it_is_off_from_the_start_and_says_both_numbers(cases, caplog):
    case = cases("gemma3")
    run = Run(case.model(), 0.01, rows=1_000_000)
    losses = run.epoch(case.loader(size=1), 0)
    assert "1,000,000 rows of" in caplog.text
    assert "more than the 0.01 GiB it allows" in caplog.text
    assert not run.cache._held
    plain = Run(case.model(), None)
    assert losses == plain.epoch(case.loader(size=1), 0)


def test_full_before_the_last_row_the_rest_is_computed(cases, caplog):
    """Rows with more images than the first micro-batch had do not go beyond the limit."""
    case = cases("gemma3")
    run, plain = Run(case.model(), 1.0), Run(case.model(), None)
    loader = case.loader(size=1, shuffle=False)
    ((batch,), *_) = loader.steps(0)
    run.loss(batch)
    (held,) = run.cache._held.values()
    taken = run.cache._memory._used
    run.cache._memory._limit = 3 * taken  # row 0 and row 1, which has two images
    assert run.epoch(loader, 0) == plain.epoch(loader, 0)
    assert run.epoch(loader, 1) == plain.epoch(loader, 1)
    assert len(run.cache._held) == 2
    assert run.cache._memory._used == 3 * taken
    assert caplog.text.count("are full") == 1
    assert held.leaves


def test_without_the_context_nothing_is_served(cases):
    """So it is in validation, whose rows have the same numbers."""
    case = cases("gemma3")
    run = Run(case.model(), 1.0)
    ((batch,), *_) = case.loader(shuffle=False).steps(0)
    run.loss(batch)
    calls = run.calls
    forward_loss(run.model, batch, FusedLinearCrossEntropy())
    assert run.calls == calls + 1
    assert "forward" not in run.model.model.vision_tower.__dict__


def test_a_loader_that_does_not_say_whose_images_they_are(cases, caplog):
    case = cases("gemma3")
    run = Run(case.model(), 1.0)
    ((batch,), *_) = case.loader(shuffle=False).steps(0)
    run.loss({k: v for k, v in batch.items() if k != "image_rows"})
    assert "does not say which part is whose row's" in caplog.text


def test_a_trained_tower_is_refused(cases):
    with pytest.raises(ConfigError, match=r"freeze\.cache_features_gb=2.*write freeze\.vision_tower: true"):
        Freeze(vision_tower=False, cache_features_gb=2)
    with pytest.raises(ConfigError, match="must be more than 0"):
        Freeze(cache_features_gb=0)
    adapted = cases("gemma3").model(peft=PeftConfig(match_all_linear=True, dim=2, parts=["vision_tower"]))
    with pytest.raises(ConfigError, match=r"lora_A.* is trained.*take the vision tower out of peft\.parts"):
        Run(adapted, 1.0)


def test_a_merger_that_is_trained_inside_the_tower_is_said(cases, caplog):
    run = Run(cases("qwen3_vl").model(freeze=Freeze()), 1.0)
    assert "merger" in caplog.text
    assert "freeze.projector: true would freeze that" in caplog.text
    assert not run.cache._towers


def _on_two_ranks(rank: int, port: int) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        with pytest.raises(ConfigError, match="works on one rank only, and this run has 2"):
            Freeze(cache_features_gb=1)
        Freeze()
    finally:
        torch.distributed.destroy_process_group()


def test_several_ranks_are_refused():
    meeting = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(_on_two_ranks, (meeting.port,), nprocs=2)
