"""What of this package works on one architecture: its tiny twin goes through loading, training and saving.

Everything is compared with plain transformers (and PEFT) on the same weights, in float32: the loss of each step, the
logits of what was saved. A cell is "yes", or the reason why not.
"""

from __future__ import annotations

import inspect
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from nemo_automodel._transformers import compat, packing_trial
from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM, NeMoAutoModelForImageTextToText
from nemo_automodel._transformers.forward import forward_loss
from nemo_automodel._transformers.head import head_of
from nemo_automodel._transformers.plain import away_from_symmetry, plain_loss, shifted, without_chance
from nemo_automodel._transformers.tiny_twin import tiny_twin
from nemo_automodel._transformers.twin_batch import image_batch, text_batch
from nemo_automodel._transformers.twin_start import start_config
from nemo_automodel.components._peft.linear import lora_layers
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.checkpoint.hf import gather_weights, write_model
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from nemo_automodel.errors import AutoModelError
from nemo_automodel.types import IGNORE_INDEX

STEPS = 3
TOLERANCE = 1e-4
"""Relative difference of losses, and of logits over their largest, that counts as the same in float32."""
COLUMNS = ("twin", "load", "sft", "save", "lora", "adapter", "fused", "attention", "packing", "fsdp2", "tp2")
REQUIRED = ("twin", "load", "sft", "save", "lora", "adapter")
YES = "yes"
LATER = "not measured"


@dataclass
class Row:
    """One architecture's line of the table: for each column "yes" or why not."""

    model_type: str
    kind: str  # causal or vlm
    cells: dict[str, str] = field(default_factory=lambda: dict.fromkeys(COLUMNS, ""))
    seconds: float = 0.0

    @property
    def trains_plainly(self) -> bool:
        """Whether plain transformers trains the twin: what it does not, nothing here can be compared with."""
        return self.cells["twin"] == YES


def check(model_type: str, kind: str) -> Row:
    """Every column of one architecture; ``kind`` is causal or vlm. Nothing is raised: a failure is a cell."""
    row = Row(model_type, kind)
    row.cells |= {"fsdp2": LATER, "tp2": LATER}
    with tempfile.TemporaryDirectory() as directory:
        trial = _Trial(model_type, kind, Path(directory))
        row.cells["twin"] = _attempt(trial.train_plainly)
        if not row.trains_plainly:
            return row
        row.cells["load"] = _attempt(trial.load)
        if row.cells["load"] == YES:
            row.cells["fused"], row.cells["attention"] = trial.fused(), trial.attention()
            row.cells["sft"] = _attempt(trial.train)
            row.cells["fused"] = trial.fused()
            row.cells["save"] = _attempt(trial.save)
        row.cells["lora"] = _attempt(trial.train_lora)
        row.cells["adapter"] = _attempt(trial.reload_adapter) if row.cells["lora"] == YES else ""
        row.cells["packing"] = _attempt(trial.pack)
    return row


class Differs(Exception):
    """Ours and plain transformers do not agree; the message says in what and by how much."""


def _attempt(stage: Callable[[], None]) -> str:
    torch.manual_seed(0)
    try:
        stage()
    except (Differs, AutoModelError) as error:
        return _one_line(error)
    except Exception as error:
        return f"{type(error).__name__}: {_one_line(error)}"
    return YES


