"""Soft-capped attention's kernels in Triton's interpreter (``test_softcap_attention.py``), through the attention function.

Claims: output and all gradients equal the formula's in float64, causal or not, within windows and documents, for grouped
heads and head sizes that are and are not powers of two; far scores neither overflow nor lose their gradient; what is not
a number stays so; the op is well formed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nemo_automodel._transformers.forward import forward_loss
from nemo_automodel._transformers.packing_trial import require_packing
from nemo_automodel.components.attention import function
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from nemo_automodel.kernels.softcap_attention import softcap_attention
from tests.unit.model.models import documents, gradients, packed_inputs, padded_inputs, pair, shifted, with_labels

LENGTH = 80  # two and a half tiles of 32
BOUNDS = [0, 3, 37, 64, 65, LENGTH]


def inputs(rows: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [  # as a model's projections leave them: [B, S, heads, size], seen as [B, heads, S, size]
        (2 * torch.randn(rows, LENGTH, n, size, generator=generator)).to(dtype).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    ]


def seen(causal: bool, window: int | None, bounds: list[int] | None) -> Tensor:
    q, k = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]
    allowed = (k <= q) if causal else torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    if causal and window:
        allowed = allowed & (q - k < window)
    if bounds:
        document = torch.tensor([sum(i >= b for b in bounds[1:-1]) for i in range(LENGTH)])
        allowed = allowed & (document[:, None] == document[None, :])
    return allowed


def formula(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, softcap: float, scale: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    return (scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def with_gradients(call: Any, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    out = call(*leaves)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, leaves, gradient.to(dtype))]


def compare(tensors: list[Tensor], causal: bool = True, window: int | None = None, bounds: list[int] | None = None,
            softcap: float = 5.0, scale: float | None = None) -> None:  # fmt: skip
    options: dict[str, Any] = {"is_causal": causal, "sliding_window": window, "scaling": scale, "softcap": softcap}
    if bounds is not None:
        options |= {"cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32), "max_length_q": 34}
    allowed, dtype = seen(causal, window, bounds), tensors[0].dtype
    scale = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    ours = with_gradients(lambda q, k, v: function.attention(nn.Module(), q, k, v, None, **options)[0], tensors, dtype)
    exact = with_gradients(lambda *x: formula(*x, allowed, softcap, scale), tensors, torch.float64)
    plain = with_gradients(lambda *x: formula(*x, allowed, softcap, scale), tensors, dtype)
    for mine, wanted, torchs in zip(ours, exact, plain, strict=True):
        assert mine.dtype == dtype
        error, own = (mine - wanted).abs().max().item(), (torchs - wanted).abs().max().item()
        allowance = max(2e-5, 3 * own) if dtype == torch.float32 else 2 * own
        assert error <= allowance, (error, own)


@pytest.fixture(autouse=True)
def _by_the_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(function, "written_out_attention")


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (3, 1, 24), pytest.param(2, 2, 64, marks=pytest.mark.full)])  # fmt: skip
@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.full)])
@pytest.mark.parametrize("bounds", [None, BOUNDS])
def test_rows_and_documents(heads: int, kv_heads: int, size: int, causal: bool, bounds: list[int] | None) -> None:
    compare(inputs(1 if bounds else 2, heads, kv_heads, size), causal, bounds=bounds)


@pytest.mark.parametrize("bounds", [None, BOUNDS])
def test_what_comes_later_is_seen_too(bounds: list[int] | None) -> None:
    compare(inputs(1, 2, 1, 16), causal=False, bounds=bounds)


@pytest.mark.parametrize("window", [7, 33, pytest.param(1, marks=pytest.mark.full), pytest.param(200, marks=pytest.mark.full)])  # fmt: skip
@pytest.mark.parametrize("bounds", [None, BOUNDS])
def test_windows(window: int, bounds: list[int] | None) -> None:
    compare(inputs(1, 4, 2, 16), window=window, bounds=bounds)


@pytest.mark.parametrize(("softcap", "scale"), [(50.0, 20.0), pytest.param(0.5, 1.0, marks=pytest.mark.full), pytest.param(50.0, 0.0625, marks=pytest.mark.full)])  # fmt: skip
def test_caps(softcap: float, scale: float) -> None:
    """From scores that all but reach the cap to those it hardly bends; x of tanh x is up to 60 in the last."""
    compare(inputs(1, 2, 1, 16), softcap=softcap, scale=scale)


def test_half_precision() -> None:
    compare(inputs(1, 4, 2, 16, torch.float16), window=20, bounds=BOUNDS)


def test_no_overflow_and_not_a_number() -> None:
    query, key, value = inputs(1, 2, 1, 16)
    far = with_gradients(lambda *x: softcap_attention(*x, 50.0), [1e10 * query, 1e10 * key, value], torch.float32)
    assert all(x.isfinite().all() for x in far)
    query[0, 0, 40, 3] = torch.nan
    out = softcap_attention(query, key, value, 50.0)
    assert out[0, 40, 0].isnan().all()
    assert out.isnan().sum() == 16


def test_other_layouts_and_the_op_itself() -> None:
    tensors = [x.contiguous().requires_grad_() for x in inputs(1, 2, 1, 16)]
    op = torch.ops.automodel.softcap_attention.default
    torch.library.opcheck(op, (*tensors, 5.0, 0.25, True, None, None))
    packed = torch.tensor(BOUNDS, dtype=torch.int32)
    torch.library.opcheck(op, (*(x.requires_grad_() for x in inputs(1, 2, 1, 16)), 5.0, 0.25, True, 7, packed))
    compare([x.detach().transpose(2, 3).contiguous().transpose(2, 3) for x in tensors])


@pytest.mark.parametrize("packed", [False, True])
def test_gemma_2(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # loading tries masks too
    ours, plain = pair("gemma2", sliding_window=16, attn_logit_softcapping=5.0)
    require_packing(ours)
    monkeypatch.delattr(function, "written_out_attention")
    ids = documents(24, 33, 2)
    rows = padded_inputs(ids)
    theirs, labels = shifted(rows["input_ids"], rows["attention_mask"], answers_from=1)
    inputs = rows
    if packed:
        inputs, labels = packed_inputs(ids), torch.cat([shifted(x, answers_from=1)[1] for x in ids], dim=1)
    loss, _ = forward_loss(ours, with_labels(inputs, labels), FusedLinearCrossEntropy())
    expected = plain(**rows, labels=theirs).loss * (24 + 33 + 2 - 3)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    mine = gradients(ours)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
