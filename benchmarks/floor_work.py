"""What a step must do at least: its matrix products, its attention, and the bytes that everything else moves.

All of it is read off transformers' own model on the meta device. Bytes, from the model's sizes: h hidden size, q and g widths
of all queries and of all keys, f width of the MLP; in numbers of 2 bytes a token and layer, each tensor read or written once by
a kernel that fuses all that lies between two products:
- Forward: residual added and the sum normed, twice, 8h (read two, write two); RoPE on queries and keys 2(q + g); SwiGLU 3f.
- Backward: SwiGLU 5f; RoPE 2(q + g); the two norms 11h: read the gradients that three (q, k, v) and two (gate, up) products left,
  the kept input and the residual's gradient; write that one.
- A norm of each branch's output too (Gemma): 4h more in backward (read the output, write its gradient; twice), nothing
  forward. Norms of queries and keys: q + g more in backward.
- A tower, forward only, a patch and layer: 8h + 2f (GELU). Around the layers: embedding and one more norm, 8h a token, 3h
  more where the embedding is trained.
So 426 KB in A and C (13.6 MB a token with 32 layers), 229 KB in B, 312 KB in D and 36 KB in D's tower.
- LoRA: a layer of K inputs and N outputs reads x for A, x and dy for the gradients: 2K + N numbers a token; y and dX cost nothing
  where the base's product adds to them.
- FP8: one byte for each number of an input or gradient of the products (4h + 2q + 2g + 3f: q, k, v share one input, gate and up
  another), 2 more to read those that attention made (q + g): its output and the gradient of values.
- Loss: logits read and their gradient written, 4 bytes for each label and entry of the vocabulary; a trained head's gradient
  cast from fp32, 6 bytes a weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.workloads import Workload
from nemo_automodel.kernels.linear_ce import chunk_rows


@dataclass(frozen=True)
class Product:
    """One matrix product of the layer called ``layer`` (without its number), ``n_in`` -> ``n_out`` features."""

    layer: str = field(compare=False)
    kind: Literal["forward", "dX", "dW"]
    rows: int
    n_in: int
    n_out: int
    fp8: bool = False
    beta: int | None = None  # of a dW summed in fp32: 0 writes the sum, 1 adds to it

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.n_in * self.n_out


@dataclass(frozen=True)
class Attention:
    """One layer's attention: ``rows`` of ``length`` tokens, ``size`` numbers a head."""

    rows: int
    length: int
    heads: int
    groups: int
    size: int
    causal: bool
    window: int | None
    packed: bool  # the rows are documents of a single row
    backward: bool

    @property
    def flops(self) -> float:
        """Causal counted half, windows not at all; backward 2.5 times forward."""
        forward = (2.0 if self.causal else 4.0) * self.rows * self.length**2 * self.heads * self.size
        return forward * (3.5 if self.backward else 1.0)


def on_meta(workload: Workload) -> Any:
    """transformers' own model of ``workload``, without memory."""
    with torch.device("meta"):
        return workload.plain_model()


def tower_of(model: Any) -> nn.Module | None:
    return getattr(model.model, "vision_tower", None)


