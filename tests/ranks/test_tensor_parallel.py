"""Tensor and sequence parallelism on real ranks.

Claims: (1) loss and every parameter's gradient are those of plain transformers on one process, on every rank, padded and
packed, full and LoRA and DoRA, whole logits and vocabulary-parallel loss, the sequence sharded or not; (2) adapters,
merged weights and gradients come out whole, under TP and under FSDP2 x TP; (3) a sharded sequence leaves less saved for
backward; (4) blocks compile as one graph, once for all lengths; (5) a plan that computes something else is found out.
"""

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from nemo_automodel._transformers.forward import forward_loss
from nemo_automodel._transformers.mixin import adopt
from nemo_automodel._transformers.packing_trial import require_packing
from nemo_automodel._transformers.tp_plan import plan_from_styles, require_heads, tp_plan_for
from nemo_automodel._transformers.tp_proof import Twin
from nemo_automodel._transformers.window_trial import find_window
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.attention.function import register
from nemo_automodel.components.distributed.grads import GradClipper
from nemo_automodel.components.distributed.tensor_parallel import tensor_parallelize
from nemo_automodel.components.distributed.tp_collectives import Ranks, exchange_slices
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.errors import ConfigError
from tests.builders import tiny_config
from tests.ranks.launch import on_ranks
from tests.ranks.test_context_parallel import batch_of, cross_entropy_sum, documents

_NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
CONFIGS = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "odd": ("llama", {"vocab_size": 385}),  # a vocabulary that no rank can have an equal share of
    "qwen3": ("qwen3", {}),
    "gemma3_text": ("gemma3_text", {"sliding_window": 9, "final_logit_softcapping": 8.0}),
    "gpt2": ("gpt2", _NO_DROPOUT),
    "phi3": ("phi3", {}),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
}
FLOAT64 = ("llama", "tied", "qwen3", "gpt2")  # the others have parts that transformers keeps in fp32


def build(kind, attention, lora, dtype):
    torch.manual_seed(0)
    model_type, over = CONFIGS[kind]
    if dist.get_world_size() == 4 and model_type != "gpt2":
        over = {**over, "num_key_value_heads": 4}
    config = tiny_config(model_type, **over)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    with torch.no_grad():
        for p in model.parameters():  # sharper than the initial weights, so that attention matters
            p.add_(torch.randn_like(p) * 0.1)
    if lora:
        targets = ["*c_attn", "*c_proj", "*c_fc"] if kind == "gpt2" else "*_proj"
        PeftConfig(target_modules=targets, dim=4, use_dora=lora == "dora").apply(model)
        model.to(dtype)  # adapters start in fp32
        torch.manual_seed(1)
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.05)
    return model.train()


def reference(kind, lora, dtype):
    model = build(kind, "eager" if dtype == torch.float32 else "sdpa", lora, dtype)  # eager has an fp32 softmax
    total = 0.0
    for ids, labels in zip(*documents(), strict=True):
        total = total + cross_entropy_sum(model(input_ids=ids[None], use_cache=False).logits, labels[None])
    total.backward()
    return total.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def tp_mesh():
    dist.init_process_group("gloo")
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_gradients(what, model, grads, loss, tolerance):
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == grads.keys()
    for name, parameter in found.items():
        grad = torch.zeros(parameter.shape, dtype=parameter.dtype) if parameter.grad is None else whole(parameter.grad)
        expected = torch.zeros_like(grad) if grads[name] is None else grads[name]
        if isinstance(parameter.grad, DTensor):
            sums = [None] * dist.get_world_size()
            dist.all_gather_object(sums, grad.double().sum().item())
            assert max(sums) - min(sums) <= 1e-12 * grad.double().abs().sum().item(), f"{what}: {name} differs by rank"
        if expected.norm() > tolerance * loss.abs() * 1e-3:  # else rounding of zero, such as a key bias
            off = (grad - expected).norm() / expected.norm()
            assert off <= tolerance, f"{what} {name}: {off:.2e} > {tolerance}"
        else:
            assert grad.norm() <= tolerance * loss.abs(), f"{what}: {name}"


