"""``--a.b=c``: how it is written, what it changes, what it refuses."""

import pytest

from nemo_automodel.config.overrides import Override, apply_override, parse_overrides, split_options
from nemo_automodel.config.tree import load_yaml
from nemo_automodel.errors import ConfigError


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a:\n  b: 1\n  list:\n    - x: 1\n    - x: 2\n  empty:\n")
    return load_yaml(path)


def apply(root, *arguments):
    for override in parse_overrides(arguments):
        apply_override(root, override)
    return root.plain()


def test_forms():
    assert parse_overrides(["--a.b=c", "--a.b", "c", "--a.b", "-1", "--a.b=x=y"]) == [
        Override("a.b", "c"), Override("a.b", "c"), Override("a.b", "-1"), Override("a.b", "x=y"),
    ]  # fmt: skip


def test_overwrite_append_and_create(root):
    assert apply(root, "--a.b=2", "--a.new", "1e-5", "--c.d.e=[1, 2]", "--a.empty.k=v") == {
        "a": {"b": 2, "list": [{"x": 1}, {"x": 2}], "empty": {"k": "v"}, "new": 1e-5},
        "c": {"d": {"e": [1, 2]}},
    }


def test_lists_by_number(root):
    assert apply(root, "--a.list.0.x=9", "--a.list.2=last")["a"]["list"] == [{"x": 9}, {"x": 2}, "last"]


@pytest.mark.parametrize("argument", ["a.b=c", "-a.b=c"])
def test_dashes_are_needed_and_said(argument):
    with pytest.raises(ConfigError, match=rf"command line {argument}: not an option; write --a\.b=c"):
        parse_overrides([argument])


def test_a_word_is_not_an_option():
    with pytest.raises(ConfigError, match=r"command line recipe\.yaml: not an option"):
        parse_overrides(["recipe.yaml"])


@pytest.mark.parametrize("arguments", [["--a.b"], ["--a.b", "--c.d=1"]])
def test_value_is_needed(arguments):
    with pytest.raises(ConfigError, match=r"--a\.b: no value; write --a\.b=value"):
        parse_overrides(arguments)


@pytest.mark.parametrize("argument", ["--=1", "--a..b=1", "--.a=1", "--a.=1"])
def test_path_must_be_one(argument):
    with pytest.raises(ConfigError, match="not a key"):
        parse_overrides([argument])


@pytest.mark.parametrize(
    ("argument", "match"),
    [
        ("--a.list.5.x=1", r"a\.list is a list and it has items 0 to 1; use one of those numbers"),
        ("--a.list.3=1", r"a\.list is a list and it has items 0 to 1; 2 appends"),
        ("--a.list.x=1", r"a\.list is a list"),
        ("--a.b.c=1", r"a\.b is the value 1 \(.*r\.yaml:2\), not a mapping; write --a\.b=value"),
    ],
)
def test_paths_that_lead_nowhere(root, argument, match):
    with pytest.raises(ConfigError, match=match):
        apply(root, argument)


def test_options_are_taken_out():
    argv = ["-c", "r.yaml", "--a.b", "1", "--print", "--allow=x", "--allow", "y", "--c.d=2"]
    options, rest = split_options(argv, ["--print"], {"-c": "f", "--allow": "p"})
    assert options == {"-c": ["r.yaml"], "--print": [], "--allow": ["x", "y"]}
    assert rest == ["--a.b", "1", "--c.d=2"]


def test_unknown_option_and_missing_value():
    with pytest.raises(ConfigError, match=r"--prnt: unknown option; did you mean `--print`"):
        split_options(["--prnt"], ["--print"], {})
    with pytest.raises(ConfigError, match=r"-c: no value; write -c recipe\.yaml"):
        split_options(["-c"], [], {"-c": "recipe.yaml"})
