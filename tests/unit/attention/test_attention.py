"""The attention function against torch's fp32 formula and transformers' own eager attention."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from nemo_automodel.components.attention import function
from nemo_automodel.components.attention.blocks import _with_bounds
from nemo_automodel.components.attention.layout import Layout, announce, current_layout

SIZE, LENGTH = 8, 24


class Module(nn.Module):
    """What a model's attention module tells the function about itself."""

    def __init__(self, groups: int, is_causal: bool = True) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, is_causal


def inputs(rows: int = 2, heads: int = 4, kv_heads: int = 2, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, heads, length, SIZE), (rows, kv_heads, length, SIZE), (rows, kv_heads, length, SIZE)]
    query, key, value = (torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)
    return query, key, value


def oracle(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, softcap: float | None = None,
           sinks: Tensor | None = None, scale: float = SIZE**-0.5, bias: Tensor | None = None) -> Tensor:  # fmt: skip
    """Attention in float64, a head and a row at a time, [B, S, H, E]."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    out = torch.empty_like(query)
    rows = []
    for row, head in itertools.product(range(query.shape[0]), range(query.shape[1])):
        scores = query[row, head] @ key[row, head // groups].T * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[0, head].double()
        scores = scores.masked_fill(~allowed, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[head].double().expand(scores.shape[0], 1)], dim=1)
        rows.append(scores.softmax(-1)[:, : key.shape[2]] @ value[row, head // groups])
    return torch.stack(rows).view_as(out).transpose(1, 2)


def causal(length: int = LENGTH, window: int | None = None, boundaries: list[int] | None = None) -> Tensor:
    q, k = torch.arange(length)[:, None], torch.arange(length)[None, :]
    allowed = k <= q
    if window:
        allowed &= k > q - window
    if boundaries:
        document = torch.tensor([sum(i >= b for b in boundaries[1:-1]) for i in range(length)])
        allowed &= document[:, None] == document[None, :]
    return allowed


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 5, LENGTH, 100])
@pytest.mark.parametrize("boundaries", [None, [0, 7, 8, 24], [0, 8, 16, 24]])
@pytest.mark.parametrize("extra", ["plain", "scaling", "softcap", "sinks"])
def test_every_pattern_and_its_gradients(kv_heads: int, window: int | None, boundaries: list[int] | None,
                                         extra: str) -> None:  # fmt: skip
    query, key, value = inputs(rows=1 if boundaries else 2, kv_heads=kv_heads)
    options: dict = {
        "plain": {},
        "scaling": {"scaling": 0.5},
        "softcap": {"softcap": 2.0},
        "sinks": {"s_aux": torch.linspace(-1, 3, 4)},
    }[extra]
    packed = {}
    if boundaries:
        longest = max(b - a for a, b in itertools.pairwise(boundaries))
        packed = {"cu_seq_lens_q": torch.tensor(boundaries, dtype=torch.int32), "max_length_q": longest}
    out, weights = function.attention(
        Module(4 // kv_heads), query, key, value, None, sliding_window=window, **options, **packed
    )
    expected = oracle(
        query, key, value, causal(window=window, boundaries=boundaries),
        options.get("softcap"), options.get("s_aux"), options.get("scaling", SIZE**-0.5),
    )  # fmt: skip
    assert weights is None
    assert out.shape == expected.shape
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(out, [query, key, value], gradient)
    theirs = torch.autograd.grad(expected, [query, key, value], gradient.double())
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("extra", [{}, {"softcap": 2.0}])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_of_the_models_own_is_obeyed(extra: dict, kind: str) -> None:
    """A prefix that sees itself whole; the window argument must not cut what the mask already says."""
    query, key, value = inputs()
    allowed = causal() | (torch.arange(LENGTH) < 6)[None, :]
    mask = allowed[None, None]
    if kind == "float":
        mask = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~mask, torch.finfo(torch.float32).min)
    out, _ = function.attention(Module(2), query, key, value, mask, sliding_window=3, **extra)
    torch.testing.assert_close(out.double(), oracle(query, key, value, allowed, **extra), rtol=1e-5, atol=1e-6)


def test_encoders_see_both_ways_and_one_query_sees_every_key() -> None:
    query, key, value = inputs()
    everything = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    for out, _ in (
        function.attention(Module(2, is_causal=False), query, key, value, None),
        function.attention(Module(2), query, key, value, None, is_causal=False),
    ):
        torch.testing.assert_close(out.double(), oracle(query, key, value, everything), rtol=1e-5, atol=1e-6)
    last, _ = function.attention(Module(2), query[:, :, -1:], key, value, None)  # a decoding step
    torch.testing.assert_close(
        last.double(), oracle(query[:, :, -1:], key, value, everything[-1:]), rtol=1e-5, atol=1e-6
    )


def test_registered_once_asked_under_one_name() -> None:
    assert function.register() == function.register() == "automodel"
    assert AttentionInterface()["automodel"] is function.attention
    assert AttentionMaskInterface()["automodel"] is function.attention_mask


def ask_mask(**over: object) -> Tensor | None:
    from transformers.masking_utils import causal_mask_function

    arguments = {"batch_size": 1, "q_length": 8, "kv_length": 8, "mask_function": causal_mask_function, **over}
    return function.attention_mask(**arguments)  # type: ignore[arg-type]


def test_no_mask_is_made_for_an_announced_batch() -> None:
    padded = torch.tensor([[True] * 6 + [False] * 2])
    assert ask_mask(attention_mask=padded) is not None
    with announce(Layout()):
        assert ask_mask(attention_mask=padded) is None
        assert ask_mask(attention_mask=padded, local_size=3) is not None  # nobody said that windows are arguments
        # an overlay of the model's own, e.g. image tokens that see each other, needs its mask, padding in it
        mask = ask_mask(attention_mask=padded, allow_is_causal_skip=False)
        assert mask is not None
        assert torch.equal(mask[0, 0], causal(8) & padded)
    with announce(Layout(windows_as_argument=True)):
        assert ask_mask(attention_mask=padded, local_size=3) is None
    with announce(None):
        assert current_layout() is None


def test_a_mask_that_must_be_made_has_the_documents_in_it() -> None:
    from transformers.masking_utils import sliding_window_causal_mask_function

    cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32)
    with announce(Layout(cu_seqlens, windows_as_argument=False)):
        assert ask_mask() is None
        mask = ask_mask(local_size=2, mask_function=sliding_window_causal_mask_function(2))
    assert mask is not None
    assert torch.equal(mask[0, 0], causal(8, window=2, boundaries=[0, 3, 8]))


@pytest.mark.parametrize("extra", ["nothing", "softcap", "sinks", "odd size", "compiled", "position_bias", "indices"])
@pytest.mark.parametrize("window", [None, 4])
def test_blocks_in_place_of_a_mask(extra: str, window: int | None) -> None:
    """By the kernel, or where something else narrows or changes the scores, by the mask that they stand for."""
    query, key, value = inputs()
    if extra == "odd size":
        query, key, value = (x[..., :6].detach().requires_grad_() for x in (query, key, value))
    ids = torch.full((2, LENGTH), -1)
    ids[0, 3:15], ids[1, 0:5], ids[1, 20:24] = 0, 0, 1
    seen = causal(window=window) | ((ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None]).triu(1)
    scale = query.shape[-1] ** -0.5
    options: dict[str, object] = {"sliding_window": window, "scaling": scale}
    known: dict[str, object] = {"scale": scale}
    if extra == "softcap":
        options["softcap"] = known["softcap"] = 0.7
    if extra == "sinks":
        options["s_aux"] = known["sinks"] = torch.randn(4, generator=torch.Generator().manual_seed(1))
    if extra == "position_bias":
        options["position_bias"] = torch.randn(1, 4, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1))
        known["bias"] = options["position_bias"]
    if extra == "indices":
        options["indices"] = torch.arange(LENGTH)[None, :, None].expand(2, -1, 1)
        seen = seen & torch.eye(LENGTH, dtype=torch.bool)
    call = torch.compile(function.attention, backend="aot_eager", fullgraph=True) if extra == "compiled" else function.attention  # fmt: skip
    out, _ = call(Module(2), query, key, value, _with_bounds(ids, None), **options)
    wanted = torch.cat([oracle(query[i : i + 1], key[i : i + 1], value[i : i + 1], seen[i], **known) for i in (0, 1)])  # type: ignore[arg-type]
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    mine = torch.autograd.grad(out, [query, key, value], gradient)
    theirs = torch.autograd.grad(wanted, [query, key, value], gradient.double())
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", [{}, {"softcap": 5.0}, {"s_aux": torch.zeros(4)}, {"sliding_window": 5}])
def test_packed_documents_are_in_one_row(option: dict[str, object]) -> None:
    """Two rows and one list of boundaries: whose they are is not said."""
    bounds = torch.tensor([0, 8, LENGTH], dtype=torch.int32)
    with pytest.raises(ValueError, match="one row that holds every document, not 2 rows"):
        function.attention(Module(2), *inputs(2), None, cu_seq_lens_q=bounds, max_length_q=16, **option)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", [{"softcap": 5.0}, {"s_aux": torch.zeros(4)}])
def test_a_bias_beside_a_softcap_or_sinks_is_refused(option: dict[str, object]) -> None:
    bias = torch.zeros(1, 4, LENGTH, LENGTH)
    with pytest.raises(NotImplementedError, match="attn_implementation: eager"):
        function.attention(Module(2), *inputs(1), None, position_bias=bias, **option)  # type: ignore[arg-type]
