"""Load the tokenizer of a model, ready for training, and change nothing about it in silence."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from nemo_automodel.errors import ModelError
from nemo_automodel.hub import explain, patiently

logger = logging.getLogger(__name__)

_PAD_TOKENS = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|finetune_right_pad|>", "<|endoftext|>")
_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "tekken.json")


def load_tokenizer(
    model_name: str | None = None,
    pretrained_model_name_or_path: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    pad_token: str | None = None,
    eos_token: str | None = None,
    add_tokens: list[str] | None = None,
    **kwargs: Any,
) -> Any:
    """A Hugging Face tokenizer with a pad token.

    Args:
        model_name: Hub ID or path of the model (the recipe offers it).
        pretrained_model_name_or_path: Hub ID or path of another tokenizer to use instead.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run the repository's own tokenizer code (default false).
        chat_template: replaces the tokenizer's template: Jinja text, or the path of a file that holds it.
        pad_token: replaces the tokenizer's pad token; must be in the vocabulary. Default: the tokenizer's own, else a
            pad-like token of its vocabulary, else its EOS (reported; padding is never recognised by id, so no EOS is lost).
        eos_token: replaces the tokenizer's EOS; must be in the vocabulary.
        add_tokens: tokens to add to the vocabulary. The model's embedding must have a row for each (many have some to spare;
            else ``resize_token_embeddings`` it and save it first). Where it is frozen, as under LoRA, they stay untrained.
        **kwargs: passed on to ``AutoTokenizer.from_pretrained``.

    Raises:
        ModelError: no tokenizer there, the Hub refuses, or a token that is not in the vocabulary.
    """
    name = pretrained_model_name_or_path or model_name
    if name is None:
        raise ModelError(
            "tokenizer: nothing to load; set tokenizer.pretrained_model_name_or_path to a Hub ID or a path"
        )
    tokenizer = _load(str(name), revision, trust_remote_code, kwargs)
    if add_tokens:
        tokenizer.tokens_added = tokenizer.add_tokens(list(add_tokens))
    if chat_template is not None:
        tokenizer.chat_template = chat_template_of(chat_template, "tokenizer.chat_template")
    if eos_token is not None:
        tokenizer.eos_token = _known(tokenizer, eos_token, "eos_token")
    if pad_token is not None:
        tokenizer.pad_token = _known(tokenizer, pad_token, "pad_token")
    elif tokenizer.pad_token_id is None:
        choose_pad(tokenizer, str(name))
    return tokenizer


def _load(name: str, revision: str | None, trust_remote_code: bool, kwargs: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    what = f"tokenizer {name}" + (f" (revision {revision})" if revision else "")
    path = Path(name).expanduser()
    local = path.is_dir()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ModelError(f"{what}: no such directory (relative to {Path.cwd()})")
    if local and not any((path / file).exists() for file in _FILES):
        raise ModelError(
            f"{what}: the directory has no tokenizer files ({', '.join(_FILES[:3])}); "
            "set tokenizer.pretrained_model_name_or_path to where they are"
        )
    if local:
        _check_files(path, what, name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code, **kwargs}
    if options.get("cache_dir"):
        options["cache_dir"] = Path(options["cache_dir"]).expanduser()
    try:
        return patiently(lambda: AutoTokenizer.from_pretrained(str(path) if local else name, **options), what)
    except Exception as error:
        raise ModelError(_problem(error, what, name, None if local else revision, local)) from error


def _problem(error: Exception, what: str, name: str, revision: str | None, local: bool) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return f"{what} is made by code in its repository; read that code, then set tokenizer.trust_remote_code=true and a revision"
    if isinstance(error, ImportError) or "sentencepiece" in text.lower() or "tiktoken" in text.lower():
        return f"{what} needs a package that is not installed: {text.strip().splitlines()[0]}"
    if (
        local and "validat" in type(error).__name__.lower()
    ):  # of config.json, which the tokenizer's class is looked up in
        return f"model {name}: config.json: {' '.join(text.split())[:300]}; correct it"
    if local:
        return f"{what}: its files cannot be read ({type(error).__name__}: {' '.join(text.split())[:200]}); download them again"
    return explain(error, "tokenizer", name, revision)


def _check_files(directory: Path, what: str, name: str) -> None:
    """Name a file that a clone without Git LFS left as a pointer, or that is not JSON; transformers names neither."""
    for file in (directory / file for file in ("config.json", *_FILES)):
        if not file.is_file():
            continue
        owner = f"model {name}" if file.name == "config.json" else what
        with file.open("rb") as content:
            pointer = content.read(40).startswith(b"version https://git-lfs")
        if pointer:
            raise ModelError(
                f"{owner}: {file.name} is a Git LFS pointer, not the file itself; run `git lfs pull` in {directory}"
            )
        if file.suffix == ".json":
            try:
                json.loads(file.read_bytes())
            except ValueError as error:
                raise ModelError(f"{owner}: {file} is not valid JSON ({error}); download it again") from None


def chat_template_of(text_or_path: str, key: str) -> str:
    """The Jinja text that ``key`` of the recipe gives, or that stands in the file it names; ModelError for neither."""
    is_text = "{%" in text_or_path or "{{" in text_or_path
    if is_text:
        return text_or_path
    try:
        return Path(text_or_path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{key}={text_or_path!r}: neither Jinja text nor a readable file ({error.__class__.__name__})"
        ) from None


def _known(tokenizer: Any, token: str, key: str) -> str:
    if token not in tokenizer.get_vocab():
        raise ModelError(
            f"tokenizer.{key}={token!r}: not in the vocabulary; name a token that is, or list it in tokenizer.add_tokens"
        )
    return token


def choose_pad(tokenizer: Any, name: str) -> None:
    """Give ``tokenizer`` a pad token of its vocabulary and say which; ModelError where there is none to take."""
    vocabulary = tokenizer.get_vocab()
    dedicated = next((token for token in _PAD_TOKENS if token in vocabulary and token != tokenizer.eos_token), None)
    token = dedicated or tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
    if token is None:
        raise ModelError(
            f"tokenizer {name!r} has no pad, EOS, unknown or BOS token; set tokenizer.pad_token to a token of its vocabulary"
        )
    tokenizer.pad_token = token
    also = (
        " (also its EOS; that is safe here, since padding is known by length and not by id)"
        if token == tokenizer.eos_token
        else ""
    )
    logger.warning(
        "tokenizer %s has no pad token: %r is used%s; set tokenizer.pad_token to choose another", name, token, also
    )


__all__ = ["chat_template_of", "choose_pad", "load_tokenizer"]
