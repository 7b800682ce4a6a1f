"""Signatures read from source equal those that Python itself reports, and reading them imports nothing."""

import inspect
import subprocess
import sys
import textwrap
from dataclasses import MISSING, fields
from importlib import import_module

import pytest

from nemo_automodel.config.signatures import COMPUTED, REQUIRED, Signatures
from nemo_automodel.config.sources import Sources, Trail

REAL = [
    "torch.optim.AdamW", "torch.optim.SGD", "torch.optim.Adafactor", "torch.optim.Muon", "torch.optim.lr_scheduler.LambdaLR",
    "torch.optim.lr_scheduler.CosineAnnealingLR", "torch.nn.CrossEntropyLoss", "torch.nn.Linear", "torch.nn.functional.cross_entropy",
    "torch.utils.data.DataLoader", "torchdata.stateful_dataloader.StatefulDataLoader", "datasets.load_dataset",
    "datasets.Dataset.from_list", "datasets.Dataset.from_json", "transformers.AutoTokenizer.from_pretrained",
    "transformers.AutoConfig.from_pretrained", "transformers.LlamaForCausalLM",
    "transformers.PreTrainedModel.from_pretrained", "transformers.get_cosine_schedule_with_warmup",
    "transformers.DataCollatorWithPadding", "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
    "nemo_automodel.components.distributed.fsdp2.FSDP2Manager", "nemo_automodel.components.training.schedule.StepScheduler",
    "nemo_automodel.components._peft.lora.PeftConfig", "nemo_automodel.components.training.lr.warmup_decay",
]  # fmt: skip


def read(target, extra_path=()):
    sources = Sources(extra_path)
    definition = sources.resolve(target)
    assert definition is not None, target
    return Signatures(sources).of(target, definition)


def live(target):
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(target)


