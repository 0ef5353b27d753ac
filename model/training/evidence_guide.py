"""An auxiliary loss for the first part of training: answers should look at their evidence."""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch

from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training.library import Video
from model.training.outputs import Outputs
from model.training.packing import Packed, answer_parts
from model.training.world_parts import Box
from model.training.world_questions import QA

WAY_WEIGHT = 10.0  # an answer about a movement has one token, one about a time four or five


def patches_in(boxes: Iterable[Box], grid: int) -> torch.Tensor:
    """Patches whose centre lies in one of the boxes, (grid, grid) bool."""
    centres = (torch.arange(grid) + 0.5) / grid
    mask = torch.zeros(grid, grid, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        rows, columns = (
            (centres >= top) & (centres <= bottom),
            (centres >= left) & (centres <= right),
        )
        mask |= rows[:, None] & columns
    return mask


class EvidenceGuide:
    """Share of T2V attention on the evidence, read from the projections by hooks.

    `separators`: ids of the tokens between the parts of a list.
    """

    def __init__(
        self, crosslmm: CrossLMMForConditionalGeneration, separators: Container[int] = ()
    ) -> None:
        self.separators = separators
        self.grid = crosslmm.config.original_grid
        self.layers = crosslmm.config.dcal_layers[1:]  # the first sees the question's noun too late
        self.seen = Outputs()
        self.branches = {}
        for i in self.layers:
            branches = crosslmm.model.language_model.layers[i].dual_cross_attention
            branch = branches.t2v if branches is not None else None
            if branch is None:
                continue
            self.branches[i] = branch
            for name in ("q_proj", "k_proj"):
                self.seen.watch((i, name), getattr(branch, name))

    def patches(self, qa: QA, video: Video, part: int | None = None) -> torch.Tensor:
        """Patches that hold the evidence of (a part of) the answer itself, (T * N,) bool."""
        mask = torch.zeros(len(video.times), self.grid, self.grid, dtype=torch.bool)
        for evidence in qa.evidence:
            if part is not None and evidence.part != part:
                continue
            if evidence.named:  # found by self-attention; a look at it here would hide the answer
                continue
            times = torch.as_tensor(video.times)
            shown = (times >= evidence.start - 1e-6) & (times < evidence.end)
            mask[shown] |= patches_in([evidence.box or (0, 0, 1, 1)], self.grid)
        return mask.flatten()

    def loss(
        self, packed: Packed, videos: list[Video], kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean of -log(share of attention on the evidence) over answer tokens that have any.

        Of a movement in the last layer: one head's on its first frame, the others' on the later
        half of its frames, because a way is the difference between two places.

        `kept` (B, T, n): the patches in the memory, where not all are.
        """
        terms, weights = [], []
        for row, (spans, video) in enumerate(zip(packed.spans, videos, strict=True)):
            columns, masks, ways = [], [], []
            for qa, start, end in spans:
                for part, place in enumerate(
                    answer_parts(packed.input_ids[row], start, end, self.separators)
                ):
                    evidence = self.patches(qa, video, part).unflatten(0, (len(video.times), -1))
                    if kept is not None:
                        evidence = evidence.gather(1, kept[row].cpu())
                    if evidence.any():
                        # The column before a token predicts it; the end token looks at nothing.
                        columns += [c - 1 - packed.text_start for c in place]
                        masks += [evidence] * len(place)
                        ways += [qa.kind == "direction"] * len(place)
            if not columns:
                continue
            evidence, way = torch.stack(masks), torch.tensor(ways)
            for layer, branch in self.branches.items():
                query = self.seen[layer, "q_proj"][row, columns].unflatten(
                    -1, (-1, branch.head_dim)
                )
                key = self.seen[layer, "k_proj"][row].unflatten(-1, (-1, branch.head_dim))
                query = query.unflatten(1, (key.shape[1], -1))  # (Lq, Hkv, G, d)
                scores = torch.einsum("lhgd,mhd->lhgm", query, key).float() * branch.scaling
                scores = scores.flatten(1, 2)
                target = evidence.flatten(1)[:, None].repeat(1, scores.shape[1], 1)
                apart = way if layer == self.layers[-1] else torch.zeros_like(way)
                # By then self-attention has found when something came and when it was last there.
                first, late = _first_and_late(evidence[apart])
                target[apart, 0], target[apart, 1:] = first.flatten(1), late.flatten(1)[:, None]
                share = (scores.softmax(-1) * target.to(scores.device)).sum(-1)
                each, any_head = (share + 1e-4).log().mean(1), (share.mean(1) + 1e-4).log()
                terms.append(-each.where(apart.to(each.device), any_head))
                weights.append(torch.where(apart, WAY_WEIGHT, 1.0).to(each.device))
        if not terms:
            return torch.zeros(())
        weight = torch.cat(weights)
        return (torch.cat(terms) * weight).sum() / weight.sum()


def _first_and_late(evidence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The patches (n, T, N) of the first frame that shows any, and of the later half of them."""
    shows = evidence.any(2)
    place, count = shows.cumsum(1), shows.sum(1, keepdim=True)
    return evidence & (shows & (place == 1))[..., None], evidence & (2 * place > count)[..., None]
