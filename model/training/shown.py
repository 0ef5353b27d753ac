"""Where single heads of the model look, with gradients, for losses that show them where to."""

from __future__ import annotations

import torch
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training.outputs import Outputs
from model.training.packing import Packed


class ShownHead:
    """Where a head of a layer's self-attention looks, from its projections."""

    def __init__(
        self, crosslmm: CrossLMMForConditionalGeneration, layer: int, head: int, seen: Outputs
    ) -> None:
        language_model = crosslmm.model.language_model
        self.module, self.layer, self.seen = language_model.layers[layer].self_attn, layer, seen
        width = self.module.head_dim
        key_head = head // self.module.num_key_value_groups
        self.columns = [slice(i * width, (i + 1) * width) for i in (head, key_head, key_head)]
        seen.watch("rotary", language_model.rotary_emb)
        for name in ("q_proj", "k_proj", "v_proj"):
            seen.watch((layer, name), getattr(self.module, name))

    def attention(
        self, rows: slice, packed: Packed, frames: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shares (B, L, T) of each frame, for queries of `rows`; the rest lies on text.

        And what is read there, (B, L, d).
        """
        weights, value = self.weights(rows, packed)
        shares = weights[..., packed.visual_columns()].unflatten(-1, (frames, -1)).sum(-1)
        return shares, weights.to(value.dtype) @ value

    def weights(self, rows: slice, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention (B, L, K) of queries of `rows` to all columns, and their values (B, K, d)."""
        query, key, value = (
            self.seen[self.layer, name][..., columns]
            for name, columns in zip(("q_proj", "k_proj", "v_proj"), self.columns, strict=True)
        )
        cos, sin = self.seen["rotary"]
        query, key = (x[:, 0] for x in apply_rotary_pos_emb(query[:, None], key[:, None], cos, sin))
        mask = packed.attention_mask[:, 0, rows].to(query.device)
        scores = (query[:, rows] @ key.mT).float() * self.module.scaling
        return scores.masked_fill(~mask, -torch.inf).softmax(-1), value


class ShownLook:
    """Where the first head of a layer's V2V branch looks in each frame, from its projections."""

    def __init__(
        self, crosslmm: CrossLMMForConditionalGeneration, layer: int, seen: Outputs
    ) -> None:
        self.branch = crosslmm.model.language_model.layers[layer].dual_cross_attention.v2v
        self.layer, self.seen = layer, seen
        for name in ("q_proj", "k_proj"):
            seen.watch((layer, "v2v", name), getattr(self.branch, name))

    def mass(self, wanted: torch.Tensor) -> torch.Tensor:
        """Share of attention on wanted patches (B, T, N), mean over a frame's tokens, (B, T)."""
        query, key = (
            self.seen[self.layer, "v2v", name][..., : self.branch.head_dim]
            for name in ("q_proj", "k_proj")
        )
        batch, frames, tokens = wanted.shape
        query = query.reshape(batch, frames, -1, self.branch.head_dim)
        key = key.reshape(batch, frames, tokens, self.branch.head_dim)
        shares = ((query @ key.mT).float() * self.branch.scaling).softmax(-1)
        return (shares * wanted.to(shares.device)[:, :, None]).sum(-1).mean(-1)
