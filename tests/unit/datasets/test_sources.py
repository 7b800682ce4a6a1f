"""The data line of bad inputs: each has one message that says what, where and what to do."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys

import datasets
import pytest

from nemo_automodel.components.datasets.llm.chat import make_chat_dataset
from nemo_automodel.components.datasets.llm.column_mapped import make_instruction_dataset
from nemo_automodel.components.datasets.llm.squad import make_squad_dataset
from nemo_automodel.components.datasets.sources import _dataset_problem, open_source
from nemo_automodel.errors import DataError
from nemo_automodel.hub import explain, patiently
from tests.builders import make_tokenizer

ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(6)]


def write(path, rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def error(call, *args, **kwargs) -> str:
    with pytest.raises(DataError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows_of(*args) -> list[dict]:
    source = open_source(*args)
    return [source[i] for i in range(len(source))]


def test_every_local_format_gives_the_same_rows(tmp_path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "lines.json").write_text((tmp_path / "a.jsonl").read_text())
    (tmp_path / "data.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    (tmp_path / "a.csv").write_text("question,answer\n" + "".join(f"q{i},a{i}\n" for i in range(6)))
    (tmp_path / "bom.tsv").write_text("\ufeffquestion\tanswer\n" + "".join(f"q{i}\ta{i}\n" for i in range(6)))
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "a.json", "lines.json", "data.json", "a.csv", "bom.tsv", "a.parquet", "saved"):
        source = open_source(str(tmp_path / name))
        assert [source[i] for i in range(len(source))] == ROWS, name


def test_globs_directories_splits_and_slices(tmp_path) -> None:
    write(tmp_path / "d" / "train-0.jsonl", ROWS[:2])
    write(tmp_path / "d" / "train-1.jsonl", ROWS[2:4])
    write(tmp_path / "d" / "validation.jsonl", ROWS[4:])
    write(tmp_path / "plain" / "x.jsonl", ROWS)
    assert len(open_source(str(tmp_path / "d"))) == 4
    assert len(open_source(str(tmp_path / "d"), "validation")) == 2
    assert len(open_source(str(tmp_path / "d" / "*.jsonl"))) == 6
    assert len(open_source(str(tmp_path / "plain"))) == 6
    assert open_source(str(tmp_path / "d"), "train[1:3]")[0] == ROWS[1]
    assert len(open_source(str(tmp_path / "d"), "train[:50%]")) == 2
    assert len(open_source([str(tmp_path / "d" / "train-0.jsonl"), str(tmp_path / "plain" / "x.jsonl")])) == 8


def test_nested_values_keep_their_own_keys(tmp_path) -> None:
    """Arrow would give the first call an argument b=None, and the template would render it."""
    rows = [{"x": {"a": 1}}, {"x": {"b": [1, {"c": None}]}}]
    assert [open_source(write(tmp_path / "a.jsonl", rows))[i] for i in range(2)] == rows
    datasets.Dataset.from_list([{"x": {"a": 1}}, {"x": {"b": 2}}]).to_parquet(tmp_path / "a.parquet")
    assert open_source(str(tmp_path / "a.parquet"))[0] == {"x": {"a": 1}}


def test_absent_files_name_the_pattern(tmp_path) -> None:
    assert "no file matches this pattern" in error(open_source, str(tmp_path / "*.jsonl"))
    assert "no such file" in error(open_source, str(tmp_path / "a.jsonl"))
    (tmp_path / "empty").mkdir()
    assert "no data file in this directory (looked for .jsonl" in error(open_source, str(tmp_path / "empty"))


def test_absent_split_lists_those_there_are(tmp_path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    assert re.search(r"no split 'test'; there is train: train.jsonl", error(open_source, str(tmp_path), "test"))
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "saved")
    assert "no split 'test'; there is train" in error(open_source, str(tmp_path / "saved"), "test")


def test_zero_rows(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    (tmp_path / "a.csv").write_text("question,answer\n")
    (tmp_path / "a.json").write_text("[]")
    for name in ("a.jsonl", "a.csv", "a.json"):
        assert "zero rows in split 'train'" in error(rows_of, str(tmp_path / name))


def test_bad_json_names_file_and_line(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n{'question': 1}\n")
    assert "a.jsonl:3: not valid JSON" in error(make_instruction_dataset, make_tokenizer(), str(path))
    path.write_text(json.dumps(ROWS[0]) + "\n[1]\n")
    assert "a.jsonl:2: expected a JSON object" in error(make_instruction_dataset, make_tokenizer(), str(path))
    (tmp_path / "a.json").write_text('[\n{"a": 1},\n{"a" 2}]')
    assert "a.json:3: not valid JSON" in error(rows_of, str(tmp_path / "a.json"))
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3\n")
    assert "a.csv:3: a row must have the 2 columns" in error(rows_of, str(tmp_path / "a.csv"))


def test_not_utf8_names_the_byte(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"question": "caf\xe9"}\n')
    message = error(rows_of, str(tmp_path / "a.jsonl"))
    assert "a.jsonl: not UTF-8 at byte 17" in message
    assert "iconv" in message


def test_truncated_parquet(tmp_path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    assert "a.parquet: not a readable parquet file" in error(rows_of, str(tmp_path / "a.parquet"))


def test_a_bad_byte_is_counted_from_the_start_of_the_file(tmp_path) -> None:
    line = json.dumps({"question": "q" * 1000}).encode() + b"\n"
    for name, head, before in (("a.jsonl", b"", line * 50), ("a.csv", b"a,b\n", b"1,2\n" * 20_000), ("a.json", b"[", b" " * 9_000)):  # fmt: skip
        (tmp_path / name).write_bytes(head + before + b"caf\xe9")
        assert f"{name}: not UTF-8 at byte {len(head + before) + 3};" in error(rows_of, str(tmp_path / name))


def test_lines_end_where_they_did(tmp_path) -> None:
    """At \\n alone in JSONL, and as its reader says in CSV; blank lines count, and a mark at the file's start does not."""
    lines = ['{"a": "x\u2028y"}', "", '{"a": 1}\r', '{"a": "\u3000"}', "\u3000"]
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
        assert rows_of(str(tmp_path / name)) == [{"a": "x\u2028y"}, {"a": 1}, {"a": "\u3000"}]
        assert open_source(str(tmp_path / name)).dataset["__where__"][:] == [
            f"{tmp_path / name}:{n}" for n in (1, 3, 4)
        ]
    for end in (b"\n", b"\r\n", b"\r"):
        (tmp_path / "a.csv").write_bytes(end.join([b"\xef\xbb\xbfa,b", b'1,"x\ny"', b"2,z"]))
        assert rows_of(str(tmp_path / "a.csv")) == [{"a": "1", "b": "x\ny"}, {"a": "2", "b": "z"}]


