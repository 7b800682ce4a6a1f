"""Checks of values, and of values against each other, that need no model and no data."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nemo_automodel.config.suggest import nearest
from nemo_automodel.config.tree import Node, Where
from nemo_automodel.config.validate import Call

Calls = dict[str, Call | None]

_DTYPES = ("float32", "bfloat16", "float16", "auto")
_SHORT_DTYPES = ("fp32", "bf16", "fp16", "float", "half")
_DTYPE_KEYS = ("dtype", "torch_dtype", "master_dtype", "lora_dtype", "compute_dtype", "export_dtype")
_AT_LEAST_ONE = ("max_steps", "num_epochs", "global_batch_size", "local_batch_size", "ckpt_every_steps", "val_every_steps", "log_every_steps")  # fmt: skip
_NOT_NEGATIVE = ("lr", "weight_decay", "eps", "warmup_steps", "min_lr_ratio", "min_lr", "alpha", "packed_sequence_size", "num_workers", "seed")  # fmt: skip
CONFLICTS = (
    ("peft", "match_all_linear", "target_modules", "write target_modules alone, or match_all_linear: true alone"),
    ("optimizer", "fused", "foreach", "torch takes one of them; leave foreach out"),
    ("optimizer", "fused", "differentiable", "torch takes one of them; leave fused out"),
    ("model", "dtype", "torch_dtype", "they are one option; leave torch_dtype out"),
)
"""(section, key, other key, what to do): the two exclude each other."""


def check_values(calls: Calls, file: str) -> list[str]:
    """Every problem of these kinds, as messages."""
    checks: tuple[Callable[[Calls, str], Iterator[str]], ...] = (
        _numbers, _dtypes, _batch, _mesh, _warmup, _conflicts, _merged, _validated, _loss, _quantized, _output, _restore,
    )  # fmt: skip
    return [problem for check in checks for problem in check(calls, file)]


def _numbers(calls: Calls, file: str) -> Iterator[str]:
    for path, node in _leaves(calls):
        value, key = node.value, path.rpartition(".")[2]
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if math.isnan(value):
            yield _message(
                node, path, "not a number", "write a number such as 1e-4" if key == "lr" else "write a number"
            )
        elif key in _NOT_NEGATIVE and value < 0:
            yield _message(node, path, "negative", "write a number such as 1e-4" if key == "lr" else "write 0 or more")
        elif key == "max_norm" and value <= 0:  # 0 is no clipping elsewhere; here it would leave no gradient
            yield _message(node, path, "no norm to clip to", "write a number above 0, or null to measure only")
        elif key == "min_lr_ratio" and value > 1:
            yield _message(node, path, "above 1, so that the learning rate would rise", "write a number from 0 to 1")
        elif key == "lr" and math.isinf(value):
            yield _message(node, path, "infinite", "write a number such as 1e-4")
        elif path.startswith("step_scheduler.") and key in _AT_LEAST_ONE and value < 1:
            yield _message(node, path, "must be at least 1", "write 1 or more, or leave it out")


def _dtypes(calls: Calls, file: str) -> Iterator[str]:
    for path, node in _leaves(calls):
        key = path.rpartition(".")[2]
        if key not in _DTYPE_KEYS or not isinstance(node.value, str):
            continue
        name = node.value.removeprefix("torch.")
        there_are, short = (_DTYPES, _SHORT_DTYPES) if key != "lora_dtype" else (_DTYPES[:2], _SHORT_DTYPES[:2])
        if name not in (*there_are, *short, "none"):
            close = nearest(name, (*there_are, *short))
            fix = f"did you mean `{close}`?" if close else f"write one of {', '.join(there_are)}"
            yield _message(node, path, f"unsupported dtype (there are {', '.join(there_are)})", fix)


def _batch(calls: Calls, file: str) -> Iterator[str]:
    call = calls.get("step_scheduler")
    total, local = _value(call, "global_batch_size"), _value(call, "local_batch_size")
    if call is None or not _positive(total) or not _positive(local):
        return
    ranks = _data_parallel_size(calls)
    unit = local * ranks
    if total % unit:
        node, path = _written(call, "global_batch_size", "local_batch_size")
        below, above = total // unit * unit, (total // unit + 1) * unit
        of_ranks = f" x {ranks} data-parallel ranks = {unit}" if ranks > 1 else ""
        fix = f"write global_batch_size: {below} or {above}" if below else f"write global_batch_size: {above}"
        yield _message(
            node, path, f"global_batch_size {total} is not a multiple of local_batch_size {local}{of_ranks}", fix
        )


def _mesh(calls: Calls, file: str) -> Iterator[str]:
    """Only where a launcher has said how many processes there are."""
    call, world = calls.get("distributed"), os.environ.get("WORLD_SIZE", "")
    sizes = [_value(call, key) for key in ("dp_size", "tp_size", "cp_size")]
    if call is None or not world.isdecimal() or not all(_positive(size) for size in sizes):
        return
    if math.prod(sizes) != int(world):
        node, path = _written(call, "dp_size", "tp_size", "cp_size")
        counted = " x ".join(
            f"{key} {size}" for key, size in zip(("dp_size", "tp_size", "cp_size"), sizes, strict=True)
        )
        yield _message(
            node, path, f"{counted} = {math.prod(sizes)}, but {world} processes were started", "write dp_size: none"
        )


def _warmup(calls: Calls, file: str) -> Iterator[str]:
    call = calls.get("lr_scheduler")
    warmup, steps = _value(call, "warmup_steps"), _value(calls.get("step_scheduler"), "max_steps")
    if call is not None and _positive(warmup) and _positive(steps) and warmup > steps:
        node, path = _written(call, "warmup_steps")
        yield _message(node, path, f"longer than step_scheduler.max_steps={steps}", f"write at most {steps}")


def _conflicts(calls: Calls, file: str) -> Iterator[str]:
    for section, first, second, fix in CONFLICTS:
        call = calls.get(section)
        if call is not None and all(key in call.arguments and call.arguments[key].value for key in (first, second)):
            other = call.arguments[first]
            problem = f"conflicts with {section}.{first}={other.shown()} ({other.where})"
            yield _message(call.arguments[second], f"{section}.{second}", problem, fix)


def _merged(calls: Calls, file: str) -> Iterator[str]:
    call = calls.get("checkpoint")
    if call is not None and _value(call, "save_merged") is True and calls.get("peft") is None:
        node, path = _written(call, "save_merged")
        yield _message(node, path, "there are no adapters to merge, since there is no `peft` section", "leave it out")


def _validated(calls: Calls, file: str) -> Iterator[str]:
    call = calls.get("step_scheduler")
    if _value(call, "val_every_steps") is not None and calls.get("validation_dataset") is None:
        node, path = _written(call, "val_every_steps")  # type: ignore[arg-type]
        yield _message(
            node, path, "there is nothing to validate on", "add a `validation_dataset` section, or leave it out"
        )


def _loss(calls: Calls, file: str) -> Iterator[str]:
    call = calls.get("loss_fn")
    if call is not None and call.target.startswith("torch.nn."):
        problem = f"{call.target} takes other shapes than logits [B, S, V] and labels [B, S], and returns a mean"
        fix = "write nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy, or a function that returns their sum"
        yield f"{call.where} loss_fn: {problem}; {fix}"
    if call is not None and _value(call, "ignore_index") not in (None, -100):
        node, path = _written(call, "ignore_index")
        yield _message(node, path, "the data marks what is not trained on with -100", "leave it out")


def _quantized(calls: Calls, file: str) -> Iterator[str]:
    """What a base in four bits cannot do; its weights are never saved, so the adapter needs a base that has a name."""
    call, model = calls.get("quantization"), calls.get("model")
    if call is None or not _value(call, "load_in_4bit"):
        return
    node, path = _written(call, "load_in_4bit")
    if calls.get("peft") is None:
        yield _message(node, path, "four bits are for the frozen base of a LoRA run", "add a `peft` section")
    if calls.get("fp8") is not None and _value(calls["fp8"], "enabled") is not False:
        yield _message(node, path, "a weight is computed in FP8 or kept in four bits, not both", "leave `fp8` out")
    if _value(calls.get("checkpoint"), "save_merged") is True:
        node_merged, path_merged = _written(calls["checkpoint"], "save_merged")  # type: ignore[arg-type]
        problem = "weights in four bits are not merged into"
        fix = "leave it out, and run automodel merge afterwards"
        yield _message(node_merged, path_merged, problem, fix)
    if model is not None and model.target.endswith(".from_config"):
        yield _message(node, path, "fresh weights have no name to load them from again", "use from_pretrained")


def _output(calls: Calls, file: str) -> Iterator[str]:
    call = calls.get("checkpoint")
    folder = _value(call, "checkpoint_dir")
    if call is None or not isinstance(folder, str) or _value(call, "enabled") is False:
        return
    node, path = _written(call, "checkpoint_dir")
    place = Path(folder).expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        yield _message(node, path, f"{place} is a file", "name a folder")
    elif not os.access(place, os.W_OK | os.X_OK):
        yield _message(node, path, f"{place} cannot be written", "name a folder you may write to")


def _restore(calls: Calls, file: str) -> Iterator[str]:
    call = calls.get("checkpoint")
    wanted, folder = _value(call, "restore_from"), _value(call, "checkpoint_dir")
    if (
        call is None
        or not isinstance(wanted, str)
        or not isinstance(folder, str)
        or "restore_from" not in call.arguments
    ):
        return
    folder = str(Path(folder).expanduser())
    there = sorted(p.name for p in Path(folder).glob("*/") if _is_checkpoint(p)) if Path(folder).is_dir() else []
    named = [Path(wanted).expanduser(), Path(folder) / wanted]
    if any(_is_checkpoint(p) or any(map(_is_checkpoint, p.glob("*/"))) for p in named if p.is_dir()):
        return
    if wanted == "latest" or (wanted == "best" and (Path(folder) / "BEST").is_file()):
        return  # latest starts anew, and says so, where there is nothing yet: a requeued job needs no other command
    node, path = _written(call, "restore_from")
    if not there:
        fix = f"{folder} holds no complete checkpoint; leave restore_from out to start anew"
    else:
        none_validated = ", and none is the best, since none was validated"
        fix = f"there are {', '.join(there)}{none_validated * (wanted == 'best')}"
    yield _message(node, path, "nothing to restore", fix)


def _is_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint was published there; its contents are verified when it is loaded."""
    try:
        return isinstance(json.loads((folder / "manifest.json").read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def _data_parallel_size(calls: Calls) -> int:
    """Data-parallel ranks as far as they are known before the run: as written, or from the launcher's environment."""
    call, world = calls.get("distributed"), os.environ.get("WORLD_SIZE", "")
    size = _value(call, "dp_size")
    if _positive(size):
        return size
    others = [_value(call, key) for key in ("tp_size", "cp_size")]
    return max(1, int(world) // math.prod(s for s in others if _positive(s))) if world.isdecimal() else 1


def _leaves(calls: Calls) -> Iterator[tuple[str, Node]]:
    for call in calls.values():
        for key, node in call.arguments.items() if call is not None else ():
            yield from _walk(f"{call.section}.{key}", node)  # type: ignore[union-attr]


def _walk(path: str, node: Node) -> Iterator[tuple[str, Node]]:
    yield path, node
    items = (
        node.value.items()
        if isinstance(node.value, dict)
        else enumerate(node.value)
        if isinstance(node.value, list)
        else ()
    )
    for key, child in items:
        yield from _walk(f"{path}.{key}", child)


def _value(call: Call | None, key: str) -> Any:
    return call.value(key) if call is not None else None


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _written(call: Call, *keys: str) -> tuple[Node, str]:
    """The first of ``keys`` that the YAML has, with its path; else the section's place with the default value."""
    for key in keys:
        if key in call.arguments:
            return call.arguments[key], f"{call.section}.{key}"
    return Node(None, call.where or Where(""), str(call.value(keys[0]))), f"{call.section}.{keys[0]}"


def _message(node: Node, path: str, problem: str, fix: str) -> str:
    return f"{node.where} {path}={node.shown()}: {problem}; {fix}"
