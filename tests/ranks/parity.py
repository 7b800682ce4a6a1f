"""The recipe on this process's ranks, cell by cell, and what plain transformers makes of the same rows on one device.

A cell is a parallel layout, an adapter or none, a model and padded or packed rows. Each is run by the recipe's own
``main`` from YAML; gradients of the first step are taken by a gradient clipper of the test's own, put in from the YAML.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components._peft.linear import clean_name
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.distributed.grads import GradClipper
from nemo_automodel.config import load
from tests.recipes.workspace import Workspace, make_workspace

STEPS = 5
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {  # ranks, the `distributed` section
    "FSDP2": (2, {}),
    "HSDP": (4, {"dp_replicate_size": 2}),
    "DDP": (2, {"_target_": "nemo_automodel.components.distributed.ddp.DDPManager"}),
    "TP2": (2, {"tp_size": 2}),
    "TP2+SP": (2, {"tp_size": 2, "sequence_parallel": True}),
    "EP2": (2, {"ep_size": 2}),
    "CP2": (2, {"cp_size": 2}),
    "FSDP2×TP2": (4, {"tp_size": 2}),
    "FSDP2×EP2": (4, {"ep_size": 2}),
    "EP4": (4, {"ep_size": 4}),
    "FSDP2×CP2": (4, {"cp_size": 2}),
    "TP2×CP2": (4, {"tp_size": 2, "cp_size": 2}),
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # model type, config
    "Llama": ("llama", {}),
    "Qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "Gemma-3": ("gemma3_text", {"final_logit_softcapping": 5.0}),
    "MoE": ("qwen3_moe", {}),
    "GPT-2": ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
}
FLOAT64 = ("Llama", "Qwen3", "GPT-2")  # the others compute parts in fp32 in transformers itself
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]  # adapted beside the linear layers, where there are any
TARGETS = {"GPT-2": ["c_attn", "c_proj", "c_fc"]}
LORA = {"dim": 4, "alpha": 8}


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix."""

    layout: str
    peft: bool
    model: str
    packed: bool
    dtype: str = "float32"

    @property
    def name(self) -> str:
        parts = (self.layout, "LoRA" if self.peft else "SFT", self.model, "packed" if self.packed else "padded")
        return " ".join((*parts, self.dtype))

    @property
    def parameters(self) -> list[str] | None:
        """``peft.target_parameters``: tensor parallelism does not cut adapters of experts."""
        return EXPERTS if self.peft and self.model == "MoE" and "TP" not in self.layout else None

    @property
    def oracle(self) -> str:
        """The name of what it is compared with: the layout does not matter to that."""
        return self.name.split(" ", 1)[1].replace(" ", "_") + "_experts" * bool(self.parameters)


# --- what the recipe is given in place of its own -----------------------------------------------------------------


class TakingClipper(GradClipper):
    """Clips as ours does, and keeps the first step's gradients, whole, by parameter."""

    taken: dict[int, torch.Tensor] | None = None

    def __call__(self, params: Any) -> torch.Tensor:
        params = list(params)
        if TakingClipper.taken is None:
            TakingClipper.taken = {id(p): _whole(p.grad) for p in params if p.grad is not None}
        return super().__call__(params)


def build(pretrained_model_name_or_path: str, dtype: str, precision: str, peft: Any, distributed: Any, packed: bool):
    """Our autoclass, in float64 too, with adapters that are not zero; keeps the model for its parameters' names.

    bfloat16 cells keep trained weights in float32, as a recipe does by default.
    """
    compute = getattr(torch, precision)
    kept = torch.promote_types(compute, torch.float32)
    if peft is not None:
        peft.lora_dtype = kept
    model = NeMoAutoModelForCausalLM.from_pretrained(
        pretrained_model_name_or_path,
        dtype=compute,
        master_dtype=kept,
        peft=peft,
        distributed=distributed,
        packed=packed,
    )
    fill_adapters(model, kept)
    build.model = model
    return model


class ExactCrossEntropy:
    """The loss of float64 cells, in float64 throughout."""

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy_sum(logits, labels)


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


