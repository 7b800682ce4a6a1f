"""Who takes part in ``step.py``: each entry builds a model and says how one forward-backward and one clip are done.

Peers run as their own documentation says, in bf16 throughout, with the same optimizer settings as ours.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmarks.workloads import Workload, fill
from nemo_automodel.types import Batch


@dataclass
class Contender:
    """A model ready to train. ``forward_backward(batch)`` returns the mean loss, detached; ``clip()`` the norm."""

    model: nn.Module
    forward_backward: Callable[[Batch], torch.Tensor]
    clip: Callable[[], torch.Tensor]
    optimizer: torch.optim.Optimizer
    gradients: Callable[[], dict[str, torch.Tensor]] | None = None  # by transformers' names, where it has others itself


def _optimizer(model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(params, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda")


def transformers(
    workload: Workload,
    device: torch.device,
    liger: bool = False,
    compiled: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    fp32_trained: bool = False,
    unpacked: bool = False,
    weights: str = "whole",
    checkpointed: bool = False,
    experts: str | None = None,
) -> Contender:
    """transformers (+ PEFT where the workload has adapters), with Liger's kernels or compiled layers or both.

    ``fp32_trained`` keeps what is trained in fp32: adapters as PEFT does by default, all weights under autocast. Packed
    rows come with positions that restart, from which transformers makes its mask; ``unpacked`` gives a document a row.
    ``weights``: of the layers, ``whole``, ``packed`` in four bits, or ``rounded`` to what four bits leave of them.
    ``checkpointed``: layers are computed again in backward. ``experts``: transformers' name of how experts are run.
    """
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    autocast = fp32_trained and not workload.lora_rank
    torch.set_default_dtype(torch.float32 if autocast else dtype)
    with device:
        model: Any = workload.plain_model()
    torch.set_default_dtype(torch.float32)
    layers = workload.layers(model)
    if experts is not None:
        model.set_experts_implementation(experts)
    if dtype == torch.float32 or checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if weights != "whole":
        for name, module in [
            (n, m) for n, m in layers.named_modules(prefix="model.layers") if isinstance(m, nn.Linear)
        ]:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, _in_four_bits(module, name, device, weights == "packed"))
        model.is_loaded_in_4bit = weights == "packed"
    in_layers = {id(p) for p in layers.parameters() if p.ndim == 2 and weights != "whole"}
    if workload.lora_rank:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=workload.lora_rank, lora_alpha=2 * workload.lora_rank, lora_dropout=0.0,
            target_modules=list(workload.targets), target_parameters=list(workload.expert_targets) or None,
        )  # fmt: skip
        model = get_peft_model(model, config, autocast_adapter_dtype=fp32_trained)
    workload.fill(model, but=in_layers)
    model.train()
    if compiled:
        for layer in layers:
            layer.compile()
    params = [p for p in model.parameters() if p.requires_grad]

    def forward_backward(batch: Batch) -> torch.Tensor:
        inputs = workload.plain_inputs(batch, device, unpacked)
        with torch.autocast(device.type, dtype, enabled=autocast):
            loss = model(**inputs).loss
        loss.backward()
        return loss.detach()

    return Contender(
        model, forward_backward, lambda: torch.nn.utils.clip_grad_norm_(params, 1.0), _optimizer(model, device)
    )


def transformers_with_masters(workload: Workload, device: torch.device, **options: Any) -> Contender:
    """transformers in bf16 throughout, stepped on fp32 copies of its weights: what ours computes, written out plainly."""
    contender = transformers(workload, device, **options)
    weights = [p for p in contender.model.parameters() if p.requires_grad]
    masters = [p.detach().float().requires_grad_() for p in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda")

    def clip() -> torch.Tensor:
        for master, weight in zip(masters, weights, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        return torch.nn.utils.clip_grad_norm_(masters, 1.0)

    @torch.no_grad()
    def write_back(*_: Any) -> None:
        torch._foreach_copy_(weights, masters)

    optimizer.register_step_post_hook(write_back)
    return Contender(contender.model, contender.forward_backward, clip, optimizer)


def ours(workload: Workload, device: torch.device, **model_options: Any) -> Contender:
    """This package as its recipe builds it from a YAML without further options."""
    from nemo_automodel._transformers.forward import forward_loss
    from nemo_automodel._transformers.inputs import to_device
    from nemo_automodel.components._peft.lora import PeftConfig
    from nemo_automodel.components.distributed.env import DistEnv
    from nemo_automodel.components.distributed.fsdp2 import FSDP2Manager
    from nemo_automodel.components.distributed.grads import GradClipper
    from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
    from nemo_automodel.components.training.compile import CompileConfig
    from nemo_automodel.components.training.local_step import step_on_local_tensors

    peft_options = model_options.pop("peft", {})
    checkpointing = model_options.pop("activation_checkpointing", "off")
    reshards = model_options.pop("reshard_after_forward", None)
    make_optimizer = model_options.pop("optimizer", _optimizer)
    peft = None
    if workload.lora_rank:
        r = workload.lora_rank
        chosen = {"match_all_linear": True, "target_parameters": list(workload.expert_targets) or None}
        peft = PeftConfig(**({"dim": r, "alpha": 2 * r} | chosen | peft_options))
    env = DistEnv(device=device.type)
    dist = FSDP2Manager(env=env, activation_checkpointing=checkpointing, reshard_after_forward=reshards)
    auto_class, options = workload.our_model()
    model = auto_class.from_config(
        workload.config(None), peft=peft, distributed=dist, **({"compile": CompileConfig()} | options | model_options)
    )
    workload.fill(model)
    model.train()
    loss_fn = FusedLinearCrossEntropy()
    params = [p for p in model.parameters() if p.requires_grad]

    def forward_backward(batch: Batch) -> torch.Tensor:
        num_label_tokens = dist.all_reduce_sum(batch["num_label_tokens"])
        dist.sync_gradients(model, last_micro_batch=True)
        ce_sum, aux = forward_loss(model, to_device(batch, dist.device), loss_fn)
        loss = ce_sum / num_label_tokens + aux
        loss.backward()
        return loss.detach()

    optimizer = step_on_local_tensors(make_optimizer(model, device))
    clipper = GradClipper(optimizer=optimizer)
    return Contender(model, forward_backward, lambda: clipper(params), optimizer)


def ours_static(workload: Workload, device: torch.device, **options: Any) -> Contender:
    """Ours with blocks compiled for these sizes alone, as one graph each."""
    from nemo_automodel.components.training.compile import CompileConfig

    return ours(workload, device, compile=CompileConfig(fullgraph=True, dynamic=False), **options)


def ours_small_state(workload: Workload, device: torch.device, state_dtype: str, **options: Any) -> Contender:
    """Ours with weights in bf16 and the optimizer's moments in ``state_dtype``, rounded at random."""
    from nemo_automodel.components.training.adamw import AdamW

    def optimizer(model: nn.Module, _: torch.device) -> torch.optim.Optimizer:
        return AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, state_dtype=state_dtype)  # type: ignore[arg-type]

    return ours(workload, device, master_dtype="bfloat16", optimizer=optimizer, **options)


