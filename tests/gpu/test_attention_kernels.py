"""The attention function on CUDA in bfloat16: at most twice as far from float64 as torch's own, compiled or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nemo_automodel.components.attention import function, varlen

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

BOUNDARIES = {"ragged": [0, 100, 101, 612, 1024], "equal": [0, 256, 512, 768, 1024]}
LENGTH = 1024


def allowed(window: int | None, packed: str | None) -> Tensor:
    position = torch.arange(LENGTH, device="cuda")
    behind = position[:, None] - position[None, :]
    mask = behind >= 0
    if window:
        mask &= behind < window
    if packed:
        document = torch.bucketize(position, torch.tensor(BOUNDARIES[packed], device="cuda"), right=True)
        mask &= document[:, None] == document[None, :]
    return mask


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("packed", ["ragged", "equal", None])
@pytest.mark.parametrize("compiled", [False, True])
def test_kernels(size: int, window: int | None, packed: str | None, compiled: bool) -> None:
    torch.manual_seed(0)
    shapes = [(1 if packed else 2, heads, LENGTH, size) for heads in (8, 2, 2)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    if packed or window:
        assert varlen.has_kernel(*inputs, 0.0)
    module = nn.Module()
    module.num_key_value_groups = 4
    options: dict = {"sliding_window": window}
    if packed:
        cu_seqlens = torch.tensor(BOUNDARIES[packed], device="cuda", dtype=torch.int32)
        options |= {"cu_seq_lens_q": cu_seqlens, "max_length_q": int(cu_seqlens.diff().max())}
    call = torch.compile(function.attention, fullgraph=True) if compiled else function.attention
    out, _ = call(module, *inputs, None, **options)
    gradient = torch.randn_like(out)
    ours = [out, *torch.autograd.grad(out, inputs, gradient)]

    def plain(dtype: torch.dtype) -> list[Tensor]:
        query, key, value = (x.detach().to(dtype).requires_grad_() for x in inputs)
        wide = F.scaled_dot_product_attention(
            query, *(x.repeat_interleave(4, dim=1) for x in (key, value)), attn_mask=allowed(window, packed)
        ).transpose(1, 2)
        return [wide, *torch.autograd.grad(wide, [query, key, value], gradient.to(dtype))]

    for mine, torchs, exact in zip(ours, plain(torch.bfloat16), plain(torch.float64), strict=True):
        error, allowance = (mine.double() - exact).abs().max(), (torchs.double() - exact).abs().max()
        assert error <= 2 * allowance, (error, allowance)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_packed_equals_separate_on_the_device(family: str) -> None:
    from tests.unit.model.models import documents, packed_inputs, pair

    ours, plain = pair(family)
    ours.cuda().to(torch.bfloat16), plain.cuda().to(torch.bfloat16)
    ids = [x.cuda() for x in documents(24, 33, 2, 19)]
    inputs = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in packed_inputs(ids).items()}
    packed = ours(**inputs).logits.float()
    exact = torch.cat([plain.float()(x).logits for x in ids], dim=1)
    separate = torch.cat([plain.to(torch.bfloat16)(x).logits.float() for x in ids], dim=1)
    close = (packed - exact).abs().mean() <= 2 * (separate - exact).abs().mean()
    assert close
