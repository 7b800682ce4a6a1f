"""The nearest valid name for a mistyped one, and the names that other trainers use for ours."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

ELSEWHERE = {
    "per_device_train_batch_size": "step_scheduler.local_batch_size",
    "per_device_batch_size": "step_scheduler.local_batch_size",
    "micro_batch_size": "step_scheduler.local_batch_size",
    "train_batch_size": "step_scheduler.global_batch_size",
    "batch_size": "step_scheduler.local_batch_size",
    "gradient_accumulation_steps": "step_scheduler.global_batch_size",
    "grad_acc_steps": "step_scheduler.global_batch_size",
    "num_train_epochs": "step_scheduler.num_epochs",
    "epochs": "step_scheduler.num_epochs",
    "max_train_steps": "step_scheduler.max_steps",
    "logging_steps": "step_scheduler.log_every_steps",
    "save_steps": "step_scheduler.ckpt_every_steps",
    "eval_steps": "step_scheduler.val_every_steps",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_epsilon": "optimizer.eps",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "optim": "optimizer._target_",
    "warmup_steps": "lr_scheduler.warmup_steps",
    "warmup_ratio": "lr_scheduler.warmup_steps",
    "lr_scheduler_type": "lr_scheduler.decay",
    "max_grad_norm": "clip_grad_norm.max_norm",
    "gradient_clipping": "clip_grad_norm.max_norm",
    "output_dir": "checkpoint.checkpoint_dir",
    "resume_from_checkpoint": "checkpoint.restore_from",
    "save_total_limit": "checkpoint.keep_last",
    "seed": "rng.seed",
    "data_seed": "rng.seed",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "torch_dtype": "model.dtype",
    "torch_compile": "compile.enabled",
    "model_name_or_path": "model.pretrained_model_name_or_path",
    "base_model": "model.pretrained_model_name_or_path",
    "max_seq_length": "dataset.seq_length",
    "max_seq_len": "dataset.seq_length",
    "max_length": "dataset.seq_length",
    "cutoff_len": "dataset.seq_length",
    "sequence_len": "dataset.seq_length",
    "model_max_length": "dataset.seq_length",
    "packing": "packed_sequence.packed_sequence_size",
    "sample_packing": "packed_sequence.packed_sequence_size",
    "dataloader_num_workers": "dataloader.num_workers",
    "dataset_name": "dataset.dataset_name",
    "dataset_text_field": "dataset",
    "train_dataset": "dataset",
    "eval_dataset": "validation_dataset",
    "train_file": "dataset",
    "lora_r": "peft.dim",
    "lora_rank": "peft.dim",
    "r": "peft.dim",
    "rank": "peft.dim",
    "lora_alpha": "peft.alpha",
    "lora_dropout": "peft.dropout",
    "lora_target_modules": "peft.target_modules",
    "lora_target_linear": "peft.match_all_linear",
    "report_to": "loggers",
    "lora": "peft",
    "trainer": "step_scheduler",
    "training": "step_scheduler",
    "loss": "loss_fn",
    "data": "dataset",
    "scheduler": "lr_scheduler",
    "logger": "loggers",
    "fsdp": "distributed",
}
"""Names of HF Trainer, TRL, PEFT, axolotl and LLaMA-Factory, and the key that does the same here."""


def nearest(name: str, valid: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The valid name most like ``name``, case, dashes and underscores aside; None where none is alike."""
    word = _squash(name)
    best: tuple[float, float] = (0.0, 0.0)
    found = None
    for candidate in dict.fromkeys(valid):
        other = _squash(candidate)
        likeness = _likeness(word, other)
        score = (likeness, _likeness(name, candidate))
        if likeness >= cutoff and score > best:
            best, found = score, candidate
    return found


def _likeness(word: str, other: str) -> float:
    """Ratio of matching letters; at least 0.7 where one begins the other, 0.6 where one holds all of the other."""
    matcher = SequenceMatcher(None, word, other)
    if min(len(word), len(other)) >= 3 and (word in other or other in word):
        begins = word.startswith(other) or other.startswith(word)
        return max(0.7 if begins else 0.6, matcher.ratio())
    return matcher.ratio() if matcher.real_quick_ratio() >= 0.6 and matcher.quick_ratio() >= 0.6 else 0.0


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """``did you mean `x`?`` or an empty string."""
    found = nearest(name, valid)
    return f"did you mean `{found}`?" if found else ""


def known_elsewhere(name: str) -> str:
    """A hint for a key of another trainer, or an empty string."""
    ours = ELSEWHERE.get(name)
    return f"did you mean `{ours}`, which other trainers call `{name}`?" if ours else ""


def _squash(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
