"""An auxiliary loss for the first part of training: answers should look at their evidence."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training.library import Video
from model.training.outputs import Outputs
from model.training.packing import Packed
from model.training.world_parts import Box
from model.training.world_questions import QA


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
    """Share of T2V attention on the evidence, read from the projections by hooks."""

    def __init__(self, crosslmm: CrossLMMForConditionalGeneration) -> None:
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

    def patches(self, qa: QA, video: Video) -> torch.Tensor:
        """Patches that hold the evidence of the answer itself, (T * N,) bool."""
        mask = torch.zeros(len(video.times), self.grid, self.grid, dtype=torch.bool)
        for evidence in qa.evidence:
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

        `kept` (B, T, n): the patches in the memory, where not all are.
        """
        terms = []
        for row, (spans, video) in enumerate(zip(packed.spans, videos, strict=True)):
            columns, masks, firsts = [], [], []
            for qa, start, end in spans:
                evidence = self.patches(qa, video).unflatten(0, (len(video.times), -1))
                if kept is not None:
                    evidence = evidence.gather(1, kept[row].cpu())
                if qa.evidence and evidence.any():
                    # The column before a token predicts it; the end token looks at nothing.
                    columns += [c - packed.text_start for c in range(start - 1, end - 2)]
                    masks += [evidence.flatten()] * (end - 1 - start)
                    first = _first_frame(evidence) if qa.kind == "direction" else evidence
                    firsts += [first.flatten()] * (end - 1 - start)
            if not columns:
                continue
            for layer, branch in self.branches.items():
                # A way is seen from where something was at first, and then all the time.
                target = torch.stack(firsts if layer == self.layers[0] else masks)[:, None, None]
                query = self.seen[layer, "q_proj"][row, columns].unflatten(
                    -1, (-1, branch.head_dim)
                )
                key = self.seen[layer, "k_proj"][row].unflatten(-1, (-1, branch.head_dim))
                query = query.unflatten(1, (key.shape[1], -1))  # (Lq, Hkv, G, d)
                scores = torch.einsum("lhgd,mhd->lhgm", query, key).float() * branch.scaling
                share = (scores.softmax(-1) * target.to(scores.device)).sum(-1).mean((1, 2))
                terms.append(-(share + 1e-4).log())
        return torch.cat(terms).mean() if terms else torch.zeros(())


def _first_frame(evidence: torch.Tensor) -> torch.Tensor:
    """The patches (T, n) of the first frame that shows any."""
    shows = evidence.any(1)
    return evidence & (shows & (shows.cumsum(0) == 1))[:, None]