@pytest.mark.parametrize("target", REAL)
def test_equal_to_the_live_signature(target):
    expected = inspect.signature(live(target)).parameters
    found = read(target)
    named = {n: p for n, p in expected.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    assert list(found.parameters) == list(named)
    assert found.var_keyword == any(p.kind is p.VAR_KEYWORD for p in expected.values())
    for name, parameter in named.items():
        default = found.parameters[name].default
        assert (default is REQUIRED) == (parameter.default is parameter.empty), name
        if default is not REQUIRED and default is not COMPUTED:
            assert default == parameter.default, name


def test_config_dataclass_of_transformers():
    found = read("transformers.LlamaConfig")
    from transformers import LlamaConfig

    expected = {f.name: f.default for f in fields(LlamaConfig) if f.init}
    assert set(found.parameters) == set(expected)
    literal = {n: p.default for n, p in found.parameters.items() if p.default not in (REQUIRED, COMPUTED)}
    assert all(literal[n] == expected[n] for n in literal if expected[n] is not MISSING)
    assert found.open  # it keeps any further field


def test_keywords_are_those_that_are_read():
    found = read("transformers.PreTrainedModel.from_pretrained")
    assert {
        "dtype",
        "torch_dtype",
        "device_map",
        "attn_implementation",
        "trust_remote_code",
        "quantization_config",
    } <= found.extra
    assert not any(name.startswith("_") for name in found.extra)


def test_our_from_pretrained_takes_what_transformers_reads_and_nothing_else():
    found = read("nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained")
    assert found.accepts("quantization_config")
    assert found.accepts("torch_dtype")
    assert not found.open
    assert not found.accepts("num_hidden_layers")


@pytest.mark.parametrize(
    ("target", "missing", "nearest"),
    [
        ("torch.optim.AdmaW", "AdmaW", "AdamW"),
        ("torch.optm.AdamW", "optm", "optim"),
        ("torch.nn.CrossEntropyLos", "CrossEntropyLos", "CrossEntropyLoss"),
        ("transformers.LlamaConfg", "LlamaConfg", "LlamaConfig"),
        ("transformers.AutoTokenizer.from_pretraned", "from_pretraned", "from_pretrained"),
        ("transformers.AutoModelForCausalLm", "AutoModelForCausalLm", "AutoModelForCausalLM"),
        ("datasets.load_datasets", "load_datasets", "load_dataset"),
        (
            "nemo_automodel.NeMoAutoModelForCasualLM.from_pretrained",
            "NeMoAutoModelForCasualLM",
            "NeMoAutoModelForCausalLM",
        ),
        ("nemo_automodel.components.loss.linear_cee.FusedLinearCrossEntropy", "linear_cee", "linear_ce"),
    ],
)
def test_unresolved_names_have_a_nearest(target, missing, nearest):
    trail = Trail()
    assert Sources().resolve(target, trail) is None
    assert (trail.missing, trail.nearest) == (missing, nearest)


@pytest.mark.parametrize("target", ["torch.tensor", "torch.device", "torch.nn.functional.linear"])
def test_compiled_names_exist_but_say_nothing(target):
    found = read(target)
    assert not found.known


def test_hops_are_on_the_trail():
    trail = Trail()
    Sources().resolve("torch.os.system", trail)
    assert "os" in trail.modules


def test_nothing_is_imported():
    script = f"""
    import sys
    from nemo_automodel.config.signatures import Signatures
    from nemo_automodel.config.sources import Sources
    sources = Sources()
    for target in {REAL!r}:
        Signatures(sources).of(target, sources.resolve(target))
    heavy = {{"torch", "transformers", "datasets", "torchdata", "numpy"}} & set(sys.modules)
    sys.exit(f"imported {{heavy}}" if heavy else 0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


PACKAGE = {
    "pkg/__init__.py": """
        from typing import TYPE_CHECKING
        _LAZY = {"Late": "pkg.late"}
        from .things import *
        from .things import renamed as other
        if TYPE_CHECKING:
            from .late import Typed
        try:
            from .fast import implementation
        except ImportError:
            implementation = None
    """,
    "pkg/fast.py": "def implementation(speed=1): ...",
    "pkg/late.py": """
        class Late:
            @staticmethod
            def make(a, /, b, *, c=(1, 2)): ...
            @classmethod
            def build(cls, size: int = -1): ...
        class Typed: ...
    """,
    "pkg/things.py": """
        from dataclasses import KW_ONLY, dataclass, field
        from typing import ClassVar
        import functools
        LIMIT = 7
        def plain(x, y=LIMIT, *args, z: "int | None" = None, **kwargs):
            ''' Do.

            Args:
                x: the first.
                y (int): the second,
                    on two lines.
            '''
            kwargs.pop("popped", None)
            kwargs.get("got")
            if "asked" in kwargs: pass
            return plain2(**kwargs)
        def plain2(forwarded=1): ...
        def renamed(n): ...
        @dataclass
        class Base:
            a: int
            shared: ClassVar[int] = 3
            b: list = field(default_factory=list)
        @dataclass
        class Derived(Base):
            a: int = 5
            c: str = field(default="c")
            d: dict = field(default_factory=lambda: {"k": 1})
            hidden: int = field(init=False, default=0)
        class Parent:
            def __init__(self, p, q=1): ...
        class Child(Parent):
            '''Child.

            Args:
                p: of the parent.
            '''
        class Forwards(Parent):
            def __init__(self, own=0, **kwargs):
                super().__init__(**kwargs)
        class Swallows:
            def __init__(self, **kwargs):
                self.__dict__.update(kwargs)
        Alias = Child
        made = functools.partial(plain, 1)
        def wrap(cls): return cls
        class Wrapped(Parent): ...
        Wrapped = wrap(Wrapped)
        NUMBER = 3
    """,
}


@pytest.fixture
def package(tmp_path):
    for name, text in PACKAGE.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return [str(tmp_path)]


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("pkg.plain", ["x", "y", "z"]),
        ("pkg.other", ["n"]),
        ("pkg.things.renamed", ["n"]),
        ("pkg.Late.make", ["a", "b", "c"]),
        ("pkg.Late.build", ["size"]),
        ("pkg.Typed", []),
        ("pkg.implementation", ["speed"]),
        ("pkg.Derived", ["a", "b", "c", "d"]),
        ("pkg.Child", ["p", "q"]),
        ("pkg.Alias", ["p", "q"]),
        ("pkg.Wrapped", ["p", "q"]),
    ],
)
def test_ways_to_define_a_callable(package, target, names):
    assert list(read(target, package).parameters) == names


def test_defaults_docs_and_keywords(package):
    found = read("pkg.plain", package)
    assert {n: p.default for n, p in found.parameters.items()} == {"x": REQUIRED, "y": 7, "z": None}
    assert found.doc == {"x": "the first.", "y": "the second, on two lines."}
    assert found.extra == {"popped", "got", "asked", "forwarded"}
    assert not found.open
    assert read("pkg.Child", package).doc == {"p": "of the parent."}


def test_keywords_handed_to_the_parent_and_keywords_kept(package):
    found = read("pkg.Forwards", package)
    assert found.accepts("q")
    assert not found.open
    assert read("pkg.Swallows", package).open


def test_dataclass_defaults(package):
    found = read("pkg.Derived", package)
    assert {n: p.default for n, p in found.parameters.items()} == {"a": 5, "b": [], "c": "c", "d": {"k": 1}}


def test_kinds(package):
    sources = Sources(package)
    kinds = {name: sources.resolve(f"pkg.things.{name}").kind for name in ("made", "NUMBER", "Child", "plain")}
    assert kinds == {"made": "opaque", "NUMBER": "value", "Child": "class", "plain": "function"}
    assert sources.resolve("pkg.things").kind == "module"
