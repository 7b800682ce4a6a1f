"""YAML with places: what is read, what is refused, and where the message points."""

import math

import pytest
import yaml

from nemo_automodel.config.tree import COMMAND_LINE, dump, load_yaml, parse_value, resolve_plain
from nemo_automodel.errors import ConfigError


def read(tmp_path, text, name="r.yaml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_yaml(path)


def refused(tmp_path, text, match):
    with pytest.raises(ConfigError, match=match) as caught:
        read(tmp_path, text)
    return str(caught.value)


def test_every_key_knows_its_line_and_column(tmp_path):
    root = read(tmp_path, "a:\n  b: 1\n  c:\n    - x\n    - y: 2\n")
    a = root.value["a"]
    assert (a.where.line, a.where.column) == (1, 1)
    assert (a.value["b"].where.line, a.value["b"].where.column) == (2, 3)
    assert a.value["c"].value[0].where.line == 4
    assert a.value["c"].value[1].value["y"].where.line == 5
    assert str(a.value["b"].where) == f"{tmp_path / 'r.yaml'}:2"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1), ("-3", -3), ("1_000", 1000), ("0x1F", 31), ("0o17", 15), ("1.5", 1.5), ("1e-5", 1e-5), ("1E5", 1e5),
        ("5e-6", 5e-6), (".5", 0.5), ("-1.5e+3", -1500.0), ("true", True), ("False", False), ("null", None), ("~", None),
        ("", None), (".inf", math.inf), ("-.inf", -math.inf), ("none", "none"), ("None", "None"), ("2024-01-01", "2024-01-01"),
        ("train[:10%]", "train[:10%]"), ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"), ("1.2.3", "1.2.3"), ("e5", "e5"),
    ],
)  # fmt: skip
def test_plain_scalars_are_what_they_look_like(text, value):
    found, trap = resolve_plain(text)
    assert (found, type(found)) == (value, type(value))
    assert trap is None


@pytest.mark.parametrize("text", ["no", "No", "YES", "off", "on", "010", "0755", "-012", "1:30", "12:30:45", "1_0:30"])
def test_what_yaml_1_1_reads_otherwise_is_marked(text):
    assert resolve_plain(text)[1] is not None
    assert yaml.safe_load(text) != text  # the trap is real: PyYAML itself falls into it


def test_quoted_words_are_words(tmp_path):
    root = read(tmp_path, "a: 'no'\nb: \"010\"\nc: '1e-5'\n")
    assert root.plain() == {"a": "no", "b": "010", "c": "1e-5"}
    assert all(node.trap is None for node in root.value.values())


def test_nan_is_read():
    assert math.isnan(resolve_plain(".nan")[0])


def test_missing_file_lists_what_is_there(tmp_path):
    (tmp_path / "other.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"recipe\.yaml: no such file; there are: .*other\.yaml"):
        load_yaml(tmp_path / "recipe.yaml")


def test_a_folder_is_not_a_recipe(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path)


def test_empty_file(tmp_path):
    refused(tmp_path, "", r"r\.yaml: the file is empty")
    refused(tmp_path, "# only a comment\n", "the file is empty")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "3\n"])
def test_root_must_be_a_mapping(tmp_path, text):
    refused(tmp_path, text, r"r\.yaml:1: the root is not a mapping")


def test_syntax_error_has_line_and_column(tmp_path):
    refused(tmp_path, "a: 1\nb: [1, 2\nc: 3\n", r"r\.yaml:3:\d+: not valid YAML")
    refused(tmp_path, "a:\n\tb: 1\n", r"r\.yaml:2:1: not valid YAML.*spaces, not tabs")
    refused(tmp_path, "a: 1\n---\nb: 2\n", r"r\.yaml:2:1: not valid YAML")
    refused(tmp_path, "a: *unknown\n", r"r\.yaml:1:4: not valid YAML.*unknown")


def test_not_utf8_says_the_byte(tmp_path):
    refused(tmp_path, b"a: \xff\n", r"not UTF-8 text at byte 3")


def test_control_character(tmp_path):
    refused(tmp_path, b"a: \x01\n", "not valid YAML")


def test_duplicate_key_names_both_lines(tmp_path):
    message = refused(tmp_path, "a:\n  b: 1\n  c: 2\n  b: 3\n", "duplicate key")
    assert "r.yaml:4 a.b: duplicate key, first written at" in message
    assert "r.yaml:2;" in message


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['true']",
        "!!python/name:os.system",
        "!custom {a: 1}",
        "!!binary aGk=",
        "!!set {a}",
    ],
)
def test_tags_that_build_objects_are_refused(tmp_path, value):
    refused(tmp_path, f"a: 1\nb: {value}\n", r"r\.yaml:2 b: the tag .* is refused")