def test_rows_beyond_a_chunk_are_in_order(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("nemo_automodel.components.datasets.sources._CHUNK", 50)
    assert rows_of(write(tmp_path / "a.jsonl", ROWS)) == ROWS
    assert open_source(str(tmp_path / "a.jsonl")).dataset.data.column(0).num_chunks > 1


def test_files_of_two_kinds_are_an_error_and_what_describes_a_dataset_is_not_read(tmp_path) -> None:
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "data" / "train-00000.parquet")
    (tmp_path / "dataset_infos.json").write_text(json.dumps({"default": {"splits": {}}}))
    assert rows_of(str(tmp_path)) == ROWS
    write(tmp_path / "more.jsonl", ROWS)
    assert re.search(
        r"different columns \(.*parquet, .*more.jsonl\); give files of one kind", error(rows_of, str(tmp_path))
    )


MEMORY = """
import sys
from pathlib import Path
import datasets
from nemo_automodel.components.datasets.sources import open_source
from nemo_automodel.components.datasets.tokenized import map_cached

def mib(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))

def counted(columns, indices):
    return {"n": [len(text) for text in columns["__json__"]]}

def read(path, cache):
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    before = mib("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
    source = open_source(path)
    features = datasets.Features({"n": datasets.Value("int32")})
    table, _ = map_cached(source, counted, features, [source.identity], None, "", 100)
    return sum(table["n"]), mib("VmHWM") - before

datasets.disable_progress_bars()
small, large, cache = sys.argv[1:]
read(small, cache)
for _ in range(2):
    print(*read(large, cache))
"""


