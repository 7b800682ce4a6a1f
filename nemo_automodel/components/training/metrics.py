"""What a run says about itself: the summary at the start, one line a step in ``metrics.jsonl``, the progress display.

Nothing leaves the machine unless the recipe names a tracker.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from nemo_automodel.components.training.progress import ProgressDisplay, format_duration
from nemo_automodel.components.training.trackers import TRACKERS, Tracker, require_extra
from nemo_automodel.types import Batch

logger = logging.getLogger(__name__)

_NOT_TRACKED = frozenset({"step", "epoch", "loss_hex", "time"})  # the x axis, and what is no number to plot


class Loggers:
    """Reports a run on its main rank: a summary, ``metrics.jsonl``, a progress display and optional trackers.

    ``metrics.jsonl`` has one JSON object per logged optimizer step: ``step`` (from 1), ``epoch`` (from 0), ``loss``
    (mean per label token), ``loss_hex`` (the same float64, exactly), ``grad_norm`` (before clipping), ``lr``,
    ``num_tokens`` and ``num_label_tokens`` (over all ranks; with images ``num_images`` too), ``tokens_per_s`` (likewise), ``step_time_s``,
    ``data_wait_s`` (the part of it in which the loop waited for data; of a mean step since the last line, validation or save), ``mem_gib``
    (peak: of the GPU, or of the process on a CPU) and ``time`` (Unix seconds). Each validation is a line of
    ``validation.jsonl``: ``step``, ``epoch``, ``val_loss``, ``time``. Both say in ``run`` whose they are, as checkpoints'
    manifests do. A resumed run first drops what an aborted one wrote after the restored step; files of other runs in the
    same place are moved aside, and back where their run goes on.

    Args:
        env: The process environment (given by the recipe): ``is_main``, ``device``, ``world_size``.
        config: The run's configuration (given by the recipe): trackers show it.
        schedule: The ``StepScheduler`` (given by the recipe): ``step``, ``epoch``, ``total_steps``.
        output_dir: Where the files go. Default: ``checkpoint.checkpoint_dir``.
        progress: True forces the live line, False prints nothing. Default: live on a terminal, plain lines
            elsewhere.
        tensorboard: True, or arguments of ``torch.utils.tensorboard.SummaryWriter``. Default: off.
        wandb: Arguments of ``wandb.init``. Default: off.
        mlflow: ``tracking_uri``, ``experiment_name`` and arguments of ``mlflow.start_run``. Default: off.

    Raises:
        MissingExtraError: A tracker's package is not installed.
    """

    def __init__(
        self,
        env: Any,
        config: Any = None,
        schedule: Any = None,
        output_dir: str | None = None,
        progress: bool | None = None,
        tensorboard: bool | dict[str, Any] = False,
        wandb: dict[str, Any] | None = None,
        mlflow: dict[str, Any] | None = None,
    ):
        self.env = env
        self.config = config
        self.schedule = schedule
        self.output_dir = Path(output_dir or _checkpoint_dir(config)).expanduser()
        self.progress = progress
        self._wanted: dict[str, dict[str, Any]] = {}
        for extra, options in {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}.items():
            if options is not None and options is not False:
                require_extra(TRACKERS[extra][0], extra)
                self._wanted[extra] = dict(options) if isinstance(options, Mapping) else {}
        self._trackers: dict[str, Tracker] = {}
        self._files: dict[str, TextIO] = {}
        self._run: dict[str, str] = {}
        self._display = ProgressDisplay(0, enabled=False)

    def start(self, model: nn.Module, loss_fn: Any, run: str | None = None) -> None:
        """Say once what is about to run, open the files and trackers, and start the clock.

        Args:
            model: The model as it will be trained.
            loss_fn: The training criterion.
            run: Names the run, over resumes; None where nothing does.
        """
        first_step = self.schedule.step
        self._run = {} if run is None else {"run": run}
        if self.env.is_main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self._files = {name: open_jsonl(self.output_dir / name, first_step, run) for name in _FILES}
            for extra, options in self._wanted.items():
                self._open_tracker(extra, options, first_step)
            if self.progress is not False:
                self._display = ProgressDisplay(self.schedule.total_steps, first_step, live=self.progress)
            for line in describe_run(model, loss_fn, self.env, self.schedule):
                self._display.print(line)
        self._start_time = time.monotonic()
        self._restart_clock()

    def train_step(
        self,
        loss: torch.Tensor | float,
        grad_norm: torch.Tensor | float,
        lr: float,
        num_tokens: torch.Tensor | int,
        num_label_tokens: torch.Tensor | int,
        num_images: torch.Tensor | int | None = None,
    ) -> None:
        """Record one optimizer step; the main rank waits here for the device.

        Args:
            loss: Mean loss per label token over all ranks, a scalar.
            grad_norm: Norm of all gradients before clipping, a scalar.
            lr: Learning rate of this step.
            num_tokens: Tokens of this step over all ranks, padding not counted.
            num_label_tokens: Those that were trained on.
            num_images: Images of this step over all ranks, filler not counted; None for a language model.
        """
        if not self.env.is_main:
            return
        loss, grad_norm, num_tokens, num_label_tokens = (
            float(loss), float(grad_norm), int(num_tokens), int(num_label_tokens)
        )  # fmt: skip
        now = time.monotonic()
        steps = max(1, self.schedule.step - self._clock_step)  # more than one where not every step is logged
        step_time = (now - self._clock) / steps
        waited = self._data_wait_s()
        data_wait = (waited - self._waited) / steps
        self._restart_clock()
        metrics = {
            "step": self.schedule.step,
            "epoch": self.schedule.epoch,
            "loss": loss,
            "loss_hex": loss.hex(),
            "grad_norm": grad_norm,
            "lr": float(lr),
            "num_tokens": num_tokens,
            "num_label_tokens": num_label_tokens,
            **({} if num_images is None else {"num_images": int(num_images)}),
            "tokens_per_s": round(num_tokens / step_time, 1) if step_time else 0.0,
            "step_time_s": round(step_time, 6),
            "data_wait_s": round(data_wait, 6),
            "mem_gib": round(peak_memory_gib(self.env.device), 3),
            "time": round(time.time(), 3),
        }
        self._write("metrics.jsonl", metrics)
        self._track("train", metrics)
        self._display.update(self.schedule.step, metrics)

    def validation(self, val_loss: float) -> None:
        """Record a validation that followed the running step; its time counts for no step."""
        self._restart_clock()
        if not self.env.is_main:
            return
        metrics = {"step": self.schedule.step, "epoch": self.schedule.epoch, "val_loss": float(val_loss)}
        self._write("validation.jsonl", metrics | {"time": round(time.time(), 3)})
        self._track("validation", metrics)
        self._display.validation(val_loss)
        self._display.print(f"step {self.schedule.step}  validation loss {val_loss:.4f}")

    def checkpoint(self, path: Any) -> None:
        """Say that a checkpoint was, or in the background is, written to ``path`` (None: none); its time counts for no step."""
        self._restart_clock()
        if path is None:  # saving is off
            return
        done = "saved" if Path(path).exists() else "saving in the background:"
        self._display.print(f"step {self.schedule.step}  {done} {path}")

    def finish(self) -> None:
        """Close the display, the files and the trackers."""
        if not self.env.is_main:
            return
        self._display.stop()
        self._display.print(
            f"trained to step {self.schedule.step} in {format_duration(time.monotonic() - self._start_time)}; "
            f"metrics in {self.output_dir / 'metrics.jsonl'}"
        )
        for file in self._files.values():
            file.close()
        for extra in list(self._trackers):
            self._guard(extra, lambda tracker: tracker.close())
        self._trackers.clear()

    def _restart_clock(self) -> None:
        """Later times are of later steps: the device must have done those before."""
        self._clock = time.monotonic()
        self._clock_step: int = self.schedule.step
        self._waited = self._data_wait_s()

    def _data_wait_s(self) -> float:
        return getattr(self.schedule, "data_wait_s", 0.0)  # a scheduler of one's own may not count it

    def _write(self, name: str, metrics: Mapping[str, Any]) -> None:
        self._files[name].write(json.dumps({**metrics, **self._run}) + "\n")
        self._files[name].flush()  # a killed run keeps every line

    def _track(self, group: str, metrics: Mapping[str, Any]) -> None:
        values = {f"{group}/{name}": value for name, value in metrics.items() if name not in _NOT_TRACKED}
        for extra in list(self._trackers):
            self._guard(extra, lambda tracker: tracker.log(values, metrics["step"]))

    def _open_tracker(self, extra: str, options: Mapping[str, Any], first_step: int) -> None:
        resolved = json.loads(json.dumps(self.config.resolved(), default=str)) if self.config is not None else {}
        try:
            self._trackers[extra] = TRACKERS[extra][1](options, self.output_dir, resolved, first_step)
        except Exception as error:  # whatever a tracker's server or client does, it is no reason not to train
            self._report_failure(extra, error)

    def _guard(self, extra: str, action: Any) -> None:
        try:
            action(self._trackers[extra])
        except Exception as error:
            del self._trackers[extra]
            self._report_failure(extra, error)

    def _report_failure(self, extra: str, error: Exception) -> None:
        logger.warning(
            "loggers.%s failed and is off for the rest of this run (%s: %s); metrics.jsonl goes on",
            extra,
            type(error).__name__,
            error,
        )


_FILES = ("metrics.jsonl", "validation.jsonl")


def open_jsonl(path: Path, first_step: int, run: str | None = None) -> TextIO:
    """Open ``path`` for appending lines of steps after ``first_step``, so that no step ever has two lines.

    A resumed run (``first_step`` > 0) drops later lines and a half-written last one. A fresh run moves an older
    file aside, to ``<name>.<time of its last line>``, and so does one that finds another ``run``'s there; a resumed one
    brings its own back.
    """
    if path.exists() and path.stat().st_size and (first_step == 0 or _is_of_another(path, run)):
        written = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
        path.rename(_unused(path.with_name(f"{path.stem}.{written}{path.suffix}")))
    if first_step and run is not None and not path.exists():
        own = [p for p in path.parent.glob(f"{path.stem}.*{path.suffix}") if _run_of(p) == run]
        if own:
            max(own, key=lambda p: p.stat().st_mtime).rename(path)
    if path.exists() and first_step:
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _is_up_to(line, first_step)]
        rewritten = path.with_name(path.name + ".tmp")
        rewritten.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(rewritten, path)
    return path.open("a", encoding="utf-8")


def _is_of_another(path: Path, run: str | None) -> bool:
    return None not in (run, found := _run_of(path)) and found != run


def _run_of(path: Path) -> str | None:
    """Whose lines ``path`` holds, by its first one; None where it does not say."""
    try:
        with path.open(encoding="utf-8") as file:
            line = json.loads(file.readline())
    except (OSError, ValueError):
        return None
    return line.get("run") if isinstance(line, dict) else None


def _unused(path: Path) -> Path:
    numbered = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in itertools.count(1))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


def _is_up_to(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def count_tokens(batches: Iterable[Batch]) -> int:
    """Tokens of ``batches``, padding not counted; by their masks where a loader of one's own does not say how many."""
    total = 0
    for batch in batches:
        mask = batch.get("attention_mask")
        counted = int(mask.sum()) if mask is not None and "num_tokens" not in batch else batch["input_ids"].numel()
        total += batch.get("num_tokens", counted)
    return total