def test_alias_bomb_is_refused_quickly(tmp_path):
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 12)]
    refused(tmp_path, "\n".join(lines), "aliases expand to more than")


def test_an_alias_inside_itself_is_refused(tmp_path):
    refused(tmp_path, "a: &a\n  b: *a\n", "aliases expand to more than")


def test_anchors_and_merge_keys_work(tmp_path):
    root = read(tmp_path, "base: &base {x: 1, y: 2}\nmore: &more {z: 3}\na:\n  <<: [*base, *more]\n  y: 5\nb: *base\n")
    assert root.value["a"].plain() == {"x": 1, "y": 5, "z": 3}
    assert root.value["b"].plain() == {"x": 1, "y": 2}


def test_environment_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("WHERE", "here")
    monkeypatch.setenv("COUNT", "3")
    monkeypatch.delenv("UNSET", raising=False)
    root = read(tmp_path, "a: ${WHERE}/x\nb: ${COUNT}\nc: '${COUNT}'\nd: ${UNSET:1e-5}\ne: $${WHERE}\nf: ${UNSET:}\n")
    assert root.plain() == {"a": "here/x", "b": 3, "c": "3", "d": 1e-5, "e": "${WHERE}", "f": None}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("${UNSET:-3}", r"a default cannot start with `-`, .*write \$\{UNSET:3\}, .*`export UNSET=-3`"),
        ("'${UNSET:-}'", r"write \$\{UNSET:\}"),
        ("${HOME:-x}", r"write \$\{HOME:x\}"),
        ("${UNSET:=x}", r"a default cannot start with `=`"),
        ("${UNSET:?not set}", r"a default cannot start with `\?`"),
        ("${UNSET:+x}", r"a default cannot start with `\+`"),
        ('"${oc.env:HOME,x}"', r"\$\{oc\.env:HOME,x\} names no environment variable; write .*\$\$\{ for a literal"),
        ("'${HOME,x}'", r"\$\{HOME,x\} names no environment variable"),
        ("${env:HOME}", r"\$\{env:HOME\} names no environment variable"),
        ("a ${HOME", r"\$\{HOME names no environment variable"),
        ("${UNSET:${HOME}}", r"names no environment variable"),
        ("|\n  {{ x }} ${y.z}\n", r"\$\{y\.z\} names no environment variable"),
    ],
)
def test_references_of_a_shell_or_of_hydra_are_refused(tmp_path, monkeypatch, value, says):
    monkeypatch.delenv("UNSET", raising=False)
    refused(tmp_path, f"a: {value}\n", r"r\.yaml:1 a=" + f"(?s:.*){says}")


def test_what_looks_like_a_reference_can_be_escaped(tmp_path):
    root = read(tmp_path, "a: $${UNSET:-3}\nb: '{% x %} $${y.z} $${'\nc: $HOME $x\nd: ${UNSET:x-y}\n")
    assert root.plain() == {"a": "${UNSET:-3}", "b": "{% x %} ${y.z} ${", "c": "$HOME $x", "d": "x-y"}


def test_unset_variable_is_an_error(tmp_path, monkeypatch):
    monkeypatch.delenv("UNSET", raising=False)
    refused(
        tmp_path,
        "a:\n  b: x/${UNSET}\n",
        r"r\.yaml:2 a\.b=x/\$\{UNSET\}: the environment variable UNSET is not set; .*\$\{UNSET:default\}",
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[1, 2]", [1, 2]),
        ("{a: 1e-3}", {"a": 1e-3}),
        ("'3'", "3"),
        ("3", 3),
        ("a: b", "a: b"),
        ("", None),
        ("@x", "@x"),
    ],
)
def test_command_line_values(text, value):
    node = parse_value(text, COMMAND_LINE, "k")
    assert node.plain() == value
    assert str(node.where) == "command line"


def test_command_line_value_that_is_not_yaml():
    with pytest.raises(ConfigError, match=r"command line.*not valid YAML"):
        parse_value("[1, 2", COMMAND_LINE, "k")


def test_dump_reads_back_as_the_same_values(tmp_path):
    data = {
        "a": {
            "x": "no",
            "y": "010",
            "z": "1e-5",
            "t": "1:30",
            "n": None,
            "f": 1e-5,
            "big": 1e22,
            "i": 3,
            "inf": math.inf,
        },
        "b": [1, "two", {"c": ["null", "${HOME}", "", " x ", "a: b", "#"]}],
        "c": {"multi": "one\ntwo\n", "ünï": "çödé", "none": "none", "true": "true", "empty": {}, "list": []},
    }
    assert read(tmp_path, dump(data)).plain() == data
