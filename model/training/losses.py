"""Losses over answer tokens, as modules that accelerate can wrap whole.

Both give a sum, not a mean: the training loop divides by the number of answer tokens of the whole
global batch, so that processes, accumulation and skipped samples do not change what a token weighs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training.data import IGNORE

ENCODE_FRAMES = 32  # encoded at a time
INPUTS = ("input_ids", "attention_mask", "position_ids", "frame_times", "frame_mask")


def encode(crosslmm: CrossLMMForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """Pixels (B, T, 3, S, S) -> features (B, T, N, Dv), some frames at a time."""
    parts = [
        crosslmm.model.encode_frames(p) for p in pixel_values.flatten(0, 1).split(ENCODE_FRAMES)
    ]
    return torch.cat(parts).unflatten(0, pixel_values.shape[:2])


def answer_columns(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where logits are needed: columns (K,), which of (B, K) are wanted, and their targets.

    Only these rows of the vocabulary's matrix are computed; a long video has few answer tokens.
    """
    targets = labels[:, 1:]
    columns = (targets != IGNORE).any(0).nonzero().flatten()
    targets = targets[:, columns]
    wanted = targets != IGNORE
    return columns, wanted, targets[wanted]


class AnswerLoss(nn.Module):
    """Cross-entropy of the answers' tokens, summed."""

    def __init__(self, crosslmm: CrossLMMForConditionalGeneration) -> None:
        super().__init__()
        self.crosslmm = crosslmm

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        """The loss of a batch from `Collator`; `video_features` may stand in for its pixels."""
        logits, targets = self.student(batch, self.features(batch))
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    def features(self, batch: dict[str, Any]) -> torch.Tensor:
        """Encoder features of the batch."""
        given = batch.get("video_features")
        return encode(self.crosslmm, batch["pixel_values_videos"]) if given is None else given

    def student(
        self, batch: dict[str, Any], features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (tokens, V) and ids (tokens,) of all answer tokens, row by row."""
        columns, wanted, targets = answer_columns(batch["labels"])
        logits = self.crosslmm(
            **{name: batch[name] for name in INPUTS if name in batch},
            video_features=features,
            use_cache=False,
            logits_to_keep=columns,
        ).logits
        return logits[wanted], targets
