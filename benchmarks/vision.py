"""Workload D: a vision-language model of gemma-3-4b's shape, an image in every row, tower and embedding frozen."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmarks.workloads import Workload
from nemo_automodel.types import IGNORE_INDEX, Batch, RowImages

AT = 4  # where a row's image tokens start

GEMMA_4B_TEXT = {
    "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208, "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256, "sliding_window": 1024, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
SIGLIP_896 = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 896, "patch_size": 14,
}  # fmt: skip
TINY_TEXT = {
    **GEMMA_4B_TEXT, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "query_pre_attn_scalar": 16, "sliding_window": 32,
}  # fmt: skip
TINY_TOWER = {**SIGLIP_896, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 112}  # fmt: skip


@dataclass(frozen=True)
class VisionWorkload(Workload):
    """A Gemma-3-shaped model; each row of ``seq`` tokens holds ``image_tokens`` that stand for one image."""

    tower: dict[str, Any] | None = None
    image_tokens: int = 256

    def config(self, attn_implementation: str | None = "sdpa") -> Any:
        from transformers import Gemma3Config

        extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        vocabulary = self.shape["vocab_size"]
        return Gemma3Config(
            text_config={**self.shape, "use_cache": False},
            vision_config={**(self.tower or {}), "vision_use_head": False},
            mm_tokens_per_image=self.image_tokens,
            image_token_index=vocabulary - 1,
            boi_token_index=vocabulary - 2,
            eoi_token_index=vocabulary - 3,
            tie_word_embeddings=True,
            **extra,
        )

    def plain_model(self) -> Any:
        """transformers' own model, tower and embedding frozen (call it where its memory is to be)."""
        from transformers import Gemma3ForConditionalGeneration

        model = Gemma3ForConditionalGeneration(self.config())
        model.model.vision_tower.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(False)
        return model

    def layers(self, model: Any) -> Any:
        """The decoder layers of ``plain_model``."""
        return model.model.language_model.layers

    def our_model(self) -> tuple[Any, dict[str, Any]]:
        """Our autoclass, and what our recipe hands it for this workload."""
        from nemo_automodel import NeMoAutoModelForImageTextToText
        from nemo_automodel._transformers.parts import Freeze

        return NeMoAutoModelForImageTextToText, {"freeze": Freeze()}

    def batches(self, count: int = 4) -> list[Batch]:
        """Seeded random tokens and pixels; every token of text is trained on, but for the first."""
        generator = torch.Generator().manual_seed(1)
        found = []
        for _ in range(count):
            ids = torch.randint(0, self.shape["vocab_size"] - 3, (self.batch, self.seq), generator=generator)
            kinds = torch.zeros_like(ids)
            kinds[:, AT : AT + self.image_tokens] = 1
            ids[kinds == 1] = self.shape["vocab_size"] - 1
            labels = torch.full_like(ids, IGNORE_INDEX)
            labels[:, :-1] = ids.masked_fill(kinds == 1, IGNORE_INDEX)[:, 1:]
            indices = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
            side = (self.tower or {})["image_size"]
            pixels = torch.rand(self.batch, 3, side, side, generator=generator) * 2 - 1
            batch: dict[str, Any] = {"input_ids": ids, "labels": labels, "label_indices": indices}
            batch |= {"num_label_tokens": indices.numel(), "token_type_ids": kinds, "pixel_values": pixels}
            batch["sample_ids"] = [len(found) * self.batch + row for row in range(self.batch)]
            batch["image_rows"] = [RowImages({"pixel_values": 1}, checksum=0)] * self.batch
            found.append(Batch(**batch))  # type: ignore[typeddict-item]
        return found

    def plain_inputs(self, batch: Batch, device: torch.device, unpacked: bool = False) -> dict[str, Any]:
        """``batch`` as transformers' model takes it."""
        keys = ("input_ids", "token_type_ids", "pixel_values")
        inputs = {key: batch[key].to(device, non_blocking=True) for key in keys}  # type: ignore[literal-required]
        labels = inputs["input_ids"].masked_fill(inputs["token_type_ids"] == 1, IGNORE_INDEX)
        return {**inputs, "labels": labels}

    def fill(self, model: nn.Module, but: Collection[int] = ()) -> None:
        """As for every workload, but for its norms: Gemma's add 1 to their weights, and a tower's have a bias."""
        super().fill(model, but)
        for name, parameter in model.named_parameters():
            if "norm" in name and ("vision_tower" not in name or name.endswith("bias")):
                parameter.detach().zero_()

    def flops(self) -> float:
        """Of a forward and backward: 6N for trained layers, 4N for the frozen head, 2N for the tower's patches, attention."""
        s, t = self.shape, self.tower or {}
        q, kv = s["num_attention_heads"] * s["head_dim"], s["num_key_value_heads"] * s["head_dim"]
        layer = 2 * s["hidden_size"] * q + 2 * s["hidden_size"] * kv + 3 * s["hidden_size"] * s["intermediate_size"]
        text = self.tokens * (6 * s["num_hidden_layers"] * layer + 4 * s["hidden_size"] * s["vocab_size"])
        text += 3.5 * s["num_hidden_layers"] * 2 * self.tokens * self.seq * q
        patches = (t["image_size"] // t["patch_size"]) ** 2
        block = 4 * t["hidden_size"] ** 2 + 2 * t["hidden_size"] * t["intermediate_size"]
        seen = self.batch * patches * t["num_hidden_layers"] * (2 * block + 4 * patches * t["hidden_size"])
        return text + seen

    def tiny(self) -> VisionWorkload:
        """The same kind of workload, small enough for a CPU in CI."""
        about = f"tiny: {self.about}"
        return replace(self, about=about, shape=TINY_TEXT, tower=TINY_TOWER, image_tokens=16, batch=2, seq=64)


D = VisionWorkload(
    "D",
    "gemma-3-4b shape, 8x1024 tokens of which 256 stand for one 896x896 image, tower and embedding frozen",
    GEMMA_4B_TEXT,
    8,
    1024,
    tower=SIGLIP_896,
)
