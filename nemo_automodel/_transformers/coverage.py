"""What of this package works on one architecture: its tiny twin goes through loading, training and saving.

Everything is compared with plain transformers (and PEFT) on the same weights, in float32: the loss of each step, the
logits of what was saved. A cell is "yes", or the reason why not.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from nemo_automodel._transformers import compat
from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM, NeMoAutoModelForImageTextToText
from nemo_automodel._transformers.coverage_cells import LATER, THEIRS, YES, Differs, Row, attempt
from nemo_automodel._transformers.coverage_packing import pack_images, pack_texts
from nemo_automodel._transformers.coverage_ranks import Pair, one_rank
from nemo_automodel._transformers.coverage_steps import (
    adapter_of,
    batch_for,
    lost,
    same_logits,
    same_losses,
    same_tensors,
    train_ours,
    train_plain,
)
from nemo_automodel._transformers.head import head_of
from nemo_automodel._transformers.plain import away_from_symmetry, without_chance
from nemo_automodel._transformers.tiny_twin import tiny_twin
from nemo_automodel._transformers.twin_batch import takes_images
from nemo_automodel._transformers.twin_start import start_config
from nemo_automodel.components._peft.linear import lora_layers
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.checkpoint.hf import gather_weights, write_model


def check(model_type: str, kind: str, report: Callable[[Row], None] | None = None) -> Row:
    """Every column of one architecture; ``kind`` is causal or vlm. Nothing is raised: a failure is a cell.

    With ``report`` the process is copied for a second rank, and the columns of two ranks are measured as well; the row
    is reported before that, because they may end in a hang.
    """
    row = Row(model_type, kind)
    row.cells |= {"fsdp2": LATER, "tp2": LATER}
    with tempfile.TemporaryDirectory() as directory:
        pair = Pair(Path(directory), kind) if report is not None else None
        trial = _Trial(model_type, kind, Path(directory))
        row.cells["twin"] = attempt(trial.train_plainly)
        if row.trains_plainly:
            row.blind = trial.blind
            _on_one_rank(row, trial)
        if pair is not None and report is not None:
            report(row)
            if row.cells["load"] == YES:
                row.cells |= pair.measure(trial.one_rank())
            pair.end()
    return row


def _on_one_rank(row: Row, trial: _Trial) -> None:
    row.cells["load"] = attempt(trial.load)
    if row.cells["load"] == YES:
        row.cells["fused"], row.cells["attention"] = trial.fused(), trial.attention()
        row.cells["sft"] = attempt(trial.train)
        row.cells["fused"] = trial.fused()
        row.cells["save"] = attempt(trial.save)
    row.cells["lora"] = attempt(trial.train_lora)
    row.cells["adapter"] = attempt(trial.reload_adapter) if row.cells["lora"] == YES else ""
    row.cells["packing"] = attempt(trial.pack)


class _Trial:
    def __init__(self, model_type: str, kind: str, directory: Path) -> None:
        self.model_type, self.kind = model_type, kind
        self.base, self.saved, self.adapter = (directory / name for name in ("base", "saved", "adapter"))
        causal = kind == "causal"
        self.plain_class: Any = AutoModelForCausalLM if causal else AutoModelForImageTextToText
        self.our_class: Any = NeMoAutoModelForCausalLM if causal else NeMoAutoModelForImageTextToText
        self.batches: list[dict[str, Any]] = []
        self.blind = False
        self.reloads = True  # whether transformers loads what transformers saves
        self.start: dict[str, Tensor] = {}
        self.losses: list[float] = []
        self.model: Any = None
        self.adapted: Any = None
        self.reference: Any = None  # PEFT's model, trained as ours

    # --- the reference ------------------------------------------------------------------------------------------

    def train_plainly(self) -> None:
        """Build and save the twin, and train it with transformers alone."""
        config = tiny_twin(start_config(self.model_type, causal=self.kind == "causal"))
        without_chance(config)
        model = self.plain_class.from_config(config, dtype=torch.float32)
        away_from_symmetry(model)
        self.blind = self.kind == "vlm" and not takes_images(model)
        self.batches = [batch_for(model, self.kind, seed) for seed in (0, 1)]
        torch.save(self.batches, self.base.with_name("batches.pt"))
        model.save_pretrained(self.base)
        try:
            loaded = self._load_plain(self.base)
        except Differs:  # by the names of a checkpoint; by those of the modules it may
            model.save_pretrained(self.base, save_original_format=False)
            loaded, self.reloads = self._load_plain(self.base), False
        self.losses = train_plain(loaded, self.batches[0])

    def _load_plain(self, directory: Path) -> Any:
        model, info = self.plain_class.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            whose = (
                "not reloaded by transformers" if self.reloads else "transformers itself does not load what it saves"
            )
            raise Differs(f"{whose}: {', '.join(missing[:3])} missing")
        return model

    # --- ours ---------------------------------------------------------------------------------------------------

    def load(self) -> None:
        self.model = self.our_class.from_pretrained(str(self.base), dtype="float32")
        same_tensors(self.model, self._load_plain(self.base), "loaded")
        self.start = copy.deepcopy(self.model.state_dict())

    def fused(self) -> str:
        state = self.model.__dict__.get("_automodel_head")
        if head_of(self.model) is None:
            return "its output head is not a plain linear layer"
        return (state and state.reason) or YES

    def attention(self) -> str:
        name = compat.attention_name(self.model)
        return YES if name == "automodel" else f"its own ({name})"

    def train(self) -> None:
        same_losses(train_ours(self.model, self.batches[0]), self.losses)

    def save(self) -> None:
        write_model(self.saved, self.model, gather_weights(self.model, None, None, keep=True), None, torch.float32)
        plain = self._load_plain(self.saved)
        same_tensors(self.model, plain, "reloaded")
        same_logits(self.model, plain, self.batches[0])

    def train_lora(self) -> None:
        peft = PeftConfig(match_all_linear=True, dim=4, alpha=8)
        self.adapted = self.our_class.from_pretrained(str(self.base), dtype="float32", peft=peft)
        generator = torch.Generator().manual_seed(1)
        for _, layer in lora_layers(self.adapted):  # as if trained a little: B is 0 at the start
            weight: Tensor = layer.lora_B.weight.data
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
        start = self.adapter.with_name("start")
        self.adapted.save_pretrained(start)
        self.reference = self._load_adapter(start, is_trainable=True)
        same_losses(train_ours(self.adapted, self.batches[0]), train_plain(self.reference, self.batches[0]))

    def reload_adapter(self) -> None:
        self.adapted.save_pretrained(self.adapter)
        try:
            same_logits(self.adapted, self._load_adapter(self.adapter), self.batches[0])
        except Differs as ours:
            own = self.adapter.with_name("peft")
            self.reference.save_pretrained(str(own))
            try:
                same_logits(self.reference, self._load_adapter(own), self.batches[0])
            except Differs as theirs:  # what training changes beside the adapter (running statistics) is not in one
                raise Differs(f"{THEIRS[0]} does not reload its own adapter of this model: {theirs}") from ours
            raise

    def _load_adapter(self, directory: Path, **options: Any) -> Any:
        """PEFT's model with an adapter of ours; Differs where PEFT would not even reload one of its own."""
        from peft import PeftModel

        try:
            loaded = PeftModel.from_pretrained(self._load_plain(self.base), str(directory), **options)
        except NotImplementedError as error:
            raise Differs(f"{THEIRS[0]} cannot adapt this model: {error}") from error
        stored = load_file(directory / "adapter_model.safetensors")
        if missing := lost(stored, loaded):
            own = directory.with_name("peft")
            loaded.save_pretrained(str(own))
            again = PeftModel.from_pretrained(self._load_plain(self.base), str(own))
            same = lost(adapter_of(loaded), again)
            whose = f"{THEIRS[0]} does not reload its own adapter of this model" if same else "not reloaded"
            raise Differs(f"{whose}: {missing} is not what was saved")
        return loaded

    def one_rank(self) -> Any:
        """What a step of two ranks must come to."""
        self.model.load_state_dict(self.start)
        return one_rank(self.model, self.batches)

    def pack(self) -> None:
        """Documents in one row have the loss that they have as rows; with images, where the model sees."""
        sees = self.kind == "vlm" and not self.blind
        packed = "images" if sees else True
        model = self.our_class.from_pretrained(str(self.base), dtype="float32", packed=packed)
        (pack_images if sees else pack_texts)(model, self._load_plain(self.base))


logging.getLogger("transformers").setLevel(logging.ERROR)

__all__ = ["check"]
