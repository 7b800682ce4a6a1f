"""``activation_checkpointing: auto`` on a GPU: a step takes no more than was estimated, and not much less."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_automodel._transformers.blocks import find_blocks
from nemo_automodel.components.distributed.auto_checkpointing import AutoCheckpointing
from tests.builders import tiny_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
BATCH = torch.randint(0, 384, (8, 1024), generator=torch.Generator().manual_seed(1))


def step(free, compile_blocks):
    """(the choice, peak bytes of forward and backward over what was there before, the estimate less optimizer state)."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 128, "num_hidden_layers": 8}
    model = AutoModelForCausalLM.from_config(tiny_config("llama", **sizes)).to("cuda", torch.bfloat16).train()
    blocks = find_blocks(model)

    def then():
        for block in blocks if compile_blocks else ():
            block.compile()

    compiled = torch.compile if compile_blocks else (lambda forward: forward)
    auto = AutoCheckpointing(model, blocks, torch.device("cuda"), compiled, then, free=lambda: free)
    ids = BATCH.cuda()
    for _ in range(3):  # the first decides, the second compiles
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    moments = 2 * sum(p.nbytes for p in model.parameters())
    return auto, peak, auto.estimate.total(auto.mode, BATCH.numel(), auto.laxer) - moments


@pytest.mark.parametrize("compile_blocks", [False, True])
def test_a_step_takes_what_was_estimated(compile_blocks):
    auto, *_ = step(0, compile_blocks)
    assert auto.mode == "full"
    totals = {mode: auto.estimate.total(mode, BATCH.numel()) for mode in auto.estimate.kept}
    assert totals["off"] > totals["selective"] > totals["full"]
    for mode, total in totals.items():
        auto, peak, estimate = step(int(total * 1.02), compile_blocks)
        assert auto.mode == mode
        assert 0.5 * estimate < peak < 1.1 * estimate, (mode, peak, estimate)
    halfway = (totals["selective"] + totals["full"]) / 2
    auto, peak, estimate = step(int(halfway), compile_blocks)
    assert (auto.mode, 3 <= auto.laxer <= 4) == ("full", True)
    assert 0.5 * estimate < peak < 1.1 * estimate, (auto.laxer, peak, estimate)
