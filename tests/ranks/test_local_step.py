"""Elementwise optimizers stepped on local tensors, against their own step on DTensors, on two gloo ranks.

Claims: (1) after five steps weights and state are the same to the last bit, laid out alike, whatever the class, its kernels
and dtype, with uneven, empty and replicated shards, with ``found_inf``, and where gradients are laid out otherwise;
(2) no step dispatches on a DTensor, except where it makes state; (3) hooks and schedulers see the optimizer as it is;
(4) what is saved is restored on another layout, and goes on as one process does; (5) other optimizers are left alone.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_automodel.components.training.adamw import AdamW
from nemo_automodel.components.training.local_step import step_on_local_tensors
from tests.ranks.launch import on_ranks

CASES = [
    (optim.Adadelta, {"weight_decay": 0.1}),
    (optim.Adagrad, {"lr_decay": 0.1}),
    (optim.Adam, {"weight_decay": 0.1, "amsgrad": True}),
    (optim.Adamax, {"weight_decay": 0.1}),
    (optim.AdamW, {}),
    (optim.AdamW, {"maximize": True, "amsgrad": True}),
    (optim.NAdam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    (optim.RAdam, {"weight_decay": 0.1}),
    (optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (optim.SGD, {}),
    (optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (optim.SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
]
KERNELS = [{"foreach": False}, {"foreach": True}, {"fused": True}]
FUSED = {optim.Adam, optim.AdamW}  # those whose fused kernels know DTensors
SHAPES = [((33, 8), Shard(0)), ((1, 8), Shard(0)), ((4, 6), Shard(1)), ((5,), Replicate()), ((8,), Shard(0))]


class DTensorCalls(TorchDispatchMode):
    """Counts the calls that are dispatched on a DTensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any(issubclass(t, DTensor) for t in types)
        return func(*args, **(kwargs or {}))


def spread(tensor, mesh, placement):
    return tensor.clone() if mesh is None else distribute_tensor(tensor, mesh, [placement])


def parameters(mesh, dtype):
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(spread(torch.randn(shape, generator=generator).to(dtype), mesh, placement))
        for shape, placement in SHAPES
    ]


def give_gradients(params, step, mesh, turned=False):
    generator = torch.Generator().manual_seed(100 + step)
    for number, (parameter, (shape, placement)) in enumerate(zip(params, SHAPES, strict=True)):
        grad = torch.randn(shape, generator=generator).to(parameter.dtype)
        parameter.grad = None
        if (number + step) % 4:  # not every weight has one in every step
            where = Shard(0) if turned and placement == Replicate() else placement  # the one torch can step with
            parameter.grad = spread(grad, mesh, where)


def train(optimizer, params, mesh, found_inf=False, turned=False, first=0, last=5):
    calls = []
    for step in range(first, last):
        give_gradients(params, step, mesh, turned)
        if found_inf:
            optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(step == 2))
        with DTensorCalls() as counted:
            optimizer.step()
        calls.append(counted.count)
        if found_inf:
            del optimizer.grad_scale, optimizer.found_inf
    return calls


def same(found, expected):
    if not isinstance(expected, torch.Tensor):
        return found == expected
    alike = type(found) is type(expected) and found.dtype == expected.dtype
    if isinstance(expected, DTensor):
        alike = alike and (found.shape, found.placements) == (expected.shape, expected.placements)
        found, expected = found.to_local(), expected.to_local()
    return alike and torch.equal(found, expected)


def require_same(params, optimizer, expected_params, expected_optimizer, what):
    for p, q in zip(params, expected_params, strict=True):
        assert same(p.detach(), q.detach()), what
        assert optimizer.state[p].keys() == expected_optimizer.state[q].keys(), what
        for key, value in expected_optimizer.state[q].items():
            assert same(optimizer.state[p][key], value), (what, key)
    assert len(optimizer.state) == len(expected_optimizer.state), what
    assert str(optimizer.state_dict()) == str(expected_optimizer.state_dict()), what


