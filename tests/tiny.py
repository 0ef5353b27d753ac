"""Tiny random CrossLMM models and prompts for tests: fast, with effects far above noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from model.configuration_crosslmm import CrossLMMConfig
from model.modeling_crosslmm import CrossLMMForConditionalGeneration

VIDEO_TOKEN = 120
PAD_TOKEN = 127
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 24,  # 6 x 6 original tokens
    "hidden_act": "gelu_pytorch_tanh",
    "vision_use_head": False,
}
TEXT = {
    "model_type": "qwen2",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}


def tiny_config(
    vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **overrides: Any
) -> CrossLMMConfig:
    """A 4-layer CrossLMM of width 32 with dual cross-attention in layers 0 and 2."""
    settings = {"pooled_grid": 2, "dcal_interval": 2, "video_token_id": VIDEO_TOKEN, **overrides}
    return CrossLMMConfig(
        vision_config={**VISION, **(vision or {})}, text_config={**TEXT, **(text or {})}, **settings
    )


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0, gate: float | None = 0.7) -> nn.Module:
    """Weights large enough that every part, biases and norms included, changes the result.

    The gates' gamma becomes `gate`, with alternating sign; None leaves them as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    sign = 1.0
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("gate"):
            if gate is not None:
                weight.fill_(sign * gate)
                sign = -sign
        elif weight.dim() > 1:
            weight.copy_(noise * 1.5 / weight[0].numel() ** 0.5)
        elif "norm" in name and name.endswith("weight"):
            weight.copy_(1 + 0.2 * noise)
        else:
            weight.copy_(0.2 * noise)
    return module


def tiny_model(
    config: CrossLMMConfig | None = None, seed: int = 0, gate: float | None = 0.7, **overrides: Any
) -> CrossLMMForConditionalGeneration:
    """A tiny model in eval mode; `overrides` go to `tiny_config`."""
    config = tiny_config(**overrides) if config is None else config
    return randomize(CrossLMMForConditionalGeneration(config), seed, gate).eval()


def tiny_frames(config: CrossLMMConfig, batch: int, frames: int, seed: int = 1) -> torch.Tensor:
    """Random pixels (B, T, 3, S, S)."""
    side = config.vision_config.image_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, 3, side, side, generator=generator)


def tiny_prompt(
    config: CrossLMMConfig, frames: int, before: tuple[int, ...] = (5, 6), question: int = 5
) -> list[int]:
    """Token ids: a few of text, the video's placeholders, a question of `question` tokens."""
    placeholders = frames * config.pooled_tokens_per_frame + int(config.frame_separator)
    text = [7 + (3 * i) % 90 for i in range(question)]
    return [*before, *[config.video_token_id] * placeholders, *text]


def tiny_inputs(
    config: CrossLMMConfig, batch: int = 1, frames: int = 3, seed: int = 1, question: int = 5
) -> dict[str, torch.Tensor]:
    """Inputs of `forward` and `generate` for equally long prompts."""
    ids = torch.tensor([tiny_prompt(config, frames, question=question)] * batch)
    ids[:, -1] = torch.arange(20, 20 + batch)  # another question for every video
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": tiny_frames(config, batch, frames, seed),
    }
    if config.time_encoding == "clock":
        inputs["frame_times"] = 61.5 * torch.arange(frames).float().expand(batch, -1)
    return inputs
