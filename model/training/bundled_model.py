"""The bundled model before its training: sizes, tokenizer, and weights to begin with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, SiglipVisionModel

from model.configuration_crosslmm import CrossLMMConfig
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.processing_crosslmm import CrossLMMProcessor
from model.training.tokenizer import train_tokenizer
from model.training.world_questions import all_texts


def model_config(
    encoder: SiglipVisionModel, vocabulary: int, ids: dict[str, int]
) -> CrossLMMConfig:
    """The bundled model: a 192-wide, 6-layer LLM, dual cross-attention in layers 0, 2 and 4."""
    return CrossLMMConfig(
        vision_config={k: v for k, v in encoder.config.to_dict().items() if k != "_name_or_path"},
        text_config={
            "model_type": "qwen2",
            "vocab_size": vocabulary,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "max_position_embeddings": 4096,
            "initializer_range": 0.04,
            "tie_word_embeddings": True,
            "eos_token_id": ids["eos"],
            "pad_token_id": ids["pad"],
        },
        pooled_grid=1,
        dcal_interval=2,
        gate_init=0.5,
        time_encoding="clock",
        patch_position="learned",
        projector_norm=True,
        video_token_id=ids["video"],
        frame_rate=1.0,
        max_frames=128,
        multi_turn=False,
    )


def new_model(
    encoder: SiglipVisionModel, override: Mapping[str, Any], start: Path | None = None
) -> tuple[CrossLMMForConditionalGeneration, CrossLMMProcessor]:
    """The bundled model with random weights behind a trained encoder, and its processor.

    `start`: a model whose tokenizer it takes, because its weights know no other.
    """
    if start is not None:
        tokenizer = CrossLMMProcessor.from_pretrained(start).tokenizer
    else:
        tokenizer = train_tokenizer([*all_texts(800), "user\n", "assistant\n", "system\n"])
    ids = {
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "video": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    }
    config = model_config(encoder, len(tokenizer), ids)
    for name, value in override.items():
        setattr(config, name, value)
    config.validate_choices()
    crosslmm = CrossLMMForConditionalGeneration(config)
    crosslmm.model.vision_tower.load_state_dict(encoder.state_dict())
    crosslmm.generation_config = GenerationConfig(
        eos_token_id=ids["eos"], pad_token_id=ids["pad"], max_new_tokens=96
    )
    return crosslmm, CrossLMMProcessor.for_config(config, tokenizer)


@torch.no_grad()
def initialise(crosslmm: CrossLMMForConditionalGeneration, features: torch.Tensor) -> None:
    """Whiten the encoder's output inside the projector and sharpen cross-attention.

    Features (F, N, Dv): a sample of the library. Whitening is a linear map, so it is folded into
    the projector's first layer and the architecture stays as it is.
    """
    model = crosslmm.model
    flat = features.flatten(0, 1).double()
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh((flat - mean).T.cov())
    whiten = vectors * (values + 1e-4 * values.mean()).rsqrt() @ vectors.T
    projector = model.multi_modal_projector
    width = projector.linear_1.in_features
    weight = torch.randn(projector.linear_1.out_features, width, dtype=torch.double)
    weight = weight / width**0.5 @ whiten
    projector.linear_1.weight.copy_(weight)
    projector.linear_1.bias.copy_(-weight @ mean)
    nn.init.normal_(projector.linear_2.weight, std=projector.linear_2.in_features**-0.5)
    for table in (model.time_embedding.digits, model.row_embedding, model.column_embedding):
        if table is not None:
            nn.init.normal_(table.weight, std=0.3)
    for layer in model.language_model.layers:
        if layer.dual_cross_attention is not None:
            for branch in layer.dual_cross_attention.children():
                branch.q_proj.weight.normal_(std=2 / width**0.5)
                branch.k_proj.weight.normal_(std=1.5 / width**0.5)
                branch.v_proj.weight.normal_(std=1 / width**0.5)
