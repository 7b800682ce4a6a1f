"""The start-up certificate: before a run's first step, what this package puts in place of transformers proves itself.

Two stages, both against plain transformers in float32. The tiny twin of the model, in float32 on the CPU, goes through
the whole stack. Then one block of each kind at its real widths, and the head, go through it on the run's own device and
in its dtype: a narrow twin has other head sizes and tiles; with the model's own weights, on its first micro-batch. What does not agree is switched off, or ends the run.
"""

from __future__ import annotations

import gc
import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn

from nemo_automodel._transformers import certificate_cache as cached
from nemo_automodel._transformers.certificate_stages import IMAGES, REAL, TWIN, Case
from nemo_automodel._transformers.certificate_verdict import Verdict
from nemo_automodel._transformers.certificate_weights import gather
from nemo_automodel._transformers.stack import (
    ATTENTION,
    CHECKPOINTING,
    FP8,
    LORA,
    PACKING,
    SWITCHES,
    Stack,
    stack_of,
    switch_off,
)
from nemo_automodel._transformers.trial import take_small_copy
from nemo_automodel.errors import ConfigError, ModelError

logger = logging.getLogger(__name__)

MODES = ("off", "warn", "strict")
_FIX = {
    ATTENTION: "write distributed.cp_size: 1",
    CHECKPOINTING: "write distributed.activation_checkpointing: off",
    PACKING: "write packed_sequence.packed_sequence_size: 0 to train it padded",
    LORA: "leave peft out, or adapt other layers",
    FP8: "write fp8.enabled: false",
}


