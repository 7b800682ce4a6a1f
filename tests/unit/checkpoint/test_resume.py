"""Resuming: the losses after it are the uninterrupted run's to the last bit, or one error says what differs."""

import json
import os
import pickle
from collections import Counter, deque
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import lr_scheduler as lrs

from nemo_automodel.components.checkpoint import dcp, plain, publish
from nemo_automodel.components.checkpoint.checkpointer import Checkpointer
from nemo_automodel.components.checkpoint.dcp import load_tensors, read_index, save_tensors
from nemo_automodel.components.checkpoint.fingerprint import as_saved, compare
from nemo_automodel.components.checkpoint.ranks import Ranks
from nemo_automodel.components.datasets import loader
from nemo_automodel.components.datasets.loader import DataLoader
from nemo_automodel.config.tree import load_yaml
from nemo_automodel.errors import CheckpointError
from tests.unit.checkpoint.runs import Average, logits, make_state, read_json, train


class OwnOptimizer(torch.optim.Optimizer):
    """A user's: bf16 moment beside an fp32 parameter, a Python counter, a nested list, a row-wise state."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.01, "schedule": (0.9, 0.5)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(
                        m=torch.zeros_like(p, dtype=torch.bfloat16), n=0, rows=torch.zeros(p.shape[0]), past=[]
                    )
                state["n"] += 1
                state["m"].mul_(group["schedule"][0]).add_(p.grad)
                state["rows"].add_(p.grad.reshape(p.shape[0], -1).float().pow(2).mean(1))
                state["past"] = [*state["past"][-1:], p.grad.mean().double()]
                p.sub_(state["m"].float() * group["lr"] / state["n"] + 1e-3 * sum(state["past"]))


def two_groups(params):
    return torch.optim.AdamW([{"params": params[:3], "weight_decay": 0.1}, {"params": params[3:], "lr": 5e-4}], lr=1e-3)


OPTIMIZERS = {
    "adamw": None,
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.8, 0.9)),
    "adamw_tensor_lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3)),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "sgd_stateless": lambda p: torch.optim.SGD(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "two_groups": two_groups,
    "own": OwnOptimizer,
}
SCHEDULERS = {
    "lambda": None,
    "cosine": lambda o: lrs.CosineAnnealingLR(o, T_max=9),
    "multistep": lambda o: lrs.MultiStepLR(o, milestones=[2, 4]),
    "onecycle": lambda o: lrs.OneCycleLR(o, max_lr=1e-2, total_steps=20),
    "sequential": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, total_iters=3), lrs.ExponentialLR(o, 0.9)], milestones=[3]
    ),
}


def interrupted_and_not(tmp_path, steps=(3, 3), **make):
    """The losses after ``steps[0]``: of the run that saved there, and of one that resumes; and both states."""
    state = make_state(**make)
    checkpointer = Checkpointer(None, str(tmp_path))
    checkpointer.restore(state)
    train(state, steps[0])
    checkpointer.save(state)
    expected = train(state, steps[1])
    other = make_state(**{**make, "seed": 5})
    other.fingerprint = state.fingerprint
    train(other, 1)  # so that nothing is what it would be after a fresh start
    assert Checkpointer(None, str(tmp_path), restore_from="latest").restore(other)
    assert other.schedule.step == steps[0]
    return expected, train(other, steps[1]), state, other


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_class_9_every_optimizer_resumes_bit_for_bit(name, tmp_path):
    expected, got, state, other = interrupted_and_not(tmp_path, optimizer=OPTIMIZERS[name])
    assert got == expected
    for p, q in zip(state.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
        mine, theirs = state.optimizer.state[p], other.optimizer.state[q]
        assert mine.keys() == theirs.keys()
        for key in mine:
            if isinstance(mine[key], torch.Tensor):
                assert (mine[key].dtype, mine[key].device) == (theirs[key].dtype, theirs[key].device)
                assert torch.equal(mine[key], theirs[key])
            else:
                assert mine[key] == theirs[key]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_class_9_every_lr_scheduler_resumes_bit_for_bit(name, tmp_path):
    expected, got, state, other = interrupted_and_not(tmp_path, scheduler=SCHEDULERS[name])
    assert got == expected
    assert state.lr_scheduler.get_last_lr() == other.lr_scheduler.get_last_lr()


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_moe", "gpt2"])
def test_class_9_every_kind_of_model_resumes_bit_for_bit(model_type, tmp_path):
    expected, got, *_ = interrupted_and_not(tmp_path, model_type=model_type)
    assert got == expected


def test_class_9_tied_weights_stay_tied(tmp_path):
    expected, got, _, other = interrupted_and_not(tmp_path, tie_word_embeddings=True)
    assert got == expected
    assert other.model.lm_head.weight is other.model.model.embed_tokens.weight


def test_40_five_resumes(tmp_path):
    state = make_state()
    expected = train(state, 10)
    trace = []
    for _ in range(5):
        state = make_state()
        checkpointer = Checkpointer(None, str(tmp_path), restore_from="latest")
        checkpointer.restore(state)
        trace += train(state, 2)
        checkpointer.save(state)
    assert trace == expected


def test_class_17_pure_bf16_keeps_its_dtypes(tmp_path):
    state = make_state()
    state.model.to(torch.bfloat16)
    state.optimizer = OwnOptimizer(state.model.parameters())
    for p in state.model.parameters():
        state.optimizer.state[p].update(
            m=torch.randn_like(p, dtype=torch.float32), n=1, rows=torch.zeros(p.shape[0]), past=[]
        )
    Checkpointer(None, str(tmp_path)).save(state)
    other = make_state()
    other.model.to(torch.bfloat16)
    other.optimizer = OwnOptimizer(other.model.parameters())
    Checkpointer(None, str(tmp_path), restore_from="latest").restore(other)
    for p, q in zip(state.model.parameters(), other.model.parameters(), strict=True):
        assert other.optimizer.state[q]["m"].dtype == torch.float32  # torch's own load_state_dict would make it bf16
        assert torch.equal(state.optimizer.state[p]["m"], other.optimizer.state[q]["m"])


def test_saving_changes_nothing_in_the_run(tmp_path):
    expected = train(make_state(), 4)
    state = make_state()
    got = []
    checkpointer = Checkpointer(None, str(tmp_path))
    for _ in range(4):
        got += train(state, 1)
        checkpointer.save(state)
    assert got == expected


def test_37_another_model_is_refused_with_its_tensors(tmp_path):
    state = make_state()
    Checkpointer(None, str(tmp_path)).save(state)
    with pytest.raises(CheckpointError, match=r"mlp.gate_proj.weight: float32\[64, 32\] -> float32\[48, 32\]"):
        Checkpointer(None, str(tmp_path), restore_from="latest").restore(make_state(intermediate_size=48))
    other = make_state()
    other.model.to(torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"float32\[384, 32\] -> bfloat16\[384, 32\]"):
        Checkpointer(None, str(tmp_path), restore_from="latest").restore(other)


def test_another_optimizer_layout_is_refused(tmp_path):
    state = make_state()
    train(state, 1)
    Checkpointer(None, str(tmp_path)).save(state)
    with pytest.raises(CheckpointError, match="parameter groups"):
        Checkpointer(None, str(tmp_path), restore_from="latest").restore(make_state(optimizer=two_groups))


CONFIG = {
    "model": {"pretrained_model_name_or_path": "acme/base"},
    "peft": {"dim": 8, "use_triton": False},
    "dataset": {"path": "a.jsonl"},
    "step_scheduler": {"global_batch_size": 8, "local_batch_size": 4, "max_steps": 10, "log_every_steps": 1},
    "packed_sequence": {"packed_sequence_size": 0},
    "optimizer": {"lr": 1e-4, "betas": (0.9, 0.95)},
    "rng": {"seed": 1},
    "dataloader": {"num_workers": 0, "shuffle": True},
    "checkpoint": {"restore_from": None},
}


def restored_with(tmp_path, change, data=("d", "d"), total_steps=100, extend=False):
    """Save under CONFIG and restore with some keys changed: (section, key, value)."""
    state = make_state()
    state.fingerprint = {"config": CONFIG, "data": data[0]}
    Checkpointer(None, str(tmp_path)).save(state)
    other = make_state(total_steps=total_steps)
    config = {section: dict(values) for section, values in CONFIG.items()}
    for section, key, value in change:
        config[section][key] = value
    other.fingerprint = {"config": config, "data": data[1]}
    before = logits(other.model)
    try:
        return Checkpointer(None, str(tmp_path), restore_from="latest", extend=extend).restore(other)
    except CheckpointError:
        assert torch.equal(logits(other.model), before)
        assert other.schedule.step == 0
        raise


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "pretrained_model_name_or_path", "acme/other"),
        ("peft", "dim", 16),
        ("step_scheduler", "global_batch_size", 16),
        ("step_scheduler", "max_steps", 20),
        ("packed_sequence", "packed_sequence_size", 512),
        ("optimizer", "lr", 1e-3),
        ("rng", "seed", 2),
        ("dataloader", "shuffle", False),
    ],
)
def test_35_36_37_38_what_must_not_change_is_refused_with_a_diff(section, key, value, tmp_path):
    with pytest.raises(CheckpointError, match="belongs to another run") as error:
        restored_with(tmp_path, [(section, key, value), ("dataloader", "num_workers", 4)])
    assert f"{section}.{key}: {CONFIG[section][key]} -> {value}" in str(error.value)
    assert "num_workers" not in str(error.value)


def test_36_other_data_is_refused_and_the_same_data_elsewhere_is_not(tmp_path, caplog):
    with pytest.raises(CheckpointError, match=r"data .*: d -> e"):
        restored_with(tmp_path / "1", [], data=("d", "e"))
    with pytest.raises(CheckpointError, match=r"dataset.path: a.jsonl -> b.jsonl"):
        restored_with(tmp_path / "2", [("dataset", "path", "b.jsonl")], data=(None, None))
    assert restored_with(tmp_path / "3", [("dataset", "path", "b.jsonl")])
    assert "dataset.path: a.jsonl -> b.jsonl" in caplog.text
    with pytest.raises(CheckpointError, match=r"dataset.path: a.jsonl -> b.jsonl"):
        restored_with(tmp_path / "4", [("dataset", "path", "b.jsonl")], data=("partial:d", "partial:d"))
    with pytest.raises(CheckpointError, match=r"data .*: partial:d -> partial:e"):
        restored_with(tmp_path / "5", [], data=("partial:d", "partial:e"))


@pytest.mark.parametrize("kind", [list, tuple, datasets.Dataset.from_list])
def test_36_rows_of_a_users_own_dataset_are_compared(kind):
    rows = [{"input_ids": [1, i, 3], "labels": [i, 3, -100]} for i in range(5, 21)]
    swapped = [rows[1], rows[0], *rows[2:]]
    relabelled = [{**rows[0], "labels": [-100, 3, -100]}, *rows[1:]]

    def fingerprint(rows):
        return DataLoader(kind(rows), global_batch_size=4, local_batch_size=2).fingerprint

    assert fingerprint(rows) == fingerprint([dict(row) for row in rows])
    assert len({fingerprint(each) for each in (rows, swapped, relabelled, rows[1:])}) == 4
    assert not fingerprint(rows).startswith("partial:")


def test_36_a_dataset_that_is_not_in_memory_is_not_read(monkeypatch):
    class Lazy:
        def __len__(self):
            return 8

        def __getitem__(self, index):
            raise AssertionError("read")

    assert DataLoader(Lazy()).fingerprint.startswith("partial:")
    changing = datasets.Dataset.from_list([{"x": 1}] * 8).with_transform(lambda batch: Lazy()[0])
    assert DataLoader(changing).fingerprint.startswith("partial:")
    monkeypatch.setattr(loader, "_ROWS_HASHED", 7)
    assert DataLoader([{"x": 1}] * 8).fingerprint.startswith("partial:")


def test_38_another_horizon_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"schedule.total_steps: 100 -> 50"):
        restored_with(tmp_path, [], total_steps=50)


def test_extending_lets_the_plan_change_and_nothing_else(tmp_path, caplog):
    longer = [("step_scheduler", "max_steps", 20), ("optimizer", "lr", 1e-3)]
    with pytest.raises(CheckpointError, match="belongs to another run") as error:
        restored_with(tmp_path / "1", longer, extend=True)
    assert "optimizer.lr" in str(error.value)
    assert "max_steps" not in str(error.value)
    with pytest.raises(CheckpointError, match=r"schedule.total_steps: 100 -> 50"):
        restored_with(tmp_path / "2", [], total_steps=50, extend=True)  # not by the plan: by the data, say
    assert restored_with(tmp_path / "3", longer[:1], total_steps=200, extend=True)
    assert f"step_scheduler.max_steps: {CONFIG['step_scheduler']['max_steps']} -> 20" in caplog.text


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: lrs.LambdaLR(o, lambda s: 0.5**s),
        lambda o: lrs.CosineAnnealingLR(o, T_max=20),
        lambda o: lrs.OneCycleLR(o, max_lr=0.1, total_steps=20),
        lambda o: lrs.SequentialLR(o, [lrs.ConstantLR(o, 0.1, 3), lrs.ExponentialLR(o, 0.5)], [3]),
    ],
)
def test_the_rate_of_an_extended_run_is_the_new_plans(tmp_path, scheduler):
    state = make_state(scheduler=lambda o: lrs.CosineAnnealingLR(o, T_max=8))
    state.fingerprint = {"config": {"lr_scheduler": {"total": 8}}}
    train(state, 5)
    Checkpointer(None, str(tmp_path)).save(state)
    whole, extended = make_state(scheduler=scheduler), make_state(scheduler=scheduler)
    train(whole, 5)
    extended.fingerprint = {"config": {"lr_scheduler": {"total": 20}}}
    assert Checkpointer(None, str(tmp_path), restore_from="latest", extend=True).restore(extended)
    for _ in range(3):
        now, wanted = ({key: group[key] for key in ("lr", "betas")} for group in (extended.optimizer.param_groups[0], whole.optimizer.param_groups[0]))  # fmt: skip
        assert now == wanted
        train(whole, 1)
        train(extended, 1)


def test_a_scheduler_that_cannot_be_brought_to_the_step_is_named(tmp_path):
    state = make_state()
    state.fingerprint = {"config": {"lr_scheduler": {"a": 1}}}
    train(state, 5)
    Checkpointer(None, str(tmp_path)).save(state)
    other = make_state(scheduler=lambda o: lrs.OneCycleLR(o, max_lr=0.1, total_steps=3))
    other.fingerprint = {"config": {"lr_scheduler": {"a": 2}}}
    with pytest.raises(CheckpointError, match="lr_scheduler cannot be brought to step 5 of the new plan"):
        Checkpointer(None, str(tmp_path), restore_from="latest", extend=True).restore(other)


def test_34_39_harmless_changes_are_listed(tmp_path, caplog):
    changes = [
        ("dataloader", "num_workers", 4),
        ("step_scheduler", "local_batch_size", 8),
        ("step_scheduler", "log_every_steps", 5),
    ]
    assert restored_with(tmp_path, [*changes, ("peft", "use_triton", True), ("checkpoint", "restore_from", "latest")])
    for section, key, value in changes:
        assert f"{section}.{key}: {CONFIG[section][key]} -> {value}" in caplog.text
    assert "restore_from" not in caplog.text


def test_39_other_library_versions_are_listed(tmp_path, caplog):
    state = make_state()
    path = Checkpointer(None, str(tmp_path)).save(state)
    text = (path / "resume/state.json").read_text()
    (path / "resume/state.json").write_text(text.replace(f'"{torch.__version__}"', '"2.0.0"'))
    publish.seal(path, {key: read_json(path / "manifest.json")[key] for key in ("run", "sequence")}, Ranks(None))
    assert Checkpointer(None, str(tmp_path), restore_from="latest").restore(make_state())
    assert f"torch: 2.0.0 -> {torch.__version__}" in caplog.text


# --- no pickle ------------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_index_does_not_run(tmp_path):
    state = make_state()
    path = Checkpointer(None, str(tmp_path / "ckpt")).save(state)
    bomb = Bomb()
    bomb.path = tmp_path / "executed"
    for name in (".metadata", "__0.metadata", "index.json"):  # DCP's own names are not even looked at
        (path / "resume/tensors" / name).write_bytes(pickle.dumps(bomb))
        publish.seal(path, {key: read_json(path / "manifest.json")[key] for key in ("run", "sequence")}, Ranks(None))
        restore = Checkpointer(None, str(tmp_path / "ckpt"), restore_from="latest").restore
        if name == "index.json":
            with pytest.raises(CheckpointError, match=r"index.json: not a readable index"):
                restore(make_state())
        else:
            assert restore(make_state())
    assert not bomb.path.exists()


def test_no_file_is_a_pickle(tmp_path, monkeypatch):
    """Every file is JSON, text or safetensors, and neither writing nor reading one reaches ``pickle``."""

    def refuse(*args, **kwargs):
        raise AssertionError("pickle was reached")

    for name in ("load", "loads", "dump", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    state = make_state()
    train(state, 1)
    path = Checkpointer(None, str(tmp_path)).save(state)
    assert Checkpointer(None, str(tmp_path), restore_from="latest").restore(make_state())
    assert {file.suffix for file in path.rglob("*") if file.is_file()} == {".json", ".safetensors", ".jinja", ".md"}


@pytest.mark.parametrize(
    "content",
    ["", "junk", "[]", "[1]", '{"a": 1}', '{"a": {"dtype": "load", "size": [], "slices": []}}',
     '{"a": {"dtype": "float32", "size": ["x"], "slices": [1]}}'],
)  # fmt: skip
def test_an_index_that_is_none(content, tmp_path):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(CheckpointError, match="not a readable index"):
        read_index(tmp_path)
    (tmp_path / "index.json").unlink()
    with pytest.raises(CheckpointError, match=r"index.json: No such file"):
        read_index(tmp_path)


def test_what_is_not_a_tensor_is_neither_written_nor_read(tmp_path):
    with pytest.raises(CheckpointException, match="a is not a tensor"):
        save_tensors(tmp_path, {"a": "an object"})
    torch.distributed.checkpoint.save({"a": "an object"}, checkpoint_id=tmp_path)  # DCP's own writer: a pickle
    with pytest.raises((CheckpointError, CheckpointException), match="No such file"):
        load_tensors(tmp_path, {"a": "object"})


# --- a recipe's own state -------------------------------------------------------------------------------------------


def test_extra_state_is_restored_exactly(tmp_path):
    state = make_state()
    ema = Average(state.model.parameters())
    log = SimpleNamespace(state_dict=lambda: {"seen": {1: [0.1, (2, "x")]}}, load_state_dict=lambda got: None)
    state.extra = {"ema": ema, "ema2": log}
    train(state, 2)
    ema.update()
    path = Checkpointer(None, str(tmp_path)).save(state)
    other = make_state()
    got = []
    log = SimpleNamespace(state_dict=dict, load_state_dict=got.append)
    again = Average(other.model.parameters())
    other.extra = {"ema": again, "ema2": log}
    assert Checkpointer(None, str(tmp_path), restore_from="latest").restore(other)
    assert again.updates == 1
    assert all(torch.equal(a, b) for a, b in zip(again.average, ema.average, strict=True))
    assert got == [{"seen": {1: [0.1, (2, "x")]}}]
    assert any(name.startswith("extra/ema.average") for name in dcp.stored_tensors(path / "resume/tensors"))


def test_extra_state_that_is_not_there_is_an_error_and_one_too_much_is_said(tmp_path, caplog):
    state = make_state()
    state.extra = {"ema": Average(state.model.parameters())}
    Checkpointer(None, str(tmp_path)).save(state)
    assert Checkpointer(None, str(tmp_path), restore_from="latest").restore(make_state())
    assert "state.extra ema is not in this run" in caplog.text
    other = make_state()
    other.extra = {"swa": Average(other.model.parameters())}
    with pytest.raises(CheckpointError, match=r"no state.extra swa"):
        Checkpointer(None, str(tmp_path), restore_from="latest").restore(other)


# --- tensors and values ---------------------------------------------------------------------------------------------


def test_tensors_are_spread_over_files_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(dcp, "_FILE_BYTES", 1000)
    tensors = {f"t{i}": torch.randn(10, 10) for i in range(7)}
    save_tensors(tmp_path, tensors)
    assert sum(path.suffix == ".safetensors" for path in tmp_path.iterdir()) == 4
    loaded = {name: torch.zeros(10, 10) for name in tensors}
    load_tensors(tmp_path, loaded)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_tensors_of_every_dtype(tmp_path):
    dtypes = [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.float8_e4m3fn,
    ]
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "view": torch.arange(12.0).reshape(3, 4).t()}
    save_tensors(tmp_path, tensors)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load_tensors(tmp_path, loaded)
    assert all(torch.equal(loaded[name].double(), tensors[name].double()) for name in tensors)


def test_plain_state_is_exact():
    state = {
        "float": 0.1 + 0.2, "inf": float("inf"), "big": 2**80, "none": None, "tuple": (1, (2.5, "x")), "keys": {1: "a", (2, 3): "b"},
        "counter": Counter({2: 1}), "set": {1, 2}, "deque": deque([1, 2]), "array": np.arange(3, dtype=np.uint32),
        "tensor": torch.arange(3), "nested": [{"t": torch.tensor(2.0)}], "__kind__": "mine", "scalar": np.float64(1.5),
    }  # fmt: skip
    tensors = {}
    back = plain.decode(json.loads(json.dumps(plain.encode(state, tensors, "s"))), tensors)
    assert back.keys() == state.keys()
    assert back["array"].dtype == np.uint32
    for key in state:
        if key in ("array", "tensor"):
            assert list(back[key]) == list(state[key])
        else:
            assert back[key] == state[key]
            assert type(back[key]) is type(state[key]) or key == "scalar"
    with pytest.raises(CheckpointError, match=r"'s.fn' is a builtin_function_or_method"):
        plain.encode({"fn": print}, {}, "s")


def differences(saved, live):
    return compare({"config": saved}, {"config": live}).forbidden


def test_what_the_environment_held_must_be_the_same(tmp_path, monkeypatch):
    (tmp_path / "r.yaml").write_text(
        "model: {name: '${BASE}/x', token: '${TOKEN}', url: 'https://me:${TOKEN}@host'}\n"
        "peft: {alpha: '${ALPHA}', names: ['${BASE}', 3]}\noptimizer:\n  lr: ${LR}\n"
    )

    def written(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return load_yaml(tmp_path / "r.yaml").as_written()

    first = written(BASE="a", ALPHA="16", LR="1e-3", TOKEN="hf_secret")
    saved = as_saved(first)
    assert "hf_secret" not in json.dumps(saved)
    assert (saved["model"]["token"], saved["model"]["url"]) == ("${TOKEN}", "https://me:${TOKEN}@host")
    assert first["optimizer"]["lr"] == "${LR}"  # what is printed and tracked has no hash

    assert differences(saved, as_saved(written(TOKEN="hf_other", LR="0.001"))) == []
    before = json.loads(json.dumps(first))  # a checkpoint of a version that kept no hash
    assert differences(before, as_saved(written(BASE="b", LR="5e-2"))) == []
    changed = differences(saved, as_saved(written(ALPHA="64")))
    assert [line.partition(":")[0] for line in changed] == ["model.name", "peft.alpha", "peft.names", "optimizer.lr"]
    assert changed[0].startswith("model.name: ${BASE}/x (value #")
