"""What each stage of training moves, how fast, and the model that it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from model.configuration_crosslmm import CrossLMMConfig
from model.loading import load_config, load_weights, quantization_config
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.types import InputError

# The first that a parameter's name contains is its part; all others are the LLM.
PARTS = {
    ".vision_tower.": "encoder",
    ".v2v.": "v2v",
    ".t2v.": "t2v",
    ".memory_norm.": "memory",
    ".multi_modal_projector.": "projector",
    ".time_embedding.": "projector",
    ".row_embedding.": "projector",
    ".column_embedding.": "projector",
    ".frame_separator": "projector",
}


@dataclass(frozen=True)
class Stage:
    """One way to train: learning rate of each part that moves, by name of the part."""

    rates: Mapping[str, float]
    frames: int  # most frames of a video, by default
    t2v: bool | None = None  # None: as the checkpoint has it


def _rates(**rates: float) -> Mapping[str, float]:
    return MappingProxyType(rates)


NEW = _rates(projector=1e-3, v2v=1e-3, memory=1e-3)
WHOLE = _rates(encoder=2e-6, projector=1e-5, v2v=1e-5, t2v=1e-5, memory=1e-5, llm=1e-5)
STAGES = {
    # The paper: alignment. Captions are too noisy for T2V, which is absent.
    "1": Stage(NEW, frames=32, t2v=False),
    # The paper: instruction tuning of everything, the encoder more slowly.
    "2": Stage(WHOLE, frames=64, t2v=True),
    # Ours: the dual cross-attention alone, over a base that stays as it is.
    "dcal": Stage(_rates(v2v=3e-4, t2v=3e-4, memory=3e-4), frames=64),
}


def part_of(name: str) -> str:
    """Which part a parameter belongs to: encoder, projector, v2v, t2v, memory or llm."""
    return next((part for key, part in PARTS.items() if key in f".{name}."), "llm")


def load_base(
    folder: Path,
    stage: Stage,
    *,
    quantization: str = "none",
    pooled_grid: int | None = None,
    device: str | torch.device = "cpu",
    frozen_dtype: torch.dtype = torch.float32,
) -> CrossLMMForConditionalGeneration:
    """The model that a stage starts from, with only the stage's parts requiring gradients.

    Parts that move are in fp32 (autocast computes in bf16), the others in `frozen_dtype`. A T2V
    that the checkpoint does not have starts new, with closed gates.

    Raises:
        InputError: the checkpoint lacks weights, or the stage cannot run over a quantised base.

    """
    config = load_config(folder, pooled_grid)
    had = config.t2v
    if stage.t2v is not None:
        config.t2v = stage.t2v
    quantized = quantization != "none"
    if quantized and set(stage.rates) - {"v2v", "t2v", "memory"}:
        raise InputError(
            f"A {quantization} base cannot be trained itself; use --train dcal, or no quantisation."
        )
    settings = {}
    if quantized:
        settings = {
            "quantization_config": quantization_config(quantization),
            "device_map": {"": str(device)},
        }
    crosslmm = load_weights(
        folder,
        config,
        new=(".t2v.",) if config.t2v and not had else (),
        gone=(".t2v.",) if had and not config.t2v else (),
        dtype=frozen_dtype if quantized else torch.float32,
        **settings,
    )
    for name, parameter in crosslmm.named_parameters():
        moves = part_of(name) in stage.rates and not _unused(name, config)
        parameter.requires_grad_(moves)
        if moves:
            parameter.data = parameter.data.float()
        elif parameter.is_floating_point() and not quantized:
            parameter.data = parameter.data.to(frozen_dtype)
    if not any(p.requires_grad for p in crosslmm.parameters()):
        raise InputError(f"{folder} has no part that this stage trains.")
    return crosslmm


def checkpoint_activations(crosslmm: CrossLMMForConditionalGeneration) -> None:
    """Keep no activations inside layers; compute them again in the backward pass."""
    # transformers renamed it in 5.23.
    enable = getattr(crosslmm, "activation_checkpointing_enable", None)
    (enable or crosslmm.gradient_checkpointing_enable)({"use_reentrant": False})


def _unused(name: str, config: CrossLMMConfig) -> bool:
    """Weights that no forward pass uses would stall processes that wait for their gradients."""
    if ".vision_tower.head." in name:
        return True
    return ".vision_tower.post_layernorm." in name and not config.vision_post_layernorm


def parameter_groups(
    crosslmm: CrossLMMForConditionalGeneration, rates: Mapping[str, float], weight_decay: float
) -> list[dict]:
    """AdamW's groups: one per part, and within it matrices (decayed) apart from the rest."""
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in crosslmm.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), parameter.dim() > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rates[part],
            "weight_decay": weight_decay if decays else 0.0,
            "part": part,
        }
        for (part, decays), parameters in groups.items()
    ]
