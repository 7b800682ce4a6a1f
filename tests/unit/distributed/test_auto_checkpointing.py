"""``activation_checkpointing: auto`` on the CPU, with a limit given: what is measured, what is chosen, what is said."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_automodel._transformers.blocks import find_blocks
from nemo_automodel.components.distributed.activation_checkpointing import checkpoint_activations
from nemo_automodel.components.distributed.auto_checkpointing import AutoCheckpointing
from tests.builders import tiny_config

BATCH = torch.randint(0, 384, (2, 64), generator=torch.Generator().manual_seed(1))


def build(free=None, layers=6, compiled=lambda forward: forward, **config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=layers, **config)).train()
    if free is None:
        return model, None
    done = []
    auto = AutoCheckpointing(
        model,
        find_blocks(model),
        torch.device("cpu"),
        compiled,
        lambda: done.append(1),
        torch.float32,
        free=lambda: free,
    )
    return model, auto


def kept_bytes(model, ids=BATCH):
    """What a whole forward keeps for backward, weights aside: counted by hooks of the test's own."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)
        return tensor

    held = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum()
    loss.backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for address, size in kept.items() if address not in weights)


def measured(mode, layers):
    model, _ = build(layers=layers)
    checkpoint_activations(find_blocks(model), mode)
    return kept_bytes(model)


@pytest.mark.parametrize("mode", ["off", "full"])
def test_a_blocks_share_is_what_whole_models_of_two_depths_differ_by(mode):
    expected = (measured(mode, 8) - measured(mode, 4)) / 4
    model, auto = build(free=0)  # nothing fits, so every mode is tried
    model(input_ids=BATCH, use_cache=False)
    assert auto.estimate.kept[mode] == pytest.approx(expected, rel=0.1)


def test_selective_keeps_the_input_and_the_results_of_products_and_attention():
    model, auto = build(free=0)
    model(input_ids=BATCH, use_cache=False)
    config, tokens = model.config, BATCH.numel()
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim  # q, k, v
    attention = config.num_attention_heads * (config.head_dim + 1)  # and the log-sum-exp of each row
    widths = config.hidden_size + heads + attention + 2 * config.hidden_size + 2 * config.intermediate_size
    assert auto.estimate.kept["selective"] == 4 * tokens * widths
    assert auto.estimate.kept["full"] == 4 * tokens * config.hidden_size


def limits():
    """For each mode a limit under which it is the first that fits."""
    model, auto = build(free=0)
    model(input_ids=BATCH, use_cache=False)
    total = {mode: auto.estimate.total(mode, BATCH.numel()) for mode in ("off", "selective", "full")}
    assert total["off"] > total["selective"] > total["full"]
    return {mode: int(value) + 1 for mode, value in total.items()}


def test_the_first_that_fits_is_chosen_and_gradients_stay(caplog):
    plain, _ = build()
    plain(input_ids=BATCH, labels=BATCH, use_cache=False).loss.backward()
    for mode, free in limits().items():
        model, auto = build(free)
        with caplog.at_level(logging.INFO):
            model(input_ids=BATCH, labels=BATCH, use_cache=False).loss.backward()
        assert auto.mode == mode
        assert f"activation checkpointing: {mode} (auto: a step of 128 tokens needs" in caplog.records[-1].getMessage()
        model.zero_grad()
        model(input_ids=BATCH, labels=BATCH, use_cache=False).loss.backward()  # every block as chosen now
        for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(found.grad, expected.grad)
        assert kept_bytes(model) == pytest.approx(measured(mode, 6), rel=0.02)


def test_a_larger_micro_batch_may_make_it_stricter(caplog):
    model, auto = build(limits()["off"])
    model(input_ids=BATCH, use_cache=False)
    assert auto.mode == "off"
    with caplog.at_level(logging.INFO):
        model(input_ids=BATCH.repeat(4, 1), use_cache=False)
    assert auto.mode == "full"
    assert "full (auto: a step of 512 tokens" in caplog.records[-1].getMessage()


@pytest.mark.parametrize(("lax", "strict"), [("off", "selective"), ("selective", "full")])
def test_between_two_modes_the_last_blocks_keep_what_there_is_room_for(lax, strict, caplog):
    plain, _ = build()
    plain(input_ids=BATCH, labels=BATCH, use_cache=False).loss.backward()
    limit = limits()
    each = (limit[lax] - limit[strict]) / 6
    model, auto = build(int(limit[strict] + 2.5 * each))
    with caplog.at_level(logging.INFO):
        model(input_ids=BATCH, labels=BATCH, use_cache=False)
    assert (auto.mode, auto.laxer) == (strict, 2)
    assert f"activation checkpointing: {strict}, {lax} in the last 2 of 6 blocks (auto: a step" in caplog.text
    kept = kept_bytes(model)
    assert kept == pytest.approx((measured(lax, 6) * 2 + measured(strict, 6) * 4) / 6, rel=0.02)
    model.zero_grad()
    model(input_ids=BATCH, labels=BATCH, use_cache=False).loss.backward()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)
    model(input_ids=torch.cat([BATCH, BATCH[:, :8]], dim=1), use_cache=False)  # a little larger
    assert (auto.mode, auto.laxer) in ((strict, 1), (strict, 0), ("full", 5), ("full", 4))
    assert auto.laxer != 2


def test_evaluation_decides_nothing_and_random_numbers_are_not_drawn():
    model, auto = build(10**12)
    with torch.no_grad():
        model(input_ids=BATCH, use_cache=False)
    assert auto.mode is None
    torch.manual_seed(5)
    model(input_ids=BATCH, use_cache=False)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert auto.mode == "off"


def test_compiled_blocks_are_measured_compiled():
    model, auto = build(0, compiled=lambda forward: torch.compile(forward, backend="aot_eager"))
    model(input_ids=BATCH, use_cache=False).logits.sum().backward()
    assert auto.estimate.kept["off"] > auto.estimate.kept["full"] > 0
