"""The autoclasses: a Hugging Face model, loaded, adapted, compiled and sharded, still of its own class.

Order: build -> LoRA -> tensor or expert parallelism -> FP8 or four bits -> checkpoint activations -> compile each block -> shard -> load.
One function, ``_assemble``, is that order. What is built has no memory yet (the meta device) where the model will be sharded,
so that no rank ever holds all of it; where it will not be, or cannot be loaded that way, weights come first.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from nemo_automodel._transformers import compat, loading, sharded
from nemo_automodel._transformers.blocks import find_blocks
from nemo_automodel._transformers.cp_check import require_context_parallel
from nemo_automodel._transformers.ep_plan import ep_plan_for
from nemo_automodel._transformers.experts import choose_experts, require_no_cut
from nemo_automodel._transformers.mixin import adopt
from nemo_automodel._transformers.packing_trial import require_packing
from nemo_automodel._transformers.parts import has_towers, part_finder, report_parts
from nemo_automodel._transformers.tp_plan import tp_plan_for
from nemo_automodel._transformers.tp_trace import pattern_of
from nemo_automodel._transformers.trial import tried_on
from nemo_automodel._transformers.window_trial import find_window
from nemo_automodel.components._peft.lora import PeftConfig, reset_adapters
from nemo_automodel.components.attention import function as attention_function
from nemo_automodel.components.distributed.activation_checkpointing import checkpoint_activations
from nemo_automodel.components.distributed.auto_checkpointing import AutoCheckpointing
from nemo_automodel.components.distributed.expert_parallel import expert_parallelize
from nemo_automodel.components.distributed.tensor_parallel import tensor_parallelize
from nemo_automodel.errors import ConfigError, ModelError
from nemo_automodel.kernels import masked_scatter

logger = logging.getLogger(__name__)


class _NeMoAutoModel:
    """What the autoclasses share; ``_auto_class`` is transformers' own one for the task."""

    _auto_class: Any

    def __init__(self) -> None:
        name = type(self).__name__
        raise ModelError(f"{name} is not built directly: use {name}.from_pretrained(...) or {name}.from_config(...)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *,
        dtype: str = "bfloat16",
        master_dtype: str = "float32",
        attn_implementation: str | None = None,
        experts_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        peft: Any = None,
        distributed: Any = None,
        compile: Any = None,
        packed: bool | str = False,
        fp8: Any = None,
        quantization: Any = None,
        freeze: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint from the Hub or a local directory, and get it ready to train.

        Args:
            pretrained_model_name_or_path: a Hub model ID or a local directory.
            dtype: what the model computes in: bfloat16, float32, auto (the checkpoint's own), or float16 (not with
                ``distributed``: without loss scaling its gradients vanish). ``torch_dtype`` is understood too.
            master_dtype: what trainable weights are kept in; used with ``distributed`` and without ``peft`` only.
            attn_implementation: None is ours where the model allows it; else a name that transformers knows.
            experts_implementation: of a mixture of experts, likewise.
            revision: branch, tag or commit on the Hub.
            trust_remote_code: run the model code that the repository brings.
            peft: a ``PeftConfig``, or None for all weights.
            distributed: a ``DistributedManager``, or None to stay on one device, unsharded.
            compile: a ``CompileConfig``, or None not to compile.
            packed: batches will be packed; "images": rows with images, too. Refused for models whose layers would mix
                documents.
            fp8: an ``Fp8Config``, or None to compute in ``dtype`` alone.
            quantization: a ``QuantizationConfig``, or None to keep frozen weights in ``dtype``.
            freeze: a ``Freeze``, which parts of a vision-language model are not trained, or None to train all.
            **kwargs: further arguments of transformers' ``from_pretrained`` and overrides of the config.

        Returns:
            The transformers model (``LlamaForCausalLM``, ...). Passing ``labels`` to it gives a loss without logits
            (``outputs.logits`` is then None); ``generate`` also takes strings.

        Raises:
            ModelError: the model cannot be found, read or trained as asked; the message says what to do.
            ConfigError: it would be trained in float16.
        """
        dtype = kwargs.pop("torch_dtype", None) or dtype
        compute, stored = _dtypes(dtype, master_dtype, distributed, peft)
        source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        name = os.path.expanduser(str(pretrained_model_name_or_path))
        if kwargs.get("cache_dir"):
            kwargs["cache_dir"] = os.path.expanduser(kwargs["cache_dir"])
        config = loading.load_config(name, **source, **kwargs)
        compute = compute or loading.own_dtype(config) or torch.float32
        _require_range(dtype, compute, distributed)
        options = {"dtype": stored or compute, "attn_implementation": attn_implementation, **source, **kwargs}
        model, weights = None, None
        if not _makes_copies(fp8, peft) and sharded.takes_meta(distributed):
            model, weights = sharded.plan_loading(cls._auto_class, name, config, **options)
        if model is None:
            model = loading.load_weights(
                cls._auto_class, name, config, device=_device(distributed, quantization), **options
            )
        if hasattr(distributed, "wait_for_all"):  # a download may be slow on one node, and a collective trip over it
            distributed.wait_for_all()
        model.__dict__["_automodel_source"] = source
        model.export_dtype = loading.own_dtype(config) or compute  # type: ignore[assignment]
        return _assemble(
            model, weights, compute, attn_implementation, experts_implementation,
            peft=peft, distributed=distributed, compile=compile, packed=packed,
            fp8=fp8, quantization=quantization, freeze=freeze,
        )  # fmt: skip

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        dtype: str = "bfloat16",
        master_dtype: str = "float32",
        attn_implementation: str | None = None,
        experts_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        peft: Any = None,
        distributed: Any = None,
        compile: Any = None,
        packed: bool | str = False,
        fp8: Any = None,
        quantization: Any = None,
        freeze: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Build a model with fresh weights; the same on every rank and for every number of ranks.

        Args:
            config: a transformers config, a mapping with ``model_type`` and the fields to set, or the Hub ID or
                directory of a config.
            dtype: as in ``from_pretrained``.
            master_dtype: as in ``from_pretrained``.
            attn_implementation: as in ``from_pretrained``.
            experts_implementation: as in ``from_pretrained``.
            revision: as in ``from_pretrained``, where ``config`` is a Hub ID.
            trust_remote_code: as in ``from_pretrained``.
            peft: as in ``from_pretrained``.
            distributed: as in ``from_pretrained``.
            compile: as in ``from_pretrained``.
            packed: as in ``from_pretrained``.
            fp8: as in ``from_pretrained``.
            quantization: as in ``from_pretrained``.
            freeze: as in ``from_pretrained``.
            **kwargs: overrides of the config's fields.

        Raises:
            ModelError: the config is not one of a model of this kind.
            ConfigError: it would be trained in float16.
        """
        dtype = kwargs.pop("torch_dtype", None) or dtype
        compute, stored = _dtypes(dtype, master_dtype, distributed, peft)
        source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        built = loading.build_config(config, **source, **kwargs)
        compute = compute or loading.own_dtype(built) or torch.float32
        _require_range(dtype, compute, distributed)
        options: dict[str, Any] = {"dtype": stored or compute, "attn_implementation": attn_implementation}
        options["trust_remote_code"] = trust_remote_code
        model, weights = None, None
        if not _makes_copies(fp8, peft) and sharded.takes_meta(distributed):
            model, weights = sharded.plan_fresh(cls._auto_class, built, **options)
        if model is None:
            model = loading.initialize(cls._auto_class, built, device=_device(distributed, quantization), **options)
        model.export_dtype = compute  # type: ignore[assignment]
        model.config.name_or_path = (
            ""  # fresh weights are nobody's: an adapter must not name the config's home as its base
        )
        return _assemble(
            model, weights, compute, attn_implementation, experts_implementation,
            peft=peft, distributed=distributed, compile=compile, packed=packed,
            fp8=fp8, quantization=quantization, freeze=freeze,
        )  # fmt: skip


class NeMoAutoModelForCausalLM(_NeMoAutoModel):
    """Any causal language model of the Hub."""

    _auto_class = AutoModelForCausalLM


class NeMoAutoModelForImageTextToText(_NeMoAutoModel):
    """Any vision-language model of the Hub that writes text."""

    _auto_class = AutoModelForImageTextToText


def _assemble(
    model: PreTrainedModel,
    weights: Any,
    compute_dtype: torch.dtype,
    attn_implementation: str | None,
    experts_implementation: str | None,
    *,
    peft: Any,
    distributed: Any,
    compile: Any,
    packed: bool | str,
    fp8: Any,
    quantization: Any,
    freeze: Any,
) -> Any:
    model = adopt(model)
    model.__dict__["_automodel_compute_dtype"] = compute_dtype  # a certificate is for that one
    _choose_attention(model, attn_implementation)
    sizes = getattr(distributed, "sizes", None)  # of our own managers; a user's shards in its own way
    with tried_on(model) as whole:  # what is found out by running it, while nothing is sharded
        find_window(whole)
        if packed:
            require_packing(whole, images=packed == "images")
        if sizes is not None and sizes.cp > 1:
            require_context_parallel(whole)
    device = next(model.parameters()).device if distributed is None else torch.device(distributed.device)
    if freeze is not None and peft is None:
        freeze.apply(model, None if distributed is None else compute_dtype)
    if peft is not None:
        peft.apply(model, device, _adaptable(model, peft)) if isinstance(peft, PeftConfig) else peft.apply(model)
        model.__dict__["_automodel_peft"] = peft  # save_pretrained describes the adapter by it
    choose_experts(model, device, compute_dtype, experts_implementation)
    if has_towers(model):
        report_parts(model)
        if device.type == "cuda":
            masked_scatter.register()
    tp_mesh = getattr(distributed, "tp_mesh", None)  # a manager of the user's own may know no such thing
    _keep_sums_wide(model, device, 1 if tp_mesh is None else tp_mesh.size())
    if tp_mesh is not None and tp_mesh.size() > 1:
        require_no_cut(model)
        along_sequence = getattr(distributed, "sequence_parallel", False)
        tensor_parallelize(model, tp_plan_for(model, tp_mesh, along_sequence), tp_mesh, along_sequence)
    expert_mesh = getattr(distributed, "expert_mesh", None)
    if expert_mesh is not None:
        expert_parallelize(model, ep_plan_for(model), expert_mesh["ep"])
    blocks = find_blocks(model)
    if fp8 is not None:
        fp8.apply(blocks, compute_dtype, device, peft)
    if quantization is not None and quantization.apply(model, blocks, device) and peft is not None and weights is None:
        reset_adapters(model)  # once more: DoRA starts from the norms of the weights as they are now
    _checkpoint_and_compile(model, blocks, device, compute_dtype, distributed, compile)
    if distributed is not None:
        alone = sizes is not None and sizes.dp * sizes.cp == 1 and not distributed.offload
        _keep_wide(model, compute_dtype, rounded=not alone)
        model = distributed.parallelize(model, blocks, compute_dtype)
    if weights is not None:
        weights.fill(model, device, offload=getattr(distributed, "offload", False))
        if peft is not None:
            reset_adapters(model)
    return model


def _keep_sums_wide(model: PreTrainedModel, device: torch.device, tp: int) -> None:
    """Have cuBLAS add in float32 throughout where a rank's share of the vocabulary is no multiple of 8.

    Of such a head's gradient it makes partial sums over the vocabulary and, unless forbidden, adds those in 16 bit: what
    the blocks got of it was then off by up to 8% of its norm on an H200, 0.7% without (docs/certificate.md).
    """
    if device.type != "cuda":
        return
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is not None and weight.shape[0] % (8 * tp):
        products = torch.backends.cuda.matmul
        products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = False
        text = "vocabulary of %d, no multiple of %d: sums of products are kept in float32"
        logger.info(text, weight.shape[0], 8 * tp)


def _keep_wide(model: PreTrainedModel, compute_dtype: torch.dtype, rounded: bool) -> None:
    """Have the weights that transformers insists on computing wider left as they are; say it where sharding rounds them."""
    kept = compat.kept_dtype(model, compute_dtype)
    names = [name for name, p in model.named_parameters() if p.is_floating_point()]
    wider = [name for name in names if kept(name) not in (None, compute_dtype)]
    for name in wider:
        path, _, last = name.rpartition(".")
        owner: Any = model.get_submodule(path)
        owner.cast_where_used = (*getattr(owner, "cast_where_used", ()), last)
    if wider and rounded:
        logger.warning(
            "%s: stored in float32 as in transformers, but rounded to %s where they are used: %s",
            type(model).__name__, str(compute_dtype).removeprefix("torch."), ", ".join(dict.fromkeys(map(pattern_of, wider))),
        )  # fmt: skip


def _adaptable(model: PreTrainedModel, peft: PeftConfig) -> Callable[[str], bool] | None:
    """What tells the modules within ``peft.parts``; None where the model has one part only, all of it."""
    wanted = peft.chosen_parts
    if not has_towers(model):
        if not {"language_model", "all"} & set(wanted):
            raise ConfigError(
                f"peft.parts={peft.parts}: {type(model).__name__} has no other part than its language model; leave it out"
            )
        return None
    part_of = part_finder(model)
    return lambda name: wanted == ["all"] or part_of(name) in wanted


def _checkpoint_and_compile(
    model: PreTrainedModel,
    blocks: Any,
    device: torch.device,
    compute_dtype: torch.dtype,
    distributed: Any,
    compile: Any,
) -> None:
    """Now; or, under ``auto``, in the first training forward, when it is known what fits."""
    mode = getattr(distributed, "activation_checkpointing", "off")

    def compile_blocks() -> None:
        if compile is not None:
            compile.apply(blocks, device)

    if mode != "auto":
        checkpoint_activations(blocks, mode)
        return compile_blocks()
    measured = getattr(compile, "function", None)
    AutoCheckpointing(
        model,
        blocks,
        device,
        compiled=lambda forward: forward if measured is None else measured(forward, device),
        then=compile_blocks,
        compute_dtype=compute_dtype,
        keeps_casts=not getattr(distributed, "reshards", True),
        shared=_share_blocks(distributed),
    )
    return None


def _share_blocks(distributed: Any) -> bool:
    """Whether ranks exchange tensors inside of a block's forward."""
    sizes = getattr(distributed, "sizes", None)
    return sizes is not None and (sizes.tp > 1 or sizes.cp > 1 or sizes.ep > 1)


def _choose_attention(model: PreTrainedModel, asked: str | None) -> None:
    if asked is not None and asked != attention_function.NAME:
        return
    name = attention_function.register()
    if compat.attention_is_pluggable(model):
        model.set_attn_implementation(name)
        return
    unknown = ", ".join(sorted(compat.unknown_attention_arguments(model)))
    why = f"hands its attention what ours does not know ({unknown})" if unknown else "takes none from transformers' registry"  # fmt: skip
    model_name = type(model).__name__
    if asked is not None:
        raise ModelError(f"model.attn_implementation={asked}: {model_name} {why}; leave attn_implementation out")
    own = compat.attention_name(model)
    logger.warning("%s: trained with its own attention (%s), padded, because it %s", model_name, own, why)


def _dtypes(
    dtype: str | torch.dtype, master_dtype: str | torch.dtype, distributed: Any, peft: Any
) -> tuple[torch.dtype | None, torch.dtype | None]:
    """(what to compute in, None for auto; what to keep weights in, None for the same)."""
    compute = None if dtype == "auto" else loading.parse_dtype("dtype", dtype)
    master = loading.parse_dtype("master_dtype", master_dtype)
    return compute, master if distributed is not None and peft is None else None


def _require_range(dtype: str | torch.dtype, compute: torch.dtype, distributed: Any) -> None:
    """Raise ConfigError where training would compute in float16: its small gradients are 0 without loss scaling."""
    if distributed is not None and compute == torch.float16:
        found = " (the checkpoint's own is float16)" if dtype == "auto" else ""
        raise ConfigError(
            f"model.dtype={str(dtype).removeprefix('torch.')}: float16 has too little range to train in: most "
            f"gradients become 0{found}; write bfloat16 (or float32)"
        )


def _makes_copies(fp8: Any, peft: Any) -> bool:
    """Whether weights must be there when the model is assembled, since copies in FP8 are made of them."""
    return fp8 is not None and fp8.keeps_copies(peft)


def _device(distributed: Any, quantization: Any) -> torch.device:
    """Where a model is loaded whole: not on the device itself where only its packed weights are to be there."""
    whole_on_host = distributed is None or quantization is not None
    return torch.device("cpu") if whole_on_host else torch.device(distributed.device)


__all__ = ["NeMoAutoModelForCausalLM", "NeMoAutoModelForImageTextToText"]
