"""One hundred ways to get a recipe wrong, made from two good ones: what is run, and what the message must say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_automodel.config.tree import Node, load_yaml

ROOT = Path(__file__).parents[3]
ANNOUNCED = ROOT / "examples/llm_finetune/llama3_2/llama3_2_1b_squad_peft.yaml"

FULL = """\
model:
  _target_: nemo_automodel.NeMoAutoModelForCausalLM.from_config
  config:
    _target_: transformers.LlamaConfig
    hidden_size: 64
    num_hidden_layers: 2
    tie_word_embeddings: true
  dtype: float32
tokenizer:
  pretrained_model_name_or_path: ./tokenizer
dataset:
  _target_: nemo_automodel.components.datasets.llm.column_mapped.make_instruction_dataset
  path_or_dataset_id: data.jsonl
  column_mapping:
    question: question
    answer: answer
  seq_length: 512
validation_dataset:
  _target_: nemo_automodel.components.datasets.llm.squad.make_squad_dataset
  dataset_name: data.json
  limit_dataset_samples: 16
dataloader:
  num_workers: 2
  shuffle: true
packed_sequence:
  packed_sequence_size: 1024
loss_fn:
  _target_: nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy
optimizer:
  _target_: torch.optim.AdamW
  lr: 1e-4
  betas: [0.9, 0.98]
  weight_decay: 0.01
lr_scheduler:
  _target_: nemo_automodel.components.training.lr.warmup_decay
  decay: cosine
  warmup_steps: 5
step_scheduler:
  global_batch_size: 8
  local_batch_size: 2
  max_steps: 20
  ckpt_every_steps: 10
clip_grad_norm:
  max_norm: 1.0
checkpoint:
  checkpoint_dir: checkpoints
  keep_last: 2
rng:
  seed: 7
compile:
  enabled: false
