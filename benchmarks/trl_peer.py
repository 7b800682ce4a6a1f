"""TRL's SFTTrainer as a contender of ``step.py``: its own loop over the same weights and tokens, timed by its callbacks.

Settings: weights and adapters in bf16 like the other peers, Liger on, no gradient checkpointing (TRL's default is on),
fused AdamW, the same clipping, nothing logged. Rows are full, so its packing and padding-free batches change nothing.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from typing import Any

import torch

from benchmarks.contenders import transformers
from benchmarks.workloads import Workload, canonical


def trainer(workload: Workload, device: torch.device, steps: int, directory: str) -> Any:
    """A ``SFTTrainer`` for ``steps`` steps over the batches of ``workload``, in their order."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    model = transformers(workload, device).model
    rows = [row for batch in workload.batches() for row in batch["input_ids"].view(-1, workload.seq).tolist()]
    data = Dataset.from_dict({"input_ids": list(itertools.islice(itertools.cycle(rows), steps * workload.batch))})
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), pad_token="a", eos_token="a")  # fmt: skip
    config = SFTConfig(
        output_dir=directory,
        max_steps=steps,
        per_device_train_batch_size=workload.batch,
        use_liger_kernel=device.type == "cuda",
        use_cpu=device.type == "cpu",
        bf16=False,  # weights are bf16, so there is nothing for autocast to do
        gradient_checkpointing=False,
        optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
        learning_rate=1e-5,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        max_length=None,
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0 if device.type == "cpu" else 2,
    )
    return _recording(SFTTrainer)(model=model, args=config, train_dataset=data, processing_class=words)


def _recording(base: Any) -> Any:
    class Recording(base):
        """Keeps every loss, and the gradients' norms of the first step."""

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            """TRL's own, its loss kept."""
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            losses = self.__dict__.setdefault("losses", [])
            if not losses:
                named = [(canonical(n), p.grad) for n, p in self.model.named_parameters() if p.grad is not None]
                self.norms = {name: grad.float().norm().item() for name, grad in named}
            losses.append(loss.detach())
            return loss

    return Recording


def measure(workload: Workload, device: torch.device, warmup: int, steps: int, started: float) -> dict[str, Any]:
    """What ``step.measure`` says of the others."""
    from transformers import TrainerCallback

    cuda = device.type == "cuda"
    marks: list[Any] = []
    found: dict[str, Any] = {}

    def peak() -> float | None:
        return round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None

    class Timing(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            """Mark the end of a step; the only waits are after the first and at the end of the warm-up."""
            marks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
            if cuda:
                marks[-1].record()
            if len(marks) == 1 or len(marks) == warmup:
                _wait(cuda)
            if len(marks) == 1:
                found.update({"cold start s": round(time.time() - started, 1), "first-step peak GiB": peak()})
            if len(marks) == warmup and cuda:
                torch.cuda.reset_peak_memory_stats()

    with tempfile.TemporaryDirectory() as directory:
        sft = trainer(workload, device, warmup + steps, directory)
        trainable = sum(p.numel() for p in sft.model.parameters() if p.requires_grad)
        sft.add_callback(Timing())
        sft.train()
    _wait(cuda)
    found |= {"trainable": trainable, "losses": [float(loss) for loss in sft.losses], "norms": sft.norms}
    found |= {"grad_norm": sum(norm**2 for norm in sft.norms.values()) ** 0.5, "peak GiB": peak()}
    pairs = list(itertools.pairwise(marks))[max(0, warmup - 1) :]
    return found | {"times": [a.elapsed_time(b) if cuda else (b - a) * 1e3 for a, b in pairs]}


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()