def ours_dense_mask(workload: Workload, device: torch.device) -> Contender:
    """Ours in pure bf16 with the images in a dense mask, as it is where blocks are not recognised."""
    from nemo_automodel._transformers import compat

    compat.read_blocks = lambda mask_function: None
    return ours(workload, device, master_dtype="bfloat16")


def ours_cached_tower(workload: Workload, device: torch.device) -> Contender:
    """Ours in pure bf16 with the tower's features of every row kept already, as from the second epoch on."""
    from nemo_automodel._transformers.parts import Freeze
    from nemo_automodel._transformers.tower_cache import cache_tower

    contender = ours(workload, device, master_dtype="bfloat16")
    batches = workload.batches()
    features = cache_tower(contender.model, Freeze(cache_features_gb=1.0), rows=len(batches) * workload.batch)

    def forward_backward(batch: Batch) -> torch.Tensor:
        with features.serve(batch):
            return contender.forward_backward(batch)

    for batch in batches:
        forward_backward(batch)
        contender.optimizer.zero_grad()
    return replace(contender, forward_backward=forward_backward)


def ours_deterministic(workload: Workload, device: torch.device) -> Contender:
    """Ours as ``rng.deterministic: true`` makes it: what a resume that repeats every bit costs."""
    from nemo_automodel.components.training.rng import StatefulRNG

    StatefulRNG(deterministic=True)
    return ours(workload, device)


def ours_fp8(workload: Workload, device: torch.device, **options: Any) -> Contender:
    """Ours with the frozen base in FP8."""
    from nemo_automodel.components.quantization.fp8 import Fp8Config, quantize

    contender = ours(workload, device, fp8=Fp8Config(min_features=FP8_FEATURES[device.type]), **options)
    quantize(contender.model)  # once more, since the weights were filled after the model was built
    return contender


def ours_fp8_trained(workload: Workload, device: torch.device, grad_weight: str, **options: Any) -> Contender:
    """Ours with trained weights in FP8 products; their gradients in ``grad_weight``."""
    from nemo_automodel.components.quantization.fp8 import Fp8Config

    return ours(
        workload, device, fp8=Fp8Config(min_features=FP8_FEATURES[device.type], grad_weight=grad_weight), **options
    )