def compare(kinds: str, extent: str) -> None:
    mesh = tp_mesh()
    for kind in kinds.split(","):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
            if dtype == torch.float64 and kind not in FLOAT64:
                continue
            for lora in (False, True, "dora") if extent == "full" or kind == "llama" else (False, True):
                if dtype == torch.float64 and lora == "dora":
                    continue  # DoRA's norms are fp32
                compare_one(kind, dtype, lora, mesh, extent, tolerance)
    dist.destroy_process_group()


def compare_one(kind, dtype, lora, mesh, extent, tolerance):
    loss, grads = reference(kind, lora, dtype)
    plan = None
    for i, (packed, along) in enumerate(((False, False), (True, True), (False, True), (True, False))):
        if i > 1 and extent != "full":
            break
        model = build(kind, register(), lora, dtype)
        find_window(model)
        if packed:
            require_packing(model)
        plan = tp_plan_for(model, mesh, along) if plan is None or along else plan
        tensor_parallelize(model, plan, mesh, along)
        if packed and not lora:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        fused = FusedLinearCrossEntropy(chunk_size=7) if packed else FusedLinearCrossEntropy()
        loss_fn = cross_entropy_sum if dtype == torch.float64 else fused if along else MaskedCrossEntropy()
        if dtype == torch.float32 and not along and not packed and extent == "sample":
            loss_fn = fused
        ce_sum, _ = forward_loss(model, batch_of(packed), loss_fn)
        ce_sum.backward()
        what = f"{kind} lora={lora} {dtype} packed={packed} sequence={along}"
        assert (ce_sum - loss).abs() <= tolerance * loss.abs(), what
        state = model.__dict__.get("_automodel_head")
        assert state is None or state.reason is None, f"{what}: {state.reason}"
        # soft-capped gradients of the smallest weights are sums of larger, cancelling terms
        assert_gradients(what, model, grads, loss, tolerance)


def test_sample_equals_plain_transformers_on_two_ranks():
    on_ranks("tests.ranks.test_tensor_parallel:compare", 2, "llama,gemma3_text,qwen3_moe,gpt2", "sample")


@pytest.mark.full
@pytest.mark.parametrize("nproc", [2, 4])
def test_loss_and_gradients_equal_plain_transformers(nproc):
    on_ranks("tests.ranks.test_tensor_parallel:compare", nproc, ",".join(CONFIGS), "full", timeout=1200)