class _Trial:
    def __init__(self, model_type: str, kind: str, directory: Path) -> None:
        self.model_type, self.kind = model_type, kind
        self.base, self.saved, self.adapter = (directory / name for name in ("base", "saved", "adapter"))
        causal = kind == "causal"
        self.plain_class: Any = AutoModelForCausalLM if causal else AutoModelForImageTextToText
        self.our_class: Any = NeMoAutoModelForCausalLM if causal else NeMoAutoModelForImageTextToText
        self.batch: dict[str, Any] = {}
        self.losses: list[float] = []
        self.model: Any = None
        self.adapted: Any = None

    # --- the reference ------------------------------------------------------------------------------------------

    def train_plainly(self) -> None:
        """Build and save the twin, and train it with transformers alone."""
        config = tiny_twin(start_config(self.model_type, causal=self.kind == "causal"))
        without_chance(config)
        model = self.plain_class.from_config(config, dtype=torch.float32)
        away_from_symmetry(model)
        self.batch = _batch(model, self.kind)
        model.save_pretrained(self.base)
        self.losses = _train_plain(self._load_plain(self.base), self.batch)

    def _load_plain(self, directory: Path) -> Any:
        model, info = self.plain_class.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            raise Differs(f"transformers itself does not load what it saved: {', '.join(missing[:3])} missing")
        return model

    # --- ours ---------------------------------------------------------------------------------------------------

    def load(self) -> None:
        self.model = self.our_class.from_pretrained(str(self.base), dtype="float32")
        _same_tensors(self.model, self._load_plain(self.base), "loaded")

    def fused(self) -> str:
        state = self.model.__dict__.get("_automodel_head")
        if head_of(self.model) is None:
            return "its output head is not a plain linear layer"
        return (state and state.reason) or YES

    def attention(self) -> str:
        name = compat.attention_name(self.model)
        return YES if name == "automodel" else f"its own ({name})"

    def train(self) -> None:
        _same_losses(_train_ours(self.model, self.batch), self.losses)

    def save(self) -> None:
        write_model(self.saved, self.model, gather_weights(self.model, None, None, keep=True), None, torch.float32)
        plain = self._load_plain(self.saved)
        _same_tensors(self.model, plain, "reloaded")
        _same_logits(self.model, plain, self.batch)

    def train_lora(self) -> None:
        peft = PeftConfig(match_all_linear=True, dim=4, alpha=8)
        self.adapted = self.our_class.from_pretrained(str(self.base), dtype="float32", peft=peft)
        generator = torch.Generator().manual_seed(1)
        for _, layer in lora_layers(self.adapted):  # as if trained a little: B is 0 at the start
            weight: Tensor = layer.lora_B.weight.data
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
        start = self.adapter.with_name("start")
        self.adapted.save_pretrained(start)
        reference = self._load_adapter(start, is_trainable=True)
        _same_losses(_train_ours(self.adapted, self.batch), _train_plain(reference, self.batch))

    def reload_adapter(self) -> None:
        self.adapted.save_pretrained(self.adapter)
        _same_logits(self.adapted, self._load_adapter(self.adapter), self.batch)

    def _load_adapter(self, directory: Path, **options: Any) -> Any:
        """PEFT's model with an adapter of ours; Differs where PEFT would not even reload one of its own."""
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(self._load_plain(self.base), str(directory), **options)
        stored = load_file(directory / "adapter_model.safetensors")
        if lost := _lost(stored, loaded):
            own = directory.with_name("peft")
            loaded.save_pretrained(str(own))
            again = PeftModel.from_pretrained(self._load_plain(self.base), str(own))
            whose = (
                "PEFT does not reload its own adapter of this model"
                if _lost(_adapter(loaded), again)
                else "PEFT reloads"
            )
            raise Differs(f"{whose}: {lost} is not what was saved")
        return loaded

    def pack(self) -> None:
        """Two documents in one row have the loss that they have as two rows."""
        if self.kind == "vlm":
            raise Differs("images are not packed yet")
        model = self.our_class.from_pretrained(str(self.base), dtype="float32", packed=True)
        documents = packing_trial._documents(model)
        lengths = [ids.shape[1] for ids in documents]
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        labels = torch.cat([shifted(ids) for ids in documents], 1)
        packed = {
            "input_ids": torch.cat(documents, 1),
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
        with torch.no_grad():
            loss, _ = forward_loss(model, _with_labels(packed, labels), _loss())
            plain = self._load_plain(self.base)
            wanted = sum(_sum_of_losses(plain, ids) for ids in documents)
        _same_losses([float(loss)], [float(wanted)])


def _batch(model: Any, kind: str) -> dict[str, Any]:
    """Text, with images for a model that sees or that cannot do without them."""
    batch = _padded(text_batch())
    if kind == "causal":
        try:
            with torch.no_grad():
                model(**batch)
            return batch
        except (RuntimeError, ValueError, TypeError):
            if "pixel_values" not in inspect.signature(type(model).forward).parameters:
                raise
    batch = image_batch(model)
    _require_sight(model, batch)
    return batch


@torch.no_grad()
def _require_sight(model: Any, batch: dict[str, Any]) -> None:
    """Raise Differs where other pixels leave the loss as it is."""
    model.eval()
    pixels = {k: v for k, v in batch.items() if v.is_floating_point()}
    other = {k: v + torch.linspace(-1, 1, v.numel()).reshape(v.shape) for k, v in pixels.items()}
    if model(**batch).loss == model(**{**batch, **other}).loss:
        raise Differs("other pixels do not change the loss")


def _padded(batch: dict[str, Any]) -> dict[str, Any]:
    """The last quarter of the last row as padding."""
    end = batch["input_ids"].shape[1] * 3 // 4
    batch["attention_mask"][-1, end:] = 0
    batch["labels"][-1, end:] = IGNORE_INDEX
    return batch


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-4)  # eps: rounding of a gradient that is 0 must not count


