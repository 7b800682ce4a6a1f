"""What a loaded recipe gives the training script: values, calls, offered arguments, defaults, and what nothing read."""

import json
import textwrap

import pytest

from nemo_automodel.config import load
from nemo_automodel.config.sections import Presence, Section
from nemo_automodel.errors import ConfigError

RECIPE = """\
model:
  _target_: parts.py:Model
  nested:
    _target_: parts.py:Inner
    size: 1e1
    deeper: [{_target_: parts.py:Inner}, 2]
dataset:
  _target_: parts.py:dataset
  rows: 3
dataloader:
  _target_: parts.py:everything
  shuffle: true
  seed: 5
"""

PARTS = """
    import functools

    class Inner:
        def __init__(self, size: float = 1.0, deeper=None): self.size, self.deeper = size, deeper

    class Model:
        def __init__(self, nested, distributed=None, peft=None, compile=None):
            self.nested, self.distributed, self.peft = nested, distributed, peft

    def dataset(tokenizer, rows):
        return [tokenizer] * rows

    def everything(dataset, **kwargs):
        return {"dataset": dataset, **kwargs}

    def picky(env=None, limit: int = 3):
        raise ValueError(f"limit {limit} is out of range")

    def broken():
        def a(): b()
        def b(): c()
        def c(): d()
        def d(): raise TypeError("deep inside")
        a()

    made = functools.partial(everything, extra=1)

    def says_key(limit=0):
        from nemo_automodel.errors import ConfigError
        raise ConfigError(f"rng.limit={limit}: too small; write 1 or more")
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts.py").write_text(textwrap.dedent(PARTS))

    def write(extra=""):
        (tmp_path / "r.yaml").write_text(RECIPE + textwrap.dedent(extra))
        return tmp_path / "r.yaml"

    return write


def read(path, *overrides, **kwargs):
    return load(path, overrides, allow_targets=["parts.py"], **kwargs)


def test_offered_arguments_go_to_those_that_name_them(recipe):
    cfg = read(recipe())
    assert cfg.dataset.instantiate(tokenizer="t", unknown=1) == ["t", "t", "t"]
    model = cfg.model.instantiate(distributed="mesh", peft=None, packed=True)
    assert model.distributed == "mesh"


def test_a_user_callable_with_kwargs_gets_all_and_the_yaml_goes_before_but_for_fixed(recipe):
    cfg = read(recipe())
    found = cfg.dataloader.instantiate(dataset=[1], seed=0, shuffle=False, drop_last=False)
    assert found == {"dataset": [1], "seed": 5, "shuffle": False, "drop_last": False}


def test_a_library_callable_never_gets_what_it_does_not_name(recipe):
    cfg = read(recipe("lr_scheduler:\n  _target_: torch.optim.lr_scheduler.StepLR\n  step_size: 2\n"))
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    assert cfg.lr_scheduler.instantiate(optimizer=optimizer, total_steps=10).step_size == 2


def test_nested_targets_are_built_at_any_depth(recipe):
    nested = read(recipe()).model.instantiate(distributed=None).nested
    assert (nested.size, type(nested.deeper[0]).__name__, nested.deeper[1]) == (10.0, "Inner", 2)


def test_targets_made_at_run_time_are_asked_at_run_time(recipe):
    cfg = read(recipe("rng:\n  _target_: parts.py:made\n  dataset: 1\n"))
    assert cfg.rng.instantiate(rank=0) == {"dataset": 1, "extra": 1, "rank": 0}


def test_values_and_their_defaults_can_be_read(recipe):
    cfg = read(recipe("optimizer:\n  weight_decay: 1\n"))
    assert cfg.optimizer.weight_decay == 1.0
    assert isinstance(cfg.optimizer.weight_decay, float)
    assert cfg.optimizer.eps == 1e-8  # torch's own
    assert cfg.step_scheduler.local_batch_size == 8
    with pytest.raises(AttributeError, match="takes no `lrr`"):
        _ = cfg.optimizer.lrr
    with pytest.raises(AttributeError, match="no section `optimiser`"):
        _ = cfg.optimiser


@pytest.mark.parametrize(
    ("peft", "lr"), [("", 1e-5), ("peft: {match_all_linear: true}\n", 1e-4), ("peft: null\n", 1e-5)]
)
def test_learning_rate_depends_on_peft(recipe, peft, lr):
    import torch

    cfg = read(recipe(peft))
    optimizer = cfg.optimizer.instantiate(params=[torch.nn.Parameter(torch.ones(1))])
    group = optimizer.param_groups[0]
    assert type(optimizer) is torch.optim.AdamW
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"], group["fused"]) == (lr, (0.9, 0.95), 0.0, True)


def test_our_defaults_do_not_leak_into_another_target(recipe):
    import torch

    cfg = read(recipe("optimizer:\n  _target_: torch.optim.SGD\n  lr: 0.5\n"))
    group = cfg.optimizer.instantiate(params=[torch.nn.Parameter(torch.ones(1))]).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["fused"]) == (0.5, 0, None)
    cfg = read(recipe("optimizer:\n  foreach: true\n"))
    cfg.optimizer.instantiate(params=[torch.nn.Parameter(torch.ones(1))])  # torch refuses foreach with fused


def test_absent_optional_sections_are_none(recipe):
    cfg = read(recipe())
    assert cfg.peft.instantiate() is None
    assert cfg.validation_dataset.instantiate(tokenizer=1) is None
    assert not cfg.peft
    assert cfg.dataset


def test_model_name(recipe, tmp_path):
    target = "model:\n  _target_: nemo_automodel.NeMoAutoModelForCausalLM"
    data = "dataset:\n  _target_: parts.py:dataset\n  rows: 1\n"
    for body, name in [
        (".from_pretrained\n  pretrained_model_name_or_path: a/b\n", "a/b"),
        (".from_config\n  config: c/d\n", "c/d"),
        (
            ".from_config\n  config: {_target_: transformers.AutoConfig.from_pretrained, pretrained_model_name_or_path: e/f}\n",
            "e/f",
        ),
        (".from_config\n  config: {model_type: llama}\n", None),
    ]:
        (tmp_path / "r.yaml").write_text(target + body + data)
        assert read(tmp_path / "r.yaml").model_name == name


def test_unread_keys_are_named(recipe, tmp_path):
    cfg = read(recipe("rng:\n  seed: 3\n"))
    with pytest.raises(ConfigError, match=r"r\.yaml:15 rng\.seed=3: nothing has read this") as caught:
        cfg.raise_on_unread()
    assert "dataset.rows" in str(caught.value)
    cfg.model.instantiate(distributed=None)
    cfg.dataset.instantiate(tokenizer=1)
    cfg.dataloader.instantiate(dataset=1)
    assert cfg.rng.seed == 3
    cfg.raise_on_unread()


def test_bad_arguments_found_by_the_constructor_are_a_config_error(recipe):
    cfg = read(recipe("rng:\n  _target_: parts.py:picky\n  limit: 9\n"))
    with pytest.raises(
        ConfigError, match=r"r\.yaml:14 rng: picky refuses its arguments: limit 9 is out of range"
    ) as caught:
        cfg.rng.instantiate()
    assert isinstance(caught.value.__cause__, ValueError)


def test_torchs_own_refusal_is_a_config_error(recipe):
    import torch

    cfg = read(recipe("optimizer:\n  betas: [1.5, 0.9]\n"))
    with pytest.raises(ConfigError, match=r"r\.yaml:14 optimizer: AdamW refuses its arguments: Invalid beta"):
        cfg.optimizer.instantiate(params=[torch.nn.Parameter(torch.ones(1))])


def test_a_fault_deep_inside_stays_what_it_is(recipe):
    cfg = read(recipe("rng:\n  _target_: parts.py:broken\n"))
    with pytest.raises(TypeError, match="deep inside"):
        cfg.rng.instantiate()


def test_a_components_message_gets_file_and_line(recipe):
    cfg = read(recipe("rng:\n  _target_: parts.py:says_key\n  limit: -1\n"))
    with pytest.raises(ConfigError, match=r"r\.yaml:16 rng\.limit=-1: too small"):
        cfg.rng.instantiate()


def test_resolved_is_a_recipe_with_the_same_meaning(recipe, tmp_path):
    from nemo_automodel.config.tree import dump

    first = read(recipe("peft: {match_all_linear: true}\n")).resolved()
    (tmp_path / "again.yaml").write_text(dump(first))
    assert read(tmp_path / "again.yaml").resolved() == first
    assert first["optimizer"]["lr"] == 1e-4
    assert first["dataset"] == {"_target_": "parts.py:dataset", "rows": 3}
    assert "env" not in first["checkpoint"]


SECRETS = """\
model:
  pretrained_model_name_or_path: a/b
  token: ${HF_TOKEN}