@torch.no_grad()
def fill_adapters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Values for every adapter from its name alone, so that any sharding and the plain model get the same."""
    for name, p in model.named_parameters():
        if "lora_" in name:
            generator = torch.Generator().manual_seed(sum(map(ord, clean_name(name))))
            full = (torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2).to(p.device, dtype)
            if isinstance(p, DTensor):
                from nemo_automodel.components._peft.linear import like

                full = like(full, p)
            p.copy_(full)


def _whole(grad: torch.Tensor) -> torch.Tensor:
    return (grad.full_tensor() if isinstance(grad, DTensor) else grad).detach().cpu().clone()


# --- running ------------------------------------------------------------------------------------------------------


def workspace_of(root: Path, model: str) -> Workspace:
    """The model, data and recipe of every cell of ``model``."""
    kind, config = MODELS[model]
    if not (root / model / "recipe.yaml").exists():
        make_workspace(root / model, kind, **config)
        _sharpen(root / model / "model")
    return Workspace(root / model)


def _sharpen(directory: Path) -> None:
    """Weights far enough from their start that attention and every layer matter to the loss."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(directory)


def overrides(cell: Cell, out: Path) -> list[str]:
    """What turns the workspace's recipe into the cell."""
    args = [
        f"--checkpoint.checkpoint_dir={out}", "--checkpoint.enabled=false", f"--step_scheduler.max_steps={STEPS}",
        "--optimizer.lr=0.001", "--lr_scheduler.decay=constant", "--lr_scheduler.warmup_steps=0",
        "--model._target_=tests.ranks.parity.build", "--clip_grad_norm._target_=tests.ranks.parity.TakingClipper",
        f"--model.precision={cell.dtype}",
    ]  # fmt: skip
    if cell.packed:
        args += ["--packed_sequence.packed_sequence_size=64", "--step_scheduler.global_batch_size=4"]
    args += [f"--step_scheduler.local_batch_size={1 if cell.packed else 2}"]
    args += [f"--distributed.{key}={value}" for key, value in LAYOUTS[cell.layout][1].items()]
    if cell.peft:
        args += ["--peft._target_=nemo_automodel.components._peft.lora.PeftConfig"]
        args += [f"--peft.{key}={value}" for key, value in LORA.items()]
        targets = TARGETS.get(cell.model)
        args += [f"--peft.target_modules={json.dumps(targets)}"] if targets else ["--peft.match_all_linear=true"]
        args += [f"--peft.target_parameters={json.dumps(cell.parameters)}"] if cell.parameters else []
    if cell.dtype == "float64":
        args += ["--loss_fn._target_=tests.ranks.parity.ExactCrossEntropy"]
    return args


def run_cell(cell: Cell, root: Path) -> dict[str, Any]:
    """Train the cell; the first step's gradients, and the logged loss and gradient norm of each step."""
    from nemo_automodel.recipes.llm import finetune

    TakingClipper.taken = None
    out = root / "out" / cell.name.replace(" ", "_")
    finetune.main(load(workspace_of(root, cell.model).recipe, overrides(cell, out), ["tests"]))
    dist.barrier()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    taken = TakingClipper.taken or {}
    named = {clean_name(name): taken[id(p)] for name, p in build.model.named_parameters() if id(p) in taken}
    return {"grads": named, "loss": [x["loss"] for x in lines], "grad_norm": [x["grad_norm"] for x in lines]}


def oracle(cell: Cell, root: Path) -> dict[str, Any]:
    """The same steps by plain transformers on one process: every document a row of its own, no padding, no sharding.

    For a bfloat16 cell in float32, with what plain transformers makes of them in bfloat16 under ``plain``.
    """
    if cell.dtype == "bfloat16":
        return plain_steps(cell, root, torch.float32) | {"plain": plain_steps(cell, root, torch.bfloat16)}
    return plain_steps(cell, root, getattr(torch, cell.dtype))