def patches_of(model: Any) -> int:
    """What a tower sees of one image."""
    config = model.config.vision_config
    return (config.image_size // config.patch_size) ** 2


def products(
    workload: Workload, model: Any, device_type: str, fp8: bool = False
) -> tuple[list[Product], list[Product]]:
    """Those of a step in its order, and those of a frozen tower. The head's are of the rows with a label alone."""
    blocks = {id(module) for module in workload.layers(model).modules()}
    tower = tower_of(model)
    in_tower = {id(module) for module in tower.modules()} if tower is not None else set()
    forward, head, backward, seen = [], [], [], []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        make = partial(Product, re.sub(r"\.\d+\.", ".", name), n_in=module.in_features, n_out=module.out_features)
        trained = module.weight.requires_grad and not workload.lora_rank
        if module is model.get_output_embeddings():
            head = _head_products(make, workload, module.weight, trained, device_type)
        elif id(module) in blocks:
            forward.append(make(kind="forward", rows=workload.tokens, fp8=fp8))
            backward.append(make(kind="dX", rows=workload.tokens, fp8=fp8))
            backward += [make(kind="dW", rows=workload.tokens)] * trained
        elif id(module) in in_tower:
            seen.append(make(kind="forward", rows=workload.batch * patches_of(model)))
        else:
            raise ValueError(f"{name}: a linear layer outside of the blocks, the tower and the head")
    return forward + head + backward[::-1], seen


def _head_products(
    make: Callable[..., Product], workload: Workload, weight: Tensor, trained: bool, device_type: str
) -> list[Product]:
    """Chunk by chunk, as ``linear_cross_entropy`` does them."""
    labels = labels_of(workload)
    most = chunk_rows(labels, weight.shape[0], torch.bfloat16.itemsize, device_type)
    found = []
    for start in range(0, labels, most):
        rows = min(most, labels - start)
        found += [make(kind="forward", rows=rows), make(kind="dX", rows=rows)]
        found += [make(kind="dW", rows=rows, beta=int(start > 0))] * trained
    return found


def labels_of(workload: Workload) -> int:
    return int(workload.batches(1)[0]["num_label_tokens"])


def attentions(workload: Workload, model: Any) -> tuple[list[Attention], list[Attention]]:
    """Of every layer, and of every layer of a tower."""
    tower = tower_of(model)
    in_tower = {id(module) for module in tower.modules()} if tower is not None else set()
    found: tuple[list[Attention], list[Attention]] = ([], [])
    length = workload.document or workload.seq
    for module in model.modules():
        if not hasattr(module, "q_proj"):
            continue
        heads, groups = (layer.out_features // module.head_dim for layer in (module.q_proj, module.k_proj))
        seen = id(module) in in_tower
        found[seen].append(
            Attention(
                rows=workload.batch if seen else workload.tokens // length,
                length=patches_of(model) if seen else length,
                heads=heads,
                groups=groups,
                size=module.head_dim,
                causal=not seen,
                window=getattr(module, "sliding_window", None),
                packed=workload.document is not None,
                backward=not seen,
            )
        )
    return found


def adapted(workload: Workload, model: Any) -> list[nn.Linear]:
    """The layers that LoRA adapts."""
    named = workload.layers(model).named_modules() if workload.lora_rank else []
    return [m for name, m in named if isinstance(m, nn.Linear) and name.rpartition(".")[2] in workload.targets]


def trained_weights(workload: Workload, model: Any) -> int:
    if workload.lora_rank:
        return sum(workload.lora_rank * (m.in_features + m.out_features) for m in adapted(workload, model))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def widths(workload: Workload, model: Any) -> tuple[int, int, int, int]:
    """h, q, g and f of a decoder block."""
    block = workload.layers(model)[0]
    q_proj = block.self_attn.q_proj
    return (
        q_proj.in_features,
        q_proj.out_features,
        block.self_attn.k_proj.out_features,
        block.mlp.gate_proj.out_features,
    )


def block_bytes(workload: Workload, model: Any) -> int:
    """Of the elementwise work of one block, forward and backward, a token."""
    h, q, g, f = widths(workload, model)
    block = workload.layers(model)[0]
    numbers = 19 * h + 4 * (q + g) + 8 * f
    numbers += 4 * h * hasattr(block, "post_feedforward_layernorm") + (q + g) * hasattr(block.self_attn, "q_norm")
    return 2 * numbers


def elementwise_bytes(workload: Workload, model: Any) -> int:
    h = widths(workload, model)[0]
    trained_embedding = model.get_input_embeddings().weight.requires_grad and not workload.lora_rank
    around = 2 * h * (11 if trained_embedding else 8)
    return workload.tokens * (len(workload.layers(model)) * block_bytes(workload, model) + around)


def tower_bytes(workload: Workload, model: Any) -> int:
    tower = tower_of(model)
    mlps: list[Any] = [m for m in tower.modules() if hasattr(m, "fc1")] if tower is not None else []
    numbers = sum(8 * mlp.fc1.in_features + 2 * mlp.fc1.out_features for mlp in mlps)
    return 2 * workload.batch * patches_of(model) * numbers if mlps else 0


def adapter_bytes(workload: Workload, model: Any) -> int:
    return 2 * workload.tokens * sum(2 * m.in_features + m.out_features for m in adapted(workload, model))


def quantising_bytes(workload: Workload, model: Any) -> int:
    h, q, g, f = widths(workload, model)
    return workload.tokens * len(workload.layers(model)) * ((4 * h + 2 * q + 2 * g + 3 * f) + 2 * (q + g))


def loss_bytes(workload: Workload, model: Any) -> int:
    weight = model.get_output_embeddings().weight
    trained = weight.requires_grad and not workload.lora_rank
    return 4 * labels_of(workload) * weight.shape[0] + 6 * weight.numel() * trained
