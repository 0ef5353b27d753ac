"""The bundled recipe on a few scenes, with a tiny encoder."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel

from model.training import bundled, bundled_model
from model.training.bundled import Trainer
from model.training.tokenizer import train_tokenizer
from model.training.world_questions import all_texts


def write_encoder(folder: Path) -> None:
    """A tiny random encoder, so that the recipe begins with its library of scenes."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        patch_size=16,
        image_size=64,
        vision_use_head=False,
    )
    SiglipVisionModel(config).save_pretrained(folder)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The recipe's tokenizer, trained on fewer texts, once."""
    return train_tokenizer([*all_texts(100), "user\n", "assistant\n", "system\n"])


def few_scenes(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, *more: str, trainer: type[Trainer] = Trainer
) -> Trainer:
    """The recipe's third part, or what goes on from it, on 60 scenes."""
    monkeypatch.setattr(bundled, "HELD_OUT_SCENES", 20)
    monkeypatch.setattr(bundled, "FRAMES_PER_STEP", 6)
    monkeypatch.setattr(bundled_model, "all_texts", lambda worlds: ())
    monkeypatch.setattr(bundled_model, "train_tokenizer", lambda texts: tokenizer())
    words = ["--out", str(recipe), "--scenes", "60", "--processes", "1", "--cpu", *more]
    return trainer(bundled.arguments(words))