def plain_steps(cell: Cell, root: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The loop of ``oracle``, computed and kept in ``dtype``."""
    workspace = workspace_of(root, cell.model)
    data, order = _rows_and_order(cell, workspace, root)
    attention = "eager" if dtype == torch.float32 else "sdpa"  # eager takes its softmax in fp32
    model = AutoModelForCausalLM.from_pretrained(workspace.model_dir, dtype=dtype, attn_implementation=attention)
    if cell.peft:
        targets = TARGETS.get(cell.model)
        config = PeftConfig(
            target_modules=targets, target_parameters=cell.parameters, match_all_linear=not targets, lora_dtype=dtype, **LORA
        )  # fmt: skip
        config.apply(model)
        fill_adapters(model, dtype)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=0.001, betas=(0.9, 0.95), weight_decay=0.0)
    found: dict[str, Any] = {"loss": [], "grad_norm": []}
    for ids in order:
        count, total = sum(label != -100 for i in ids for label in data[i]["labels"]), 0.0
        for i in ids:
            row, labels = torch.tensor([data[i]["input_ids"]]), torch.tensor([data[i]["labels"]])
            loss = cross_entropy_sum(model(input_ids=row, use_cache=False).logits, labels) / count
            loss.backward()
            total += loss.item()
        if "grads" not in found:
            wide = torch.promote_types(dtype, torch.float32)
            found["grads"] = {n: p.grad.to(wide, copy=True) for n, p in model.named_parameters() if p.grad is not None}
        found["grad_norm"].append(torch.nn.utils.clip_grad_norm_(params, 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        found["loss"].append(total)
    return found


def _rows_and_order(cell: Cell, workspace: Workspace, root: Path) -> tuple[Any, list[list[int]]]:
    cfg = load(workspace.recipe, overrides(cell, root / "none"), ["tests"])
    tokenizer = cfg.tokenizer.instantiate(model_name=cfg.model_name)
    data = cfg.dataset.instantiate(tokenizer=tokenizer)
    size = cfg.step_scheduler.global_batch_size
    loader = cfg.dataloader.instantiate(
        dataset=data, tokenizer=tokenizer, packing=cfg.packed_sequence.instantiate(), seed=cfg.rng.seed, dp_rank=0,
        dp_size=1, global_batch_size=size, local_batch_size=1, pin_memory=False,
    )  # fmt: skip
    steps = [[i for batch in batches for i in batch["sample_ids"]] for batches in loader.steps(0)]
    return data, [*steps, *([i for b in batches for i in b["sample_ids"]] for batches in loader.steps(1))][:STEPS]


def compare(got: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Relative errors: the worst gradient (and whose), the logged losses and gradient norms."""
    missing = sorted(expected["grads"].keys() ^ got["grads"].keys())
    size = max(g.norm().item() for g in expected["grads"].values())
    errors = {}
    for name in expected["grads"].keys() & got["grads"].keys():
        g = expected["grads"][name]
        scale = max(g.norm().item(), 1e-4 * size)  # of a gradient that is rounding of zero, against the largest
        errors[name] = ((got["grads"][name].to(g.dtype) - g).norm() / scale).item()
    worst = max(errors, key=lambda name: errors[name])

    def off(key: str) -> float:
        pairs = zip(got[key], expected[key], strict=True)
        return max(abs(a - b) / abs(b) for a, b in pairs)

    squares = {
        n: (got["grads"][n].to(g.dtype) - g).square().sum().item() for n, g in expected["grads"].items() if n in errors
    }
    return {
        "missing": missing, "parameters": len(errors), "gradient": errors[worst], "worst": worst,
        "loss": off("loss"), "grad_norm": off("grad_norm"), "each": errors,
        "total": (sum(squares.values()) / sum(g.square().sum().item() for g in expected["grads"].values())) ** 0.5,
    }  # fmt: skip


def main(root: str, cells: str, results: str) -> None:
    """Run ``cells`` (a JSON file) and write, on rank 0, what each came to (another JSON file)."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, size = next(rendezvous("env://"))
    found = {}
    for number, fields in enumerate(json.loads(Path(cells).read_text())):
        cell = Cell(**fields)
        # Groups of its own for each cell: those of all cells together come to a thousand threads a rank, which wake for nothing.
        apart = dist.PrefixStore(f"group_{number}", store)
        dist.init_process_group(backend, store=apart, rank=rank, world_size=size)
        try:
            got = run_cell(cell, Path(root))
            expected = torch.load(Path(root) / f"oracle_{cell.oracle}.pt", weights_only=True)
            found[cell.name] = asdict(cell) | compare(got, expected)
            if "plain" in expected:  # what plain transformers is off by in the same dtype
                found[cell.name]["plain"] = compare(expected["plain"], expected)
        except Exception as error:  # the next cell is still of interest
            found[cell.name] = asdict(cell) | {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        if rank == 0:
            Path(results).write_text(json.dumps(found, indent=1))
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()


if __name__ == "__main__":
    main(*sys.argv[1:])
