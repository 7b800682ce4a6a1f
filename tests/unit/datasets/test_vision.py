"""Rows with images: what the model is given is what its processor makes, labels are the assistant's words alone, no image
is ever cut, and what is wrong with a row is said in one line."""

from __future__ import annotations

import importlib.util
import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from nemo_automodel._transformers.processor import load_processor
from nemo_automodel._transformers.processor_kinds import processor_kind
from nemo_automodel.components.datasets.loader import DataLoader
from nemo_automodel.components.datasets.packing import PackedSequence
from nemo_automodel.components.datasets.vlm.conversation import make_vlm_chat_dataset
from nemo_automodel.components.datasets.vlm.cord_v2 import as_tokens, make_cord_v2_dataset
from nemo_automodel.components.datasets.vlm.medpix import make_medpix_dataset
from nemo_automodel.components.datasets.vlm.rdr import make_rdr_dataset
from nemo_automodel.errors import DataError, ModelError
from nemo_automodel.types import IGNORE_INDEX
from tests.vlm_builders import FAMILIES, tiny_vlm_config, write_processor

CHATTING = [family for family in FAMILIES if family != "paligemma"]
ANSWER = "It jumps over the dog."


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """family -> its processor, loaded from files once."""
    loaded = {}

    def get(family: str):
        if family not in loaded:
            folder = tmp_path_factory.mktemp(family)
            try:
                write_processor(family, folder)
            except ImportError:  # transformers 5.17 and SmolVLM
                pytest.skip(f"{family}: its PIL image processor wants torchvision in this transformers")
            loaded[family] = load_processor(str(folder))
        return loaded[family]

    return get


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 255, (40 + 30 * i, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return tmp_path


def picture(name: str) -> dict:
    return {"type": "image", "path": name}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def ask(*parts, answer: str = ANSWER) -> dict:
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]}


def write(folder, rows, name="data.jsonl") -> str:
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder / name)


ONE = ask(picture("0.png"), text("What does the fox do?"))
TWO = ask(picture("1.png"), text("and"), picture("2.png"), answer="Two.")
TURNS = {
    "messages": [*ONE["messages"], {"role": "user", "content": [picture("3.png")]}, {"role": "assistant", "content": "four"}]
}  # fmt: skip
BARE = ask(text("Hello"), answer="my name is Ada")


def spoken_by_the_assistant(processor, ids: list[int]) -> list[int]:
    """Labels by another road: in id space, all between an assistant's marker and the stop token."""
    tokenizer = processor.tokenizer
    marker = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    labels, on = [IGNORE_INDEX] * len(ids), False
    for at, token in enumerate(ids):
        on = on or ids[max(at - len(marker), 0) : at] == marker
        if on:
            labels[at - 1] = token
            on = token != stop
    return labels


@pytest.mark.parametrize("family", CHATTING)
def test_ids_are_the_processors_and_labels_the_assistants_words(processors, folder, family):
    processor = processors(family)
    data = make_vlm_chat_dataset(processor, write(folder, [ONE, TWO, TURNS, BARE]))
    for row, sample in zip((ONE, TWO, TURNS, BARE), data, strict=True):
        parts = [p for m in row["messages"] if isinstance(m["content"], list) for p in m["content"]]
        images = [Image.open(folder / p["path"]) for p in parts if p["type"] == "image"]
        bare = [
            {"role": m["role"], "content": [{"type": p["type"], "text": p.get("text")} for p in m["content"]] if isinstance(m["content"], list) else [text(m["content"])]}
            for m in row["messages"]
        ]  # fmt: skip
        whole = processor(
            text=[processor.apply_chat_template(bare, tokenize=False)],
            images=[images] if images else None,
            add_special_tokens=False,
        )
        assert sample["input_ids"] == list(np.asarray(whole["input_ids"]).reshape(-1))
        assert sample["labels"] == spoken_by_the_assistant(processor, sample["input_ids"])
        assert sample["vision"].num_images == len(images)
    assert list(data.lengths) == [len(sample["input_ids"]) for sample in data]
    assert data.stats.images == 5
    assert data.stats.label_tokens == sum(label != IGNORE_INDEX for s in data for label in s["labels"])