def equality(mesh):
    for dtype in (torch.float32, torch.bfloat16):
        for cls, options in CASES:
            for kernels in KERNELS:
                fused = "fused" in kernels
                if fused and cls not in FUSED:
                    continue
                for found_inf in {False, fused}:
                    what = (cls, options, kernels, dtype, found_inf)
                    theirs, ours = parameters(mesh, dtype), parameters(mesh, dtype)
                    plain = cls(theirs, lr=0.1, **options, **kernels)
                    local = step_on_local_tensors(cls(ours, lr=0.1, **options, **kernels))
                    slow = train(plain, theirs, mesh, found_inf)
                    calls = train(local, ours, mesh, found_inf)
                    require_same(ours, local, theirs, plain, what)
                    assert min(slow) > 0, what
                    assert calls[4] == 0, (what, calls)  # by then every weight has had a step, and so its state

    theirs, ours = parameters(mesh, torch.float32), parameters(mesh, torch.float32)
    plain, local = optim.SGD(theirs, lr=0.1), step_on_local_tensors(optim.SGD(ours, lr=0.1))
    train(plain, theirs, mesh, turned=True)
    assert train(local, ours, mesh, turned=True)[4] > 0
    require_same(ours, local, theirs, plain, "gradients laid out otherwise")


def hooks(mesh):
    """A scheduler, hooks around a step and a closure, as with any optimizer; a copy is an optimizer of its own."""
    params = parameters(mesh, torch.float32)
    optimizer = step_on_local_tensors(optim.AdamW(params, lr=0.1))
    seen = []
    for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
        register(lambda opt, *_: seen.append((opt, [p for g in opt.param_groups for p in g["params"]])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # lr_scheduler.step() before optimizer.step(), say
        scheduler = optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        give_gradients(params, 1, mesh)
        assert optimizer.step(lambda: 3) == 3
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert [opt for opt, _ in seen] == [optimizer, optimizer]
    assert all(p is q for _, found in seen for p, q in zip(found, params, strict=True))
    assert "_init_group" not in copy.deepcopy(optimizer).__dict__


def other_layout(mesh):
    """Two steps on shards, restored on whole weights and on replicas: three more are one process's five."""
    for cls, options in [(optim.AdamW, {"fused": True}), (optim.SGD, {"momentum": 0.9}), (optim.NAdam, {})]:
        expected = parameters(None, torch.float32)
        whole = cls(expected, lr=0.1, **options)
        train(whole, expected, None)

        params = parameters(mesh, torch.float32)
        optimizer = step_on_local_tensors(cls(params, lr=0.1, **options))
        train(optimizer, params, mesh, last=2)
        saved = optimizer.state_dict()
        for values in saved["state"].values():
            values.update({k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in values.items()})
        again = [nn.Parameter(p.detach().full_tensor()) for p in params]
        other = step_on_local_tensors(cls(again, lr=0.1, **options))
        other.load_state_dict(saved)
        train(other, again, None, first=2)
        for p, q in zip(again, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0)


def on_two_ranks(what):
    dist.init_process_group("gloo")
    {"equality": equality, "hooks": hooks, "other_layout": other_layout}[what](init_device_mesh("cpu", (2,)))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("what", ["equality", "hooks", "other_layout"])
def test_on_two_ranks(what):
    on_ranks("tests.ranks.test_local_step:on_two_ranks", 2, what)


class Own(optim.AdamW):
    """A user's."""


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda params: Own(params),
        lambda params: AdamW(params),
        lambda params: optim.Adafactor(params),
        lambda params: optim.LBFGS(params),
        lambda params: optim.Adam(params, differentiable=True),
    ],
)
def test_other_optimizers_are_left_alone(optimizer):
    made = optimizer([nn.Parameter(torch.ones(3, 3))])
    before = dict(made.__dict__)
    assert step_on_local_tensors(made) is made
    assert made.__dict__ == before