class Certificate:
    """Proves, before the first step, that a run computes what plain transformers does.

    Args:
        mode: ``warn`` (default) switches off what does not agree and says so once, and is an error only for what a run
            cannot go on without (packing, adapters, FP8); ``strict`` is an error for anything that does not agree or
            cannot be tried; ``off`` proves nothing.
        cache_dir: Where results are kept, so that the same model, versions and recipe prove themselves once. Default
            ``nemo_automodel/certificates`` in the Hugging Face cache (``HF_HOME``).
        config: The recipe (given by the recipe); ``certificate.json`` is written to its ``checkpoint_dir``.

    Raises:
        ConfigError: ``mode`` is none of these.
    """

    def __init__(
        self, mode: Literal["off", "warn", "strict"] = "warn", cache_dir: str | None = None, config: Any = None
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"certificate.mode={mode}: write one of {', '.join(MODES)}")
        self.mode = mode
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else cached.default_directory()
        self.directory = _directory_of(config)

    def prove(
        self, model: nn.Module, loss_fn: Any, *, packed: bool = False, distributed: Any = None, loader: Any = None
    ) -> Verdict | None:
        """Prove the stack that ``model`` is about to be trained with; every rank calls it, rank 0 computes.

        Args:
            model: as ``from_pretrained`` returned it; optimisations that do not agree are switched off in place.
            loss_fn: the run's loss.
            packed: whether its batches are packed.
            distributed: the run's ``DistributedManager``, None for none.
            loader: the run's, whose first micro-batch is looked at; None to try made up documents.

        Returns:
            What was found, None with ``mode: off``.

        Raises:
            ModelError: something does not agree that cannot be switched off, or anything with ``mode: strict``.
        """
        small = take_small_copy(model)  # type: ignore[arg-type]
        if self.mode == "off":
            logger.info("certificate: off, nothing is proved")
            return None
        device = torch.device(getattr(distributed, "device", None) or next(model.parameters()).device)
        checkpointing = getattr(distributed, "activation_checkpointing", "off")
        stack = stack_of(model, loss_fn, packed=packed, checkpointing=checkpointing, device=device)
        verdict, buffers, from_cache = self._find(model, stack, small, device, loader)
        sizes = getattr(distributed, "sizes", None)
        cp, tp = getattr(sizes, "cp", 1), getattr(sizes, "tp", 1)
        self._act(model, stack, verdict, buffers, cp)
        self._report(verdict, from_cache, [f"{name} plan" for name, size in (("TP", tp), ("CP", cp)) if size > 1])
        return verdict

    def _find(
        self, model: nn.Module, stack: Stack, small: Any, device: torch.device, loader: Any
    ) -> tuple[Verdict, dict[str, Tensor], bool]:
        """The verdict, the buffers that must be set anew, and whether it was made before; the same on every rank."""
        start, case, known, wanted = time.monotonic(), None, None, {}
        with _undisturbed(device):
            if _rank() == 0:
                case = Case(model, stack, device, loader)
                known = self._known(case) if case.cls is not None else (case.verdict, {}, False)
                wanted = {} if known is not None else case.prepare(model)
            wanted = _from_rank_0(wanted)
            values = gather(getattr(model, "module", model), wanted, keep=case is not None)
            if case is not None and known is None:
                case.prove(small, values)
                known = self._keep(case, time.monotonic() - start)
        return _from_rank_0(known)

    # --- rank 0 -------------------------------------------------------------------------------------------------

    def _known(self, case: Case) -> tuple[Verdict, dict[str, Tensor], bool] | None:
        """What was found before; None where nothing was."""
        record = cached.load(self.cache_dir, case.key)
        if record is None or (restored := _restored(record)) is None:
            return None
        self._write(record)
        return restored, {}, True

    def _keep(self, case: Case, seconds: float) -> tuple[Verdict, dict[str, Tensor], bool]:
        verdict, buffers, key = case.verdict, case.wrong_buffers, case.key
        verdict.agree = [name for name in case.stack.optimisations if name not in verdict.off]
        verdict.seconds = round(seconds, 2)
        assert case.cls is not None
        record = {"key": key, **vars(verdict), "wrong_buffers": sorted(buffers), "device": str(case.device)}
        record |= {"dtype": str(case.dtype), "model": case.cls.__name__, "versions": cached.versions()}
        if not buffers and not any("OutOfMemory" in reason for reason in verdict.unproved):
            cached.store(self.cache_dir / f"{key}.json", record)
        self._write(record)
        return verdict, buffers, False

    def _write(self, record: dict[str, Any]) -> None:
        if self.directory is not None:
            cached.store(self.directory / "certificate.json", record)

    # --- every rank ---------------------------------------------------------------------------------------------

    def _act(self, model: nn.Module, stack: Stack, verdict: Verdict, buffers: dict[str, Tensor], cp: int) -> None:
        problems = [f"{name}: {reason}" for name, reason in verdict.off.items()]
        problems += [f"buffer {name} has other values than transformers computes" for name in buffers]
        if self.mode == "strict" and (problems or verdict.unproved):
            listed = "; ".join([*problems, *(f"not proved: {reason}" for reason in verdict.unproved)])
            raise ModelError(
                f"certificate: {listed}; write certificate.mode: warn to train without what does not agree"
            )
        kept = {ATTENTION} if cp > 1 else set()
        kept |= {CHECKPOINTING} if stack.checkpointing == "auto" else set()  # which chooses anew with every batch
        for name, reason in verdict.off.items():
            if name not in SWITCHES or name in kept:
                fix = _FIX.get(name, f"switch {name} off")
                raise ModelError(
                    f"certificate: {name} does not compute what plain transformers does: {reason}; {fix}, or "
                    "--certificate off to train regardless"
                )
        for name, reason in verdict.off.items():
            instead = switch_off(model, name, verdict.attention or "eager")
            logger.warning("certificate: %s is off, %s is used, because %s", name, instead, reason)
        for name, value in buffers.items():
            buffer = model.get_buffer(name)
            buffer.copy_(value.to(buffer.device))
            logger.warning(
                "certificate: %s was loaded with other values than transformers computes; it now has those", name
            )

    def _report(self, verdict: Verdict, from_cache: bool, proved: list[str]) -> None:
        """Say what was found; ``proved`` is what the model could not have been built without proving (``tp_proof``)."""
        for reason in verdict.unproved:
            logger.warning("certificate: not proved: %s", reason)
        numbers = [f"worst gradient {verdict.worst[TWIN]:.1e}"] if TWIN in verdict.worst else []
        numbers += ["cached" if from_cache else f"{verdict.seconds:.1f} s"]
        agree = ", ".join([*verdict.agree, *proved]) or "the model's own forward and loss"
        rows = " on text and images" if any(stage.endswith(IMAGES) for stage in verdict.worst) else ""
        if verdict.worst:
            logger.info("certificate: %s agree with plain transformers%s (%s)", agree, rows, "; ".join(numbers))


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """What happens inside leaves random numbers, memory and the log as they were, and sums float32 in float32."""
    loggers = [logging.getLogger(name) for name in ("nemo_automodel", "transformers")]
    levels = [log.level for log in loggers]
    devices = [device] if device.type == "cuda" else []
    precision = torch.get_float32_matmul_precision()
    drawn = random.getstate(), np.random.get_state()  # rows of a user's own dataset may draw from these
    try:
        torch.set_float32_matmul_precision("highest")
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            for log in loggers:
                log.setLevel(logging.ERROR)
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def _restored(record: dict[str, Any]) -> Verdict | None:
    try:
        return Verdict(**{name: record[name] for name in vars(Verdict())})
    except (KeyError, TypeError):
        return None


def _from_rank_0(value: Any) -> Any:
    """What rank 0 has, on every rank."""
    held = [value]
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(held, src=0)
    return held[0]


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _directory_of(config: Any) -> Path | None:
    section = getattr(config, "checkpoint", None)
    if section is None or getattr(section, "enabled", True) is False:
        return None
    return Path(getattr(section, "checkpoint_dir", None) or "checkpoints").expanduser()


__all__ = ["MODES", "REAL", "TWIN", "Certificate"]
