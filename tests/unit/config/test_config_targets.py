"""``_target_`` may name trusted packages minus what is dangerous; anything else needs the flag that the error prints."""

import textwrap

import pytest

from nemo_automodel.config.targets import DANGEROUS, ENV_ALLOW, TargetPolicy
from nemo_automodel.errors import ConfigError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            import os
            class Thing:
                def __init__(self, size=1): self.size = size
                @classmethod
                def make(cls): return cls(2)
            number = 3
            """
        )
    )
    package = tmp_path / "user_package_for_targets"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import build\n")
    (package / "inner.py").write_text("def build(size=1):\n    return size\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(ENV_ALLOW, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "target",
    [
        "nemo_automodel.components.training.lr.warmup_decay", "torch.optim.AdamW", "torch.nn.CrossEntropyLoss", "torch.tensor",
        "transformers.AutoConfig.from_pretrained", "transformers.LlamaConfig", "datasets.load_dataset", "torch.device",
        "torchdata.stateful_dataloader.StatefulDataLoader", "torch.optim.lr_scheduler.LambdaLR", "torch.optim.Muon",
    ],
)  # fmt: skip
def test_trusted_targets_resolve_and_load(target, folder):
    policy = TargetPolicy()
    policy.find(target)
    assert callable(policy.load(target))


ATTACKS = [
    "os.system", "subprocess.run", "builtins.eval", "builtins.exec", "importlib.import_module", "pickle.loads", "sys.exit",
    "torch.os.system", "torch.hub.os.system", "torch.utils.data.os.system", "transformers.os.system", "datasets.os.system",
    "transformers.utils.import_utils.os.system", "torch.serialization.pickle.loads", "torch.nn.modules.module.functools.partial",
    "torch.load", "torch.serialization.load", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter",
    "torch.utils.cpp_extension.load_inline", "torch.multiprocessing.spawn", "torch.distributed.run.main", "torch.ops.load_library",
    "torch.utils.benchmark.Timer", "torch.distributed.checkpoint.format_utils.torch_save_to_dcp", "torch._dynamo.optimize",
    "transformers.models.llama.convert_llama_weights_to_hf.write_model", "torch.nn.Module.__class__", "torch.nn.Linear.__init__.__globals__", "torch.builtins.eval",
    "transformers.dynamic_module_utils.get_class_from_dynamic_module", "nemo_automodel.cli.app.import_module",
    "nemo_automodel.config.targets.importlib.import_module", "nemo_automodel.config.load", "nemo_automodel.import_module",
    "nemo_automodel.components.checkpoint.checkpointer.shutil.rmtree",
]  # fmt: skip


@pytest.mark.parametrize("target", ATTACKS)
def test_attacks_fail_from_source_and_again_on_the_object(target, folder):
    with pytest.raises(ConfigError, match=r"--allow-target|has no") as static:
        TargetPolicy().find(target)
    with pytest.raises((ConfigError, AttributeError, ImportError)):
        TargetPolicy().load(target)
    assert "Traceback" not in str(static.value)


def test_no_dangerous_name_is_reachable_by_another_path(folder):
    for target in (
        "torch.save",
        "torch.utils.data.dataloader.multiprocessing.spawn",
        "torch.compiler.load_cache_artifacts",
    ):
        with pytest.raises(ConfigError):
            TargetPolicy().load(target)
    assert "torch.load" in DANGEROUS


def test_the_error_prints_the_flag_and_the_flag_works(folder):
    with pytest.raises(ConfigError, match="add --allow-target user_package_for_targets "):
        TargetPolicy().find("user_package_for_targets.build")
    policy = TargetPolicy(["user_package_for_targets"], folder)
    assert policy.find("user_package_for_targets.build").path == "user_package_for_targets.inner.build"
    assert policy.load("user_package_for_targets.build")(size=4) == 4


def test_a_flag_can_name_one_callable(folder):
    policy = TargetPolicy(["torch.load"])
    import torch

    assert policy.load("torch.load") is torch.load
    with pytest.raises(ConfigError, match=r"--allow-target torch\.hub\.load"):
        policy.find("torch.hub.load")


def test_environment_variable_is_the_flag(folder, monkeypatch):
    monkeypatch.setenv(ENV_ALLOW, "user_package_for_targets, ./mine.py")
    policy = TargetPolicy([], folder)
    policy.find("user_package_for_targets.build")
    assert policy.load("./mine.py:Thing")(3).size == 3


@pytest.mark.parametrize("target", ["./mine.py:Thing", "mine.py:Thing"])
def test_files_beside_the_yaml_need_the_flag(folder, target, monkeypatch, tmp_path_factory):
    written = target.partition(":")[0]
    with pytest.raises(ConfigError, match=f"if you trust it, add --allow-target {written}"):
        TargetPolicy([], folder).find(target)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))  # the name is relative to the YAML, wherever the run starts
    policy = TargetPolicy([written], folder)
    assert policy.find(target).qualname == "Thing"
    assert policy.load(target)(5).size == 5
    assert policy.load("mine.py:Thing.make")().size == 2


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("mine.py:Thnig", "has no `Thnig`; did you mean `mine.py:Thing`"),
        ("mine.py:number", "is a value, not something to call"),
        ("absent.py:Thing", "no such file beside the YAML"),
    ],
)
def test_mistakes_in_file_targets(folder, target, match):
    with pytest.raises(ConfigError, match=match):
        TargetPolicy(["mine.py"], folder).find(target)


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("torch.optim", "is a module, not something to call"),
        ("torch.optm.AdamW", r"torch has no `optm`; did you mean `torch\.optim\.AdamW`"),
        ("nemo_automodle.NeMoAutoModelForCausalLM.from_pretrained", r"did you mean `nemo_automodel\.NeMoAutoModelForCausalLM\.from_pretrained`"),
        ("AdamW", "not a dotted name"),
        ("torch..AdamW", "not a dotted name"),
        ("print", "not a dotted name"),
        ("mlflow.log_param", "mlflow is not installed; run `pip install mlflow`"),
    ],
)  # fmt: skip
def test_unresolved_targets(folder, target, match):
    with pytest.raises(ConfigError, match=match):
        TargetPolicy().find(target)


@pytest.mark.parametrize("entry", ["no_such_package_anywhere", "./absent.py"])
def test_a_flag_for_nothing_is_a_mistake(folder, entry):
    with pytest.raises(ConfigError, match=f"--allow-target {entry}: no such"):
        TargetPolicy([entry], folder)


def test_a_re_export_into_a_trusted_package_is_seen_on_the_object(folder, monkeypatch):
    import os

    import torch.optim

    monkeypatch.setattr(torch.optim, "Innocent", os.system, raising=False)
    with pytest.raises(ConfigError, match=r"is really posix\.system, outside the trusted packages"):
        TargetPolicy().load("torch.optim.Innocent")