"""


@dataclass(frozen=True)
class Mutation:
    """One wrong command.

    Attributes:
        name: For the test's id.
        text: The recipe, or None where the mistake is not in it (then the full one is used).
        arguments: The command line; ``{yaml}`` stands for the recipe's path.
        line: Of the mistake in the file, 0 where it is on the command line.
        says: What the message must hold: the key as written, and the nearest valid name or type.
    """

    name: str
    text: str | None
    arguments: tuple[str, ...]
    line: int
    says: tuple[str, ...]


RUN = ("finetune", "llm", "-c", "{yaml}")

_FREE = ("column_mapping.",)  # keys of a mapping that is data, not arguments

_WRONG_VALUES = {
    "dp_size": ("[1, 2]", "expected"),
    "tp_size": ("two", "a whole number"),
    "sequence_parallel": ("maybe", "true or false"),
    "dim": ("8.5", "a whole number"),
    "use_triton": ("sometimes", "true or false"),
    "match_all_linear": ("3", "true or false"),
    "hidden_size": ("wide", "a whole number"),
    "num_hidden_layers": ("[2]", "a whole number"),
    "dtype": ("float33", "float32"),
    "seq_length": ("long", "a whole number"),
    "num_workers": ("true", "a whole number"),
    "packed_sequence_size": ("-1", "0 or more"),
    "lr": ("fast", "a number"),
    "betas": ("0.9", "a list"),
    "decay": ("cosin", "cosine"),
    "warmup_steps": ("5.5", "a whole number"),
    "global_batch_size": ("010", "write 10"),
    "max_steps": ("0", "at least 1"),
    "local_batch_size": ("3", "multiple of local_batch_size 3"),
    "max_norm": (".nan", "not a number"),
    "keep_last": ("none of them", "a whole number"),
    "seed": ("1:30", "base 60"),
    "enabled": ("2", "true or false"),
    "limit_dataset_samples": ('"16"', "remove the quotes"),
}


def typo(word: str) -> str:
    """A misspelling: two letters swapped, or in a short word one doubled."""
    if len(word) < 5:
        return word + word[-1]
    middle = next(i for i in range(len(word) // 2, len(word)) if word[i] != word[i - 1])
    return word[: middle - 1] + word[middle] + word[middle - 1] + word[middle + 1 :]


def mutations() -> list[Mutation]:
    """All of them, always the same hundred."""
    found: list[Mutation] = []
    for name, text in (("announced", ANNOUNCED.read_text()), ("full", FULL)):
        found += _mistyped_keys(name, text)
        found += _mistyped_targets(name, text)
        found += _wrong_values(name, text)
    return found + _wrong_arguments() + _wrong_commands()


def keys_of(text: str, path: Path) -> list[tuple[str, Node]]:
    """Every dotted key of a YAML with its node, depth first."""
    path.write_text(text)
    return list(_walk(load_yaml(path), ""))


def _walk(node: Node, prefix: str):
    for key, child in node.value.items():
        yield prefix + key, child
        if child.is_mapping:
            yield from _walk(child, f"{prefix}{key}.")


def _lines(text: str) -> list[tuple[int, str, str]]:
    """``(line number, key, rest of the line)`` of every line with a key."""
    split = [(i, *line.partition(":")[::2]) for i, line in enumerate(text.splitlines(), 1) if ":" in line]
    return [(i, key.strip(), rest) for i, key, rest in split]


def _replace(text: str, line: int, old: str, new: str) -> str:
    lines = text.splitlines(keepends=True)
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    return "".join(lines)


def _mistyped_keys(name: str, text: str) -> list[Mutation]:
    found = []
    for line, key, _ in _lines(text):
        if key in ("question", "answer"):  # a mapping that is data, not arguments
            continue
        wrong = typo(key)
        found.append(
            Mutation(f"{name}-key-{line}-{key}", _replace(text, line, key, wrong), RUN, line, (wrong, f"`{key}`"))
        )
    return found


def _mistyped_targets(name: str, text: str) -> list[Mutation]:
    found = []
    for line, key, rest in _lines(text):
        if key == "_target_":
            target = rest.strip().split()[0]
            last = target.rpartition(".")[2]
            wrong = target[: -len(last)] + typo(last)
            mutated = _replace(text, line, target, wrong)
            found.append(Mutation(f"{name}-target-{line}", mutated, RUN, line, ("_target_", typo(last), f"`{target}`")))
    return found


def _wrong_values(name: str, text: str) -> list[Mutation]:
    found = []
    for line, key, rest in _lines(text):
        if key in _WRONG_VALUES:
            value, says = _WRONG_VALUES[key]
            old = f"{key}:{rest.split('#')[0].rstrip()}"
            place = 0 if key == "local_batch_size" else line  # two keys disagree: either may be named
            found.append(
                Mutation(f"{name}-value-{key}", _replace(text, line, old, f"{key}: {value}"), RUN, place, (key, says))
            )
    return found


def _wrong_arguments() -> list[Mutation]:
    added = {
        "loss_fn": ("reduction: mean", "reduction"),
        "optimizer": ("learning_rate: 1e-4", "`lr`"),
        "step_scheduler": ("per_device_train_batch_size: 4", "`local_batch_size`"),
        "rng": ("sed: 3", "`seed`"),
        "checkpoint": ("output_dir: out", "`checkpoint_dir`"),
        "clip_grad_norm": ("momentum: 0.9", "max_norm"),
    }
    found = []
    for section, (argument, says) in added.items():
        line = FULL.splitlines().index(f"{section}:") + 2
        lines = FULL.splitlines(keepends=True)
        mutated = "".join([*lines[: line - 1], f"  {argument}\n", *lines[line - 1 :]])
        key = argument.partition(":")[0]
        found.append(Mutation(f"argument-{section}-{key}", mutated, RUN, line, (f"{section}.{key}", says)))
    return found


def _wrong_commands() -> list[Mutation]:
    def on_command_line(name: str, *arguments: str, says: tuple[str, ...]) -> Mutation:
        return Mutation(f"command-{name}", None, arguments, 0, says)

    return [
        on_command_line("dashless", *RUN, "optimizer.lr=1e-3", says=("optimizer.lr=1e-3", "--optimizer.lr=1e-3")),
        on_command_line("one-dash", *RUN, "-rng.seed=1", says=("-rng.seed=1", "--rng.seed=1")),
        on_command_line("override-key", *RUN, "--optimizer.lrr=1e-3", says=("optimizer.lrr", "`lr`")),
        on_command_line("override-section", *RUN, "--optimiser.lr=1e-3", says=("optimiser", "`optimizer`")),
        on_command_line("override-value", *RUN, "--rng.seed", "x", says=("rng.seed=x", "a whole number")),
        on_command_line("override-index", *RUN, "--optimizer.betas.7=0.9", says=("optimizer.betas.7", "2 appends")),
        on_command_line("override-through-value", *RUN, "--rng.seed.x=1", says=("rng.seed", "--rng.seed=value")),
        on_command_line("option", *RUN, "--print-confg", says=("--print-confg", "`--print-config`")),
        on_command_line("verb", "finetun", "llm", "-c", "{yaml}", says=("finetun", "`automodel finetune`")),
        on_command_line("verb-2", "mrege", says=("mrege", "`automodel merge`")),
        on_command_line("domain", "finetune", "lllm", "-c", "{yaml}", says=("lllm", "`llm`")),
    ]
