"""The start-up certificate: before a run's first step, what this package puts in place of transformers proves itself.

Two stages, both against plain transformers in float32. The tiny twin of the model, in float32 on the CPU, goes through
the whole stack. Then one block of each kind at its real widths, and the head, go through it on the run's own device and
in its dtype: a narrow twin has other head sizes and tiles. What does not agree is switched off, or ends the run.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor, nn
from transformers import PretrainedConfig

from nemo_automodel._transformers import certificate_cache as cached
from nemo_automodel._transformers import twin_fields as names
from nemo_automodel._transformers.certificate_trial import Trial
from nemo_automodel._transformers.certificate_verdict import Verdict, settle
from nemo_automodel._transformers.plain import sharpen, without_chance
from nemo_automodel._transformers.stack import (
    ATTENTION,
    FP8,
    KERNEL,
    LORA,
    PACKING,
    SWITCHES,
    Stack,
    plain_class,
    stack_of,
    switch_off,
)
from nemo_automodel._transformers.tiny_twin import one_block_each, tiny_twin
from nemo_automodel._transformers.trial import build, take_small_copy
from nemo_automodel.errors import ConfigError, ModelError

logger = logging.getLogger(__name__)

MODES = ("off", "warn", "strict")
TWIN, REAL = "tiny twin, float32", "real width"
_TWIN_LENGTHS = (7, 18, 12)  # tokens of three documents; the middle one longer than the twin's window of 8
_CPU = ((5, 17, 11), 8, 4096)  # the same at real width; the most tokens of a window; of the vocabulary
_CUDA = ((33, 400, 591), 128, 32768)
_CPU_PARAMETERS = 3e8  # more would take longer than the ten seconds there are
_BYTES = 16  # a parameter, with its float32 reference and the gradients of both
_FIX = {
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

    def prove(self, model: nn.Module, loss_fn: Any, *, packed: bool = False, distributed: Any = None) -> Verdict | None:
        """Prove the stack that ``model`` is about to be trained with; every rank calls it, rank 0 computes.

        Args:
            model: as ``from_pretrained`` returned it; optimisations that do not agree are switched off in place.
            loss_fn: the run's loss.
            packed: whether its batches are packed.
            distributed: the run's ``DistributedManager``, None for none.

        Returns:
            What was found, None with ``mode: off``.

        Raises:
            ModelError: something does not agree that cannot be switched off, or anything with ``mode: strict``.
        """
        small = take_small_copy(model)  # type: ignore[arg-type]
        if self.mode == "off":
            return None
        device = torch.device(getattr(distributed, "device", None) or next(model.parameters()).device)
        checkpointing = getattr(distributed, "activation_checkpointing", "off")
        stack = stack_of(model, loss_fn, packed=packed, checkpointing=checkpointing, device=device)
        found: list[Any] = [None]
        if _rank() == 0:
            with _undisturbed(device):
                found = [self._find(model, stack, small, device)]
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.broadcast_object_list(found, src=0)
        verdict, buffers, from_cache = found[0]
        self._act(model, stack, verdict, buffers, getattr(getattr(distributed, "sizes", None), "cp", 1))
        self._report(verdict, from_cache)
        return verdict

    # --- rank 0 -------------------------------------------------------------------------------------------------

    def _find(
        self, model: nn.Module, stack: Stack, small: Any, device: torch.device
    ) -> tuple[Verdict, dict[str, Tensor], bool]:
        """The verdict, the buffers that must be set anew, and whether the verdict was made before."""
        start, verdict = time.monotonic(), Verdict()
        cls, config = plain_class(model), getattr(model, "config", None)
        if cls is None or not isinstance(config, PretrainedConfig):
            verdict.unproved.append("it is no model of transformers")
            return verdict, {}, False
        dtype = model.__dict__.get("_automodel_compute_dtype") or next(model.parameters()).dtype
        live = cached.free_buffers(model)
        key = cached.key_of(cls, config, stack, device, dtype, live)
        record = cached.load(self.cache_dir, key)
        if record is not None and (restored := _restored(record)) is not None:
            self._write(record)
            return restored, {}, True
        _attempt(TWIN, verdict, lambda: _prove_twin(cls, config, small, stack, verdict))
        buffers: dict[str, Tensor] = {}
        _attempt(REAL, verdict, lambda: buffers.update(_prove_real(cls, config, stack, verdict, device, dtype, live)))
        verdict.agree = [name for name in stack.optimisations if name not in verdict.off]
        verdict.seconds = round(time.monotonic() - start, 2)
        record = {"key": key, **vars(verdict), "wrong_buffers": sorted(buffers), "device": str(device)}
        record |= {"dtype": str(dtype), "model": cls.__name__, "versions": cached.versions()}
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
        for name, reason in verdict.off.items():
            if name not in SWITCHES or (name == ATTENTION and cp > 1):
                fix = "write distributed.cp_size: 1" if name == ATTENTION else _FIX.get(name, f"switch {name} off")
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

    def _report(self, verdict: Verdict, from_cache: bool) -> None:
        for reason in verdict.unproved:
            logger.warning("certificate: not proved: %s", reason)
        numbers = [f"worst gradient {verdict.worst[TWIN]:.1e}"] if TWIN in verdict.worst else []
        numbers += ["cached" if from_cache else f"{verdict.seconds:.1f} s"]
        agree = ", ".join(verdict.agree) or "the model as it is"
        if verdict.worst:
            logger.info("certificate: %s agree with plain transformers (%s)", agree, "; ".join(numbers))


def _prove_twin(cls: type, config: PretrainedConfig, small: Any, stack: Stack, verdict: Verdict) -> None:
    made: list[Any] = [small]

    def trial(seed: int) -> Trial:
        model = made.pop() if made else None
        if model is None:
            twin = tiny_twin(config)
            without_chance(twin)
            model = build(cls, twin)
        model.__class__ = cls
        torch.manual_seed(seed)
        sharpen(model)
        return Trial(model, _without(stack, KERNEL, FP8), _TWIN_LENGTHS, seed=seed)

    settle(trial, _without(stack, KERNEL, FP8), verdict, TWIN)


def _prove_real(
    cls: type,
    config: PretrainedConfig,
    stack: Stack,
    verdict: Verdict,
    device: torch.device,
    dtype: torch.dtype,
    live: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Stage two; returns the buffers of ``live`` that are wrong, with the right values."""
    wanted, window, most = _CUDA if device.type == "cuda" else _CPU
    whole = getattr(names.text_part(config), "vocab_size", most)
    cut = one_block_each(config, vocab_size=whole if whole <= most else most + whole % 64, window=window)
    without_chance(cut)
    _require_room(cls, cut, device)
    lengths = _within_positions(cut, wanted)
    wrong: dict[str, Tensor] = {}

    def trial(seed: int) -> Trial:
        model = build(cls, cut, device)
        wrong.update(_wrong_buffers(live, cached.free_buffers(model)))
        torch.manual_seed(seed)
        sharpen(model)
        return Trial(model, stack, lengths, dtype, seed)

    settle(trial, stack, verdict, f"{REAL}, {str(dtype)[6:]}")
    return wrong


