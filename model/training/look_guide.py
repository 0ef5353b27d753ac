"""An auxiliary loss for a full-token model: answers should look at their evidence's tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training.evidence_guide import EvidenceGuide
from model.training.library import Video
from model.training.outputs import Outputs
from model.training.packing import Packed


class LookGuide:
    """Share of self-attention on the evidence among visual tokens, read by hooks.

    The same idea as `EvidenceGuide`, for a model whose text sees the patches in the LLM itself.
    """

    def __init__(self, crosslmm: CrossLMMForConditionalGeneration, grid: int) -> None:
        self.grid = grid
        self.evidence = EvidenceGuide(crosslmm)
        self.text = crosslmm.model.language_model
        self.layers = range(1, len(self.text.layers) - 1)
        self.seen = Outputs()
        for i in self.layers:
            for name in ("q_proj", "k_proj"):
                self.seen.watch((i, name), getattr(self.text.layers[i].self_attn, name))

    def loss(self, packed: Packed, videos: list[Video]) -> torch.Tensor:
        """Mean of -log(share of attention on the evidence) over answer tokens that have any."""
        rows, columns, masks = [], [], []
        for row, (spans, video) in enumerate(zip(packed.spans, videos, strict=True)):
            for qa, start, end in spans:
                patches = self.evidence.patches(qa, video).float()
                side = self.evidence.grid
                found = F.adaptive_max_pool2d(patches.view(-1, side, side), self.grid).flatten()
                if qa.evidence and found.any():
                    count = end - 1 - start  # the end token looks at nothing
                    rows += [row] * count
                    columns += range(start - 1, end - 2)
                    masks += [found] * count
        if not rows:
            return torch.zeros(())
        target, terms = torch.stack(masks), []
        visual = slice(packed.text_start - target.shape[1], packed.text_start)
        for layer in self.layers:
            attention = self.text.layers[layer].self_attn
            query, key = (
                self.seen[layer, name].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for name in ("q_proj", "k_proj")
            )
            cos, sin = self.text.rotary_emb(query, packed.position_ids)
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            query = query[rows, :, columns].unflatten(1, (key.shape[1], -1))  # (n, Hkv, G, d)
            scores = torch.einsum("nhgd,nhmd->nhgm", query, key[rows, :, visual]).float()
            share = (scores * attention.scaling).softmax(-1) * target[:, None, None]
            terms.append(-(share.sum(-1).mean((1, 2)) + 1e-4).log())
        return torch.cat(terms).mean()
