"""The bundled model's loss: answers, and with a small weight where they look and what came when."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
import torch.nn.functional as F

from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training.evidence_guide import EvidenceGuide, patches_in
from model.training.losses import AnswerLoss, answer_columns
from model.training.order import Order
from model.training.order_guide import OrderGuide
from model.training.packing import IGNORE, Packed, answer_parts, links
from model.training.world_questions import QA

Right = list[tuple[QA, bool]]
LINK_WEIGHT = 4.0  # of a separator and of a list's end: one token decides whether more is to come
TOGETHER_WEIGHT = 4.0  # of names at one time: few lists have them, and one of two names is luck


class GuidedLoss(AnswerLoss):
    """Cross-entropy of answers' tokens, summed, and two guides; leaves which are right in `right`.

    `weight` is that of the guides, `keep` the share of patches that stay in the memory: most of a
    step's cost is their keys and values, and most of them show background. What shows an object or
    a sign stays: where something is would be uncertain without a part of it. `separators`: ids of
    the tokens between the parts of an answer.
    """

    def __init__(
        self, crosslmm: CrossLMMForConditionalGeneration, separators: Container[int]
    ) -> None:
        super().__init__(crosslmm)
        self.evidence = EvidenceGuide(crosslmm, separators)
        self.order = OrderGuide(crosslmm, separators)
        self.separators = separators
        self.weight, self.keep = 0.0, 1.0
        self.kept: torch.Tensor | None = None  # (B, T, n) patches that stayed
        self.orders: list[Order] = []
        self.right: Right = []  # which of the last batch's answers are right in every token
        self.told: dict[str, float] = {}  # parts of the last batch's loss, for the log
        self._embed = crosslmm.model.embed_frames
        crosslmm.model.embed_frames = self._embed_some

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        """The loss of a batch with `packed` and `videos` beside its tensors."""
        if self.training:
            self.orders = [Order.of(video) for video in batch["videos"]]
        logits, targets = self.student(batch, batch["video_features"])
        self.right = right_answers(batch, logits.argmax(-1))
        loss = self.each(batch, logits, targets).sum()
        if self.training and self.weight:
            loss = loss + len(targets) * self.weight * self.guides(batch)
        return loss

    def each(
        self, batch: dict[str, Any], logits: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """The loss (tokens,) of each answer token."""
        return F.cross_entropy(logits.float(), targets, reduction="none") * self._weights(batch)

    def guides(self, batch: dict[str, Any]) -> torch.Tensor:
        """The guides' loss for each answer token."""
        off = self.evidence.loss(batch["packed"], batch["videos"], self.kept)
        unknown, lost = self.order.loss(batch["packed"], self.orders, self.kept)
        parts = {"astray": off, "disorder": unknown, "lost": lost}
        self.told = {name: part.item() for name, part in parts.items()}
        return off + unknown + lost

    def _weights(self, batch: dict[str, Any]) -> torch.Tensor:
        """The weight (tokens,) of each answer token in training."""
        labels = batch["labels"]
        weights = torch.ones(labels.shape, device=labels.device)
        for row, spans in enumerate(batch["packed"].spans if self.training else ()):
            for qa, start, end in spans:
                if qa.kind == "scenes":
                    parts = answer_parts(labels[row], start, end, self.separators)
                    for part, several in zip(parts, _together(qa.answer), strict=False):
                        weights[row, part] = TOGETHER_WEIGHT if several else 1.0
                    weights[row, links(labels[row], start, end, self.separators)] = LINK_WEIGHT
        return self.of_tokens(weights, labels)

    @staticmethod
    def of_tokens(columns: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Those (tokens,) of a batch's columns (B, L) that answer tokens stand in."""
        kept, wanted, _ = answer_columns(labels)
        return columns.to(labels.device)[:, kept + 1][wanted]

    def _embed_some(
        self, features: torch.Tensor, times: torch.Tensor, grid: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`embed_frames` with a random part of each frame's background left out of the memory."""
        self.kept = None
        if self.training and self.keep < 1:
            side, count = self.evidence.grid, round(self.keep * features.shape[2])
            shown = [patches_in(boxes, side) for order in self.orders for boxes in order.shown]
            rank = torch.rand(features.shape[:3]) + torch.stack(shown).view(features.shape[:3])
            self.kept = rank.topk(count).indices.to(features.device)
        return self._embed(features, times, grid, self.kept)


def _together(answer: str) -> list[bool]:
    """Of each part of a list: whether it has its time in common with others."""
    moments = [moment.split(" and ") for moment in answer.split(", ")]
    return [len(names) > 1 for names in moments for _ in names]


def right_answers(batch: dict[str, Any], found: torch.Tensor) -> Right:
    """Which answers are right in every token, their end included.

    `found` (tokens,): the likeliest ids where `answer_columns` of the batch's labels wants some.
    """
    labels, packed = batch["labels"], batch["packed"]
    columns, wanted, _ = answer_columns(labels)
    predicted, place = torch.full_like(labels, IGNORE), wanted.nonzero()
    predicted[place[:, 0], columns[place[:, 1]] + 1] = found
    hits = (predicted == labels).cpu()
    return [
        (qa, bool(hits[row, start:end].all()))
        for row, spans in enumerate(packed.spans)
        for qa, start, end in spans
    ]


def batch_of(packed: Packed, videos: list, features: torch.Tensor) -> dict[str, Any]:
    """A batch for this loss, its tensors by the names of `CrossLMMForConditionalGeneration`."""
    return {
        "input_ids": packed.input_ids,
        "attention_mask": packed.attention_mask,
        "position_ids": packed.position_ids,
        "labels": packed.labels,
        "frame_times": packed.frame_times,
        "video_features": features,
        "packed": packed,
        "videos": videos,
    }
