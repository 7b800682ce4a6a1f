"""The stages of a certificate: the tiny twin, then one block of each kind at real width; text first, then images.

What the blocks are filled and fed with is the run's own where it can be had: its weights, its first micro-batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from nemo_automodel._transformers import certificate_cache as cached
from nemo_automodel._transformers import certificate_weights as weights
from nemo_automodel._transformers import twin_fields as names
from nemo_automodel._transformers.certificate_rows import Documents, Pictures, compact_vocabulary, first_documents
from nemo_automodel._transformers.certificate_trial import NotTaken, Trial
from nemo_automodel._transformers.certificate_verdict import Verdict, settle
from nemo_automodel._transformers.plain import sharpen, without_chance
from nemo_automodel._transformers.stack import FP8, KERNEL, PACKING, Stack, plain_class
from nemo_automodel._transformers.tiny_twin import kept_blocks, moved_tokens, one_block_each, tiny_twin
from nemo_automodel._transformers.trial import build
from nemo_automodel._transformers.twin_batch import takes_images
from nemo_automodel.errors import ModelError

TWIN, REAL, IMAGES = "tiny twin, float32", "real width", ", images"
_TWIN_LENGTHS = (7, 18, 12)  # tokens of three documents; the middle one longer than the twin's window of 8
_CPU = ((5, 17, 11), 16, 8, 4096)  # made up ones; most tokens of a real one; of a window; of the vocabulary
_CUDA = ((33, 400, 591), 341, 128, 32768)
_CPU_PARAMETERS = 3e8  # more would take longer than the ten seconds there are
_BYTES = 16  # a parameter, with its float32 reference and the gradients of both


class Case:
    """A model to certify, and what it is tried on; of rank 0 alone.

    Args:
        model: the live one; only looked at.
        stack: what it is about to be trained with.
        device: where.
        loader: whose first micro-batch it is tried on; None for made up documents.
    """

    def __init__(self, model: Any, stack: Stack, device: torch.device, loader: Any) -> None:
        self.cls, self.config = plain_class(model), getattr(model, "config", None)
        self.stack, self.device, self.verdict = stack, device, Verdict()
        if self.cls is None or not isinstance(self.config, PretrainedConfig):
            self.cls = None
            self.verdict.unproved.append("it is no model of transformers")
            return
        self.dtype: torch.dtype = model.__dict__.get("_automodel_compute_dtype") or next(model.parameters()).dtype
        self.lengths, self.most, self.window, vocabulary = _CUDA if device.type == "cuda" else _CPU
        self.whole = getattr(names.text_part(self.config), "vocab_size", vocabulary)
        self.vocabulary = self.whole if self.whole <= vocabulary else vocabulary + self.whole % 64
        self.documents, self.rows_are = self._read(loader)
        self.source = weights.source_of(model)
        self.buffers = cached.free_buffers(model)
        self.wrong_buffers: dict[str, Tensor] = {}
        self.blocks: Any = None

    @property
    def key(self) -> str:
        """The same for a case that would be found the same."""
        assert self.cls is not None
        tried = {"documents": self.documents and self.documents.digest(), "weights": self.source}
        return cached.key_of(self.cls, self.config, self.stack, self.device, self.dtype, self.buffers, tried)

    def prepare(self, live: nn.Module) -> dict[str, weights.Wanted]:
        """Build the blocks; returns which values of the ``live`` model they get, none where it has fresh ones itself."""
        wanted: dict[str, weights.Wanted] = {}

        def plan() -> None:
            self._build_blocks()
            if self.source is not None:
                layers = kept_blocks(self.config, self.least)  # type: ignore[arg-type]
                wanted.update(weights.wanted_of(self.blocks, live, layers, self.rows))

        _attempt(REAL, self.verdict, plan)
        return wanted

    def prove(self, small: Any, values: dict[str, Tensor]) -> None:
        """Put into ``verdict`` what all stages find; ``small`` is a twin that is there already, or None."""
        made = [small or self._build_twin()]
        sees = takes_images(made[0])
        stack = _without(self.stack, KERNEL, FP8)
        self._settle(TWIN, self._twin(made, stack), stack, "made up documents; fresh weights", alone=not sees)
        stage = f"{REAL}, {str(self.dtype)[6:]}"
        if self.blocks is not None:
            self.wrong_buffers = _wrong_buffers(self.buffers, cached.free_buffers(self.blocks))
            tried = f"{self.rows_are}; {self._weights_are(values)}"
            self._settle(stage, self._real([self.blocks], self.stack, values), self.stack, tried, alone=not sees)
        if sees:
            self._prove_images(values, stage)

    def _prove_images(self, values: dict[str, Tensor], stage: str) -> None:
        stack = _without(self.stack, KERNEL, FP8, PACKING)
        tried = "two rows with a made up image each"
        self._settle(TWIN + IMAGES, self._twin([], stack, True), stack, f"{tried}; fresh weights")
        if self.blocks is not None:
            stack, tried = _without(self.stack, PACKING), f"{tried}, of few patches; {self._weights_are(values)}"
            self._settle(stage + IMAGES, self._real([], stack, values, True), stack, tried)

    def _settle(
        self, stage: str, trial: Callable[[int], Trial], stack: Stack, tried: str, *, alone: bool = True
    ) -> None:
        """One stage; where it is not ``alone``, transformers may refuse its rows: it wants images, which come later."""
        self.verdict.tried[stage] = tried

        def action() -> None:
            try:
                settle(trial, stack, self.verdict, stage)
            except (NotTaken, NotImplementedError) as error:  # the latter from a model without embeddings
                if alone:
                    raise
                self.verdict.tried[stage] = f"nothing: text alone is not what it takes ({error})"

        _attempt(stage, self.verdict, action)

    # --- the tiny twin ------------------------------------------------------------------------------------------

    def _twin(self, made: list[Any], stack: Stack, sees: bool = False) -> Callable[[int], Trial]:
        def trial(seed: int) -> Trial:
            model = made.pop() if made else None
            model = self._build_twin() if model is None else model
            model.__class__ = self.cls
            torch.manual_seed(seed)
            sharpen(model)
            rows = Pictures(model, seed) if sees else Documents.random(model, _TWIN_LENGTHS, seed)
            return Trial(model, stack, rows, seed=seed)

        return trial

    def _build_twin(self) -> Any:
        twin = tiny_twin(self.config)  # type: ignore[arg-type]
        without_chance(twin)
        return build(self.cls, twin)

    # --- real width ---------------------------------------------------------------------------------------------

    def _real(
        self, made: list[Any], stack: Stack, values: dict[str, Tensor], sees: bool = False
    ) -> Callable[[int], Trial]:
        def trial(seed: int) -> Trial:
            model = made.pop() if made else build(self.cls, copy.deepcopy(self.cut), self.device)
            torch.manual_seed(seed)
            sharpen(model, but=values)
            weights.load(model, values)
            rows = Pictures(model, seed, self.dtype) if sees else self._rows(model, seed)
            return Trial(model, stack, rows, self.dtype, seed)

        return trial

    def _rows(self, model: Any, seed: int) -> Documents:
        lengths = _within_positions(self.cut, self.lengths)
        if self.documents is None:
            return Documents.random(model, lengths, seed)
        rows = self.documents.mapped(self.numbers).and_random(model, lengths, seed)
        return rows.rolled() if seed else rows

    def _read(self, loader: Any) -> tuple[Documents | None, str]:
        if loader is None:
            return None, "made up documents"
        try:
            most = min(self.most, max(_within_positions(self.config, (self.most,))))  # type: ignore[arg-type]
            found = first_documents(loader, self.config, most)  # type: ignore[arg-type]
        except Exception as error:  # of any kind: it is a user's own data; the run's first step will say what is wrong
            return None, f"made up documents, because the first micro-batch cannot be read ({_said(error)})"
        if found is None:
            return None, "made up documents, because those of the first micro-batch are too short"
        lengths = ", ".join(str(len(ids)) for ids in found.ids)
        more = "" if len(found.ids) == len(self.lengths) else f", and {len(self.lengths) - len(found.ids)} made up"
        return found, f"documents of the first micro-batch ({lengths} tokens){more}"

    def _weights_are(self, values: dict[str, Tensor]) -> str:
        if not values:
            return "fresh weights"
        fresh = weights.left_fresh(self.shapes, values)
        return "the model's own weights" + (f", but for {len(fresh)} tensors ({fresh[0]}, ...)" if fresh else "")

    def _build_blocks(self) -> None:
        """One block of each kind; two, where a model divides by the number of its layers less one."""
        longest = self.lengths if self.documents is None else [len(ids) for ids in self.documents.ids]
        window = max(2, min(self.window, max(longest) // 2))
        for least in (1, 2):
            cut = one_block_each(self.config, vocab_size=self.vocabulary, window=window, least=least)  # type: ignore[arg-type]
            without_chance(cut)
            try:
                with torch.device("meta"):
                    self.shapes = self.cls._from_config(cut)  # type: ignore[union-attr]
                _require_room(sum(p.numel() for p in self.shapes.parameters()), self.device)
                self.blocks, self.cut, self.least = build(self.cls, copy.deepcopy(cut), self.device), cut, least
                break
            except (ModelError, torch.OutOfMemoryError):
                raise
            except Exception:  # any model's own code
                if least == 2:
                    raise
        special = moved_tokens(self.config, self.vocabulary)  # type: ignore[arg-type]
        self.numbers, self.rows = compact_vocabulary(self.documents, special, self.vocabulary, self.whole)


def _wrong_buffers(live: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in right.items():
        mine = live.get(name)
        if mine is None or mine.shape != value.shape:
            continue
        held = value.to(mine.dtype)  # what a model of 16 bit can hold of it
        if not torch.allclose(mine.float().cpu(), held.float().cpu(), rtol=1e-4, atol=1e-7):
            found[name] = value.cpu()
    return found


def _require_room(numbers: int, device: torch.device) -> None:
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


def _attempt(stage: str, verdict: Verdict, action: Callable[[], None]) -> None:
    try:
        action()
    except Exception as error:  # of any kind: it is any model's own code
        verdict.unproved.append(f"{stage}: {_said(error)}")


def _said(error: Exception) -> str:
    reason = (str(error).splitlines() or [""])[0][:200]
    return reason if isinstance(error, ModelError) else f"{type(error).__name__}: {reason}"


__all__ = ["IMAGES", "REAL", "TWIN", "Case"]