dataset:
  _target_: parts.py:dataset
  rows: ${ROWS:3}
tokenizer:
  pad_token: "${PAD}"
dataloader:
  _target_: parts.py:everything
  workers: [1, "${HF_TOKEN}", "${ROWS:3}"]
  quoted: "a $${PAD} b"
"""


def test_what_the_environment_holds_is_used_and_never_resolved(recipe, tmp_path, monkeypatch):
    from nemo_automodel.config.tree import dump

    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("PAD", "12")
    recipe()
    (tmp_path / "r.yaml").write_text(SECRETS)
    cfg = read(tmp_path / "r.yaml")
    assert (cfg.model.token, cfg.dataset.rows, cfg.tokenizer.pad_token) == ("hf_verysecret", 3, "12")
    printed = dump(cfg.resolved())
    assert "hf_verysecret" not in printed + json.dumps(cfg.resolved())
    (tmp_path / "again.yaml").write_text(printed)
    again = read(tmp_path / "again.yaml")
    assert again.resolved() == cfg.resolved()
    for section, key in [("model", "token"), ("dataset", "rows"), ("tokenizer", "pad_token"), ("dataloader", "quoted")]:
        assert getattr(getattr(again, section), key) == getattr(getattr(cfg, section), key)
    assert again.dataloader.instantiate(dataset=None)["workers"] == [1, "hf_verysecret", "3"]
    with pytest.raises(ConfigError, match=r"model\.tokn=\$\{HF_TOKEN\}: .*did you mean `token`"):
        read(tmp_path / "r.yaml", "--model.tokn=${HF_TOKEN}")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("--model.token=hf_verysecret", r"model\.token: .*write \$\{HF_TOKEN\}"),
        ("--dataloader.api_key=verysecret", r"dataloader\.api_key: .*write \$\{API_KEY\}"),
        ("--dataloader.db={password: verysecret}", r"dataloader\.db\.password: .*write \$\{PASSWORD\}"),
        ("--loggers.mlflow={tracking_uri: 'https://me:verysecret@host'}", r"tracking_uri: .*\$\{PASSWORD\}"),
    ],
)
def test_a_secret_written_out_is_refused_and_not_repeated(recipe, override, says):
    with pytest.raises(ConfigError, match=says) as caught:
        read(recipe("rng:\n  _target_: parts.py:nonsense\n"), override)
    assert "verysecret" not in str(caught.value)
    assert read(recipe("tokenizer: {pad_token: <pad>, eos_token: '</s>', add_tokens: [a]}\n"))


def test_a_recipe_of_ones_own_may_have_more_sections(recipe):
    path = recipe("teacher:\n  _target_: parts.py:Inner\n  size: 2\n")
    teacher = {"teacher": Section("Another model.", presence=Presence.REQUIRED)}
    assert read(path, extra_sections=teacher).teacher.instantiate().size == 2.0
    with pytest.raises(ConfigError, match="teacher: unknown section"):
        read(path)


def test_a_replacement_must_take_what_the_recipe_passes(recipe):
    with pytest.raises(ConfigError, match="the recipe passes `params`, which it does not take"):
        read(recipe("optimizer:\n  _target_: torch.nn.CrossEntropyLoss\n"))
    with pytest.raises(ConfigError, match="the recipe passes `peft`, which it does not take"):
        read(
            recipe("peft: {match_all_linear: true}\n"),
            "--model._target_=transformers.AutoModelForCausalLM.from_pretrained",
        )


def test_resolved_leaves_out_a_default_that_what_is_written_excludes(recipe, tmp_path):
    from nemo_automodel.config.tree import dump

    text = """\
model:
  pretrained_model_name_or_path: a/b
  torch_dtype: bfloat16
dataset:
  _target_: parts.py:dataset
  rows: 1
peft:
  target_modules: [q_proj]
optimizer:
  foreach: true
"""
    recipe()
    (tmp_path / "r.yaml").write_text(text)
    first = read(tmp_path / "r.yaml").resolved()
    assert "dtype" not in first["model"]
    (tmp_path / "again.yaml").write_text(dump(first))
    assert read(tmp_path / "again.yaml").resolved() == first
