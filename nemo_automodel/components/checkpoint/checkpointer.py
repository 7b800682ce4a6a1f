"""When a run is saved and where it goes on from: the ``checkpoint`` section of a recipe.

checkpoints/
  LATEST  BEST            text files that name a checkpoint
  epoch_0_step_10/
    model/                an HF directory (full fine-tuning, ``save_merged``) or a PEFT adapter directory (LoRA)
    adapter/              with ``save_merged``: the adapter beside the merged weights
    resume/               what continues the run
    manifest.json         every file's size and SHA-256
    val_loss.json         of one that was the best so far, known after it was saved
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_automodel.components.checkpoint import publish
from nemo_automodel.components.checkpoint.background import Background, HostCopies
from nemo_automodel.components.checkpoint.contents import Contents
from nemo_automodel.components.checkpoint.fingerprint import as_saved, compare, versions
from nemo_automodel.components.checkpoint.lock import DirectoryLock
from nemo_automodel.components.checkpoint.publish import BEST, LATEST, Found
from nemo_automodel.components.checkpoint.ranks import Ranks
from nemo_automodel.components.checkpoint.resume import load_resume, read_state
from nemo_automodel.components.checkpoint.serving import serving_advice
from nemo_automodel.errors import CheckpointError, ConfigError, IncompatibleCheckpointError
from nemo_automodel.types import TrainState

logger = logging.getLogger(__name__)

VAL_LOSS = "val_loss.json"
"""In a checkpoint that was found the best after it was saved: its loss. Not in the manifest, which was sealed before."""


class Checkpointer:
    """Saves a run so that a kill at any moment costs nothing, and continues it exactly.

    Args:
        env: The process environment (given by the recipe); None for a single process.
        checkpoint_dir: Where checkpoints go, ``epoch_E_step_S`` each: E from 0, S optimizer steps done. On a file
            system that all ranks share, and of one run at a time. Default ``checkpoints``.
        enabled: Default true; false saves nothing (``restore_from`` still works).
        restore_from: ``latest`` (the newest complete checkpoint of ``checkpoint_dir``; a fresh start, said so, where
            there is none yet, so that a requeued job needs no other command), ``best``, the name of a checkpoint, or
            a path. Default: a fresh start.
        keep_last: How many checkpoints of this run to keep, besides those that LATEST and BEST name; null keeps all.
            Default 3. Checkpoints of other runs in the same directory are never removed: one whose name this run
            needs is renamed to ``<name>.<time it was written>``, and can still be restored by its path.
        save_merged: For LoRA: also merge the adapter into the base weights, as a full HF directory in ``model/``.
            Default false.
        extend: Let the plan differ from that of the checkpoint: more (or fewer) epochs or steps, and another
            ``lr_scheduler``. The learning rate follows the new plan from the next step on. Default false: a changed plan
            is an error.
        async_save: Training goes on once the state is copied to host memory (which must hold it: weights and
            optimizer, each rank its part); it is written and published meanwhile. The next save, and the end, wait for
            it; what goes wrong with it is raised at the next step. An error elsewhere meanwhile waits for it on one
            rank, and loses it on several. Default false.

    Attributes:
        stall_s: Seconds that the last save kept training waiting.
        run: Names the run in its checkpoints; a resumed one keeps it, where it goes on in the same directory.

    Raises:
        ConfigError: ``checkpoint_dir`` cannot be written, or ``keep_last`` is less than 1.
    """

    def __init__(
        self,
        env: Any | None = None,
        checkpoint_dir: str = "checkpoints",
        enabled: bool = True,
        restore_from: str | None = None,
        keep_last: int | None = 3,
        save_merged: bool = False,
        extend: bool = False,
        async_save: bool = False,
    ):
        if keep_last is not None and keep_last < 1:
            raise ConfigError(
                f"checkpoint.keep_last={keep_last}: at least one is always kept; write 1 or more, or null for all"
            )
        self.root = Path(checkpoint_dir).expanduser()
        if enabled:
            _check_writable(self.root)
        self.enabled = enabled
        self.restore_from = restore_from
        self.keep_last = keep_last
        self.save_merged = save_merged
        self.extend = extend
        self._ranks = Ranks(env)
        self._background = Background(env) if enabled and async_save else None
        self._copies = HostCopies() if self._background is not None else None
        self._directory = DirectoryLock(self.root)
        self.stall_s = 0.0
        self.run = uuid.uuid4().hex
        self._saved_step = 0  # the step whose state is on disk
        self._saved_name: str | None = None  # where, in this run's own directory
        self._schedule: Any | None = None
        self._offered: tuple[int | None, float] | None = None  # step, validation loss
        self._best: tuple[float, str] | None = None  # validation loss, name
        # Rank 0's, for the pointers and the two below: a save may be in the background.
        self._pointers = threading.Lock()
        self._unpublished: str | None = None  # what is being written
        self._late: tuple[float, str] | None = None  # that it is the best so far, heard meanwhile

    # --- saving ---------------------------------------------------------------------------------------------------

    def save(self, state: TrainState) -> Path | None:
        """Write and publish a checkpoint; every rank calls it.

        Returns:
            The checkpoint's directory (with ``async_save``: where it will be), or None if saving is off.

        Raises:
            CheckpointError: It could not be written (disk full, permissions, ...); earlier ones are untouched.
        """
        if not self.enabled:
            return None
        started = time.perf_counter()
        if self._background is not None:
            self._background.wait()  # for the one before
        self._directory.take(self._ranks)
        schedule: Any = state.schedule
        self._schedule = schedule
        name = f"epoch_{schedule.epoch}_step_{schedule.step}"
        best = self._takes_best(schedule.step, name)
        temporary = self._ranks.on_main(
            f"Creating {self.root / name}", lambda: publish.temporary_directory(self.root, name)
        )
        meta = {"name": name, "epoch": schedule.epoch, "step": schedule.step, **self._identity()}
        with self._whole_or_nothing(name, temporary):
            fingerprint = {**as_saved(state.fingerprint), **self._surroundings(state)}
            extra = {"best": best, "fingerprint": fingerprint}
            contents = Contents.of(state, temporary, self._ranks, extra, self.save_merged)
            self.save_merged = contents.merged
            copies = self._copies
            if copies is not None:
                self._ranks.together("Copying the state to host memory", lambda: contents.on_host(copies))

        def complete(ranks: Ranks) -> None:
            with self._whole_or_nothing(name, temporary):
                contents.write(ranks)
                publish.seal(temporary, meta, ranks)
                ranks.on_main(f"Publishing {name}", lambda: self._publish(temporary, name, best))

        self._unpublished = name
        if self._background is None:
            complete(self._ranks)
        else:
            self._background.start(complete)
        self._saved_step, self._saved_name, self._best = schedule.step, name, best
        self.stall_s = time.perf_counter() - started
        logger.info("Checkpoint %s kept training waiting for %.2f s.", name, self.stall_s)
        return self.root / name

    def check(self) -> None:
        """Raise what went wrong with a save in the background since it was last asked; cheap enough for every step."""
        if self._background is not None:
            self._background.check()

    @contextmanager
    def _whole_or_nothing(self, name: str, temporary: Path) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            if self._ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"{error}\ncheckpoint {name} was not saved; those saved before are intact in {self.root}"
            ) from error

    def _identity(self) -> dict[str, Any]:
        newest = max((found.sequence for found in publish.find_checkpoints(self.root)), default=0)
        return {"run": self.run, "sequence": max(newest, 0) + 1}

    def _publish(self, temporary: Path, name: str, best: tuple[float, str] | None) -> None:
        with self._pointers:
            publish.publish(temporary, self.root / name, self.run)
            publish.write_pointer(self.root, LATEST, name)
            late, self._late, self._unpublished = self._late, None, None
            if best is not None and best[1] == name:
                publish.write_pointer(self.root, BEST, name)
            elif late is not None:
                best = late
                self._point_to_best(*late)
            self._retain(best)

    def _retain(self, best: tuple[float, str] | None) -> None:
        """Remove this run's older checkpoints, but for those that are named."""
        if self.keep_last is None:
            return
        protected = {
            publish.read_pointer(self.root, LATEST),
            best[1] if best else None,
            publish.read_pointer(self.root, BEST),
        }
        mine = [found for found in publish.find_checkpoints(self.root) if found.run == self.run]
        for found in reversed(mine[self.keep_last :]):
            if found.name not in protected:
                publish.remove(found)

    # --- the best -------------------------------------------------------------------------------------------------

    def offer_best(self, val_loss: float) -> None:
        """Say that the weights of the running step have this validation loss; every rank calls it, with the same.

        Its checkpoint may be BEST then: saved already, or by the next save. A step that is never saved cannot be.

        Raises:
            CheckpointError: It could not be written that the checkpoint is the best.
        """
        schedule = self._schedule
        self._offered = (None if schedule is None else schedule.step, float(val_loss))
        name = self._saved_name
        if not self.enabled or schedule is None or name is None or schedule.step != self._saved_step:
            return
        best = self._takes_best(schedule.step, name)
        if best is not None and best is not self._best:
            self._ranks.on_main(f"Making {name} the best", lambda: self._make_best(*best))
            self._best = best

    def _make_best(self, val_loss: float, name: str) -> None:
        with self._pointers:
            if self._unpublished == name:
                self._late = (val_loss, name)  # what publishes it sees to it
            else:
                self._point_to_best(val_loss, name)
                self._retain((val_loss, name))

    def _point_to_best(self, val_loss: float, name: str) -> None:
        publish.write_text(self.root / name / VAL_LOSS, json.dumps(val_loss))
        publish.write_pointer(self.root, BEST, name)

    def _takes_best(self, step: int, name: str) -> tuple[float, str] | None:
        """The best so far (loss, name), this checkpoint included."""
        offered, self._offered = self._offered, None
        if offered is None or offered[0] not in (None, step) or math.isnan(offered[1]):
            return self._best
        if self._best is not None and not offered[1] < self._best[0]:
            return self._best
        return offered[1], name

    # --- restoring ------------------------------------------------------------------------------------------------

    def restore(self, state: TrainState) -> bool:
        """Continue from the checkpoint that ``restore_from`` asks for, and tidy up what a killed run left.

        A damaged newest checkpoint is named in a warning and the one before it is taken.

        Returns:
            Whether something was restored; false is a fresh start.

        Raises:
            CheckpointError: What was asked for is not there or damaged, every checkpoint is, or it belongs to another
                run (the message lists what differs).
        """
        self._schedule = state.schedule
        self._directory.take(self._ranks, create=self.enabled)  # without saving too: metrics are written there
        if self.enabled:
            touched = self._ranks.on_main("Cleaning up", lambda: publish.clean(self.root))
            if touched:
                logger.info("Removed what an interrupted run left in %s: %s", self.root, ", ".join(touched))
        found = self._choose()
        if found is None:
            return False
        directory = found.path / "resume"
        saved = self._ranks.together(f"Reading {directory}", lambda: read_state(directory))
        changed_plan = self._check(found, saved["fingerprint"], state)
        load_resume(state, directory, self._ranks, changed_plan)
        if found.path.parent.resolve() == self.root.resolve():  # else nothing of this run is in its own directory yet
            self.run, self._saved_step, self._saved_name = found.run, found.step, found.name
            self._best = (saved["best"][0], saved["best"][1]) if saved.get("best") else None
            own = self._ranks.on_main(f"Reading {VAL_LOSS}", lambda: _read_val_loss(found.path))
            if own is not None:
                self._best = (own, found.name)
        self._ranks.on_main("Repairing the pointers", lambda: self._repair_pointers(found))
        logger.info("Resumed from %s", found.path)
        return True

    def _repair_pointers(self, restored: Found) -> None:
        """A kill between publishing and pointing leaves them behind, and LATEST may name what turned out damaged."""
        if not self.enabled:
            return
        if self.restore_from == "latest":
            publish.write_pointer(self.root, LATEST, restored.name)
        best = publish.found_at(self.root / self._best[1]) if self._best else None
        if best is not None and best.run == self.run:
            publish.write_pointer(self.root, BEST, best.name)

    def _choose(self) -> Found | None:
        """The checkpoint to restore, verified byte by byte; None for a fresh start."""
        everything = self._ranks.on_main(f"Reading {self.root}", lambda: publish.find_checkpoints(self.root))
        if self.restore_from is None:
            if everything and self.enabled:
                logger.warning(
                    "%s already holds %d checkpoint(s) of an earlier run. This run starts anew; one whose name it needs "
                    "is kept as <name>.<time it was written>. To continue the earlier run: --checkpoint.restore_from=latest", self.root, len(everything),
                )  # fmt: skip
            return None
        if self.restore_from == "latest":
            return self._newest_sound(everything)
        asked = self._asked_for(everything)
        problems = publish.damage(asked.path, self._ranks)
        if problems:
            raise CheckpointError(f"{asked.path} is damaged: {problems[0]}; {self._what_there_is(everything, asked)}")
        return asked

    def _newest_sound(self, everything: list[Found]) -> Found | None:
        reasons = []
        for found in everything:
            problems = publish.damage(found.path, self._ranks)
            if not problems:
                return found
            reasons.append(f"{found.name}: {problems[0]}")
            logger.warning("%s is damaged (%s): falling back to the checkpoint before it.", found.path, problems[0])
        if reasons:
            raise CheckpointError(
                f"every checkpoint in {self.root} is damaged; not starting anew over them:\n  " + "\n  ".join(reasons)
                + "\nrepair or move them, or remove restore_from to start anew"
            )  # fmt: skip
        logger.warning("checkpoint.restore_from=latest: no checkpoint in %s yet, so this is a fresh start.", self.root)
        return None

    def _asked_for(self, everything: list[Found]) -> Found:
        asked = str(self.restore_from)
        name: str | None = asked
        if asked == "best":
            name = self._ranks.on_main("Reading BEST", lambda: publish.read_pointer(self.root, BEST))
        for found in everything:
            if found.name == name:
                return found
        path = Path(asked).expanduser()
        path = path.parent if path.name in ("model", "resume", "adapter") else path
        given = publish.found_at(path.resolve()) if asked != "best" else None
        if given is not None:
            return given
        raise CheckpointError(
            f"checkpoint.restore_from={asked}: nothing to restore there; {self._what_there_is(everything)}"
        )

    def _what_there_is(self, everything: list[Found], but: Found | None = None) -> str:
        names = [found.name for found in everything if found != but]
        return f"{self.root} has " + (
            ", ".join(names) + "; write restore_from: latest or one of them" if names else "no other checkpoint"
        )

    def _check(self, found: Found, saved: Mapping[str, Any], state: TrainState) -> bool:
        """Whether the run is to go on under another plan; raises where it is not this run's checkpoint."""
        changes = compare(saved, {**as_saved(state.fingerprint), **self._surroundings(state)})
        refused = changes.forbidden + ([] if self.extend else changes.plan)
        if refused:
            how = "set these back to continue it"
            if changes.plan and not changes.forbidden:
                how += "; or write checkpoint.extend: true to go on from there under the new plan"
            raise IncompatibleCheckpointError(
                f"{found.path} belongs to another run than this recipe describes (checkpoint -> this run):\n  "
                + "\n  ".join(refused)
                + f"\n{how}; or, to start anew from its weights, remove checkpoint.restore_from and set "
                f"model.pretrained_model_name_or_path: {found.path / 'model'}"
            )
        planned = getattr(state.schedule, "total_steps", found.step)
        if changes.plan and planned < found.step:
            raise IncompatibleCheckpointError(
                f"{found.path} has done {found.step} steps, and this recipe plans {planned}; write a larger "
                "step_scheduler.num_epochs or max_steps, or restore an earlier checkpoint"
            )
        if told := changes.plan + changes.harmless:
            logger.warning("Resuming with changed settings (checkpoint -> this run):\n  %s", "\n  ".join(told))
        return bool(changes.plan)

    def _surroundings(self, state: TrainState) -> dict[str, Any]:
        planned = {key: value for key, value in state.schedule.state_dict().items() if key == "total_steps"}
        return {"versions": {**versions(), "world_size": str(self._ranks.world_size)}, "schedule": planned}

    # --- the end --------------------------------------------------------------------------------------------------

    def finish(self, state: TrainState) -> Path | None:
        """Save the last step if it has no checkpoint; print where the result is and how it is served, or continued.

        Returns:
            The checkpoint of that step; None where there is none, since saving is off or no step was done.
        """
        schedule: Any = state.schedule
        stopped = schedule.step < getattr(schedule, "total_steps", 0)
        if self.enabled and schedule.step > self._saved_step:
            self.save(state)
        if self._background is not None:
            self._background.wait()
        self._directory.release()
        name = self._saved_name if self.enabled else None
        path = None if name is None else self.root / name
        if not self._ranks.is_main:
            return path
        if path is not None:
            print(serving_advice(path))
        if stopped:
            print(f"stopped at step {schedule.step} of {schedule.total_steps}{self._how_to_go_on(path)}")
        return path

    def _how_to_go_on(self, path: Path | None) -> str:
        if path is None:
            return "; nothing was saved" if self.enabled else "; checkpoint.enabled=false, not saved"
        asked = "latest" if publish.read_pointer(self.root, LATEST) == path.name else path.name
        return f", saved in {path}\nto go on, run the same command with --checkpoint.restore_from={asked}"


def _read_val_loss(directory: Path) -> float | None:
    try:
        return float(json.loads((directory / VAL_LOSS).read_text()))
    except (OSError, ValueError, TypeError):  # without it the checkpoint is sound, and one of many
        return None


def _check_writable(root: Path) -> None:
    """Fail now rather than at the first save; leaves nothing behind."""
    existing = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"checkpoint.checkpoint_dir={root}: {existing} is a file; write a directory")
    try:
        with tempfile.TemporaryFile(dir=existing):  # nothing less tells on every file system, or for root
            pass
    except OSError as error:
        raise ConfigError(
            f"checkpoint.checkpoint_dir={root}: {existing} is not writable ({error.strerror}); write another directory"
        ) from error
