"""A task that can be learned from scratch in a minute: how many shapes an image shows, and their colour."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image, ImageDraw
from transformers import CLIPImageProcessorPil

from tests.vlm_builders import turns, vlm_tokenizer

SIDE, CELL = 24, 8
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 230), "yellow": (230, 220, 50)}
COUNTS = ("1", "2", "3", "4")
QUESTIONS = {"count": "How many shapes are there?", "colour": "Which colour are they?"}


def draw(rng: random.Random, count: int, colour: str) -> Image.Image:
    """``count`` circles and squares of one colour, each somewhere within a cell of its own, on a dark, uneven ground."""
    ground = rng.randint(0, 20)
    image = Image.new("RGB", (SIDE, SIDE), (ground, ground, ground))
    pen = ImageDraw.Draw(image)
    per_side = SIDE // CELL
    for cell in rng.sample(range(per_side**2), count):
        size = rng.randint(5, 6)
        x = cell % per_side * CELL + rng.randint(0, CELL - size - 1)
        y = cell // per_side * CELL + rng.randint(0, CELL - size - 1)
        shade = tuple(max(0, min(255, part + rng.randint(-20, 20))) for part in COLOURS[colour])
        shape = rng.choice((pen.ellipse, pen.rectangle))
        shape((x, y, x + size, y + size), fill=shade)
    return image


def examples(seed: int, number: int, most: int = len(COUNTS)) -> list[tuple[Image.Image, str, str]]:
    """Images of up to ``most`` shapes, each with one of the two questions and its answer."""
    rng = random.Random(seed)
    found = []
    for _ in range(number):
        count, colour = rng.randint(1, most), rng.choice(list(COLOURS))
        kind = rng.choice(list(QUESTIONS))
        answer = COUNTS[count - 1] if kind == "count" else colour
        found.append((draw(rng, count, colour), QUESTIONS[kind], answer))
    return found


def write_data(folder: Path, seed: int, number: int, most: int) -> Path:
    """``data.jsonl`` and its images in ``folder``, as a user would have them."""
    (folder / "images").mkdir(parents=True)
    with open(folder / "data.jsonl", "w") as file:
        for i, (image, question, answer) in enumerate(examples(seed, number, most)):
            image.save(folder / f"images/{i}.png")
            asked = [{"type": "image", "image": f"images/{i}.png"}, {"type": "text", "text": question}]
            turns_of = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns_of}) + "\n")
    return folder / "data.jsonl"


def write_processor(folder: Path) -> Any:
    """A LLaVA processor: 9 patches of 8 pixels an image. Returns its tokenizer."""
    tokenizer = vlm_tokenizer({"image_token": "<image>"})
    tokenizer.init_kwargs["processor_class"] = "LlavaProcessor"
    tokenizer.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False).save_pretrained(folder)
    fields = {"patch_size": CELL, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor", **fields}))
    (folder / "chat_template.jinja").write_text(turns("<image>"))
    return tokenizer


def model_config(tokenizer: Any) -> dict[str, Any]:
    """A LLaVA of 0.3 M parameters."""
    width = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {
        "model_type": "llava",
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_layer": -1,
        "vision_config": {"model_type": "clip_vision_model", **width, "image_size": SIDE, "patch_size": CELL},
        "text_config": {
            "model_type": "llama",
            **width,
            "initializer_range": 0.1,  # so narrow a model starts too quiet with less
            "num_key_value_heads": 4,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 128,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    }


def write_recipe(folder: Path, rows: int, steps: int, most: int = len(COUNTS)) -> Path:
    """Everything that ``automodel finetune vlm -c recipe.yaml`` needs, in ``folder``."""
    data = write_data(folder / "train", 0, rows, most)
    tokenizer = write_processor(folder / "processor")
    recipe = {
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForImageTextToText.from_config",
            "config": model_config(tokenizer),
            "dtype": "float32",
        },
        "processor": {"pretrained_model_name_or_path": str(folder / "processor")},
        "freeze": {"vision_tower": False, "embeddings": False},
        "dataset": {
            "_target_": "nemo_automodel.components.datasets.vlm.conversation.make_vlm_chat_dataset",
            "path_or_dataset_id": str(data),
        },
        "dataloader": {"num_workers": 1},
        "step_scheduler": {
            "global_batch_size": 32,
            "local_batch_size": 32,
            "max_steps": steps,
            "ckpt_every_steps": steps,
        },
        "optimizer": {"lr": 0.003},
        "lr_scheduler": {"warmup_steps": 20},
        "checkpoint": {"checkpoint_dir": str(folder / "out")},
        "loggers": {"progress": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@torch.no_grad()
def accuracy(model: Any, processor: Any, most: int = len(COUNTS), number: int = 200, seed: int = 1) -> float:
    """The share of held-out questions that ``model`` answers exactly, as plain transformers generates."""
    right = 0
    held_out = examples(seed, number, most)
    for start in range(0, number, 50):
        part = held_out[start : start + 50]
        asked = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]}] for _, q, _ in part]
        texts = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        images = [[image] for image, _, _ in part]
        inputs = processor(
            images=images, text=texts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False
        )
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        right += sum(given.strip() == answer for given, (_, _, answer) in zip(answers, part, strict=True))
    return right / number
