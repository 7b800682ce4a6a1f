"""``automodel merge``: add a LoRA adapter to its base model and write the sum as an ordinary HF directory."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from nemo_automodel.errors import CheckpointError, ConfigError, ModelError
from nemo_automodel.hub import explain, patiently

_CONFIG = "adapter_config.json"
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_DEQUANTIZED = ("fp8", "mxfp8", "mxfp4")  # transformers loads them as plain weights where it is asked to


def merge(
    adapter_dir: Annotated[Path, typer.Argument(help="A PEFT adapter directory, or a checkpoint that holds one.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Default: beside it, ending in -merged.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model; default: the one the adapter names.")] = None,
    dtype: Annotated[
        str, typer.Option(help=f"Dtype to write: auto (the base's own), {', '.join(_DTYPES[1:])}.")
    ] = "auto",
) -> Path:
    """Merge a LoRA or DoRA adapter into its base model and write a full Hugging Face directory.

    Each sum is made in float32 and rounded once. Returns the directory written.

    Raises:
        CheckpointError: No adapter there, or one of a kind that cannot be merged.
        ConfigError: The output exists already, or the dtype is unknown.
        ModelError: The base model is not found or does not fit.
    """
    from nemo_automodel.components._peft.merge import merge_adapter, read_adapter_config, read_adapter_weights

    if dtype not in _DTYPES:
        raise ConfigError(f"--dtype {dtype}: unknown; write one of {', '.join(_DTYPES)}")
    adapter_dir = adapter_dir.expanduser()
    directory = find_adapter(adapter_dir)
    target = output.expanduser() if output else _default_output(adapter_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--output {target}: exists already; remove it or write another one")
    config = read_adapter_config(directory)
    name = os.path.expanduser(base) if base else config.get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"{directory / _CONFIG} names no base model; pass it: --base MODEL")
    model = _load_base(str(name), config.get("revision") if base is None else None, dtype)
    merge_adapter(model, config, read_adapter_weights(directory))
    _write(target, model, _load_tokenizer(directory, str(name)))
    print(f"Merged {directory} into {name}: {target}\n  serve it:  vllm serve {shlex.quote(str(target))}")
    return target


def find_adapter(path: Path) -> Path:
    """The adapter directory at ``path``: itself, or its ``adapter/`` or ``model/`` (a checkpoint).

    Raises:
        CheckpointError: None of them holds an adapter.
    """
    for candidate in (path, path / "adapter", path / "model"):
        if (candidate / _CONFIG).is_file():
            return candidate
    problem = "is not a directory" if not path.is_dir() else f"holds no {_CONFIG}"
    full = next((p for p in (path, path / "model") if (p / "config.json").is_file()), None)
    hint = (
        f"{full} is a full model, with nothing to merge"
        if full
        else "give an adapter directory or an epoch_E_step_S one"
    )
    raise CheckpointError(f"{path}: {problem}; {hint}")


def _default_output(path: Path) -> Path:
    path = path.resolve()
    path = path.parent if path.name in ("model", "adapter") else path
    return path.with_name(path.name + "-merged")


def _load_base(name: str, revision: str | None, dtype: str) -> Any:
    import transformers

    from nemo_automodel._transformers.compat import forget_quantization

    try:
        config = patiently(lambda: transformers.AutoConfig.from_pretrained(name, revision=revision), name)
        declared = (getattr(config, "architectures", None) or ["AutoModelForCausalLM"])[0]
        model_class: Any = getattr(transformers, declared, transformers.AutoModelForCausalLM)
        options = {"revision": revision, "dtype": dtype, "output_loading_info": True}
        if quantised := _take_quantization(config):
            if quantised.get("quant_method") not in _DEQUANTIZED:
                raise ModelError(f"the base model {name} is quantised; pass its 16-bit original: --base MODEL")
            config.quantization_config = {**quantised, "dequantize": True}
            options["config"] = config
        model, info = patiently(lambda: model_class.from_pretrained(name, **options), name)
        if quantised:
            forget_quantization(model)
    except (OSError, ValueError) as error:
        raise ModelError(f"{explain(error, 'model', name, revision)}; or pass where it is: --base MODEL") from error
    if info["missing_keys"]:
        raise ModelError(
            f"the base model {name} lacks tensors: {', '.join(sorted(info['missing_keys'])[:5])}; get it whole"
        )
    return model.eval()


def _take_quantization(config: Any) -> dict[str, Any] | None:
    """How the weights are quantised, taken out of ``config``, or of its text model's, which may say it instead."""
    parts = {id(part): part for part in (config, config.get_text_config(decoder=True))}.values()
    found = [vars(part).pop("quantization_config", None) for part in parts]
    return next(filter(None, found), None)


def _load_tokenizer(directory: Path, base: str) -> Any | None:
    """The adapter's own tokenizer or processor (it may carry another chat template), else the base's, else none."""
    from transformers import AutoTokenizer

    from nemo_automodel._transformers.processor import load_processor

    if (directory / "processor_config.json").exists():
        return load_processor(str(directory))
    for source in (str(directory), base):
        try:
            return AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError):
            continue
    return None


def _write(target: Path, model: Any, tokenizer: Any | None) -> None:
    """Write aside and rename, so that a directory of that name is always whole."""
    from safetensors import SafetensorError

    from nemo_automodel.components.checkpoint.hf import gather_weights, write_model
    from nemo_automodel.components.checkpoint.publish import temporary_directory

    try:
        temporary = temporary_directory(target.absolute().parent, target.name)
        try:
            write_model(temporary, model, gather_weights(model, None, None, keep=True), tokenizer, model.dtype)
            if target.exists():
                target.rmdir()  # empty, as checked
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except Exception as error:  # tokenizers has no class for it
        if not isinstance(error, OSError | SafetensorError) and "(os error " not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{target} cannot be written: {reason}; write to another place: -o DIRECTORY") from error
