"""What the processor of a model type is without torchvision: read from what transformers registers, for the coverage table."""

from __future__ import annotations

from nemo_automodel._transformers import compat

PIL, IMAGES_ONLY = "PIL", "PIL, images only"
TORCHVISION = "torchvision"
BY_CHECKPOINT, CHECKPOINT_IMAGES_ONLY = "by checkpoint", "by checkpoint, images only"
NO_IMAGES, NONE = "no images", "none"

MEANING = """\
**processor**: what `processor:` loads where torchvision is not installed. *PIL*: its image processor has a PIL version.
*images only*: it has a video part, which needs torchvision and is left out (said at loading; what the checkpoint says of
videos is saved again). *torchvision*: its image processor has no PIL version, or the processor itself insists, so that it
is refused and the error names the package. *by checkpoint*: transformers registers no image processor for the type, so
the checkpoint's own file names it. *no images*: a processor without images. *none*: none is registered."""


def processor_kind(model_type: str) -> str:
    """What a processor of ``model_type`` is without torchvision, one of this module's constants."""
    cls, by_backend = compat.registered_processor(model_type)
    if cls is None:
        return PIL if by_backend.get("pil") else TORCHVISION if by_backend else NONE
    if any("torchvision" in package for package in compat.required_packages(cls)):
        return TORCHVISION
    parts = cls.get_attributes()
    if "image_processor" not in parts:
        return NO_IMAGES
    films = any("video" in part for part in parts)
    if not by_backend:
        return CHECKPOINT_IMAGES_ONLY if films else BY_CHECKPOINT
    if not by_backend.get("pil"):
        return TORCHVISION
    return IMAGES_ONLY if films else PIL


__all__ = ["MEANING", "processor_kind"]
