"""Everything one checkpoint holds: collected between two steps, written then or while training goes on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_automodel.components.checkpoint.adapters import write_adapter
from nemo_automodel.components.checkpoint.background import HostCopies
from nemo_automodel.components.checkpoint.card import hub_id
from nemo_automodel.components.checkpoint.export import Export, Merge, plan_export
from nemo_automodel.components.checkpoint.hf import gather_weights, write_beside, write_model
from nemo_automodel.components.checkpoint.ranks import Ranks
from nemo_automodel.components.checkpoint.resume import ResumeState
from nemo_automodel.components.checkpoint.stream import write_weights
from nemo_automodel.types import TrainState

logger = logging.getLogger(__name__)


class Contents:
    """What goes into a directory. Whatever needs the live model is done by ``of``; large tensors are left to ``write``."""

    def __init__(self) -> None:
        self.merged = False  # whether an adapter is saved merged, too
        self._writes: list[Callable[[Ranks], None]] = []
        self._copies: list[Callable[[Callable[[torch.Tensor], torch.Tensor]], None]] = []

    @classmethod
    def of(
        cls, state: TrainState, directory: Path, ranks: Ranks, extra: Mapping[str, Any], save_merged: bool
    ) -> Contents:
        """Collect the contents of a checkpoint of ``state``; every rank calls it, and nothing in ``state`` changes.

        ``extra``: JSON-able entries kept with what continues the run.
        """
        contents = cls()
        resume = ResumeState.of(state, directory / "resume", ranks, extra)
        contents._copies.append(resume.on_host)
        contents._writes.append(resume.write)
        merged = contents.merged = _merges(state, save_merged)
        if state.peft is not None:
            _write_adapter(state, directory / ("adapter" if merged else "model"), ranks)
        if state.peft is None or merged:
            contents._add_model(state, directory / "model", ranks)
        return contents

    def on_host(self, copies: HostCopies) -> None:
        """Copy what training changes, so that ``write`` can come later."""
        copies.begin()
        for each in self._copies:
            each(copies.copy)
        copies.end()

    def write(self, ranks: Ranks) -> None:
        """Write everything; every rank calls it, on a file system they share."""
        for each in self._writes:
            each(ranks)

    def _add_model(self, state: TrainState, directory: Path, ranks: Ranks) -> None:
        """Stream the weights out where the model can say how they are saved; gather them, and now, where it cannot."""
        model, peft = state.model, state.peft
        if not hasattr(model, "export_groups") or not (peft is None or hasattr(peft, "merges")):
            return _write_gathered(state, directory, ranks)
        dtype = getattr(model, "export_dtype", None)

        def plan() -> Export:
            merges = {} if peft is None else {name: Merge(*merge) for name, merge in peft.merges(model).items()}
            return plan_export(model, dtype, merges)

        export = ranks.together("Planning the export", plan)
        declared, datasets = dtype or getattr(model, "dtype", None), _datasets(state)

        def beside() -> None:
            write_beside(directory, model, export.tied, state.tokenizer, declared, datasets)

        ranks.on_main("Writing the model's config", beside)
        self._copies.append(export.on_host)
        self._writes.append(lambda ranks: write_weights(directory, export, ranks))
        return None


def _write_adapter(state: TrainState, directory: Path, ranks: Ranks) -> None:
    model, peft = state.model, state.peft
    assert peft is not None

    def gather() -> Any:
        return gather_weights(model, peft.adapter_state_dict(model), None, keep=ranks.is_main)

    weights = ranks.together("Gathering the adapter", gather)
    config: Any = model.config
    description = peft.adapter_config(model, _base_name(model), getattr(config, "_commit_hash", None))
    datasets = _datasets(state)
    ranks.on_main(
        "Writing the adapter",
        lambda: write_adapter(directory, weights, description, state.tokenizer, config, datasets),
    )


def _write_gathered(state: TrainState, directory: Path, ranks: Ranks) -> None:
    model = state.model
    dtype = getattr(model, "export_dtype", None)

    def gather() -> Any:
        tensors = None if state.peft is None else state.peft.merged_state_dict(model)
        return gather_weights(model, tensors, dtype, keep=ranks.is_main)

    weights = ranks.together("Gathering the weights", gather)
    declared = dtype or getattr(model, "dtype", None)
    datasets = _datasets(state)
    ranks.on_main(
        "Writing the model", lambda: write_model(directory, model, weights, state.tokenizer, declared, datasets)
    )


def _merges(state: TrainState, save_merged: bool) -> bool:
    if state.peft is None or save_merged or _base_name(state.model):
        return state.peft is not None and save_merged
    logger.warning("The base model has no name to load it from again: the merged weights are saved (save_merged).")
    return True


def _base_name(model: Any) -> str:
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return os.path.abspath(name) if name and os.path.isdir(name) else name  # so that it is found from elsewhere too


def _datasets(state: TrainState) -> tuple[str, ...]:
    """Hub IDs named in the dataset section, for the model card."""
    section = (state.fingerprint.get("config") or {}).get("dataset") or {}
    values = section.values() if isinstance(section, Mapping) else ()
    return tuple(value for value in values if isinstance(value, str) and hub_id(value))
