"""What forward passes remember for attention maps: queries of text, and reduced V2V weights.

Shapes: H heads, L tokens of this forward, T frames, n frames of this chunk, P pooled tokens per
frame, N original tokens per frame, w earlier frames of the window, d head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

if TYPE_CHECKING:
    from model.modeling_crosslmm import CrossLMMForConditionalGeneration

_CPU_SCORES, _GPU_SCORES = 8 << 20, 256 << 20  # the largest block of scores held at once, bytes
PATCH_BYTES = 16 << 20  # V2V patch maps above this are kept as the mean of the heads


def score_bytes(like: torch.Tensor) -> int:
    """The largest block of scores to hold at once where `like` lies."""
    return _GPU_SCORES if like.is_cuda else _CPU_SCORES


def frame_scores(query: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    """(H, L, d) x (Hkv, n, N, d) -> (H, L, n, N) in fp32."""
    groups = query.shape[0] // keys.shape[0]
    rows = query.unflatten(0, (-1, groups)).flatten(1, 2)  # (Hkv, G * L, d)
    scores = (rows @ keys.flatten(1, 2).mT).float().mul_(scaling)
    return scores.unflatten(1, (groups, -1)).flatten(0, 1).unflatten(-1, keys.shape[1:3])


def block_tokens(query: torch.Tensor, tokens_per_frame: int) -> int:
    """How many keys, in whole frames, may be scored at once."""
    per_token = query.shape[0] * query.shape[1] * 4
    return max(1, score_bytes(query) // (per_token * tokens_per_frame)) * tokens_per_frame


def frame_totals(
    query: torch.Tensor,
    blocks: Iterable[torch.Tensor],
    frames: int,
    tokens_per_frame: int,
    scaling: float,
) -> torch.Tensor:
    """Log-sum-exp of the scores on each frame, (H, L, T), from blocks of keys (Hkv, m, d)."""
    # Written in place: small results kept between large blocks would keep a CPU's allocator from
    # using the blocks' memory again.
    totals = query.new_empty((*query.shape[:2], frames), dtype=torch.float32)
    done = 0
    for keys in blocks:
        keys = keys.unflatten(1, (-1, tokens_per_frame))
        part = totals[..., done : done + keys.shape[1]]
        torch.logsumexp(frame_scores(query, keys, scaling), dim=-1, out=part)
        done += keys.shape[1]
    return totals


def focus(weights: torch.Tensor) -> torch.Tensor:
    """How narrow a distribution (..., N) is: 0 where it is even, 1 where it is a single point."""
    entropy = torch.special.entr(weights).sum(-1)
    return 1 - entropy / torch.tensor(float(max(weights.shape[-1], 2))).log()


@dataclass
class MapCapture:
    """Collects, during forward passes of one sequence, what the maps need."""

    v2v: bool = False  # keep V2V maps while a video is built
    t2v_queries: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # (H, L, d)
    self_queries: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # (L, H * d)
    rotary: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # (L, d) each
    v2v_focus: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # (n, H), frame scope
    v2v_patches: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # (n, H or 1, N)
    v2v_window: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # (n, H, w + 1)
    v2v_video: dict[int, torch.Tensor] = field(default_factory=dict)  # (H, T)

    def add_t2v(self, layer: int, query: torch.Tensor) -> None:
        """Called by the T2V branch with (1, H, L, d)."""
        self.t2v_queries.setdefault(layer, []).append(query[0].detach())

    def forget_last(self) -> None:
        """Remove what the last forward pass of text left."""
        for parts in (*self.t2v_queries.values(), *self.self_queries.values(), self.rotary):
            del parts[-1:]

    def add_v2v(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        tokens: int,
    ) -> None:
        """Called by the V2V branch with (n, H, P, d) and (n, Hkv, (w + 1) * N, d), N `tokens`."""
        if not self.v2v:
            return
        groups = query.shape[1] // key.shape[1]
        one = query[0, :, :, :1].numel() * key.shape[2] * 4
        step = max(1, score_bytes(query) // one)
        for start in range(0, len(query), step):
            q, k = query[start : start + step], key[start : start + step]
            scores = (q.unflatten(1, (-1, groups)) @ k.unsqueeze(2).mT).float() * scaling
            if mask is not None:
                scores = scores.masked_fill(~mask[start : start + step, None], float("-inf"))
            weights = scores.softmax(-1).flatten(1, 2)  # (n, H, P, (w + 1) * N)
            frames = weights.unflatten(-1, (-1, tokens))  # the last one is the token's own
            own = frames[..., -1, :]
            if frames.shape[-2] == 1:
                self.v2v_focus.setdefault(layer, []).append(focus(own).mean(2))
            else:
                self.v2v_window.setdefault(layer, []).append(frames.sum(-1).mean(2))
            self._add_patches(layer, own.mean(2))

    def _add_patches(self, layer: int, own: torch.Tensor) -> None:
        """Keep (n, H, N), each row scaled to sum to 1; once there are many, the mean of heads."""
        kept = self.v2v_patches
        heads_apart = all(one.shape[1] > 1 for parts in kept.values() for one in parts)
        own = own if heads_apart else own.mean(1, keepdim=True)
        own = own / own.sum(-1, keepdim=True).clamp_min(1e-30)
        kept.setdefault(layer, []).append(own.half())
        held = sum(one.numel() * 2 for parts in kept.values() for one in parts)
        if heads_apart and own.shape[1] > 1 and held > PATCH_BYTES:
            for parts in kept.values():
                parts[:] = [one.float().mean(1, keepdim=True).half() for one in parts]

    def add_v2v_video(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, frames: int, scaling: float
    ) -> None:
        """Called in `video` scope with (1, H, T * P, d) and (1, Hkv, M, d): mass per frame only.

        Patch weights would be a (T * P, M) array.
        """
        if not self.v2v:
            return
        tokens = key.shape[2] // frames
        total = torch.zeros(query.shape[1], frames, device=query.device)
        for rows in query[0].chunk(frames, dim=1):  # frame by frame
            blocks = key[0].split(block_tokens(rows, tokens), dim=1)
            total += frame_totals(rows, blocks, frames, tokens, scaling).softmax(-1).mean(1)
        self.v2v_video[layer] = total / frames

    @contextmanager
    def self_attention(self, crosslmm: CrossLMMForConditionalGeneration) -> Iterator[None]:
        """Within: also remember the queries of the LLM's own self-attention, all layers."""

        def remember(layer: int, query: torch.Tensor) -> None:
            self.self_queries.setdefault(layer, []).append(query[0].detach())

        def remember_positions(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            cos, sin = kwargs["position_embeddings"]
            self.rotary.append((cos[0], sin[0]))

        modules = [layer.self_attn for layer in crosslmm.model.language_model.layers]
        hooks = [modules[0].register_forward_pre_hook(remember_positions, with_kwargs=True)]
        for layer, module in enumerate(modules):
            hooks.append(
                module.q_proj.register_forward_hook(
                    lambda _, args, out, layer=layer: remember(layer, out)
                )
            )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def rotated(self, layer: int, last: int) -> torch.Tensor:
        """Self-attention queries of the last `last` positions, with their position: (H, L, d)."""
        cos, sin = (torch.cat(parts)[-last:] for parts in zip(*self.rotary, strict=True))
        query = torch.cat(self.self_queries[layer])[-last:].unflatten(-1, (-1, cos.shape[-1]))
        query = query.transpose(0, 1)[None]
        return apply_rotary_pos_emb(query, query, cos[None], sin[None])[0][0]