def shards() -> None:
    """What is stored: adapters and merged weights whole, gradients and their norm under FSDP2 x TP, a fused weight's parts."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    for kind, lora in (("llama", False), ("llama", True), ("llama", "dora"), ("gpt2", True), ("gpt2", False)):
        alone = build(kind, register(), lora, torch.float32)
        loss, _ = forward_loss(alone, batch_of(False), MaskedCrossEntropy())
        loss.backward()
        grads = {n: p.grad.clone() for n, p in alone.named_parameters() if p.requires_grad}
        norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 1e9)
        for sharded in (False, True):
            model = adopt(build(kind, register(), lora, torch.float32))
            tensor_parallelize(model, tp_plan_for(model, mesh["tp"], lora is True), mesh["tp"], lora is True)
            if sharded:
                for block in model.model.layers if kind == "llama" else model.transformer.h:
                    fully_shard(block, mesh=mesh["dp"])
                fully_shard(model, mesh=mesh["dp"])
            assert all(isinstance(p, DTensor) for p in model.parameters())
            if lora:
                config = PeftConfig(match_all_linear=True, use_dora=lora == "dora")
                assert_equal(config.adapter_state_dict(model), config.adapter_state_dict(alone))
                assert_equal(config.merged_state_dict(model), config.merged_state_dict(alone))
            else:
                assert_equal(model.state_dict(), alone.state_dict())
            ce_sum, _ = forward_loss(model, batch_of(False), FusedLinearCrossEntropy())
            ce_sum.backward()  # the same batch on every rank: FSDP2's mean is one process's gradient
            assert_gradients(f"{kind} {lora} fsdp={sharded}", model, grads, loss.detach(), 1e-5)
            assert (GradClipper(None)(list(model.parameters())) - norm).abs() <= 1e-5 * norm
    exchanged(mesh["tp"])
    dist.destroy_process_group()


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(whole(value), expected[name], rtol=1e-6, atol=1e-7, msg=name)


def exchanged(mesh):
    ranks = Ranks.of(mesh)
    for sizes in ((4, 4, 4), (8, 2, 2), (2, 6), (4,)):
        weight = torch.arange(sum(sizes) * 3.0).view(-1, 3)
        local = weight.chunk(ranks.size)[ranks.rank].clone().requires_grad_()
        out = exchange_slices(local, 0, sizes, ranks)
        assert torch.equal(out, torch.cat([p.chunk(ranks.size)[ranks.rank] for p in weight.split(sizes)]))
        out.backward(out.detach() * 2)
        assert torch.equal(local.grad, local.detach() * 2)


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.full)])
def test_what_is_stored_is_whole_when_gathered(nproc):
    on_ranks("tests.ranks.test_tensor_parallel:shards", nproc)


def saved_bytes(model, ids):
    storages = {}
    weights = {whole_storage(p) for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(input_ids=ids, use_cache=False)
    return sum(size for size, _ in storages.values())


def whole_storage(parameter):
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.untyped_storage().data_ptr()


def behaviour() -> None:
    """Saved activations, compilation, and proofs."""
    mesh = tp_mesh()
    ids = torch.randint(3, 384, (2, 64), generator=torch.Generator().manual_seed(0))
    sizes = []
    for along in (None, False, True):
        model = build("llama", register(), False, torch.float32)
        if along is not None:
            tensor_parallelize(model, tp_plan_for(model, mesh, along), mesh, along)
        sizes.append(saved_bytes(model, ids))
    alone, tensor, sequence = sizes
    assert tensor < 0.75 * alone, sizes
    assert sequence < 0.85 * tensor, sizes

    for along, most in ((False, 2), (True, 3)):  # one length, any length; with the filler of an odd one
        found = []
        for compiled in (False, True):
            torch._dynamo.reset()
            counters.clear()
            model = build("llama", "sdpa", False, torch.float32)
            tensor_parallelize(model, tp_plan_for(model, mesh, along), mesh, along)
            for block in model.model.layers if compiled else ():
                block.compile(fullgraph=True, backend="aot_eager")
            loss = 0.0
            for length in (16, 17, 22, 31, 40):
                logits = model(input_ids=ids[:, :length], use_cache=False).logits
                loss = loss + cross_entropy_sum(logits, ids[:, :length])
            loss.backward()
            found.append((loss, [whole(p.grad) for p in model.parameters() if p.grad is not None]))
            assert counters["stats"]["unique_graphs"] == (most if compiled else 0), counters["stats"]
        torch.testing.assert_close(*(loss for loss, _ in found))
        for one, other in zip(*(grads for _, grads in found), strict=True):
            assert (one - other).norm() <= 1e-5 * one.norm() + 1e-6

    model = build("qwen3", "sdpa", False, torch.float32)
    styles = dict(model._tp_plan)
    twin = Twin(model, mesh)
    assert twin.objection(lambda m: plan_from_styles(m, styles, 2)) is None
    for name, style, complaint in (
        ("model.layers.*.self_attn.o_proj", "replicate", "fails|loss"),
        ("model.layers.*.mlp.up_proj", "colwise_gather_output", "fails"),
        ("model.layers.*.self_attn.q_norm", "colwise", "fails|unknown|no linear"),
        ("lm_head", "colwise", "fails"),
    ):
        wrong = twin.objection(lambda m, n=name, s=style: plan_from_styles(m, {**styles, n: s}, 2))
        assert wrong is not None, (name, complaint)
    dist.destroy_process_group()


def test_activations_shrink_blocks_compile_and_wrong_plans_are_found_out():
    on_ranks("tests.ranks.test_tensor_parallel:behaviour", 2)


@pytest.mark.parametrize(
    ("heads", "groups", "tp_size", "message"),
    [
        (6, 3, 2, "distributed.tp_size=2: 6 attention heads and 3 key-value heads .* write one of 1, 3"),
        (6, 6, 4, "distributed.tp_size=4: 6 attention heads .* write one of 1, 2, 3, 6"),
        (4, 1, 2, "4 attention heads and 1 key-value heads .* write 1"),
    ],
)
def test_heads_that_do_not_divide_say_what_to_write(heads, groups, tp_size, message):
    config = tiny_config("llama", hidden_size=48, num_attention_heads=heads, num_key_value_heads=groups)
    model = AutoModelForCausalLM.from_config(config)
    plan = plan_from_styles(model, model._tp_plan, tp_size)
    with pytest.raises(ConfigError, match=message):
        require_heads(model, plan, tp_size)