def ours_4bit(workload: Workload, device: torch.device, **options: Any) -> Contender:
    """Ours with the frozen base in four bits, made of the weights that every contender has."""
    from nemo_automodel.components.quantization.nf4 import Nf4Linear, QuantizationConfig

    small = {"min_features": 16} if workload.shape["hidden_size"] < 256 else {}  # the tiny shapes
    contender = ours(workload, device, quantization=QuantizationConfig(**small), **options)
    for name, module in contender.model.named_modules():
        if isinstance(module, Nf4Linear):
            weight = torch.nn.Parameter(torch.empty(module.nf4_shape, dtype=module.nf4_dtype, device=device))
            fill([(f"{name}.weight", weight)])
            module.quantize(weight)
    return contender


def transformers_4bit(workload: Workload, device: torch.device) -> Contender:
    """transformers + PEFT + Liger over bitsandbytes' own four-bit layers."""
    return transformers(workload, device, liger=device.type == "cuda", weights="packed")


def _in_four_bits(module: nn.Linear, name: str, device: torch.device, packed: bool) -> nn.Module:
    """``module`` with the weights that every contender has, packed by bitsandbytes, or packed and unpacked again."""
    import bitsandbytes
    from bitsandbytes import functional

    fill([(f"{name}.weight", module.weight)])
    weight = module.weight.detach()
    if not packed:
        module.weight.data = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))  # fmt: skip
        return module
    n_out, n_in = weight.shape
    layer = bitsandbytes.nn.Linear4bit(n_in, n_out, False, weight.dtype, compress_statistics=True, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    return layer.to(device)


FP8_FEATURES = {"cuda": 256, "cpu": 16}  # the smallest layers that compute in FP8: the tiny shapes have only small ones
Builder = Callable[[Workload, torch.device], Contender]
REFERENCE = "transformers fp32"
"""What every contender's first loss and gradients are compared with; never timed."""

FP32_TRAINED = "transformers, trained weights in fp32"
FP32_MASTERS = "transformers, fp32 masters"
EAGER_EXPERTS = "transformers, eager experts"
ROUNDED = "transformers, weights rounded to 4 bits"
PURE_BF16 = "ours, pure bf16"
PEERS: dict[str, Builder] = {
    "transformers": transformers,
    FP32_TRAINED: lambda w, d: transformers(w, d, fp32_trained=True),
    "transformers + Liger": lambda w, d: transformers(w, d, liger=True),
    "transformers, compiled layers": lambda w, d: transformers(w, d, compiled=True),
    "transformers + Liger, compiled layers": lambda w, d: transformers(w, d, liger=True, compiled=True),
    "transformers + Liger, trained weights in fp32": lambda w, d: transformers(w, d, liger=True, fp32_trained=True),
}
ONLY_IN: dict[str, dict[str, Builder]] = {
    "A": {
        FP32_MASTERS: transformers_with_masters,
        "ours": ours,
        "ours, tuned": lambda w, d: ours_static(w, d, peft={"lora_dtype": "bfloat16"}),
        "ours, use_triton: false": lambda w, d: ours(w, d, peft={"use_triton": False}),
        "ours, fp8": ours_fp8,
        "ours, fp8, use_triton: false": lambda w, d: ours_fp8(w, d, peft={"use_triton": False}),
    },
    "B": {
        FP32_MASTERS: transformers_with_masters,
        "ours": ours,
        PURE_BF16: lambda w, d: ours(w, d, master_dtype="bfloat16"),
        "ours, bf16 with random rounding": lambda w, d: ours_small_state(w, d, "bfloat16"),
        "ours, bf16 with random rounding, int8 moments": lambda w, d: ours_small_state(w, d, "int8"),
        "ours, rng.deterministic": ours_deterministic,
        "ours, fp8": lambda w, d: ours_fp8_trained(w, d, "bfloat16"),
        "ours, fp8, gradients of weights too": lambda w, d: ours_fp8_trained(w, d, "float8"),
    },
    "B'": {
        FP32_MASTERS: transformers_with_masters,
        "transformers + Liger, a document a row": lambda w, d: transformers(w, d, liger=True, unpacked=True),
        "ours": ours,
        PURE_BF16: lambda w, d: ours(w, d, master_dtype="bfloat16"),
    },
    "D": {
        FP32_MASTERS: transformers_with_masters,
        "ours": ours,
        PURE_BF16: lambda w, d: ours(w, d, master_dtype="bfloat16"),
        f"{PURE_BF16}, dense image mask": ours_dense_mask,
        f"{PURE_BF16}, cached tower": ours_cached_tower,
    },
    "E": {
        FP32_MASTERS: transformers_with_masters,
        EAGER_EXPERTS: lambda w, d: transformers(w, d, experts="eager"),
        "ours": ours,
        "ours, transformers' experts": lambda w, d: ours(w, d, experts_implementation="grouped_mm"),
    },
    "E+": {  # with its adapters added to the weights, whole layers' worth of sums would be kept for backward
        FP32_MASTERS: lambda w, d: transformers_with_masters(w, d, checkpointed=True),
        "ours": ours,
        "ours, checkpointed": lambda w, d: ours(w, d, activation_checkpointing="full"),
        "ours, selective": lambda w, d: ours(w, d, activation_checkpointing="selective"),
    },
}
FOUR_BITS: dict[str, Builder] = {
    "transformers + Liger, 4 bits": transformers_4bit,
    ROUNDED: lambda w, d: transformers(w, d, weights="rounded"),
    "ours, 4 bits": ours_4bit,
    "ours, 4 bits, checkpointed": lambda w, d: ours_4bit(w, d, activation_checkpointing="full"),
}
"""In ``qlora.py`` only: their weights are others than the reference's."""

LIGER = "transformers + Liger"
AUTO = "ours, activation_checkpointing: auto"
GROWTH: dict[str, Builder] = {
    AUTO: lambda w, d: ours(
        w, d, activation_checkpointing="auto", **({} if w.lora_rank else {"master_dtype": "bfloat16"})
    ),
    "ours, checkpointed": lambda w, d: ours(w, d, activation_checkpointing="full"),
    f"{LIGER}, checkpointed": lambda w, d: transformers(w, d, liger=True, checkpointed=True),
    "ours, full SFT, small state": lambda w, d: ours_small_state(
        replace(w, lora_rank=None), d, "bfloat16" if d.type == "cpu" else "int8", activation_checkpointing="full"
    ),
}
"""In ``growth.py``: what recomputes activations where they do not fit."""


TUNED: dict[str, tuple[str, str]] = {
    "A": ("ours, tuned", "peft.lora_dtype: bfloat16, compile: {fullgraph: true, dynamic: false}"),
    "B": ("ours, bf16 with random rounding", "model.master_dtype: bfloat16, optimizer: our AdamW, moments in bfloat16"),
    "B'": (PURE_BF16, "model.master_dtype: bfloat16"),
    "D": (PURE_BF16, "model.master_dtype: bfloat16"),
}
"""The contender with the options that make a workload fastest, and those options; all else is as in ``ours``."""


def curve_of(name: str) -> str:
    """The plain transformers contender whose loss curve ``name`` must follow: equal in what is kept in which dtype.

    At lr 1e-5 most bf16 weights do not move, autocast keeps the residual stream in fp32, and PEFT computes fp32 adapters
    in fp32: different curves.
    """
    if name.endswith("trained weights in fp32"):
        return FP32_TRAINED
    pure = name.startswith(PURE_BF16) or name == "ours, tuned"
    if name == FP32_MASTERS or (name.startswith("ours") and not pure):
        return FP32_MASTERS
    return "transformers"


NEEDS_GPU = ("Liger", "compiled")
TRL = "TRL SFTTrainer"


def contenders(workload: str, cpu: bool) -> dict[str, Builder]:
    """Those that can take part in ``workload``, by name."""
    llama = workload not in ("D", "E", "E+")  # Liger's patch is for llamas
    peers = {name: build for name, build in PEERS.items() if llama or "Liger" not in name}
    found = ({} if workload == "E+" else peers) | ONLY_IN[workload]
    if workload in ("A", "B") and importlib.util.find_spec("trl") is not None:
        found[TRL] = transformers  # with a loop of its own: trl_peer.py
    if workload == "B" and importlib.util.find_spec("torchtitan") is not None:
        from benchmarks.titan_peer import torchtitan

        found["torchtitan"] = torchtitan
    missing = NEEDS_GPU if cpu else ()
    if importlib.util.find_spec("bitsandbytes") is None:
        missing = (*missing, "int8")
    return {name: build for name, build in found.items() if not any(word in name for word in missing)}


def build(name: str, workload: Workload, device: torch.device) -> Contender:
    """The contender (or the reference) called ``name``."""
    if name == REFERENCE:
        return transformers(workload, device, dtype=torch.float32)
    return (contenders(workload.name, cpu=False) | FOUR_BITS | GROWTH)[name](workload, device)
