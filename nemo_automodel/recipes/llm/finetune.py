"""Fine-tune a causal language model, SFT or LoRA: data -> model -> training -> validation -> checkpoint.

Read it top to bottom; there is no trainer behind it. To change the training, copy this file and change the copy.

    automodel finetune llm -c recipe.yaml [--section.key=value ...]
    torchrun --nproc-per-node=8 nemo_automodel/recipes/llm/finetune.py -c recipe.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from nemo_automodel._transformers.forward import forward_loss
from nemo_automodel._transformers.inputs import to_device
from nemo_automodel._transformers.limits import check_data_fits
from nemo_automodel.components.training.local_step import step_on_local_tensors
from nemo_automodel.components.training.metrics import count_tokens
from nemo_automodel.config import Config
from nemo_automodel.errors import EXIT_OK, EXIT_PREEMPTED, DataError
from nemo_automodel.recipes.run import run_recipe
from nemo_automodel.types import TrainState


def main(cfg: Config) -> int:
    """Run the recipe that ``cfg`` describes, from the first token read to the last checkpoint written.

    Returns the exit code: 0, or 75 where a signal ended training early and everything is saved.

    Longer than a function should be, on purpose: it is the whole story in order, with nothing behind it.
    """
    # --- where we run -----------------------------------------------------------------------------------------
    env = cfg.dist_env.instantiate()  # process group, rank, device
    dist = cfg.distributed.instantiate(env=env)  # the mesh, and how a model is spread over it
    rng = cfg.rng.instantiate(rank=dist.dp_rank)

    # --- data: before the model, because it is cheap and fails for more reasons --------------------------------
    tokenizer = cfg.tokenizer.instantiate(model_name=cfg.model_name)
    with env.rank_zero_first():  # rank 0 downloads and tokenises, the others read its cache
        train_data = cfg.dataset.instantiate(tokenizer=tokenizer)
        val_data = cfg.validation_dataset.instantiate(tokenizer=tokenizer)  # None without the section
    schedule = cfg.step_scheduler.instantiate(dp_size=dist.dp_size)  # batch sizes, epochs, cadence
    packing = cfg.packed_sequence.instantiate()
    batching = {
        "tokenizer": tokenizer,
        "packing": packing,
        "seed": rng.seed,
        "dp_rank": dist.dp_rank,
        "dp_size": dist.dp_size,
        "global_batch_size": schedule.global_batch_size,
        "local_batch_size": schedule.local_batch_size,
        "pin_memory": dist.device.type == "cuda",
    }
    loader = cfg.dataloader.instantiate(dataset=train_data, **batching)
    val_loader = None
    if val_data is not None:
        val_loader = cfg.dataloader.instantiate(dataset=val_data, **batching, shuffle=False, drop_last=False)
    schedule.plan(loader)

    # --- model: LoRA -> parallelism -> compile each block -> shard -> load its weights ------------------------
    peft = cfg.peft.instantiate()  # None without the section: full fine-tuning
    model = cfg.model.instantiate(
        peft=peft,
        distributed=dist,
        compile=cfg.compile.instantiate(),
        packed=packing.packed_sequence_size > 0,
        fp8=cfg.fp8.instantiate(),  # None without the section: computed in the model's dtype
        quantization=cfg.quantization.instantiate(),  # None without the section: frozen weights stay as they are
    )
    check_data_fits(model, tokenizer, dataset=train_data, validation_dataset=val_data)
    params = [p for p in model.parameters() if p.requires_grad]

    # --- optimisation -----------------------------------------------------------------------------------------
    loss_fn = cfg.loss_fn.instantiate()  # a SUM over label tokens; normalised once, below
    optimizer = step_on_local_tensors(cfg.optimizer.instantiate(params=params))
    lr_scheduler = cfg.lr_scheduler.instantiate(optimizer=optimizer, total_steps=schedule.total_steps)
    clip_gradients = cfg.clip_grad_norm.instantiate(optimizer=optimizer)
    guard = cfg.non_finite.instantiate(env=env)
    checkpointer = cfg.checkpoint.instantiate(env=env)
    log = cfg.loggers.instantiate(env=env, config=cfg, schedule=schedule)
    certificate = cfg.certificate.instantiate(config=cfg)
    cfg.raise_on_unread()

    # --- what is ours computes what plain transformers does, or is switched off --------------------------------
    certificate.prove(model, loss_fn, packed=packing.packed_sequence_size > 0, distributed=dist, loader=loader)

    fingerprint = {"config": cfg.resolved(), "data": getattr(loader, "fingerprint", None)}
    state = TrainState(model, tokenizer, peft, optimizer, lr_scheduler, schedule, rng, fingerprint)
    checkpointer.restore(state)
    guard.protect(state, save=checkpointer.finish)
    log.start(model=model, loss_fn=loss_fn, run=getattr(checkpointer, "run", None))

    # --- training: one iteration is one optimizer step ---------------------------------------------------------
    model.train()
    env.defer_signals()  # from here SIGTERM, SIGUSR1 and Ctrl-C wait for the end of a step
    for batches in schedule.iterate(loader):
        rng.seed_step(schedule.step)  # dropout is a function of (seed, step, rank): nothing to restore
        batches = [dist.shard_batch(batch) for batch in batches]  # along the sequence, under context parallelism
        num_label_tokens = dist.all_reduce_sum(sum(batch["num_label_tokens"] for batch in batches))
        num_micro_batches = dist.all_reduce_sum(sum(batch["num_label_tokens"] > 0 for batch in batches)).clamp(min=1)
        losses = []
        for i, batch in enumerate(batches):
            dist.sync_gradients(model, last_micro_batch=i == len(batches) - 1)
            ce_sum, aux = forward_loss(model, to_device(batch, dist.device), loss_fn)
            share = (batch["num_label_tokens"] > 0) / num_micro_batches  # of auxiliary losses: their mean
            (ce_sum / num_label_tokens.clamp(min=1) + aux * share).backward()
            losses.append(ce_sum.detach())

        mean_loss = dist.all_reduce_sum(sum(losses)) / num_label_tokens.clamp(min=1)
        grad_norm = clip_gradients(params)
        lr = optimizer.param_groups[0]["lr"]
        guard.step(mean_loss, grad_norm, losses, batches)  # optimizer.step(), if both are finite
        lr_scheduler.step()
        optimizer.zero_grad()
        checkpointer.check()  # raises what went wrong with a save in the background

        if schedule.should_log:
            num_tokens = dist.all_reduce_sum(count_tokens(batches))
            log.train_step(mean_loss, grad_norm, lr, num_tokens, num_label_tokens)
        if schedule.should_validate or schedule.should_save:
            guard.settle()  # nothing is kept of a step that is not known to be sound
        if schedule.should_save:  # before the validation, so that an error in that loses nothing
            log.checkpoint(checkpointer.save(state))
        if val_loader is not None and schedule.should_validate:
            val_loss = validate(model, val_loader, loss_fn, dist, stop=env.stop_requested)
            if val_loss is not None:
                log.validation(val_loss=val_loss)
                checkpointer.offer_best(val_loss)
        if env.stop_requested(schedule.step):  # a signal, on whichever rank
            break

    guard.settle()
    log.finish()
    checkpointer.finish(state)  # saves the last step if it is not saved yet
    env.shutdown()
    return EXIT_OK if schedule.is_last_step else EXIT_PREEMPTED


@torch.no_grad()
def validate(
    model: torch.nn.Module, loader: Any, loss_fn: Any, dist: Any, stop: Callable[[], bool] = lambda: False
) -> float | None:
    """Mean loss per label token over the whole validation set, equal on every rank; None where ``stop`` cut it short."""
    model.eval()
    loss_sum, num_label_tokens = torch.zeros((), device=dist.device), 0
    for batches in loader.steps(epoch=0):
        if stop():
            return None
        for batch in map(dist.shard_batch, batches):
            ce_sum, _ = forward_loss(model, to_device(batch, dist.device), loss_fn)
            loss_sum += ce_sum
            num_label_tokens += batch["num_label_tokens"]
    model.train()
    total = dist.all_reduce_sum(num_label_tokens).item()
    if not total:
        raise DataError(
            "validation_dataset: no label tokens in it, so it has no loss; check its answers and seq_length"
        )
    return dist.all_reduce_sum(loss_sum).item() / total


if __name__ == "__main__":
    sys.exit(run_recipe("llm", sys.argv[1:], main))