@pytest.mark.parametrize("family", CHATTING)
def test_a_batch_of_rows_with_and_without_images_is_worth_its_rows(processors, folder, family):
    """One padded batch through plain transformers gives the loss of its rows one by one, as their processor made them."""
    processor = processors(family)
    data = make_vlm_chat_dataset(processor, write(folder, [ONE, TWO, BARE]))
    torch.manual_seed(0)
    config = tiny_vlm_config(family, processor.tokenizer)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).train()

    def losses(size: int) -> float:
        loader = DataLoader(data, global_batch_size=size, local_batch_size=size, shuffle=False)
        total = 0.0
        for (batch,) in loader.steps(0):
            ours = (
                "labels",
                "label_indices",
                "num_label_tokens",
                "num_tokens",
                "sample_ids",
                "num_images",
                "image_rows",
            )
            logits = model(**{k: v for k, v in batch.items() if k not in ours}).logits.flatten(0, 1)
            total += float(torch.nn.functional.cross_entropy(logits, batch["labels"].flatten(), reduction="sum"))
        return total

    with torch.no_grad():
        assert losses(3) == pytest.approx(losses(1), rel=1e-5)


def test_a_question_and_its_answer_where_the_processor_knows_no_turns(processors, folder):
    processor = processors("paligemma")
    (sample,) = make_vlm_chat_dataset(processor, write(folder, [ONE]))
    tokenizer = processor.tokenizer
    labels = [label for label in sample["labels"] if label != IGNORE_INDEX]
    assert tokenizer.decode(labels) == ANSWER + tokenizer.eos_token
    assert sample["vision"].tokens["token_type_ids"].tolist() == [0] * (len(sample["input_ids"]) - len(labels)) + [1] * len(labels)  # fmt: skip
    with pytest.raises(DataError, match=r"data.jsonl:1: .* takes no row without an image"):
        make_vlm_chat_dataset(processor, write(folder, [BARE]))


def test_train_on_all_leaves_images_out(processors, folder):
    processor = processors("gemma3")
    (sample,) = make_vlm_chat_dataset(processor, write(folder, [TWO]), train_on="all")
    ids, labels = sample["input_ids"], sample["labels"]
    of_images = set(processor.tokenizer.convert_tokens_to_ids(["<image_soft_token>", "<start_of_image>", "<end_of_image>"]))  # fmt: skip
    assert not of_images & set(labels)
    assert len(of_images & set(ids)) == 3
    trained = [label for label in labels if label != IGNORE_INDEX]
    assert processor.tokenizer.decode(trained).count("Two.") == 1


def test_an_image_is_never_cut(processors, folder):
    processor = processors("gemma3")
    late = ask(text("What does the fox do? " * 4), picture("0.png"))
    whole = make_vlm_chat_dataset(processor, write(folder, [ONE, ONE, ONE, late]))
    size = int(whole.lengths[0]) - 3
    cut = make_vlm_chat_dataset(processor, write(folder, [ONE, ONE, ONE, late], "cut.jsonl"), seq_length=size)
    assert (len(cut), cut.stats.images_cut, cut.stats.truncated) == (3, 1, 3)
    assert cut[0]["input_ids"] == whole[0]["input_ids"][:size]
    assert cut[0]["labels"] == [*whole[0]["labels"][: size - 1], IGNORE_INDEX]
    assert cut[0]["vision"].images["pixel_values"].equal(whole[0]["vision"].images["pixel_values"])
    assert len(cut[0]["vision"].tokens["token_type_ids"]) == size
    with pytest.raises(DataError, match="of 1 seq_length=20 would cut an image"):
        make_vlm_chat_dataset(processor, write(folder, [late], "late.jsonl"), seq_length=20)


