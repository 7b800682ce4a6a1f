"""``automodel demo``: the main job on an embedded default, offline and on a CPU, in about a minute.

Text and tokenizer are made here (see ``demo_data``). From then on it is what a user does: a YAML recipe, the
``finetune`` verb, and plain transformers to load what came out.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from nemo_automodel.cli import demo_data
from nemo_automodel.errors import EXIT_FAULT, EXIT_OK, ConfigError

RECIPE = """\
model:
  _target_: nemo_automodel.NeMoAutoModelForCausalLM.from_config   # a bare config: random weights
  config: {{model_type: llama, vocab_size: {vocab_size}, hidden_size: 256, intermediate_size: 768, num_hidden_layers: 4,
           num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 512, tie_word_embeddings: true,
           bos_token_id: null, eos_token_id: {eos_token_id}, pad_token_id: {pad_token_id}}}
  dtype: float32
tokenizer:
  pretrained_model_name_or_path: {tokenizer}
dataset:
  _target_: nemo_automodel.components.datasets.llm.chat.make_chat_dataset
  path_or_dataset_id: {train}
validation_dataset:
  _target_: nemo_automodel.components.datasets.llm.chat.make_chat_dataset
  path_or_dataset_id: {validation}
step_scheduler: {{global_batch_size: 16, local_batch_size: 16, max_steps: 200, ckpt_every_steps: 200, val_every_steps: 50}}
optimizer: {{lr: 0.002}}
lr_scheduler: {{warmup_steps: 30}}
checkpoint:
  checkpoint_dir: {checkpoints}
"""
"""The recipe that the demo writes, shows and runs."""

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # nothing is downloaded, and nothing should be asked for
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # of files read in a blink
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "OMP_WAIT_POLICY": "passive",  # on a busy machine, threads that spin while they wait make it ten times slower
}
_VOCAB_SIZE = 1536
_ANSWER_TOKENS = 40
_REQUIRED_FALL = 0.5  # the last steps' loss over the first step's must be below this


def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for data, tokenizer, recipe and checkpoints; an earlier demo's is replaced.")
    ] = Path("automodel-demo"),
) -> int:
    """Train a small model on the Python standard library's docstrings, offline and on a CPU, and show its answers.

    What it runs is an ordinary recipe, and what it writes an ordinary Hugging Face directory. The exit code is 0 where
    the loss fell.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    prepare_folder(output)
    _say("1. Data: questions about the Python standard library, answered by its own docstrings")
    recipe = write_inputs(output)
    _say(f"\n2. Recipe: {recipe}\n")
    _say(_indent(recipe.read_text(encoding="utf-8")))
    _say("3. Before training")
    _show_answer(untrained_model(recipe), output / "tokenizer")

    _say(f"\n4. Training: automodel finetune llm -c {recipe}\n")
    from nemo_automodel.recipes.run import run_recipe

    started = time.monotonic()
    exit_code = run_recipe("llm", ["-c", str(recipe)])
    if exit_code != EXIT_OK:
        return exit_code
    seconds = time.monotonic() - started

    checkpoints = output / "checkpoints"
    first, last = loss_fall(checkpoints / "metrics.jsonl")
    _say(f"\nThe loss went from {first:.3f} to {last:.3f} in {seconds:.0f} s, model building and saving included.")
    model_dir = checkpoints / (checkpoints / "LATEST").read_text(encoding="utf-8").strip() / "model"
    _say(f"\n5. After training: {model_dir}, loaded by plain transformers")
    _say(f"  files            {', '.join(sorted(path.name for path in model_dir.iterdir()))}")
    _show_answer(reloaded_model(model_dir), model_dir)
    _say(f"  the docstring    {dict(demo_data.documented_functions())['shutil.copytree']}")
    if last > _REQUIRED_FALL * first:
        _say(f"\nThe demo failed: the loss should have fallen below {_REQUIRED_FALL * first:.3f}.")
        return EXIT_FAULT
    _say(NEXT_STEPS.format(recipe=recipe, model_dir=model_dir, examples=find_examples()))
    return EXIT_OK


