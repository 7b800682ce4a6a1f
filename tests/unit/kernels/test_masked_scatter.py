"""The source's gradient of ``masked_scatter`` against torch's own, in every shape a mask may have."""

from __future__ import annotations

import pytest
import torch

from nemo_automodel.kernels.masked_scatter import source_gradient


@pytest.mark.parametrize(
    ("mask_shape", "expanded"),
    [
        ((2, 7, 1), False),
        ((2, 7, 1), True),
        ((2, 7, 5), False),
        ((7, 5), False),
        ((7, 1), False),
        ((5,), False),
        ((1, 1, 1), False),
    ],
)
@pytest.mark.parametrize("more", [0, 5, 3])
def test_it_is_torchs(mask_shape, expanded, more):
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(2, 7, 5, generator=generator)
    mask = torch.rand(mask_shape, generator=generator) < 0.5
    if expanded:
        mask = mask.expand(2, 7, 5)
    taken = int(mask.expand_as(grad).sum())
    for sizes in {(taken + more,), (1, taken + more), (max(taken // 5, 1), 5)}:
        if taken > torch.Size(sizes).numel():
            continue
        expected = torch.ops.aten.masked_scatter_backward(grad, mask, sizes)
        assert torch.equal(source_gradient(grad, mask, sizes), expected)


def test_through_autograd_it_is_the_gradient_of_what_went_into_the_result():
    mask = torch.tensor([[True, False, True, False], [False, True, False, False]])[..., None]
    source = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    into = torch.zeros(2, 4, 6, dtype=torch.float64)
    weights = torch.randn(2, 4, 6, dtype=torch.float64)
    (expected,) = torch.autograd.grad((into.masked_scatter(mask, source) * weights).sum(), source)
    assert torch.equal(source_gradient(weights, mask, source.shape), expected)
    assert torch.equal(expected, weights[mask[..., 0]])
