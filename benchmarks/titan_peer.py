"""torchtitan's own Llama 3 as a contender of ``step.py``: its model, its chunked loss, each block compiled as it does.

Settings: its defaults but for attention, which is its scaled-dot-product module with cuDNN first (its language models
want variable-length kernels, which are slower on rows that are one document); weights in bf16, like the other peers.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.contenders import Contender, _optimizer, transformers
from benchmarks.workloads import Workload


def torchtitan(workload: Workload, device: torch.device) -> Contender:
    """``workload``, a llama whose every weight is trained, in torchtitan's classes with the weights that all have."""
    from torchtitan.components.loss import ChunkedLossWrapper
    from torchtitan.models.llama3 import Llama3Model, Llama3StateDictAdapter

    plain = transformers(workload, device).model.state_dict()  # drawn where everybody draws them
    config = _config(workload)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model: Any = Llama3Model(config)
    torch.set_default_dtype(default)
    with device:
        for module in model.modules():
            if hasattr(module, "_precompute_cache"):
                module.cache = module._precompute_cache()
    adapter = Llama3StateDictAdapter(config, None)
    model.load_state_dict(adapter.from_hf(plain), strict=False)
    model.train()
    if device.type == "cuda":
        for layer in model.layers.values():
            layer.compile(fullgraph=True)
    loss_fn = ChunkedLossWrapper(ChunkedLossWrapper.Config())
    loss_fn.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    params = [p for p in model.parameters() if p.requires_grad]

    def forward_backward(batch: Any) -> torch.Tensor:
        ids = batch["input_ids"].to(device, non_blocking=True)
        labels = batch["labels"].to(device, non_blocking=True).view_as(ids)
        tokens = torch.tensor(float(batch["num_label_tokens"]), device=device)
        positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
        loss, _ = loss_fn(model(ids, positions), labels, tokens)
        loss.backward()
        return loss.detach()

    def gradients() -> dict[str, torch.Tensor]:
        """By transformers' names: its adapter takes fused projections apart, given gradients for weights."""
        weights = [p.data for p in params]
        for p in params:
            assert p.grad is not None
            p.data = p.grad
        named = adapter.to_hf({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
        for p, weight in zip(params, weights, strict=True):
            p.data = weight
        return named

    clip = lambda: torch.nn.utils.clip_grad_norm_(params, 1.0)  # noqa: E731
    return Contender(model, forward_backward, clip, _optimizer(model, device), gradients)


def _config(workload: Workload) -> Any:
    from torchtitan.models import llama3
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention

    s = workload.shape
    rope = ComplexRoPE.Config(dim=s["head_dim"], max_seq_len=workload.seq, theta=s["rope_theta"], scaling="none")
    layers = llama3._build_llama3_layers(
        fuse_qkv=True,
        n_layers=s["num_hidden_layers"],
        dim=s["hidden_size"],
        n_heads=s["num_attention_heads"],
        n_kv_heads=s["num_key_value_heads"],
        hidden_dim=s["intermediate_size"],
        rope=rope,
        attn_backend="varlen",
    )
    norm = layers[0].attention_norm
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
        for own in (layer.attention_norm, layer.ffn_norm):
            own.eps = s["rms_norm_eps"]
    return llama3.Llama3Model.Config(
        dim=s["hidden_size"],
        vocab_size=s["vocab_size"],
        enable_weight_tying=s["tie_word_embeddings"],
        tok_embeddings=Embedding.Config(num_embeddings=s["vocab_size"], embedding_dim=s["hidden_size"]),
        norm=RMSNorm.Config(normalized_shape=s["hidden_size"], eps=norm.eps),
        lm_head=Linear.Config(in_features=s["hidden_size"], out_features=s["vocab_size"]),
        layers=layers,
    )
