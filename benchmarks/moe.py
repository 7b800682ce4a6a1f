"""Workloads E and E+: a mixture of experts of Qwen3-30B-A3B's shape, LoRA on attention, and on the experts too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.workloads import Workload

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
QWEN3_30B_A3B = {
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
TINY = {
    **QWEN3_30B_A3B, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2,
    "vocab_size": 512,
}  # fmt: skip


@dataclass(frozen=True)
class MoEWorkload(Workload):
    """A Qwen3-MoE-shaped model."""

    targets: tuple[str, ...] = ATTENTION

    def config(self, attn_implementation: str | None = "sdpa") -> Any:
        from transformers import Qwen3MoeConfig

        extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        return Qwen3MoeConfig(**self.shape, use_cache=False, **extra)

    def plain_model(self) -> Any:
        """transformers' own model (call it where its memory is to be)."""
        from transformers import Qwen3MoeForCausalLM

        return Qwen3MoeForCausalLM(self.config())

    def flops(self) -> float:
        """FLOPs of a forward and backward: 4N a token, N of the weights that a token meets, and causal attention."""
        s = self.shape
        q, kv = s["num_attention_heads"] * s["head_dim"], s["num_key_value_heads"] * s["head_dim"]
        experts = s["num_experts_per_tok"] * 3 * s["moe_intermediate_size"] + s["num_experts"]
        layer = s["hidden_size"] * (2 * q + 2 * kv + experts)
        n = s["num_hidden_layers"] * layer + s["hidden_size"] * s["vocab_size"]
        return self.tokens * (4 * n + 3.5 * s["num_hidden_layers"] * 2 * self.seq * q)

    def tiny(self) -> Workload:
        """The same kind of workload, small enough for a CPU in CI."""
        return replace(self, about=f"tiny: {self.about}", shape=TINY, seq=64)


E = MoEWorkload("E", "Qwen3-30B-A3B shape, LoRA r16 on attention, 1x4096, bf16", QWEN3_30B_A3B, 1, 4096, 16)
E_EXPERTS = replace(E, name="E+", about="E with LoRA r16 on the experts of every layer too", expert_targets=EXPERTS)