def _train_plain(model: Any, batch: dict[str, Any]) -> list[float]:
    model.train()
    optimizer, losses = _optimizer(model), []
    for _ in range(STEPS):
        loss = plain_loss(model, batch)
        if loss is None or not torch.isfinite(loss):
            raise Differs(f"transformers' own loss is {loss}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _train_ours(model: Any, batch: dict[str, Any]) -> list[float]:
    model.train()
    decodes = compat.is_encoder_decoder(model)  # from what it is told so far: its labels are not shifted
    labels = batch["labels"] if decodes else shifted(batch["labels"])
    ours = _with_labels({k: v for k, v in batch.items() if k != "labels"}, labels)
    optimizer, losses, loss_fn = _optimizer(model), [], _loss()
    for _ in range(STEPS):
        ce_sum, aux = forward_loss(model, ours, loss_fn)
        loss = ce_sum / ours["num_label_tokens"] + aux
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _loss() -> Any:
    return FusedLinearCrossEntropy()


def _with_labels(inputs: dict[str, Any], labels: Tensor) -> Any:
    indices = (labels.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)
    return {**inputs, "labels": labels, "label_indices": indices, "num_label_tokens": indices.numel()}


def _sum_of_losses(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits.float()
    return F.cross_entropy(logits[0], shifted(ids)[0], ignore_index=IGNORE_INDEX, reduction="sum")


def _same_losses(ours: list[float], plain: list[float]) -> None:
    for step, (mine, theirs) in enumerate(zip(ours, plain, strict=True)):
        if not abs(mine - theirs) <= TOLERANCE * abs(theirs):
            raise Differs(f"loss of step {step}: {mine:.6f}, plain transformers {theirs:.6f}")


def _same_tensors(ours: nn.Module, plain: nn.Module, what: str) -> None:
    mine, theirs = ours.state_dict(), plain.state_dict()
    if mine.keys() != theirs.keys():
        raise Differs(
            f"{what}: other tensors than transformers' ({', '.join(sorted(mine.keys() ^ theirs.keys())[:3])})"
        )
    for name, tensor in mine.items():
        if not torch.equal(tensor, theirs[name]):
            raise Differs(f"{what}: {name} is not bit for bit what transformers has")


def _adapter(model: nn.Module) -> dict[str, Tensor]:
    return {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if ".lora_" in n}


def _lost(stored: dict[str, Tensor], model: nn.Module) -> str | None:
    """The first of the adapter tensors ``stored`` that ``model`` does not hold as they are."""
    held = _adapter(model)
    return next((name for name, t in stored.items() if name not in held or not torch.equal(held[name], t)), None)


def _same_logits(ours: Any, plain: Any, batch: dict[str, Any]) -> None:
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if compat.is_encoder_decoder(ours):
        inputs["decoder_input_ids"] = batch["labels"].clamp(min=0)
    logits = []
    for model in (ours, plain):
        model.eval()
        with torch.no_grad():
            logits.append(model(**inputs).logits.float())
    gap = ((logits[0] - logits[1]).abs().max() / logits[1].abs().max()).item()
    if not gap <= TOLERANCE:
        raise Differs(f"logits differ by {gap:.1e} of the largest")


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]


logging.getLogger("transformers").setLevel(logging.ERROR)

__all__ = ["COLUMNS", "LATER", "REQUIRED", "YES", "Row", "check"]