def test_every_form_of_image_gives_the_same_sample(processors, folder):
    import base64

    processor = processors("qwen3_vl")
    content = (folder / "0.png").read_bytes()
    question = "What does the fox do?"
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": ANSWER}]
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    rows = [
        ONE,
        {"conversations": turns, "image": "0.png"},
        {"conversations": turns, "images": ["0.png"]},
        {**ask(text(question)), "images": [str(folder / "0.png")]},
        ask({"type": "image_url", "image_url": {"url": url}}, text(question)),
    ]
    samples = list(make_vlm_chat_dataset(processor, write(folder, rows)))
    flat = {"question": ["<image>" + question], "answer": [ANSWER], "images": [[{"bytes": content, "path": None}]]}
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
        }
    )
    datasets.Dataset.from_dict(flat, features=features).to_parquet(folder / "rows.parquet")
    samples += list(make_vlm_chat_dataset(processor, str(folder / "rows.parquet")))
    assert len(samples) == 6
    for sample in samples:
        assert sample["input_ids"] == samples[0]["input_ids"]
        assert sample["labels"] == samples[0]["labels"]
        assert sample["vision"].images["pixel_values"].equal(samples[0]["vision"].images["pixel_values"])


def test_an_image_lies_as_its_camera_says(processors, folder):
    processor = processors("qwen3_vl")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.open(folder / "3.png")
    upright.rotate(90, expand=True).save(folder / "turned.png", exif=exif)
    straight, turned = make_vlm_chat_dataset(
        processor, write(folder, [ask(picture("3.png"), text("a")), ask(picture("turned.png"), text("a"))])
    )
    assert straight["vision"].images["pixel_values"].equal(turned["vision"].images["pixel_values"])


def hub_shaped(folder, columns, image_column) -> str:
    content = (folder / "0.png").read_bytes()
    table = {**columns, image_column: [{"bytes": content, "path": None}]}
    values = {name: datasets.Value("string") for name in columns} | {image_column: datasets.Image()}
    datasets.Dataset.from_dict(table, features=datasets.Features(values)).to_parquet(folder / "hub.parquet")
    return str(folder / "hub.parquet")


def learned(processor, data) -> str:
    return processor.tokenizer.decode([label for label in data[0]["labels"] if label != IGNORE_INDEX])


def test_datasets_of_the_hub_by_their_columns(processors, folder):
    processor = processors("gemma3")
    parse = {"menu": [{"nm": "Tea", "price": "2"}, {"nm": "Rice"}], "total": {"cash": "5"}}
    truth = json.dumps({"gt_parse": parse, "meta": {}})
    tokens = "<s_total><s_cash>5</s_cash></s_total><s_menu><s_price>2</s_price><s_nm>Tea</s_nm><sep/><s_nm>Rice</s_nm></s_menu>"  # fmt: skip
    assert as_tokens(parse) == tokens
    path = hub_shaped(folder, {"ground_truth": [truth]}, "image")
    assert learned(processor, make_cord_v2_dataset(processor, path)) == tokens + "<|im_end|>"
    as_json = make_cord_v2_dataset(processor, path, answer="json")
    assert json.loads(learned(processor, as_json).removesuffix("<|im_end|>")) == parse
    path = hub_shaped(folder, {"question": ["What is it?"], "answer": ["A fox"], "mode": ["CT"]}, "image_id")
    data = make_medpix_dataset(processor, path)
    assert learned(processor, data) == "A fox<|im_end|>"
    assert "What is it?" in processor.tokenizer.decode(data[0]["input_ids"])
    data = make_rdr_dataset(processor, hub_shaped(folder, {"text": ["a fox"]}, "image"))
    assert learned(processor, data) == "a fox<|im_end|>"
    with pytest.raises(DataError, match="no column 'text'"):
        make_rdr_dataset(processor, hub_shaped(folder, {"caption": ["a fox"]}, "image"))
    with pytest.raises(DataError, match="'ground_truth' is not valid JSON"):
        make_cord_v2_dataset(processor, hub_shaped(folder, {"ground_truth": ["{"]}, "image"))


