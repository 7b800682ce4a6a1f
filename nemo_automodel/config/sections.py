"""The sections of a recipe: what each calls by default, and what the recipe gives it at run time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any


class Presence(Enum):
    """What an absent section means."""

    DEFAULT = "its default target is called"
    OPTIONAL = "nothing is built: None"
    REQUIRED = "an error"


@dataclass(frozen=True)
class Section:
    """One section.

    Attributes:
        doc: What it decides, in a line.
        target: Called where the YAML gives no ``_target_``; None where it must.
        offered: Arguments the recipe gives to a callable that takes them; a value in the YAML goes before.
        fixed: Arguments the recipe insists on where it gives them.
        needed: Of those offered, the ones a replacement must take to be of use.
        defaults: Arguments of ``target`` where neither the YAML nor its own defaults say what we want.
    """

    doc: str
    target: str | None = None
    offered: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    presence: Presence = Presence.DEFAULT


MODEL = "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained"
LR_LORA, LR_FULL = 1e-4, 1e-5

_DATASET = "an HF-style dataset builder, such as nemo_automodel.components.datasets.llm.squad.make_squad_dataset"
_BATCHING = ("dataset", "tokenizer", "packing", "seed", "dp_rank", "dp_size", "global_batch_size", "local_batch_size", "pin_memory")  # fmt: skip

LLM: dict[str, Section] = {
    "model": Section(
        "The model: which autoclass, which checkpoint or config.",
        target=MODEL,
        offered=("peft", "distributed", "compile", "packed", "fp8", "quantization", "freeze"),
        needed=("distributed",),
        presence=Presence.REQUIRED,
    ),
    "tokenizer": Section(
        "The tokenizer; by default the model's own.",
        target="nemo_automodel._transformers.tokenizer.load_tokenizer",
        offered=("model_name",),
    ),
    "peft": Section(
        "LoRA adapters; absent = all weights are trained.",
        target="nemo_automodel.components._peft.lora.PeftConfig",
        presence=Presence.OPTIONAL,
    ),
    "dataset": Section(
        f"The training data: {_DATASET}.",
        offered=("tokenizer",),
        presence=Presence.REQUIRED,
    ),
    "validation_dataset": Section(
        "The validation data, built as `dataset` is; absent = no validation.",
        offered=("tokenizer",),
        presence=Presence.OPTIONAL,
    ),
    "dataloader": Section(
        "How rows become micro-batches.",
        target="nemo_automodel.components.datasets.loader.DataLoader",
        offered=_BATCHING,
        fixed=("shuffle", "drop_last"),
        needed=("dataset",),
    ),
    "packed_sequence": Section(
        "Several documents in one row, isolated from each other.",
        target="nemo_automodel.components.datasets.packing.PackedSequence",
    ),
    "loss_fn": Section(
        "The training criterion: a sum over label tokens.",
        target="nemo_automodel.components.loss.linear_ce.FusedLinearCrossEntropy",
    ),
    "optimizer": Section(
        "The optimizer. The default learning rate is 1e-4 with a `peft` section and 1e-5 without.",
        target="torch.optim.AdamW",
        offered=("params",),
        needed=("params",),
        defaults={"lr": LR_FULL, "betas": [0.9, 0.95], "weight_decay": 0.0, "fused": True},
    ),
    "lr_scheduler": Section(
        "The learning rate over the steps of the run.",
        target="nemo_automodel.components.training.lr.warmup_decay",
        offered=("optimizer", "total_steps"),
        needed=("optimizer",),
    ),
    "step_scheduler": Section(
        "Batch sizes, the length of the run, and when to log, validate and save.",
        target="nemo_automodel.components.training.schedule.StepScheduler",
        offered=("dp_size",),
    ),
    "clip_grad_norm": Section(
        "Gradient clipping.",
        target="nemo_automodel.components.distributed.grads.GradClipper",
        offered=("optimizer",),
    ),
    "non_finite": Section(
        "What happens when a loss or a gradient is NaN or infinite.",
        target="nemo_automodel.components.training.nonfinite.NonFiniteGuard",
        offered=("env",),
    ),
    "checkpoint": Section(
        "Where and what is saved, and what a run resumes from.",
        target="nemo_automodel.components.checkpoint.checkpointer.Checkpointer",
        offered=("env",),
    ),
    "distributed": Section(
        "How the model is spread over processes.",
        target="nemo_automodel.components.distributed.fsdp2.FSDP2Manager",
        offered=("env",),
    ),
    "dist_env": Section(
        "The process group and the device.",
        target="nemo_automodel.components.distributed.env.DistEnv",
    ),
    "rng": Section(
        "The seed of the run.",
        target="nemo_automodel.components.training.rng.StatefulRNG",
        offered=("rank",),
    ),
    "compile": Section(
        "torch.compile, one decoder block at a time.",
        target="nemo_automodel.components.training.compile.CompileConfig",
    ),
    "fp8": Section(
        "Linear layers computed in FP8; absent = in the model's dtype.",
        target="nemo_automodel.components.quantization.fp8.Fp8Config",
        presence=Presence.OPTIONAL,
    ),
    "certificate": Section(
        "The proof, before the first step, that the run computes what plain transformers does. `--certificate off`, "
        "`warn` or `strict` is short for its `mode`.",
        target="nemo_automodel._transformers.certificate.Certificate",
        offered=("config",),
    ),
    "quantization": Section(
        "Frozen weights kept in four bits (QLoRA); absent = in the model's dtype.",
        target="nemo_automodel.components.quantization.nf4.QuantizationConfig",
        presence=Presence.OPTIONAL,
    ),
    "loggers": Section(
        "Metrics: JSONL and the progress display always, trackers on request.",
        target="nemo_automodel.components.training.metrics.Loggers",
        offered=("env", "config", "schedule"),
    ),
}

_VLM_DATASET = "such as nemo_automodel.components.datasets.vlm.conversation.make_vlm_chat_dataset"

VLM: dict[str, Section] = {
    **{name: section for name, section in LLM.items() if name != "tokenizer"},
    "model": replace(LLM["model"], target="nemo_automodel.NeMoAutoModelForImageTextToText.from_pretrained"),
    "processor": Section(
        "The processor: tokenizer, chat template and image processor; by default the model's own.",
        target="nemo_automodel._transformers.processor.load_processor",
        offered=("model_name",),
    ),
    "freeze": Section(
        "Which parts of the model are not trained; LoRA (`peft`) freezes all of them.",
        target="nemo_automodel._transformers.parts.Freeze",
    ),
    "dataset": Section(
        f"The training data: conversations with images, {_VLM_DATASET}.",
        offered=("processor", "tokenizer"),
        presence=Presence.REQUIRED,
    ),
    "validation_dataset": Section(
        "The validation data, built as `dataset` is; absent = no validation.",
        offered=("processor", "tokenizer"),
        presence=Presence.OPTIONAL,
    ),
}

RECIPES: dict[str, dict[str, Section]] = {"llm": LLM, "vlm": VLM}


def default_arguments(
    name: str, section: Section, target: str, given: Mapping[str, Any], has_peft: bool
) -> dict[str, Any]:
    """Our defaults for this call: none for another target, and none that contradict what the YAML says."""
    if target != section.target:
        return {}
    found = {key: value for key, value in section.defaults.items() if key not in given}
    if name == "optimizer":
        if "lr" in found:
            found["lr"] = LR_LORA if has_peft else LR_FULL
        if given.get("foreach") or given.get("differentiable"):  # torch refuses these together with fused
            found.pop("fused", None)
    return found