def _wrong_buffers(live: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in right.items():
        mine = live.get(name)
        if mine is None or mine.shape != value.shape:
            continue
        if not torch.allclose(mine.float().cpu(), value.float().cpu(), rtol=1e-4, atol=1e-7):
            found[name] = value.cpu()
    return found


def _require_room(cls: Any, config: PretrainedConfig, device: torch.device) -> None:
    with torch.device("meta"):
        numbers = sum(p.numel() for p in cls._from_config(config).parameters())
    if device.type == "cuda":
        if numbers * _BYTES > torch.cuda.mem_get_info(device)[0]:
            raise ModelError(f"its blocks ({numbers / 1e9:.1f}e9 numbers) do not fit beside the model")
    elif numbers > _CPU_PARAMETERS:
        raise ModelError(f"its blocks ({numbers / 1e9:.1f}e9 numbers) are too large to try on a CPU")


def _within_positions(config: PretrainedConfig, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """``lengths``, shorter where the model knows fewer positions."""
    fields = names.fields_of(names.text_part(config)).items()
    known = [v for k, v in fields if names.POSITIONS.search(k) and names.is_int(v) and v > 0]
    most = min(known, default=max(lengths))
    return lengths if most >= max(lengths) else tuple(max(3, n * most // max(lengths)) for n in lengths)


def _without(stack: Stack, *left_out: str) -> Stack:
    return Stack(**{**vars(stack), "optimisations": stack.without(left_out)})


def _attempt(stage: str, verdict: Verdict, action: Any) -> None:
    try:
        action()
    except Exception as error:  # of any kind: it is any model's own code
        reason = (str(error).splitlines() or [""])[0][:200]
        kind = "" if isinstance(error, ModelError) else f"{type(error).__name__}: "
        verdict.unproved.append(f"{stage}: {kind}{reason}")


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """What happens inside leaves random numbers, gradients, memory and the log as they were."""
    loggers = [logging.getLogger(name) for name in ("nemo_automodel", "transformers")]
    levels = [log.level for log in loggers]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            for log in loggers:
                log.setLevel(logging.ERROR)
            yield
    finally:
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


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _directory_of(config: Any) -> Path | None:
    section = getattr(config, "checkpoint", None)
    if section is None or getattr(section, "enabled", True) is False:
        return None
    return Path(getattr(section, "checkpoint_dir", None) or "checkpoints").expanduser()


__all__ = ["MODES", "Certificate"]
