"""A processor of images and videos, built for images alone: where what its video part needs (torchvision) is not there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.utils import FEATURE_EXTRACTOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, PushToHubMixin

from nemo_automodel._transformers import compat


class NoVideos(PushToHubMixin):
    """Stands where a processor has its video part: nothing can be done with it but saving what was loaded."""

    _auto_class = None

    def __init__(self, written: dict[str, Any]):
        self.written = written

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "written":
            raise AttributeError(name)
        return self.written.get(name)  # processors read its settings where no video is near, too

    def to_dict(self) -> dict[str, Any]:
        """What the checkpoint says of its video part."""
        return self.written

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise ImportError("this processor was built for images only; videos need torchvision")


def image_only_processor(cls: Any, name: str, **source: Any) -> Any:
    """``cls`` for the checkpoint ``name`` with ``NoVideos``, so that what videos need (torchvision, ...) is not needed."""
    values, rest = cls.get_processor_dict(name, **source)
    loaders: dict[str, Any] = {"tokenizer": AutoTokenizer.from_pretrained, "image_processor": pil_image_processor}
    written = values.get("video_processor")
    for file in (VIDEO_PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME):  # older checkpoints say both in one file
        written = written or compat.json_file_of(name, file, **source)
    arguments = [
        NoVideos(written or {}) if "video" in part else loaders[part](name, **source) for part in cls.get_attributes()
    ]

    def check(self: Any, argument_name: str, argument: Any) -> Any:
        if isinstance(argument, NoVideos):
            return NoVideos
        return cls.check_argument_for_proper_class(self, argument_name, argument)

    body = {"check_argument_for_proper_class": check, "__module__": cls.__module__, "__doc__": cls.__doc__}
    kind: Any = type(cls.__name__, (cls,), body)
    with _without_missing_packages(sys.modules[cls.__module__]):
        return kind.from_args_and_dict(arguments, values, **rest)


def pil_image_processor(name: str, **source: Any) -> Any:
    """The image processor of the checkpoint ``name``, its PIL version where transformers' own look-up wants torchvision."""
    try:
        return AutoImageProcessor.from_pretrained(name, **source)
    except ImportError:
        written = compat.json_file_of(name, FEATURE_EXTRACTOR_NAME, **source)
        written = written or compat.json_file_of(name, PROCESSOR_NAME, **source).get("image_processor", {})
        kind = str(written.get("image_processor_type", "")).removesuffix("Fast").removesuffix("Pil") + "Pil"
        found = getattr(transformers, kind, None)
        if found is None:
            raise
        return found.from_dict(written)


@contextmanager
def _without_missing_packages(module: Any) -> Iterator[None]:
    """What ``module`` wanted to import and could not (it is None there) counts as there, for a constructor's checks."""
    missing = [name for name, value in vars(module).items() if value is None and not name.startswith("_")]
    for name in missing:
        setattr(module, name, name)
    try:
        yield
    finally:
        for name in missing:
            setattr(module, name, None)
