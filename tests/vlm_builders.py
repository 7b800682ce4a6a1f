"""Small vision-language models with their processors, built in code: config, tokenizer and image processor of a family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedTokenizerFast

from nemo_automodel._transformers.tiny_twin import tiny_twin
from tests.builders import make_tokenizer

IMAGE = 28  # pixels on a side of what a tower sees, where it has a fixed size
_PARTS = (
    "{%- for part in (message['content'] if message['content'] is not string else [{'type': 'text', 'text': message['content']}]) -%}"
    "{%- if part['type'] == 'image' -%}IMAGE_HERE{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}"
)


def turns(image: str, bos: bool = False) -> str:
    """A chat template that goes through the parts of messages, ``image`` standing for each image."""
    parts = _PARTS.replace("IMAGE_HERE", image)
    return (
        ("{{ bos_token }}" if bos else "")
        + "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' }}"
        + parts
        + "{{ '<|im_end|>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )


def vlm_tokenizer(names: dict[str, str], extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A small tokenizer with the special tokens that a processor looks for by name (``image_token`` and the like)."""
    plain = make_tokenizer("chatml")
    plain.add_special_tokens({"additional_special_tokens": [*dict.fromkeys([*names.values(), *extra])]})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        extra_special_tokens=names,
    )
    tokenizer.model_max_length = 4096
    return tokenizer


_QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_INTERN = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_SMOL = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
_GEMMA = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
_GRID = [[56, 56], [56, 112], [112, 56], [112, 112]]
_SQUARE = {"height": 56, "width": 56}

# family -> (names of the tokenizer's tokens, template's text for an image, processor class and its fields, image
# processor class and its fields, fields of the config, config field -> token)
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "names": _GEMMA,
        "image": "<start_of_image>",
        "bos": True,
        "processor": ("Gemma3Processor", {"image_seq_length": 4}),
        "image_processor": ("Gemma3ImageProcessorPil", {"size": {"height": 64, "width": 64}}),
        "ids": {
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
    },
    "qwen3_vl": {
        "names": _QWEN,
        "image": "<|vision_start|><|image_pad|><|vision_end|>",
        "processor": ("Qwen3VLProcessor", {}),
        "image_processor": (
            "Qwen2VLImageProcessorPil",
            {"patch_size": 16, "merge_size": 2, "size": {"shortest_edge": 32 * 32, "longest_edge": 96 * 96}},
        ),
        "ids": {
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
    },
    "smolvlm": {
        "names": _SMOL,
        "extra": tuple(f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)),
        "image": "<image>",
        "processor": ("SmolVLMProcessor", {"image_seq_len": 16}),  # transformers 5.20 takes multiples of a patch's size
        "vision": {"patch_size": 16},
        "image_processor": (
            "SmolVLMImageProcessorPil",
            {"size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 128}},
        ),
        "ids": {"image_token_id": "<image>"},
    },
    "internvl": {
        "names": _INTERN,
        "image": "<IMG_CONTEXT>\n",
        "processor": ("InternVLProcessor", {"image_seq_length": 4}),
        "image_processor": ("GotOcr2ImageProcessorPil", {"size": _SQUARE, "max_patches": 3}),
        "ids": {"image_token_id": "<IMG_CONTEXT>"},
    },
    "llava": {
        "names": {"image_token": "<image>"},
        "image": "<image>\n",
        "processor": (
            "LlavaProcessor",
            {"patch_size": 14, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 1},
        ),
        "image_processor": (
            "CLIPImageProcessorPil",
            {"size": {"shortest_edge": 56}, "crop_size": _SQUARE},
        ),
        "config": {"vision_feature_select_strategy": "full"},
        "ids": {"image_token_index": "<image>"},
    },
    "llava_onevision": {
        "names": {"image_token": "<image>", "video_token": "<video>"},
        "image": "<image>\n",
        "processor": ("LlavaOnevisionProcessor", {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}),
        "image_processor": ("LlavaOnevisionImageProcessorPil", {"size": _SQUARE, "image_grid_pinpoints": _GRID}),
        "config": {"image_grid_pinpoints": _GRID},
        "ids": {"image_token_index": "<image>", "video_token_index": "<video>"},
    },
    "paligemma": {
        "names": {"image_token": "<image>"},
        "image": None,
        "processor": ("PaliGemmaProcessor", {}),
        "image_processor": ("SiglipImageProcessorPil", {"size": _SQUARE}),
        "image_fields": {"image_seq_length": 16},
        "ids": {"image_token_index": "<image>"},
    },
}


def write_processor(family: str, directory: Path) -> PreTrainedTokenizerFast:
    """Write the processor files of ``family`` as the Hub has them, and return the tokenizer."""
    made = FAMILIES[family]
    tokenizer = vlm_tokenizer(made["names"], made.get("extra", ()))
    if family == "paligemma":  # adds 1024 locations and 128 segments by itself
        from transformers.models.paligemma.processing_paligemma import EXTRA_TOKENS

        tokenizer.add_tokens(EXTRA_TOKENS)
    name, fields = made["processor"]
    tokenizer.init_kwargs["processor_class"] = name
    tokenizer.save_pretrained(directory)
    kind, options = made["image_processor"]
    image_processor = getattr(transformers, kind)(**options)
    image_processor.save_pretrained(directory)
    path = directory / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **made.get("image_fields", {})}))
    (directory / "processor_config.json").write_text(json.dumps({"processor_class": name, **fields}))
    if made["image"] is not None:
        (directory / "chat_template.jinja").write_text(turns(made["image"], made.get("bos", False)))
    return tokenizer


def tiny_vlm_config(family: str, tokenizer: PreTrainedTokenizerFast, **over: Any) -> PretrainedConfig:
    """A twin of ``family`` that fits ``write_processor``'s tokenizer and image sizes."""
    made = FAMILIES[family]
    config = tiny_twin(AutoConfig.for_model(family), vocab_size=len(tokenizer))
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    text = config.get_text_config()
    for owner in (config, text):
        for key, value in ids.items():
            if hasattr(owner, key):
                setattr(owner, key, value)
    for key, token in made["ids"].items():
        setattr(config, key, tokenizer.convert_tokens_to_ids(token))
    for key, value in {**made.get("config", {}), **over}.items():
        setattr(config, key, value)
    for key, value in made.get("vision", {}).items():
        setattr(config.vision_config, key, value)
    if hasattr(config.vision_config, "out_hidden_size"):
        config.vision_config.out_hidden_size = text.hidden_size
    return type(config).from_dict(config.to_dict())


def write_vlm(family: str, directory: Path, **over: Any) -> Path:
    """A tiny model of ``family`` with random fp32 weights, and its processor, as a Hub directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = write_processor(family, directory)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(tiny_vlm_config(family, tokenizer, **over), dtype=torch.float32)
    for parameter in model.parameters():  # a projector that starts at zero would let no image through
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(directory)
    return directory
