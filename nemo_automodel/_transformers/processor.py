"""Load the processor of a vision-language model: its image processor, tokenizer and chat template in one.

torchvision is not required: transformers takes the PIL image processors where it is missing, and a processor that would
insist on a video part, which needs it, is built for images only (that is said).
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from nemo_automodel._transformers.tokenizer import chat_template_of, choose_pad
from nemo_automodel.errors import AutoModelError, ModelError
from nemo_automodel.hub import explain, patiently

logger = logging.getLogger(__name__)


def load_processor(
    model_name: str | None = None,
    pretrained_model_name_or_path: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    image_options: dict[str, Any] | None = None,
) -> Any:
    """A Hugging Face processor with an image processor and a tokenizer that has a pad token.

    Args:
        model_name: Hub ID or path of the model (the recipe offers it).
        pretrained_model_name_or_path: Hub ID or path of another processor to use instead.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run the repository's own processor code (default false).
        chat_template: replaces the processor's template: Jinja text, or the path of a file that holds it.
        image_options: fields of the image processor to set, such as ``size``, ``max_pixels`` or ``do_image_splitting``;
            they are saved with it.

    Raises:
        ModelError: no processor there, one without images, or the Hub refuses.
    """
    name = pretrained_model_name_or_path or model_name
    if name is None:
        raise ModelError(
            "processor: nothing to load; set processor.pretrained_model_name_or_path to a Hub ID or a path"
        )
    processor = _load(str(name), {"revision": revision, "trust_remote_code": trust_remote_code})
    if image_options:
        processor.image_processor = _with_options(processor.image_processor, image_options)
    if chat_template is not None:
        processor.chat_template = chat_template_of(chat_template, "processor.chat_template")
    if processor.tokenizer.pad_token_id is None:
        choose_pad(processor.tokenizer, str(name))
    return processor


def _with_options(image_processor: Any, options: dict[str, Any]) -> Any:
    written = image_processor.to_dict()
    for key in options:
        if not hasattr(image_processor, key):
            fields = ", ".join(sorted(written))
            raise ModelError(f"processor.image_options.{key}: no field of its image processor, which has {fields}")
    return type(image_processor).from_dict({**written, **options})


def _load(name: str, source: dict[str, Any]) -> Any:
    from transformers import AutoProcessor

    what = f"processor {name}" + (f" (revision {source['revision']})" if source["revision"] else "")
    path = Path(name).expanduser()
    local = path.is_dir()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ModelError(f"{what}: no such directory (relative to {Path.cwd()})")
    place = str(path) if local else name
    try:
        try:
            processor = patiently(lambda: AutoProcessor.from_pretrained(place, **source), what)
        except (ImportError, ValueError, OSError) as error:
            if not isinstance(error, ImportError) and not re.search("torchvision|video processor", str(error)):
                raise
            processor = _for_images_only(place, source, error)
    except AutoModelError:
        raise
    except Exception as error:
        raise ModelError(_problem(error, what, name, source["revision"], local)) from error
    if not hasattr(processor, "image_processor") or getattr(processor, "tokenizer", None) is None:
        raise ModelError(
            f"{what}: found a {type(processor).__name__}, which takes no images; give a vision-language model, or set "
            "processor.pretrained_model_name_or_path to where its processor is"
        )
    return processor


def _for_images_only(name: str, source: dict[str, Any], error: Exception) -> Any:
    """The processor without its video part, where that is what could not be imported."""
    from transformers import AutoConfig

    from nemo_automodel._transformers import compat
    from nemo_automodel._transformers.image_only import image_only_processor

    try:
        config = AutoConfig.from_pretrained(name, **source)
    except (OSError, ValueError):
        config = None
    found = compat.processor_class(name, config, **source)
    if found is None:
        raise error
    processor = image_only_processor(found, name, **source)
    if any("video" in part for part in found.get_attributes()):
        logger.warning("processor %s: for images only, because its video part cannot be imported here", name)
    return processor


def _problem(error: Exception, what: str, name: str, revision: str | None, local: bool) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return f"{what} is made by code in its repository; read that code, then set processor.trust_remote_code=true and a revision"
    if isinstance(error, ImportError):
        return f"{what} needs a package that is not installed: {text[:300]}"
    if local:
        return (
            f"{what}: the directory has no processor that can be read ({type(error).__name__}: {text[:200]}); set "
            "processor.pretrained_model_name_or_path to where its preprocessor_config.json and tokenizer are"
        )
    return explain(error, "processor", name, revision)


__all__ = ["load_processor"]