def test_a_large_file_is_held_once_and_not_at_all_where_the_cache_has_its_rows(tmp_path) -> None:
    small = write(tmp_path / "small.jsonl", ROWS)
    large = write(tmp_path / "large.jsonl", ({"question": f"{i}" + "fox " * 1000} for i in range(15_000)))
    size = (tmp_path / "large.jsonl").stat().st_size / 2**20
    assert 55 < size < 65
    command = [sys.executable, "-c", MEMORY, small, large, str(tmp_path / "cache")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    first, again = float(out[1]), float(out[3])
    assert out[0] == out[2]
    assert first < 3 * size
    assert again < size / 4


def test_missing_column_lists_those_there_are(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", [ROWS[0], {"question": "q", "reply": "a"}])
    assert "a.jsonl:2: no column 'answer'; there is 'question', 'reply'" in error(
        make_instruction_dataset, make_tokenizer(), path
    )
    assert "a.jsonl:1: no column 'context'; there is 'question', 'answer'" in error(
        make_squad_dataset, make_tokenizer(), path
    )


def test_wrong_type_names_the_row(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", [ROWS[0], {"question": "q", "answer": 7}, {"question": "q", "answer": None}])
    assert "a.jsonl:2: column 'answer' must be str, got int: '7'" in error(
        make_instruction_dataset, make_tokenizer(), path
    )
    path = write(tmp_path / "m.jsonl", [{"messages": "hello"}])
    assert "m.jsonl:1: column 'messages' must be list, got a string" in error(
        make_chat_dataset, make_tokenizer("chatml"), path
    )


def test_errors_survive_worker_processes(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", [*ROWS, {"question": "q"}])
    assert "a.jsonl:7: no column 'answer'" in error(make_instruction_dataset, make_tokenizer(), path, num_proc=2)


# --- the Hub: the same exception types that its libraries raise; a real server is in the recipe tests ---------------------
def http_error(status: int, kind: str = "HfHubHTTPError") -> Exception:
    import huggingface_hub.errors as hub

    http = importlib.import_module(
        hub.HTTPError.__module__.split(".")[0]
    )  # httpx, under the name that this version uses
    response = http.Response(status, request=http.Request("GET", "http://hub/x"))
    return getattr(hub, kind)(f"{status} error", response=response)


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        (
            http_error(401, "RepositoryNotFoundError"),
            "not found at .*, and there is no such local directory: check the spelling",
        ),
        (
            http_error(403, "GatedRepoError"),
            "is gated: accept its licence at .*/datasets/a/b with your account, then run `hf auth login`",
        ),
        (http_error(401), r"access refused by .* \(401\); run `hf auth login`"),
        (http_error(403), r"access refused by .* \(403\)"),
        (http_error(404, "RevisionNotFoundError"), "has no revision"),
        (http_error(503), "answered 503; try again later"),
        (
            ConnectionError("refused"),
            "cannot be reached .*; check the network, or HF_ENDPOINT, or give a local directory",
        ),
    ],
)
def test_hub_problems_say_what_to_do(problem: Exception, says: str) -> None:
    message = explain(problem, "dataset", "a/b")
    assert re.search(says, message), message
    assert "\n" not in message


def test_offline_is_told_apart(monkeypatch) -> None:
    import huggingface_hub.errors as hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = explain(hub.LocalEntryNotFoundError("x"), "dataset", "a/b")
    assert "HF_HUB_OFFLINE is set" in message
    assert "hf download a/b --repo-type dataset" in message


def test_datasets_own_errors() -> None:
    script = RuntimeError("Dataset scripts are no longer supported, but found squad.py")
    assert "use its parquet files" in _dataset_problem(script, "a/b", None)
    split = ValueError("Unknown split \"foo\". Should be one of ['train', 'test'].")
    assert "no split 'foo'; there is ['train', 'test']" in _dataset_problem(split, "a/b", None)


def test_what_passes_by_itself_is_tried_again(monkeypatch) -> None:
    monkeypatch.setattr("nemo_automodel.hub._FIRST_WAIT_S", 0.0)
    left = [http_error(503), http_error(429), ConnectionError("cut")]
    calls = []

    def call() -> str:
        calls.append(1)
        if left:
            raise left.pop()
        return "ok"

    assert patiently(call, "x") == "ok"
    assert len(calls) == 4
    monkeypatch.setattr("nemo_automodel.hub._PATIENCE_S", -1.0)
    with pytest.raises(Exception, match="503"):  # the call backed off by itself, for longer than we would
        patiently(lambda: (_ for _ in ()).throw(http_error(503)), "x")
    with pytest.raises(Exception, match="404"):
        patiently(lambda: (_ for _ in ()).throw(http_error(404)), "x")


def test_a_file_has_only_the_split_in_its_name(tmp_path):
    rows = '{"text": "a"}\n'
    (tmp_path / "data.jsonl").write_text(rows)
    (tmp_path / "my_val.jsonl").write_text(rows)
    assert len(open_source(str(tmp_path / "my_val.jsonl"))) == 1
    assert len(open_source(str(tmp_path / "my_val.jsonl"), split="validation")) == 1
    with pytest.raises(DataError, match=r"no split 'validation'; there is train: data\.jsonl"):
        open_source(str(tmp_path / "data.jsonl"), split="validation")


def test_other_kinds_of_files_are_named(tmp_path):
    (tmp_path / "data.jsonl.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "data.txt").write_text("{}")
    with pytest.raises(DataError, match=r"data\.jsonl\.gz: not a kind .* unpack it first"):
        open_source(str(tmp_path / "data.jsonl.gz"))
    with pytest.raises(DataError, match=r"^absent\.jsonl\.gz: no such file"):  # and not looked for on the Hub
        open_source("absent.jsonl.gz")
    with pytest.raises(DataError, match=r"data\.txt: not a kind"):
        open_source(str(tmp_path / "data.txt"))
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text("")
    with pytest.raises(DataError, match=r"scripted\.py is a script, which is not run: use the dataset's parquet"):
        open_source(str(tmp_path / "scripted"))


@pytest.mark.parametrize(("name", "before", "after"), [("a.jsonl", "", ""), ("a.json", "[", "]")])
def test_half_a_surrogate_pair_is_named_and_a_whole_one_is_an_emoji(tmp_path, name, before, after):
    whole = '{"x": "\\ud83d\\ude00 \u00e9"}'
    (tmp_path / name).write_text(f"{before}{whole}{after}", encoding="utf-8")
    assert open_source(str(tmp_path / name))[0] == {"x": "\U0001f600 \u00e9"}
    broken = '{"x": "a\\ud83d"}'
    (tmp_path / name).write_text(f"{before}{broken}{after}")
    with pytest.raises(DataError, match=rf"{name}.*half a surrogate pair"):
        open_source(str(tmp_path / name))[0]


def test_utf_16_is_told_from_latin_1(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": "e"}', encoding="utf-16")
    with pytest.raises(DataError, match="iconv -f utf-16 -t utf-8"):
        len(open_source(str(tmp_path / "a.jsonl")))
