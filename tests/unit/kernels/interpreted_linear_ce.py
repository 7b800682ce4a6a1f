"""The Triton row kernel against the torch one, run by Triton's interpreter (``test_linear_ce.py`` starts this file)."""

from __future__ import annotations

import pytest
import torch

from nemo_automodel.kernels.linear_ce import cross_entropy_rows
from nemo_automodel.kernels.linear_ce_triton import launch_cross_entropy_rows, launch_scaled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [64, 101, 9000])
@pytest.mark.parametrize(("bias", "scale", "softcap"), [(False, 1.0, 0.0), (True, 0.5, 0.0), (True, -1.5, 2.0)])
def test_triton_row_kernel_equals_the_torch_one(dtype, vocab_size, bias, scale, softcap):
    generator = torch.Generator().manual_seed(1)
    wide = (torch.randn(9, vocab_size + 3, generator=generator) * 4).to(dtype)
    labels = torch.randint(0, vocab_size, (9,), generator=generator)
    labels[4], labels[0], labels[1] = -100, 0, vocab_size - 1
    b = torch.randn(vocab_size, generator=generator).to(dtype) if bias else None
    for with_grad in (True, False):
        ours, theirs = wide.clone(), wide.clone()
        loss = launch_cross_entropy_rows(ours[:, :vocab_size], labels, b, -100, scale, softcap, with_grad)
        expected = cross_entropy_rows(theirs[:, :vocab_size], labels, b, -100, scale, softcap, with_grad)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6)
        assert torch.equal(ours[:, vocab_size:], wide[:, vocab_size:]), "wrote past the row"


def test_triton_row_kernel_marks_a_label_outside_the_vocabulary():
    loss = launch_cross_entropy_rows(torch.randn(3, 70), torch.tensor([1, 70, -1]), None, -100, 1.0, 0.0, True)
    assert loss.isnan().tolist() == [False, True, True]


def test_scaled_rounds_once():
    x = torch.randn(70, 131, generator=torch.Generator().manual_seed(0))
    scaled = launch_scaled(x, torch.tensor(1 / 3), torch.float16)  # the interpreter truncates to bf16
    assert torch.equal(scaled, (x * torch.tensor(1 / 3)).half())
