"""Context parallelism on real ranks.

Claims: the loss summed over ranks, and every parameter's gradient summed over ranks, are those of plain transformers
(to 1e-5 in float32, or twice what float32 itself is off from float64 there; to 1e-10 in float64) on one process, whose
loss is a sum over each document by itself: padded and packed, full and LoRA, whole logits and fused loss, with windows,
soft-caps, attention dropout off and blocks recomputed in backward.
"""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from nemo_automodel._transformers.cp_check import require_context_parallel
from nemo_automodel._transformers.forward import forward_loss
from nemo_automodel._transformers.window_trial import find_window
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.attention.function import register
from nemo_automodel.components.distributed.context_parallel import shard_sequence
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from tests.builders import tiny_config
from tests.ranks.launch import on_ranks

CONFIGS = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 9, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
    "gemma2": {"sliding_window": 9, "query_pre_attn_scalar": 8},
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "qwen3_moe": {},
}
TOLERANCES = ((torch.float32, 1e-5), (torch.float64, 1e-10))
FLOAT64 = ("llama", "qwen3", "gpt2")  # soft-capped scores are normalised in fp32; transformers' experts have no float64
LENGTHS = (5, 30, 8, 4)  # 47 tokens: no multiple of 2 or 4 chunks' pairs; one document lies on every rank


def build(kind, attention, lora, dtype):
    torch.manual_seed(0)
    config = tiny_config(kind, **CONFIGS[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    with torch.no_grad():
        for p in model.parameters():  # sharper than the initial weights, so that attention matters
            p.add_(torch.randn_like(p) * 0.1)
    if lora:
        PeftConfig(target_modules="*c_attn" if kind == "gpt2" else "*_proj", dim=4).apply(model)
        model.to(dtype)  # adapters start in fp32
        torch.manual_seed(1)
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.2)
    return model.train()


def documents():
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 384, (n,), generator=generator) for n in LENGTHS]
    labels = [torch.randint(3, 384, (n,), generator=generator) for n in LENGTHS]
    labels[1][:11] = -100
    return rows, labels


def batch_of(packed):
    rows, labels = documents()
    if not packed:
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(r) for r in rows], batch_first=True)
        return {
            "input_ids": pad(rows, batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=-100),
            "attention_mask": mask,
        }
    bounds = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return {
        "input_ids": torch.cat(rows)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": positions,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
    }


def cross_entropy_sum(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def reference(kind, lora, dtype):
    model = build(kind, "eager" if dtype == torch.float32 else "sdpa", lora, dtype)  # eager has an fp32 softmax
    total = 0.0
    for ids, labels in zip(*documents(), strict=True):
        total = total + cross_entropy_sum(model(input_ids=ids[None], use_cache=False).logits, labels[None])
    total.backward()
    return total.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def rounding(kind, lora, grads):
    """By parameter, how far the float32 reference itself is from float64's gradient, relative."""
    if kind not in FLOAT64:
        return {}
    _, exact = reference(kind, lora, torch.float64)
    pairs = {name: (grads[name], grad) for name, grad in exact.items() if grad is not None}
    return {name: ((got - grad).norm() / grad.norm().clamp_min(1e-12)).item() for name, (got, grad) in pairs.items()}


def close(name, got, expected, tolerance):
    off = (got - expected).norm() / expected.norm().clamp_min(1e-12)
    assert off <= tolerance, f"{name}: {off:.2e} > {tolerance}"


def compare() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    for kind in CONFIGS:
        compare_one(kind, mesh)
    dist.destroy_process_group()


def compare_one(kind, mesh):
    for dtype, tolerance in TOLERANCES[: 2 if kind in FLOAT64 else 1]:
        for lora in (False, True):
            loss, grads = reference(kind, lora, dtype)
            noise = rounding(kind, lora, grads) if dtype == torch.float32 else {}
            for packed in (False, True):
                loss_fn = cross_entropy_sum if dtype == torch.float64 else FusedLinearCrossEntropy()
                check(kind, lora, dtype, packed, loss_fn, mesh, loss, grads, tolerance, noise)


def check(kind, lora, dtype, packed, loss_fn, mesh, loss, grads, tolerance, noise):
    model = build(kind, register(), lora, dtype)
    find_window(model)
    require_context_parallel(model)
    if packed and not lora:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shard = shard_sequence(batch_of(packed), mesh)
    ce_sum, _ = forward_loss(model, shard, loss_fn)
    ce_sum.backward()
    total = ce_sum.detach().clone()
    dist.all_reduce(total)
    what = f"{kind} lora={lora} {dtype} packed={packed}"
    close(f"{what} loss", total, loss, tolerance)
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == grads.keys()
    for name, parameter in found.items():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(grad)
        expected = torch.zeros_like(parameter) if grads[name] is None else grads[name]
        if expected.norm() > tolerance * total.abs() * 1e-3:  # else rounding of zero, such as a key bias
            # two float32 runs may each be off by their rounding, where that is more than the tolerance
            close(f"{what} {name}", grad, expected, max(tolerance, 2 * noise.get(name, 0.0)))
        else:
            assert grad.norm() <= tolerance * total.abs(), name


@pytest.mark.parametrize("nproc", [2, 4])
def test_loss_and_gradients_equal_plain_transformers(nproc):
    on_ranks("tests.ranks.test_context_parallel:compare", nproc, timeout=500)