NEXT_STEPS = """
What to run next
  automodel finetune llm -c {recipe} --optimizer.lr 0.001    the same with one value changed
  automodel finetune llm -c {examples}/llm_finetune/qwen3/qwen3_8b_chat_peft.yaml    a Hub model with LoRA (a GPU of 40 GiB)
  vllm serve {model_dir}    any library that reads Hugging Face checkpoints serves it
  docs/write-your-own-recipe.md in the repository    your own data, loss or training loop\
"""


def find_examples() -> Path:
    """The folder of example recipes: a wheel has it inside the package, a clone beside it."""
    package = Path(__file__).resolve().parent.parent
    return next((path for path in (package / "examples", package.with_name("examples")) if path.is_dir()), package)


def prepare_folder(output: Path) -> None:
    """Create ``output``, without what an earlier demo left in it.

    Raises:
        ConfigError: ``output`` is a file, or a folder with something else in it.
    """
    if output.is_dir() and (output / "recipe.yaml").is_file() and (output / "train.jsonl").is_file():
        shutil.rmtree(output)
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output}: not empty, and not written by an earlier demo; name another folder")
    output.mkdir(parents=True, exist_ok=True)


def write_inputs(output: Path) -> Path:
    """Write data, tokenizer and recipe into ``output``; returns the recipe's path."""
    train, validation = demo_data.conversations()
    demo_data.write_jsonl(output / "train.jsonl", train)
    demo_data.write_jsonl(output / "validation.jsonl", validation)
    tokenizer = demo_data.train_tokenizer(train, output / "tokenizer", _VOCAB_SIZE)
    _say(f"  {output / 'train.jsonl'}: {len(train)} rows, such as\n  {json.dumps(train[0])}")
    _say(f"  {output / 'validation.jsonl'}: {len(validation)} rows, the same functions asked about in other words")
    _say(f"  {output / 'tokenizer'}: byte-level BPE with {len(tokenizer)} entries, trained on these rows")
    recipe = output / "recipe.yaml"
    text = RECIPE.format(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tokenizer=_yaml_scalar(output / "tokenizer"),
        train=_yaml_scalar(output / "train.jsonl"),
        validation=_yaml_scalar(output / "validation.jsonl"),
        checkpoints=_yaml_scalar(output / "checkpoints"),
    )
    recipe.write_text(text, encoding="utf-8")
    return recipe


def untrained_model(recipe: Path) -> Any:
    """The model that ``recipe`` names, as transformers initialises it."""
    import torch
    import yaml
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]["config"]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def reloaded_model(model_dir: Path) -> Any:
    """What the run wrote, loaded by transformers alone."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir)


def loss_fall(metrics: Path) -> tuple[float, float]:
    """Loss of the first step, and the mean of the last five, read from ``metrics``."""
    losses = [json.loads(line)["loss"] for line in metrics.read_text(encoding="utf-8").splitlines()]
    return losses[0], sum(losses[-5:]) / len(losses[-5:])


def answer(model: Any, tokenizer_dir: Path, question: str) -> str:
    """The most likely answer to ``question``, decoded without special tokens."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_dir)
    prompt: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output_ids = model.eval().generate(**prompt, max_new_tokens=_ANSWER_TOKENS, do_sample=False)
    return tokenizer.decode(output_ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def _show_answer(model: Any, tokenizer_dir: Path) -> None:
    text = " ".join(answer(model, tokenizer_dir, demo_data.PROBE).split())
    printable = "".join(c if c.isprintable() else "?" for c in text)
    _say(f"  question         {demo_data.PROBE}")
    _say(f"  answer           {printable[:100]}")


def _yaml_scalar(path: Path) -> str:
    """``path`` as YAML reads it back: quoted where it has a space, a colon or the like."""
    return str(path) if re.fullmatch(r"[\w./-]+", str(path)) else json.dumps(str(path))


def _indent(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


def _say(text: str) -> None:
    print(text, flush=True)
