"""The catalogue of bad inputs, config part: each has its message, ``file:line key=value: problem; fix``, exit code 2."""

import os
import re
import textwrap

import pytest

from nemo_automodel.config import load
from nemo_automodel.errors import ConfigError

BASE = """\
model:
  pretrained_model_name_or_path: some/model
dataset:
  _target_: nemo_automodel.components.datasets.llm.squad.make_squad_dataset
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a recipe and returns its path; the current folder is a fresh one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def write(text, base=BASE):
        path = tmp_path / "r.yaml"
        path.write_text(base + textwrap.dedent(text))
        return path

    return write


def message(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_base_is_good(recipe):
    load(recipe(""))
    assert load(recipe("optimizer:\npeft: null\nfp8: ~")).peft.instantiate() is None


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("optimizer:\n  lrr: 1", r"r\.yaml:6 optimizer\.lrr=1: torch\.optim\.AdamW takes no such argument; did you mean `lr`\?"),
        ("optimiser:\n  lr: 1", r"r\.yaml:5 optimiser: unknown section; did you mean `optimizer`\?"),
        ("step_scheduler:\n  global_batch_size: no", r"r\.yaml:6 step_scheduler\.global_batch_size=no: YAML reads an unquoted no as false"),
        ("step_scheduler:\n  max_steps: 010", r":6 step_scheduler\.max_steps=010: YAML 1\.1 reads 010 as octal; write 10"),
        ("step_scheduler:\n  max_steps: 1:30", r":6 step_scheduler\.max_steps=1:30: YAML 1\.1 reads 1:30 as a number in base 60"),
        ("tokenizer:\n  pad_token: no", r":6 tokenizer\.pad_token=no: .*'no' for the word"),
        ("peft:\n  target_modules: [q_proj, off]", r":6 peft\.target_modules\.1=off: "),
        ("optimizer:\n  lr:", r":6 optimizer\.lr=: expected float \| Tensor, not null; write a number"),
        ("optimizer:\n  lr: fast", r":6 optimizer\.lr=fast: expected float \| Tensor, not text; write a number such as 1e-4"),
        ("optimizer:\n  lr: '1e-4'", r":6 optimizer\.lr=1e-4: .*remove the quotes: 1e-4"),
        ("optimizer:\n  betas: [0.9]", r":6 optimizer\.betas=\[\.\.\.\]: expected a list of 2, not of 1; write 2 values"),
        ("optimizer:\n  betas: [0.9, x]", r":6 optimizer\.betas\.1=x: expected float"),
        ("tokenizer:\n  pad_token: 3", r":6 tokenizer\.pad_token=3: expected str \| None, not a whole number; put it in quotes: '3'"),
        ("peft:\n  dim: 8.0", r":6 peft\.dim=8\.0: expected int, not a number; write 8"),
        ("peft:\n  match_all_linear: 1", r":6 peft\.match_all_linear=1: expected bool"),
        ("peft:\n  target_modules: {a: b}", r":6 peft\.target_modules: expected list\[str\] \| str \| None, not a mapping"),
        ("peft:\n  dropout_position: before", r":6 peft\.dropout_position=before: not one of pre, post; "),
        ("optimizer:\n  _target_: torch.optim.AdmaW", r":6 optimizer\._target_=torch\.optim\.AdmaW: torch\.optim has no `AdmaW`; did you mean `torch\.optim\.AdamW`"),
        ("optimizer:\n  _target_: os.system", r":6 optimizer\._target_=os\.system: os is not a trusted package; if you trust it, add --allow-target os "),
        ("optimizer:\n  _target_: ./mine.py:SGD", r":6 optimizer\._target_=\./mine\.py:SGD: no such file beside the YAML"),
        ("optimizer:\n  _target_: torch.optim", r":6 optimizer\._target_=torch\.optim: is a module, not something to call"),
        ("optimizer:\n  _target_: nemo_automodel.types.IGNORE_INDEX", r":6 optimizer\._target_=.*: is a value, not something to call"),
        ("optimizer:\n  _target_: 3", r":6 optimizer\._target_=3: must be a dotted name"),
        ("lr_scheduler:\n  _target_: torch.optim.lr_scheduler.StepLR", r":6 lr_scheduler\.step_size: missing argument of torch\.optim\.lr_scheduler\.StepLR\(optimizer, step_size, gamma=0\.1, last_epoch=-1\); add `step_size:`"),
        ("loss_fn:\n  reduction: sum", r":6 loss_fn\.reduction=sum: .*takes no such argument; .*[Ii]t takes .*chunk_size"),
        ("peft:", r":5 peft=: nothing is written in this section; indent its keys below it, or write `peft: null` to go without"),
        ("fp8:\n  # enabled: true", r":5 fp8=: nothing is written in this section"),
        ("optimizer: 3", r":5 optimizer=3: a section is a mapping"),
        ("optimizer: [lr]", r":5 optimizer=\[\.\.\.\]: a section is a mapping"),
        ("optimizer:\n  lr: .nan", r":6 optimizer\.lr=\.nan: not a number; write a number such as 1e-4"),
        ("optimizer:\n  lr: -1e-4", r":6 optimizer\.lr=-1e-4: negative"),
        ("optimizer:\n  lr: .inf", r":6 optimizer\.lr=\.inf: infinite"),
        ("clip_grad_norm:\n  max_norm: 0", r":6 clip_grad_norm\.max_norm=0: no norm to clip to; write a number above 0, or null to measure only"),
        ("clip_grad_norm:\n  max_norm: -1.0", r":6 clip_grad_norm\.max_norm=-1\.0: no norm to clip to"),
        ("optimizer:\n  betas: [0.9, .nan]", r":6 optimizer\.betas\.1=\.nan: not a number"),
        ("step_scheduler:\n  max_steps: 0", r":6 step_scheduler\.max_steps=0: must be at least 1"),
        ("step_scheduler:\n  ckpt_every_steps: 0", r":6 step_scheduler\.ckpt_every_steps=0: must be at least 1"),
        ("step_scheduler:\n  max_steps: 5\nlr_scheduler:\n  warmup_steps: 9", r":8 lr_scheduler\.warmup_steps=9: longer than step_scheduler\.max_steps=5; write at most 5"),
        ("step_scheduler:\n  global_batch_size: 10\n  local_batch_size: 4", r":6 step_scheduler\.global_batch_size=10: global_batch_size 10 is not a multiple of local_batch_size 4; write global_batch_size: 8 or 12"),
        ("step_scheduler:\n  local_batch_size: 7", r":6 step_scheduler\.local_batch_size=7: global_batch_size 64 is not a multiple of local_batch_size 7"),
        ("step_scheduler:\n  global_batch_size: 24\ndistributed:\n  dp_size: 2", r"24 is not a multiple of local_batch_size 8 x 2 data-parallel ranks = 16; write global_batch_size: 16 or 32"),
        ("peft:\n  lora_dtype: float61", r":6 peft\.lora_dtype=float61: unsupported dtype .*did you mean `bfloat16`"),
        ("peft:\n  lora_dtype: fp8", r":6 peft\.lora_dtype=fp8: unsupported dtype .*write one of float32, bfloat16"),
        ("peft:\n  lora_dtype: float16", r":6 peft\.lora_dtype=float16: unsupported dtype \(there are float32, bfloat16\)"),
        ("step_scheduler:\n  val_every_steps: 2", r":6 step_scheduler\.val_every_steps=2: there is nothing to validate on; add a `validation_dataset` section"),
        ("distributed:\n  activation_checkpointing: true", r":6 distributed\.activation_checkpointing=true: not one of off, selective, full, auto; write one of them"),
        ("loss_fn:\n  _target_: torch.nn.CrossEntropyLoss", r":5 loss_fn: torch\.nn\.CrossEntropyLoss takes other shapes than .*; write nemo_automodel\.components\.loss\.masked_ce\.MaskedCrossEntropy"),
        ("loss_fn:\n  ignore_index: 0", r":6 loss_fn\.ignore_index=0: the data marks what is not trained on with -100; leave it out"),
        ("peft:\n  match_all_linear: true\n  target_modules: [q_proj]", r":7 peft\.target_modules=\[\.\.\.\]: conflicts with peft\.match_all_linear=true \(.*r\.yaml:6\)"),
        ("optimizer:\n  fused: true\n  foreach: true", r":7 optimizer\.foreach=true: conflicts with optimizer\.fused=true \(.*:6\)"),
        ("checkpoint:\n  save_merged: true", r":6 checkpoint\.save_merged=true: there are no adapters to merge, since there is no `peft` section"),
        ("checkpoint:\n  checkpoint_dir: r.yaml/out", r":6 checkpoint\.checkpoint_dir=r\.yaml/out: .*r\.yaml is a file; name a folder"),
        ("checkpoint:\n  restore_from: epoch_0_step_9", r":6 checkpoint\.restore_from=epoch_0_step_9: nothing to restore; checkpoints holds no complete checkpoint"),
        ("lr_scheduler:\n  min_lr_ratio: 1.5", r":6 lr_scheduler\.min_lr_ratio=1\.5: above 1, .*write a number from 0 to 1"),
        ("per_device_train_batch_size: 2", r":5 per_device_train_batch_size=2: unknown section; did you mean `step_scheduler\.local_batch_size`, which other trainers call `per_device_train_batch_size`\?"),
        ("max_steps: 2", r":5 max_steps=2: unknown section; did you mean `step_scheduler\.max_steps`\?"),
        ("step_scheduler:\n  learning_rate: 2", r":6 step_scheduler\.learning_rate=2: .*did you mean `optimizer\.lr`, which other trainers call `learning_rate`\?"),
        ("rng:\n  warmup_steps: 2", r":6 rng\.warmup_steps=2: .*`lr_scheduler\.warmup_steps`"),
        ("dataloader:\n  tokenizer: x", r":6 dataloader\.tokenizer=x: the recipe passes this itself; write the section `tokenizer:` beside `dataloader:`"),
        ("optimizer:\n  lr: ${NOT_SET_ANYWHERE}", r":6 optimizer\.lr=\$\{NOT_SET_ANYWHERE\}: the environment variable NOT_SET_ANYWHERE is not set"),
        ("dataset:\n  split: x", r":5 dataset: duplicate key, first written at .*r\.yaml:3; "),
        ("rng: !!python/object/apply:os.system [x]", r":5 rng: the tag !!python/object/apply:os\.system builds an object"),
        ("loss_fn:\n  _target_: torch.load", r":6 loss_fn\._target_=torch\.load: torch\.load can run or load arbitrary code"),
    ],
)  # fmt: skip
def test_bad_value(recipe, section, expected):
    found = message(recipe(section))
    assert re.search(expected, found), found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model:\n  pretrained_model_name_or_path: m\n", r"r\.yaml dataset: missing section; add `dataset:`"),
        ("model:\ndataset:\n  _target_: datasets.load_dataset\n  path: x\n", r":1 model: null, and it is required"),
        ("model:\n  dtype: bfloat16\ndataset:\n  _target_: datasets.load_dataset\n  path: x\n", r":1 model\.pretrained_model_name_or_path: missing argument"),
        ("model:\n  pretrained_model_name_or_path:\ndataset:\n  _target_: datasets.load_dataset\n  path: x\n", r":2 model\.pretrained_model_name_or_path=: null, and it is required"),
        ("model:\n  pretrained_model_name_or_path: m\ndataset:\n  path: x\n", r":3 dataset: says not what to call: no `_target_`; add `_target_:"),
        ("model:\n  pretrained_model_name_or_path: m\ndataset:\n  _traget_: x\n", r":4 dataset\._traget_=x: says not what to call: no `_target_`; write `_target_` for `_traget_`"),
        ("model:\n  pretrained_model_name_or_path: m\n  dtype: bf61\n", r":3 model\.dtype=bf61"),
        ("model:\n  pretrained_model_name_or_path: m\n  num_hidden_layers: 2\n", r":3 model\.num_hidden_layers=2: .* takes no such argument"),
        ("model:\n  pretrained_model_name_or_path: m\n  dtype: float32\n  torch_dtype: float32\n", r":4 model\.torch_dtype=float32: conflicts with model\.dtype"),
    ],
)  # fmt: skip
def test_bad_model_or_dataset(recipe, text, expected):
    base = (
        ""
        if "dataset:" in text or "missing section" in expected
        else "dataset:\n  _target_: datasets.load_dataset\n  path: x\n"
    )
    found = message(recipe(base, base=text))
    assert re.search(expected, found), found


CONFIG = "model:\n  _target_: nemo_automodel.NeMoAutoModelForCausalLM.from_config\n  config: {}\n"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("{model_type: llama, hiden_size: 64}", r":3 model\.config\.hiden_size=64: transformers\.LlamaConfig takes no such argument; did you mean `hidden_size`"),
        ("{model_type: llama, hidden_size: big}", r":3 model\.config\.hidden_size=big: expected int"),
        ("{model_type: lama, hidden_size: 64}", r":3 model\.config\.model_type=lama: not one that the installed transformers knows; did you mean `llama`"),
        ("{hidden_size: 64}", r":3 model\.config: no model_type"),
        ("{_target_: transformers.LlamaConfig, num_hidden_layer: 2}", r":3 model\.config\.num_hidden_layer=2: .*did you mean `num_hidden_layers`"),
        ("{_target_: transformers.LlamaConfg}", r":3 model\.config\._target_=transformers\.LlamaConfg: .*did you mean `transformers\.LlamaConfig`"),
        ("{_target_: transformers.LlamaConfig, rope_parameters: {_target_: os.system}}", r":3 model\.config\.rope_parameters\._target_=os\.system: .*--allow-target os "),
    ],
)  # fmt: skip
def test_bad_nested_config(recipe, config, expected):
    found = message(recipe("", base=CONFIG.replace("{}", config) + BASE[BASE.index("dataset:") :]))
    assert re.search(expected, found), found


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(recipe):
    found = message(recipe("optimizer:\n  lrr: 1\nrng:\n  sed: 1\npeft:\n  dimm: 3\n")).splitlines()
    assert [re.search(r":(\d+) ", line)[1] for line in found] == ["6", "8", "10"]


def test_mesh_must_divide_the_world(recipe, monkeypatch):
    path = recipe("distributed:\n  dp_size: 3\n")
    load(path, ["--step_scheduler.global_batch_size=24"])
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = message(path, "--step_scheduler.global_batch_size=24")
    assert re.search(
        r":6 distributed\.dp_size=3: dp_size 3 x tp_size 1 x cp_size 1 = 3, but 4 processes were started", found
    )


def test_batch_counts_the_launched_ranks(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "x 3 data-parallel ranks = 24; write global_batch_size: 48 or 72" in message(recipe(""))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_that_cannot_be_written(recipe, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "cannot be written" in message(recipe(f"checkpoint:\n  checkpoint_dir: {locked}/out\n"))


def test_restore_lists_what_there_is(recipe, tmp_path):
    for name in ("epoch_0_step_5", "epoch_0_step_10"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").write_text("{}")
    (tmp_path / "checkpoints" / "epoch_0_step_15").mkdir()  # never finished
    path = recipe("checkpoint:\n  restore_from: epoch_0_step_15\n")
    assert "nothing to restore; there are epoch_0_step_10, epoch_0_step_5" in message(path)
    load(path, ["--checkpoint.restore_from=epoch_0_step_5"])
    load(path, ["--checkpoint.restore_from=checkpoints/epoch_0_step_5"])
    load(path, ["--checkpoint.restore_from=latest"])


def test_override_mistakes_name_the_option(recipe):
    path = recipe("")
    assert message(path, "--optimizer.lrr=1").startswith(
        "command line optimizer.lrr=1: torch.optim.AdamW takes no such argument"
    )
    assert "did you mean `optimizer`" in message(path, "--optimiser.lr=1")


@pytest.mark.parametrize("word", ["no", "off", "yes", "on"])
def test_old_booleans_are_fine_where_a_boolean_is_expected(recipe, word):
    cfg = load(recipe(f"peft:\n  match_all_linear: {word}\n"))
    assert cfg.peft.match_all_linear is (word in ("yes", "on"))


def test_none_is_null_where_no_text_is_taken(recipe):
    cfg = load(recipe("step_scheduler:\n  max_steps: none\n"))
    assert cfg.step_scheduler.max_steps is None
    assert cfg.distributed.dp_size == "none"  # there it is a word of its own


def test_off_is_a_word_where_it_is_a_choice(recipe):
    path = recipe("distributed:\n  activation_checkpointing: off\n")
    assert load(path).resolved()["distributed"]["activation_checkpointing"] == "off"