BAD = {
    "missing file": (ask(picture("gone.png")), r"data.jsonl:1: image .*gone.png does not exist; .*on_bad_image: skip"),
    "not an image": (ask(picture("data.jsonl")), r"data.jsonl:1: image data.jsonl is not an image that can be read"),
    "a folder": (ask(picture(".")), "is a directory"),
    "on the network": (ask(picture("https://a.b/c.png")), "is on the network; download the images"),
    "no source": (ask({"type": "image"}), "1 places for images .* but 0 in the row"),
    "too few images": ({**ask(text("<image> and <image>")), "images": ["0.png"]}, "2 places for images .* but 1 in column 'images'"),
    "too many images": ({**ask(text("<image>")), "images": ["0.png", "1.png"]}, "1 places for images .* but 2 in column"),
    "placeholder as text": (ask(text("see <start_of_image>")), "a text holds '<start_of_image>', which stands for an image"),
    "no user": ({"messages": [{"role": "assistant", "content": ANSWER}], "image": "0.png"}, "data.jsonl:1: 1 images, but no <image> and no message of role user .* there is assistant"),
    "a number": ({**ask(text("<image>")), "images": [7]}, "an image must be a path, bytes or"),
    "a place, but no column": (ask(text("<image> What?")), r"data.jsonl:1: 1 places for images .* but 0 in the row, .* \(read are 'images' and 'image', there is 'messages'\); put the images"),
    "a place beside a part": (ask(picture("0.png"), text("<image> What?")), "1 places for images .* needs no <image>"),
    "a column of another name": ({**ask(text("<image> What?")), "img": "0.png"}, "there is 'messages', 'img'.; set dataset.images_column: img, or rename"),
    "another name, no place": ({**ask(text("What?")), "image_path": "0.png"}, "data.jsonl:1: no image is read from the row, .* there is 'messages', 'image_path'.; set dataset.images_column: image_path"),
    "videos": ({**ask(text("What?")), "videos": ["a.mp4"]}, "data.jsonl:1: column 'videos' is not empty, but video is not supported"),
    "audio": ({**ask(text("What?")), "image": "0.png", "audio": "a.wav"}, "column 'audio' is not empty, but audio is not supported"),
    "a video's place": (ask(text("<video> What?")), "data.jsonl:1: <video> in what the user says, but only images"),
    "an audio's place": ({**ask("<audio> What?"), "image": "0.png"}, "data.jsonl:1: <audio> in what the user says, but only images"),
    "a video": (ask({"type": "video", "path": "a.mp4"}), "data.jsonl:1: a part of type video, but only text and images"),
    "audio as a part": (ask({"type": "input_audio", "path": "a.wav"}), "a part of type input_audio, but only text and images"),
    "another part": (ask({"type": "table", "path": "a.csv"}), "a part of a message must be"),
    "two system turns": ({"system": "Be kind.", "messages": [{"role": "system", "content": "Be brief."}, *ONE["messages"]]}, "data.jsonl:1: column 'system' has a system turn and the conversation has one too"),
    "system of no text": ({**ONE, "system": ["Be kind."]}, "data.jsonl:1: column 'system' must be str, got"),
    "no conversation": ({"images": ["0.png"], "caption": "a"}, "no conversation found; there is 'caption'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_in_one_line_that_names_the_row(processors, folder, case):
    row, message = BAD[case]
    with pytest.raises(DataError, match=message) as caught:
        make_vlm_chat_dataset(processors("gemma3"), write(folder, [row]))
    assert "\n" not in str(caught.value)


def test_a_system_column_is_the_first_turn(processors, folder):
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": ANSWER}]
    asked = {"instruction": "What?", "output": ANSWER}
    rows = [
        {"messages": [{"role": "system", "content": "Be kind."}, *ask(text("What?"))["messages"]]},
        {**ask(text("What?")), "system": "Be kind."},
        {"conversations": turns, "system": "Be kind."},
        {**asked, "system": "Be kind."},
    ]
    rows = [{**row, "image": "0.png"} for row in rows]
    plain = [{**ask(text("What?")), "image": "0.png", "system": none} for none in ("", None)]
    first, *others, empty, null = make_vlm_chat_dataset(processors("gemma3"), write(folder, [*rows, *plain]))
    assert "Be kind." in processors("gemma3").tokenizer.decode(first["input_ids"])
    for other in others:
        assert (other["input_ids"], other["labels"]) == (first["input_ids"], first["labels"])
    assert "Be kind." not in processors("gemma3").tokenizer.decode(empty["input_ids"])
    assert empty["input_ids"] == null["input_ids"]


def test_data_without_any_image_is_said_to_be_text(processors, folder, caplog):
    rows = [BARE, {**BARE, "scan": "0.png"}]
    make_vlm_chat_dataset(processors("gemma3"), write(folder, rows))
    (said,) = (
        r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "no row has an image" in r.getMessage()
    )
    assert "data.jsonl: no row has an image" in said
    assert "from column 'images' or 'image'; there is 'messages', 'scan'. " in said
    caplog.clear()
    values = {name: datasets.Value("string") for name in ("question", "answer")} | {"photo": datasets.Image()}
    table = {"question": ["What?"], "answer": [ANSWER], "photo": [{"bytes": b"torn", "path": None}]}
    datasets.Dataset.from_dict(table, features=datasets.Features(values)).to_parquet(folder / "other.parquet")
    make_vlm_chat_dataset(processors("gemma3"), str(folder / "other.parquet"))
    assert "there is 'question', 'answer', 'photo'. " in caplog.text
    caplog.clear()
    make_vlm_chat_dataset(processors("gemma3"), write(folder, [*rows, ONE], "mixed.jsonl"))
    assert "no row has an image" not in caplog.text


def test_columns_without_a_value_are_no_media(processors, folder):
    """As rows of one table have them: a row's own column of images is read, though one of the other name is there."""
    empty = {"videos": [], "video": None, "audios": None, "audio": "", "img": None}
    rows = [{**BARE, **empty}, {**ask(text("What?")), **empty, "images": [], "image": "0.png"}, ONE]
    data = make_vlm_chat_dataset(processors("gemma3"), write(folder, rows))
    assert [sample["vision"].num_images for sample in data] == [0, 1, 1]
    told = ask(text("Which tag is it?"), answer="It is <video>.")
    assert len(make_vlm_chat_dataset(processors("gemma3"), write(folder, [told, ONE], "told.jsonl"))) == 2


def test_a_column_that_is_not_there(processors, folder):
    with pytest.raises(DataError, match=r"no column 'photo' \(dataset.images_column\); there is 'messages'"):
        make_vlm_chat_dataset(processors("gemma3"), write(folder, [ONE]), images_column="photo")


def test_bad_images_are_skipped_and_counted_or_an_error(processors, folder):
    content = (folder / "3.png").read_bytes()
    (folder / "torn.png").write_bytes(content[: len(content) // 2])
    rows = [ONE, ask(picture("torn.png")), ask(picture("gone.png")), TWO, BARE]
    path = write(folder, rows)
    skipped = make_vlm_chat_dataset(processors("gemma3"), path, on_bad_image="skip")
    assert (len(skipped), skipped.stats.bad_images) == (3, 2)
    assert "2 for an image that cannot be read" in str(skipped.stats)
    assert [skipped.source_row(i) for i in range(3)] == [0, 3, 4]
    torn = make_vlm_chat_dataset(processors("gemma3"), write(folder, [ONE, ask(picture("torn.png"))], "torn.jsonl"))
    with pytest.raises(DataError, match=r"torn.jsonl:2: image torn.png is damaged .*on_bad_image: skip"):
        torn[1]
    with pytest.raises(DataError, match="write one of error, skip"):
        make_vlm_chat_dataset(processors("gemma3"), path, on_bad_image="ignore")


def test_images_that_changed_are_measured_anew(processors, folder):
    processor, path = processors("qwen3_vl"), write(folder, [ONE, BARE])
    first = make_vlm_chat_dataset(processor, path)
    Image.open(folder / "0.png").resize((96, 96)).save(folder / "0.png")
    second = make_vlm_chat_dataset(processor, path)
    assert int(second.lengths[0]) == len(second[0]["input_ids"]) != int(first.lengths[0])
    assert second.fingerprint != first.fingerprint
    with pytest.raises(DataError, match=r"data.jsonl:1: .* if its images have changed since this run began, start it"):
        first[0]
    (folder / "0.png").unlink()
    with pytest.raises(DataError, match=r"data.jsonl:1: image .*0.png does not exist"):
        make_vlm_chat_dataset(processor, path)


def test_a_bad_image_that_was_repaired_is_back(processors, folder):
    content = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(content[: len(content) // 2])
    path = write(folder, [ONE, TWO])
    assert len(make_vlm_chat_dataset(processors("gemma3"), path, on_bad_image="skip")) == 1
    (folder / "0.png").write_bytes(content)
    assert len(make_vlm_chat_dataset(processors("gemma3"), path, on_bad_image="skip")) == 2


def test_a_moved_dataset_resumes_and_reads_the_images_where_they_are(processors, folder, monkeypatch):
    write(folder, [ONE])
    monkeypatch.chdir(folder)
    first = make_vlm_chat_dataset(processors("qwen3_vl"), "data.jsonl")
    (folder / "moved").mkdir()
    for name in ("0.png", "data.jsonl"):
        (folder / name).rename(folder / "moved" / name)
    monkeypatch.chdir(folder / "moved")
    second = make_vlm_chat_dataset(processors("qwen3_vl"), "data.jsonl")
    assert DataLoader(second).fingerprint == DataLoader(first).fingerprint
    Image.open("0.png").resize((96, 96)).save("0.png")
    third = make_vlm_chat_dataset(processors("qwen3_vl"), "data.jsonl")
    assert int(third.lengths[0]) == len(third[0]["input_ids"]) != int(second.lengths[0])


def test_unchanged_images_are_not_measured_again(processors, folder, monkeypatch):
    path = write(folder, [ONE, TWO])
    first = make_vlm_chat_dataset(processors("gemma3"), path)
    monkeypatch.setattr("nemo_automodel.components.datasets.vlm.dataset.size_of", None)  # would fail if called
    second = make_vlm_chat_dataset(processors("gemma3"), path)
    assert (second.fingerprint, list(second.lengths)) == (first.fingerprint, list(first.lengths))


def test_a_micro_batch_without_images_still_runs_the_tower(processors, folder):
    data = make_vlm_chat_dataset(processors("gemma3"), write(folder, [ONE, BARE]))
    loader = DataLoader(data, global_batch_size=1, local_batch_size=1, shuffle=False)
    (seen,), (unseen,) = loader.steps(0)
    assert (seen["num_images"], seen["input_ids"].shape[0]) == (1, 1)
    assert (unseen["num_images"], unseen["input_ids"].shape[0]) == (0, 2)
    assert unseen["pixel_values"].shape == (1, 3, 64, 64)
    assert (unseen["labels"][1] == IGNORE_INDEX).all()
    assert unseen["num_tokens"] == data.lengths[1]
    assert unseen["sample_ids"] == [1]


def test_the_row_with_a_blank_image_is_made_once_and_only_where_it_is_needed(processors, folder, monkeypatch):
    data = make_vlm_chat_dataset(processors("gemma3"), write(folder, [ONE, TWO, BARE, BARE]))
    blank, made = data._rows.blank, []
    monkeypatch.setattr(data._rows, "blank", lambda: made.append(1) or blank())
    steps = iter(DataLoader(data, shuffle=False).steps(0))
    counts = [(next(steps)[0]["num_images"], len(made)) for _ in range(4)]
    assert counts == [(1, 0), (2, 0), (0, 1), (0, 1)]


def test_a_mistake_in_making_the_blank_image_is_not_its_absence(processors, folder, monkeypatch):
    data = make_vlm_chat_dataset(processors("gemma3"), write(folder, [BARE, ONE]))
    monkeypatch.setattr(data._rows, "blank", lambda: data.no_such_thing)
    with pytest.raises(AttributeError, match="no_such_thing"):
        next(DataLoader(data, shuffle=False).steps(0))


def test_a_pair_with_an_empty_answer_is_dropped_with_its_image(processors, folder):
    rows = [{"question": "What?", "answer": answer, "image": "0.png"} for answer in ("", "A fox", "A dog")]
    data = make_vlm_chat_dataset(processors("gemma3"), write(folder, rows))
    assert (len(data), data.stats.dropped) == (2, 1)


def test_whole_rows_share_a_pack_and_their_images_follow_each_other(processors, folder):
    """Grids and patches in the documents' order; what is of tokens stands where its document stands."""
    data = make_vlm_chat_dataset(processors("qwen3_vl"), write(folder, [ONE, BARE, TWO, TURNS]))
    size = int(data.lengths[:3].sum()) + 3
    loader = DataLoader(data, packing=PackedSequence(size), shuffle=False, drop_last=False)
    (first,), (second,) = loader.steps(0)
    assert (first["sample_ids"], second["sample_ids"]) == ([0, 1, 2], [3])
    assert (first["num_images"], second["num_images"]) == (3, 2)
    assert first["input_ids"].shape == second["input_ids"].shape == (1, size)
    assert first["num_tokens"] == int(data.lengths[:3].sum())
    ends = first["cu_seq_lens_q"].tolist()
    assert ends == [0, *np.cumsum(data.lengths[:3]).tolist(), size]
    for i in range(3):
        sample, start, end = data[i], ends[i], ends[i + 1]
        assert first["input_ids"][0, start:end].tolist() == sample["input_ids"]
        assert first["mm_token_type_ids"][0, start:end].equal(sample["vision"].tokens["mm_token_type_ids"])
    assert not first["mm_token_type_ids"][0, ends[3] :].any()
    seen = [data[i]["vision"].images for i in (0, 2)]
    for key in ("pixel_values", "image_grid_thw"):
        assert first[key].equal(torch.cat([images[key] for images in seen]))


def test_what_a_row_has_once_is_joined_along_its_images(processors, folder):
    """SmolVLM's tiles are one entry a row, padded to the most of any row; Llava-OneVision counts images by row."""
    data = make_vlm_chat_dataset(processors("smolvlm"), write(folder, [ONE, BARE, TWO]))
    ((batch,),) = DataLoader(data, packing=PackedSequence(int(data.lengths.sum())), shuffle=False).steps(0)
    parts = [data[i]["vision"].rows["pixel_values"] for i in (0, 2)]
    assert batch["pixel_values"].equal(torch.cat(parts)[None])
    data = make_vlm_chat_dataset(processors("llava_onevision"), write(folder, [ONE, BARE, TWO]))
    ((batch,),) = DataLoader(data, packing=PackedSequence(int(data.lengths.sum())), shuffle=False).steps(0)
    assert batch["batch_num_images"].tolist() == [1, 0, 2]
    assert batch["pixel_values"].shape[0] == batch["image_sizes"].shape[0] == 3


def test_a_pack_without_images_still_runs_the_tower(processors, folder):
    """The masked document with an image takes what room is left, or makes the pack longer; it counts nowhere."""
    data = make_vlm_chat_dataset(processors("gemma3"), write(folder, [BARE, ONE]))
    blank, words = len(data.filler["input_ids"]), int(data.lengths[0])
    long = int(data.lengths[1])  # of the row with an image: the least that a pack must hold
    for size, width in ((words + blank + 5, words + blank + 5), (long, -(-(words + blank) // 8) * 8)):
        loader = DataLoader(data, packing=PackedSequence(size), shuffle=False)
        first = next(iter(loader.steps(0)))[0]
        if size == long:
            assert words + blank > long
            assert first["sample_ids"] == [0]
        assert first["num_images"] == 0
        assert first["input_ids"].shape == (1, width)
        assert first["pixel_values"].shape == (1, 3, 64, 64)
        assert first["num_tokens"] == words
        assert first["num_label_tokens"] == sum(label != IGNORE_INDEX for label in data[0]["labels"])


def test_a_row_longer_than_a_pack_is_an_error_or_left_out_and_counted(processors, folder, caplog):
    data = make_vlm_chat_dataset(processors("gemma3"), write(folder, [ONE, TURNS, BARE]))
    size = int(data.lengths[0])
    with pytest.raises(DataError, match=rf"1 of 3 rows are longer than packed_sequence.packed_sequence_size={size}"):
        DataLoader(data, packing=PackedSequence(size))
    loader = DataLoader(data, packing=PackedSequence(size, overlong="drop"), shuffle=False)
    assert loader.rows_dropped == 1
    assert f"1 rows longer than packed_sequence_size={size} are left out" in caplog.text
    assert [batch["sample_ids"] for (batch,) in loader.steps(0)] == [[0], [2]]


def test_the_order_of_packs_is_a_function_of_seed_epoch_and_index(processors, folder):
    data = make_vlm_chat_dataset(processors("internvl"), write(folder, [ONE, TWO, TURNS, BARE, ONE, BARE]))
    packing = PackedSequence(int(data.lengths.max()) + 20)

    def packs(rank, ranks, epoch=1, first=0, **options):
        loader = DataLoader(data, packing=packing, seed=5, dp_rank=rank, dp_size=ranks, global_batch_size=2, **options)
        return [[batch["sample_ids"] for batch in step] for step in loader.steps(epoch, first)]

    alone = packs(0, 1)
    assert packs(0, 1, first=1) == alone[1:]
    assert packs(0, 1, num_workers=2) == alone
    assert packs(0, 1, epoch=2) != alone
    together = [[a, b] for (a,), (b,) in zip(packs(0, 2), packs(1, 2), strict=True)]
    assert together == alone


def test_workers_and_order_change_nothing(processors, folder):
    data = make_vlm_chat_dataset(processors("qwen3_vl"), write(folder, [ONE, TWO, TURNS, BARE]))

    def batches(**options):
        return [batch for step in DataLoader(data, global_batch_size=2, seed=3, **options).steps(0) for batch in step]

    for alone, helped in zip(batches(), batches(num_workers=2), strict=True):
        assert alone["sample_ids"] == helped["sample_ids"]
        assert alone["input_ids"].equal(helped["input_ids"])
        assert ("pixel_values" in alone) == ("pixel_values" in helped)
        assert "pixel_values" not in alone or alone["pixel_values"].equal(helped["pixel_values"])


def test_no_processor_or_one_without_images_or_template_is_one_line(tmp_path, processors, folder):
    from tests.builders import make_tokenizer, tiny_config

    make_tokenizer("chatml").save_pretrained(tmp_path / "text")
    tiny_config("llama").save_pretrained(tmp_path / "text")
    with pytest.raises(ModelError, match=r"found a .*, which takes no images; give a vision-language model"):
        load_processor(str(tmp_path / "text"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"the directory has no processor that can be read .*set processor.pretrained"):
        load_processor(str(tmp_path / "empty"))
    with pytest.raises(ModelError, match="no such directory"):
        load_processor(str(tmp_path / "absent"))
    write_processor("gemma3", tmp_path / "gemma")
    with pytest.raises(ModelError, match=r"processor.image_options.sizes: no field of its image processor, which has"):
        load_processor(str(tmp_path / "gemma"), image_options={"sizes": 3})
    write_processor("gemma3", tmp_path / "bare")
    (tmp_path / "bare/chat_template.jinja").unlink()
    bare = load_processor(str(tmp_path / "bare"))
    with pytest.raises(DataError, match=r"has no chat template; set processor\.chat_template"):
        make_vlm_chat_dataset(bare, write(folder, [ONE]))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_table_says_of_a_processor_is_what_loading_does(processors, tmp_path, caplog, family):
    """Without torchvision: one with a video part is said to be for images only, one of images alone says nothing."""
    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed")
    processors(family)  # skips where it cannot be built
    write_processor(family, tmp_path)
    load_processor(str(tmp_path))
    said = "for images only, because its video part cannot be imported here" in caplog.text
    assert processor_kind(family) == ("PIL, images only" if said else "PIL")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_processor_comes_back_as_it_was_saved(processors, tmp_path, family):
    """Those without their video part too: what the checkpoint says of videos is kept."""
    processor = processors(family)
    processor.save_pretrained(tmp_path)
    again = load_processor(str(tmp_path))
    assert type(again).__name__ == type(processor).__name__
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert again.chat_template == processor.chat_template
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_a_template_for_plain_text_gets_images_as_their_token(processors, folder, tmp_path):
    write_processor("qwen3_vl", tmp_path / "model")
    plain = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"  # fmt: skip
    processor = load_processor(str(tmp_path / "model"), chat_template=plain)
    (sample,) = make_vlm_chat_dataset(processor, write(folder, [TWO]))
    assert sample["vision"].num_images == 2
    assert sample["labels"] == spoken_by_the_assistant(processor, sample["input_ids"])


def test_bytes_in_parquet_without_the_image_feature(processors, folder):
    rows = {"messages": [[{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A fox"}]]}
    buffer = io.BytesIO()
    Image.open(folder / "0.png").save(buffer, "JPEG")
    table = {**rows, "images": [[{"bytes": buffer.getvalue(), "path": "0.jpg"}]]}
    datasets.Dataset.from_dict(table).to_parquet(folder / "plain.parquet")
    (sample,) = make_vlm_chat_dataset(processors("gemma3"), str(folder / "plain.parquet"))
    assert sample["vision"].num_images == 1
