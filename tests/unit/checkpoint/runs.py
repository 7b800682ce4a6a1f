"""A small run without a recipe: the state a checkpoint holds, and a few real optimizer steps."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from nemo_automodel.types import TrainState
from tests.builders import make_tokenizer, tiny_config


class Schedule:
    def __init__(self, total_steps: int = 100):
        self.step, self.epoch, self.total_steps = 0, 0, total_steps

    def state_dict(self):
        return {"step": self.step, "epoch": self.epoch, "total_steps": self.total_steps}

    def load_state_dict(self, state):
        self.step, self.epoch = state["step"], state["epoch"]


class GlobalRNG:
    """Carries the generators' own state, tensors and NumPy arrays included."""

    def state_dict(self):
        return {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()}

    def load_state_dict(self, state):
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])


class Average:
    """An exponential moving average of the weights, as the guide has it, with a counter beside it."""

    def __init__(self, params, decay=0.9):
        self.params, self.decay, self.updates = list(params), decay, 0
        self.average = [p.detach().clone() for p in self.params]

    def update(self):
        self.updates += 1
        for average, p in zip(self.average, self.params, strict=True):
            average.mul_(self.decay).add_(p.detach(), alpha=1 - self.decay)

    def state_dict(self):
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]
        for average, saved in zip(self.average, state["average"], strict=True):
            average.copy_(saved)


def make_state(
    model_type: str = "llama",
    *,
    seed: int = 0,
    peft: Any = None,
    optimizer=None,
    scheduler=None,
    total_steps=100,
    **config,
):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, attention_dropout=0.1, **config))
    model.config._name_or_path = "acme/base"
    if peft is not None:
        peft.apply(model)
    params = [p for p in model.parameters() if p.requires_grad]
    opt = (optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)))(params)
    sched = (scheduler or (lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: 1 / (1 + s))))(opt)
    return TrainState(
        model=model,
        tokenizer=make_tokenizer("chatml"),
        peft=peft,
        optimizer=opt,
        lr_scheduler=sched,
        schedule=Schedule(total_steps),
        rng=GlobalRNG(),
        fingerprint={"config": {"model": {"name": "acme/base"}, "rng": {"seed": seed}}, "data": "d1"},
    )


def train(state: TrainState, steps: int) -> list[str]:
    """Real steps on data drawn from the global generator, with dropout; returns each loss to the last bit."""
    trace = []
    state.model.train()
    for _ in range(steps):
        ids = torch.randint(3, 300, (2, 12))
        loss = state.model(input_ids=ids, labels=ids).loss
        loss.backward()
        state.optimizer.step()
        state.lr_scheduler.step()
        state.optimizer.zero_grad()
        state.schedule.step += 1
        trace.append(loss.double().item().hex())
    return trace


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    ids = torch.arange(3, 35).reshape(2, 16) if ids is None else ids
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
