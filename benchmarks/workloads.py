"""The workloads: a model shape, a batch, weights and tokens that are the same for every contender, and their FLOPs."""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nemo_automodel.types import IGNORE_INDEX, Batch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Workload:
    """A llama-shaped model and a batch of full rows of ``seq`` tokens."""

    name: str
    about: str
    shape: dict[str, Any]
    batch: int
    seq: int
    lora_rank: int | None = None  # None: every weight is trained
    document: int | None = None  # tokens of each document packed into the rows; None: a row is one document
    targets: tuple[str, ...] = tuple(TARGETS)  # the linear layers that peers adapt: all but the output head
    expert_targets: tuple[str, ...] = ()  # stacked expert weights that are adapted

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    def config(self, attn_implementation: str | None = "sdpa") -> Any:
        from transformers import LlamaConfig

        extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        return LlamaConfig(**self.shape, use_cache=False, **extra)

    def plain_model(self) -> Any:
        """transformers' own model (call it where its memory is to be)."""
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM(self.config())

    def layers(self, model: Any) -> Any:
        """The decoder layers of ``plain_model``."""
        return model.model.layers

    def our_model(self) -> tuple[Any, dict[str, Any]]:
        """Our autoclass, and what our recipe hands it for this workload."""
        from nemo_automodel import NeMoAutoModelForCausalLM

        return NeMoAutoModelForCausalLM, {"packed": self.document is not None}

    def plain_inputs(self, batch: Batch, device: torch.device, unpacked: bool = False) -> dict[str, Any]:
        """``batch`` as transformers' model takes it: rows whose positions restart, or (``unpacked``) a document a row."""
        ids = batch["input_ids"].to(device, non_blocking=True)
        if not self.document or unpacked:
            ids = ids.view(-1, self.document or self.seq)
            return {"input_ids": ids, "labels": ids}
        ids = ids.view(-1, self.seq)
        positions = batch["position_ids"].to(device, non_blocking=True).view(-1, self.seq)
        return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, IGNORE_INDEX)}

    def batches(self, count: int = 4) -> list[Batch]:
        """``count`` batches, the same for every contender."""
        return batches(self, count)

    def fill(self, model: nn.Module, but: Collection[int] = ()) -> None:
        """Give every parameter of ``model``, ``but`` those of these ids, the values that all contenders have."""
        fill((name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in but)

    def flops(self) -> float:
        """FLOPs of a forward and backward."""
        return model_flops(self)

    def tiny(self) -> Workload:
        """The same kind of workload, small enough for a CPU in CI."""
        return tiny(self)


LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_1B = {
    **LLAMA_8B, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    **LLAMA_8B, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
}  # fmt: skip
WORKLOADS = {
    "A": Workload("A", "Llama-3.1-8B shape, LoRA r16 on all projections, 2x4096, bf16", LLAMA_8B, 2, 4096, 16),
    "B": Workload("B", "Llama-3.2-1B shape, full SFT, 4x4096, tied embeddings", LLAMA_1B, 4, 4096),
    "B'": Workload("B'", "B with documents of 1024 tokens packed to 4096, isolated", LLAMA_1B, 4, 4096, document=1024),
}


def tiny(workload: Workload) -> Workload:
    """The same kind of workload, small enough for a CPU in CI."""
    shape = {**TINY, "tie_word_embeddings": workload.shape["tie_word_embeddings"]}
    return replace(workload, about=f"tiny: {workload.about}", shape=shape, seq=64, document=workload.document and 16)


def batches(workload: Workload, count: int = 4) -> list[Batch]:
    """``count`` batches of seeded random tokens."""
    generator = torch.Generator().manual_seed(1)
    shape = (workload.batch, workload.seq)
    ids = [torch.randint(0, workload.shape["vocab_size"], shape, generator=generator) for _ in range(count)]
    return [_batch(workload, rows) for rows in ids]


def chain_batches(workload: Workload, count: int, seed: int = 2) -> list[Batch]:
    """``count`` batches of a language that can be learnt: each of up to 1024 tokens is followed by one of four.

    The four come with probabilities 0.55, 0.25, 0.15 and 0.05: no model gets below 1.11 nats. Languages of other seeds have
    the same tokens in another order.
    """
    vocabulary = torch.randperm(workload.shape["vocab_size"], generator=torch.Generator().manual_seed(2))[:1024]
    generator = torch.Generator().manual_seed(seed)
    followers = torch.randint(0, len(vocabulary), (len(vocabulary), 4), generator=generator)
    rows = count * workload.batch
    probabilities = torch.tensor([0.55, 0.25, 0.15, 0.05])
    choices = torch.multinomial(probabilities, workload.seq * rows, replacement=True, generator=generator)
    states = [torch.randint(0, len(vocabulary), (rows,), generator=generator)]
    for choice in choices.view(workload.seq, rows)[1:]:
        states.append(followers[states[-1], choice])
    ids = vocabulary[torch.stack(states, dim=1)]
    return [_batch(workload, chosen) for chosen in ids.split(workload.batch)]


def _batch(workload: Workload, ids: torch.Tensor) -> Batch:
    """``ids`` [batch, seq], of which every position but each document's last is trained on; packed ones in a single row."""
    documents = ids.view(-1, workload.document or workload.seq)
    labels = torch.full_like(documents, IGNORE_INDEX)
    labels[:, :-1] = documents[:, 1:]
    indices = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    batch = Batch(input_ids=ids, labels=labels, label_indices=indices, num_label_tokens=indices.numel())
    return _packed(batch, *documents.shape) if workload.document else batch


def _packed(batch: Batch, documents: int, length: int) -> Batch:
    """``batch`` as our collator lays out packed documents: one row, positions that restart, boundaries."""
    total = documents * length
    bounds = torch.arange(0, total + 1, length, dtype=torch.int32)
    packed: dict[str, Any] = {
        **batch,
        "input_ids": batch["input_ids"].view(1, total),
        "labels": batch["labels"].view(1, total),
    }
    packed["position_ids"] = torch.arange(length).repeat(1, documents)
    packed |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": length, "max_length_k": length}
    return Batch(**packed)  # type: ignore[typeddict-item]


def canonical(name: str) -> str:
    """A parameter's name without what PEFT puts around it; its adapters of experts, one inside the other, as ours."""
    name = re.sub(r"\.experts\.base_layer\.lora_(?=[AB]\.)", ".experts.lora_experts.gate_up_proj.lora_", name)
    name = re.sub(r"\.experts\.lora_(?=[AB]\.)", ".experts.lora_experts.down_proj.lora_", name)
    return re.sub(r"^base_model\.model\.|\.base_layer|\.default", "", name)


@torch.no_grad()
def fill(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Give every parameter values that depend on its name and shape alone: norms 1, the rest N(0, 0.02), bf16-exact.

    LoRA's B is filled too, so that every adapter's gradient is non-zero from the first step on.
    """
    for name, parameter in named_parameters:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if "norm" in name:
            local.fill_(1.0)
            continue
        generator = torch.Generator(local.device).manual_seed(zlib.crc32(canonical(name).encode()))
        drawn = torch.empty(_shape_in_file(name, local), device=local.device).normal_(0.0, 0.02, generator=generator)
        local.copy_((drawn.permute(2, 0, 1) if drawn.shape != local.shape else drawn).bfloat16())


def _shape_in_file(name: str, local: torch.Tensor) -> torch.Size:
    """Of our B of experts [E, out, r] PEFT's order [out, r, E], in which numbers are drawn."""
    if ".lora_experts." in name and ".lora_B." in name and local.ndim == 3:
        return torch.Size((*local.shape[1:], local.shape[0]))
    return local.shape


def model_flops(workload: Workload) -> float:
    """FLOPs of a forward and backward: 4N a token under LoRA, 6N where all is trained, causal attention within documents, counted half.

    N includes the output head and excludes the embedding look-up; adapters are left out, as for every contender.
    """
    s = workload.shape
    q, kv = s["num_attention_heads"] * s["head_dim"], s["num_key_value_heads"] * s["head_dim"]
    layer = 2 * s["hidden_size"] * q + 2 * s["hidden_size"] * kv + 3 * s["hidden_size"] * s["intermediate_size"]
    n = s["num_hidden_layers"] * layer + s["hidden_size"] * s["vocab_size"]
    attention_forward = s["num_hidden_layers"] * 2 * workload.tokens * (workload.document or workload.seq) * q
    return workload.tokens * n * (4 if workload.lora_rank else 6) + 3.5 * attention_forward
