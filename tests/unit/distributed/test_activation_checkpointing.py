"""What a block keeps for its backward: less, and the same gradients bit for bit."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from nemo_automodel._transformers.blocks import find_blocks
from nemo_automodel.components.distributed.activation_checkpointing import checkpoint_activations, require_mode
from nemo_automodel.errors import ConfigError
from tests.builders import tiny_config


def train(mode: str, kind: str = "llama", compiled: bool = False, **config):
    """(gradients, bytes kept for backward) of one forward and backward."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **config)).train()
    blocks = find_blocks(model)
    checkpoint_activations(blocks, mode)
    if compiled:
        for block in blocks:
            block.compile(backend="aot_eager", dynamic=False)
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(0, 384, (2, 64), generator=torch.Generator().manual_seed(1))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum()
    loss.backward()
    size = sum(n for address, n in kept.items() if address not in parameters)
    return {name: p.grad for name, p in model.named_parameters()}, size


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_moe"])
def test_gradients_are_the_same_bit_for_bit(mode, kind):
    plain, _ = train("off", kind)
    found, _ = train(mode, kind)
    assert found.keys() == plain.keys()  # names of parameters stay
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_dropout_is_drawn_again_as_it_was():
    plain, _ = train("off", "llama", attention_dropout=0.2)
    found, _ = train("full", "llama", attention_dropout=0.2)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_full_keeps_little_and_selective_computes_no_product_again():
    kept = {mode: train(mode, num_hidden_layers=6)[1] for mode in ("off", "full")}
    assert kept["full"] < 0.4 * kept["off"]
    work = {}
    for mode in ("off", "selective", "full"):
        with FlopCounterMode(display=False) as counter:
            train(mode)
        work[mode] = counter.get_total_flops()
    assert work["selective"] == work["off"] < 0.9 * work["full"]  # the head, in no block, is most of this model


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_blocks_can_be_compiled_too(mode):
    plain, _ = train("off")
    found, _ = train(mode, compiled=True)
    for name, grad in plain.items():
        assert (found[name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_another_word_is_refused():
    with pytest.raises(ConfigError, match="activation_checkpointing=on: write one of off, selective, full, auto"):
        require_mode("on")
