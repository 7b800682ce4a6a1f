"""The Triton LoRA op against the fp32 oracle, run by Triton's interpreter (``test_lora_op.py`` starts this file).

Claims: forward, dX, dA and dB are within twice torch's own same-dtype error of the exact result, for every dtype, odd
shape, rank, stride and bias; nothing is computed for a frozen input; the op is a well-formed, compilable torch op.
"""

from __future__ import annotations

import pytest
import torch

from nemo_automodel.components._peft.linear import LoRALinear, _kernel_takes
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.kernels import lora_triton, reference
from nemo_automodel.kernels.lora import lora_linear, runs_on

SCALE = 1.7


def make(tokens, k, n, rank, dtype, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*tokens, k, generator=g).to(dtype)
    weight = (torch.randn(n, k, generator=g) * k**-0.5).to(dtype)
    b = torch.randn(n, generator=g).to(dtype) if bias else None
    lora_a, lora_b = torch.randn(rank, k, generator=g) * k**-0.5, torch.randn(n, rank, generator=g)
    return x, weight, b, lora_a, lora_b, torch.randn(*tokens, n, generator=g).to(dtype)


def outputs(forward, case, **options):
    x, weight, bias, lora_a, lora_b, dy = case
    leaves = [t.detach().clone().requires_grad_() for t in (x, lora_a, lora_b)]
    y = forward(leaves[0], weight, bias, leaves[1], leaves[2], SCALE, **options)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def assert_within_twice_torch(case, dtype):
    exact = outputs(reference.lora_linear, case, dtype=torch.float64)
    theirs = outputs(reference.lora_linear, case, dtype=dtype)
    ours = outputs(lora_linear, case)
    # one token's u = x A is a single rounded number: how far torch's happens to be off says nothing of another order
    known = torch.finfo(torch.float32).eps * case[0].shape[-1] ** 0.5 if case[0].numel() == case[0].shape[-1] else 1e-7
    for name, value, same_dtype, want in zip(("y", "dx", "da", "db"), ours, theirs, exact, strict=True):
        error = (value.double() - want).norm() / want.norm()
        baseline = (same_dtype.double() - want).norm() / want.norm()
        assert error <= 2 * baseline.clamp_min(known), (name, error, baseline)
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "k", "n", "rank"),
    [((2, 19), 40, 50, 5), ((1,), 16, 16, 1), ((130,), 129, 131, 8), ((3, 7), 64, 200, 16), ((70,), 96, 33, 33)],
)
def test_op_is_within_twice_torchs_own_error(dtype, tokens, k, n, rank):
    for bias in (True, False):
        assert_within_twice_torch(make(tokens, k, n, rank, dtype, bias), dtype)


def test_many_rows_are_split_over_programs_and_summed_in_order():
    case = make((1100,), 40, 24, 4, torch.float32)
    assert_within_twice_torch(case, torch.float32)
    first, second = outputs(lora_linear, case), outputs(lora_linear, case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strided_inputs_and_transposed_weight():
    x, weight, bias, lora_a, lora_b, dy = make((2, 12), 40, 50, 5, torch.float32)
    strided = (x.transpose(0, 1), weight.t().contiguous().t(), bias, lora_a, lora_b, dy.transpose(0, 1))
    assert_within_twice_torch(strided, torch.float32)
    wide = torch.cat([x, x], -1)[..., :40]
    assert torch.equal(lora_linear(wide, weight, bias, lora_a, lora_b, SCALE),
                       lora_linear(x, weight, bias, lora_a, lora_b, SCALE))  # fmt: skip
    expanded = dy[:, :1].expand(dy.shape)
    assert_within_twice_torch((x, weight, bias, lora_a, lora_b, expanded), torch.float32)


def test_adapters_in_half_precision_get_gradients_of_their_own_dtype():
    x, weight, bias, lora_a, lora_b, dy = make((2, 12), 40, 50, 5, torch.bfloat16)
    case = (x, weight, bias, lora_a.bfloat16(), lora_b.bfloat16(), dy)
    assert [t.dtype for t in outputs(lora_linear, case)] == [torch.bfloat16] * 4


def test_no_gradient_is_computed_for_an_input_that_needs_none():
    x, weight, bias, lora_a, lora_b, dy = make((2, 12), 40, 50, 5, torch.float32)
    lora_a.requires_grad_()
    y = lora_linear(x, weight, bias, lora_a, lora_b, SCALE)
    y.backward(dy)
    assert x.grad is None
    assert lora_a.grad is not None
    with pytest.raises(RuntimeError, match="freeze"):
        lora_linear(x, weight.clone().requires_grad_(), bias, lora_a, lora_b, SCALE)


def test_expand_adds_to_what_is_there():
    x, _, _, lora_a, lora_b, dy = make((9,), 40, 50, 5, torch.float32)
    u = x @ lora_a.t()
    y = dy.clone()
    lora_triton.expand(u, lora_b.t(), y, scale=SCALE, add=True)
    torch.testing.assert_close(y, dy + SCALE * u @ lora_b.t(), rtol=1e-5, atol=1e-5)


def test_op_is_well_formed_and_compiles_into_one_graph():
    x, weight, bias, lora_a, lora_b, _ = make((2, 12), 40, 50, 5, torch.float32)
    leaves = (x.requires_grad_(), weight, bias, lora_a.requires_grad_(), lora_b.requires_grad_(), SCALE)
    results = torch.library.opcheck(torch.ops.automodel.lora_linear.default, leaves)
    assert set(results.values()) == {"SUCCESS"}


def test_layers_use_the_op_and_compile_into_one_graph():
    """A model adapted with ``use_triton`` equals the plain path in loss and gradients, eager and compiled."""
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 8, bias=False))
    fast = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 8, bias=False))
    fast.load_state_dict(plain.state_dict())
    for model, use_triton in ((plain, False), (fast, True)):
        PeftConfig(match_all_linear=True, dim=4, use_triton=use_triton).apply(model)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    fast.load_state_dict(plain.state_dict())
    assert runs_on("cpu")
    assert isinstance(fast[0], LoRALinear)
    assert _kernel_takes(torch.randn(2, 24), fast[0].weight, fast[0].bias)
    x = torch.randn(3, 5, 24)
    reference_loss = plain(x).square().mean()
    reference_loss.backward()
    for model in (fast, torch.compile(fast, fullgraph=True, backend="aot_eager")):
        fast.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        torch.testing.assert_close(loss, reference_loss, rtol=1e-5, atol=0)
        for (name, ours), theirs in zip(fast.named_parameters(), plain.parameters(), strict=True):
            if ours.requires_grad:
                assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm(), name


def test_over_a_weight_in_four_bits_it_is_the_same_op_bit_for_bit():
    pytest.importorskip("bitsandbytes")
    from nemo_automodel.kernels import nf4

    x, weight, bias, lora_a, lora_b, dy = make((2, 19), 64, 128, 8, torch.bfloat16)
    packed = nf4.pack(weight, "nf4", nested=True)
    whole = nf4.unpack(packed, (128, 64), torch.bfloat16, "nf4")

    def over_packed(x, weight, bias, lora_a, lora_b, scale):
        return nf4.nf4_lora_linear(x, packed, bias, lora_a, lora_b, scale, "nf4")

    expected = outputs(lora_linear, (x, whole, bias, lora_a, lora_b, dy))
    found = outputs(over_packed, (x, weight, bias, lora_a, lora_b, dy))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    torch.library.opcheck(
        nf4._lora_forward_op,
        (x.requires_grad_(), *nf4._parts(packed), bias, lora_a.requires_grad_(), lora_b.requires_grad_(), SCALE, "nf4"),
    )