def count_images(batches: Iterable[Batch]) -> int:
    """Images of ``batches``, filler not counted."""
    return sum(batch.get("num_images", 0) for batch in batches)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far, in GiB: allocated on a CUDA ``device``, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return 0.0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def describe_run(model: nn.Module, loss_fn: Any, env: Any, schedule: Any) -> list[str]:
    """The lines printed once before the first step: model, loss, device and plan. Of the data the loader has spoken."""
    packed = sum(getattr(module, "packed_parameters", 0) for module in model.modules())  # in four bits: no parameters
    total = packed + sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad})
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    lines = [
        f"model     {type(model).__name__.removeprefix('FSDP')}, {total:,} parameters, {trainable:,} trainable ({trainable / max(1, total):.2%}) in {'/'.join(dtypes)}",
        f"kernels   loss {type(loss_fn).__name__}" + (f", attention {attention}" if attention else ""),
        f"device    {device_name(env.device)}, {env.world_size} rank(s)",
    ]
    done = f", {schedule.step:,} done before" if schedule.step else ""
    return [*lines, f"plan      {schedule.total_steps:,} optimizer steps{done}"]


def device_name(device: torch.device) -> str:
    """What ``device`` is called: a GPU's name, or how many CPU threads compute."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"


def _checkpoint_dir(config: Any) -> str:
    """Where the run's checkpoints go; a user's own checkpoint writer may not name a place."""
    section = getattr(config, "checkpoint", None)
    return getattr(section, "checkpoint_dir", None) or "checkpoints"
