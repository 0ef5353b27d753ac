"""Where tokens looked: maps from stored queries, never a whole (heads, queries, keys) array.

A forward pass only remembers the queries of the tokens of interest. Their weights are worked out
afterwards from the keys that the memory holds anyway: per frame, the log-sum-exp of the scores; the
softmax over frames of those is the exact share of attention on each frame.

Shapes: H heads, L chosen tokens, T frames, N original tokens per frame, P pooled, d head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from model.key_value_store import KeyValueStore

if TYPE_CHECKING:
    from model.modeling_crosslmm import CrossLMMForConditionalGeneration
    from model.video_memory import VideoMemory

SCORE_BYTES = 8 << 20  # the largest block of scores held at once


@dataclass
class MapCapture:
    """Collects, during forward passes of one sequence, what the maps need."""

    v2v: bool = False  # keep V2V patch weights while a video is built
    t2v_queries: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # (H, L, d)
    self_queries: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # (H, L, d)
    v2v_weights: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # (P, keys) a frame
    v2v_mass: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # (P, T) a frame

    def add_t2v(self, layer: int, query: torch.Tensor) -> None:
        """Called by the T2V branch with (1, H, L, d)."""
        self.t2v_queries.setdefault(layer, []).append(query[0].detach())

    def add_v2v(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> None:
        """Called by the V2V branch with (n, H, P, d) and (n, Hkv, keys, d), one row per frame."""
        if not self.v2v:
            return
        groups = query.shape[1] // key.shape[1]
        for start in range(len(query)):  # frame by frame: the array stays small
            q, k = query[start], key[start]
            scores = (q.unflatten(0, (-1, groups)) @ k.unsqueeze(1).mT).float() * scaling
            if mask is not None:
                scores = scores.masked_fill(~mask[start], float("-inf"))
            weights = scores.softmax(-1).mean((0, 1))  # (P, keys)
            self.v2v_weights.setdefault(layer, []).append(weights)

    def add_v2v_mass(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, frames: int, scaling: float
    ) -> None:
        """Called in `video` scope with (1, H, T * P, d) and (1, Hkv, M, d): mass per frame only.

        Patch weights would be a (T * P, M) array; `v2v_mass` gets (T, P, T) instead.
        """
        if not self.v2v:
            return
        tokens = key.shape[2] // frames
        for rows in query[0].chunk(frames, dim=1):  # frame by frame
            blocks = key[0].split(_block_tokens(rows, tokens), dim=1)
            mass = _frame_totals(rows, blocks, frames, tokens, scaling).softmax(-1).mean(0)
            self.v2v_mass.setdefault(layer, []).append(mass)

    @contextmanager
    def self_attention(self, crosslmm: CrossLMMForConditionalGeneration) -> Iterator[None]:
        """Within: also remember the queries of the LLM's own self-attention, all layers."""

        def remember(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            query = module.q_proj(kwargs["hidden_states"])
            query = query.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
            query, _ = apply_rotary_pos_emb(query, query, *kwargs["position_embeddings"])
            self.self_queries.setdefault(module.layer_idx, []).append(query[0].detach())

        layers = crosslmm.model.language_model.layers
        hooks = [
            layer.self_attn.register_forward_pre_hook(remember, with_kwargs=True)
            for layer in layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _frame_scores(query: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    """(H, L, d) x (Hkv, n, N, d) -> (H, L, n, N) in fp32."""
    groups = query.shape[0] // keys.shape[0]
    rows = query.unflatten(0, (-1, groups)).flatten(1, 2)  # (Hkv, G * L, d)
    scores = (rows @ keys.flatten(1, 2).mT).float().mul_(scaling)
    return scores.unflatten(1, (groups, -1)).flatten(0, 1).unflatten(-1, keys.shape[1:3])


def _block_tokens(query: torch.Tensor, tokens_per_frame: int) -> int:
    """How many keys, in whole frames, may be scored at once."""
    per_token = query.shape[0] * query.shape[1] * 4
    return max(1, SCORE_BYTES // (per_token * tokens_per_frame)) * tokens_per_frame


def _frame_totals(
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
        torch.logsumexp(_frame_scores(query, keys, scaling), dim=-1, out=part)
        done += keys.shape[1]
    return totals


@torch.inference_mode()
def frame_mass(
    query: torch.Tensor, store: KeyValueStore, tokens_per_frame: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of each token's attention on each frame.

    Returns:
        mass: (H, L, T), every row over T sums to 1.
        log_total: (H, L) log-sum-exp of all scores, for `patch_weights`.

    """
    blocks = (keys[0] for keys, _ in store.blocks(_block_tokens(query, tokens_per_frame)))
    frames = store.length // tokens_per_frame
    per_frame = _frame_totals(query, blocks, frames, tokens_per_frame, scaling)
    return per_frame.softmax(-1), per_frame.logsumexp(-1)


@torch.inference_mode()
def patch_weights(
    query: torch.Tensor,
    store: KeyValueStore,
    frames: list[int],
    tokens_per_frame: int,
    scaling: float,
    log_total: torch.Tensor,
) -> torch.Tensor:
    """Weight of every patch of chosen frames, mean over heads: (L, len(frames), N)."""
    maps = []
    for frame in frames:
        keys = store.frame_keys([frame], tokens_per_frame)[0]  # (Hkv, 1, N, d)
        scores = _frame_scores(query, keys, scaling)[:, :, 0]
        maps.append((scores - log_total.unsqueeze(-1)).exp().mean(0))
    return torch.stack(maps, dim=1)


@dataclass
class TextMaps:
    """T2V of chosen tokens in every dual cross-attention layer."""

    layers: list[int]
    mass: torch.Tensor  # (L, layers, T), mean over heads
    head_mass: torch.Tensor  # (L, layers, H, T)
    frames: list[int]  # the frames with most mass, strongest first
    patches: torch.Tensor  # (layers, len(frames), N), mean over tokens and heads


@torch.inference_mode()
def text_to_visual(
    crosslmm: CrossLMMForConditionalGeneration,
    memory: VideoMemory,
    capture: MapCapture,
    *,
    last: int,
    keep: list[int] | None = None,
    strongest: int = 6,
) -> TextMaps | None:
    """T2V maps of the last `last` positions that `capture` saw, or of those of them in `keep`.

    The position before a token is the one that predicted it; with the turn's prompt and its
    answer's tokens but the last one fed through the model, the last `last` positions are those
    that predicted the answer. None where the model has no T2V.
    """
    per_frame = memory.config.original_tokens_per_frame
    queries = {
        layer: torch.cat(parts, dim=1)[:, -last:] for layer, parts in capture.t2v_queries.items()
    }
    if keep is not None:
        queries = {layer: query[:, keep] for layer, query in queries.items()}
    if not queries:
        return None
    layers = sorted(queries)
    masses, totals = [], {}
    for layer in layers:
        scaling = queries[layer].shape[-1] ** -0.5
        mass, totals[layer] = frame_mass(
            queries[layer], memory.state.t2v[layer], per_frame, scaling
        )
        masses.append(mass)
    head_mass = torch.stack(masses, dim=0).permute(2, 0, 1, 3)  # (L, layers, H, T)
    mass = head_mass.mean(2)
    overall = mass.mean((0, 1))
    frames = overall.topk(min(strongest, overall.numel())).indices.tolist()
    patches = torch.stack(
        [
            patch_weights(
                queries[layer],
                memory.state.t2v[layer],
                frames,
                per_frame,
                queries[layer].shape[-1] ** -0.5,
                totals[layer],
            ).mean(0)
            for layer in layers
        ]
    )
    return TextMaps(layers, mass, head_mass, frames, patches)


@torch.inference_mode()
def self_attention_mass(memory: VideoMemory, capture: MapCapture, *, last: int) -> torch.Tensor:
    """Share of the LLM's self-attention on each frame's pooled tokens: (L, layers, T).

    Rows sum to less than 1: the rest lies on the text. Call it inside the turn, while the cache
    still holds the text.
    """
    pooled, frames = memory.config.pooled_tokens_per_frame, memory.num_frames
    first = len(memory.prefix_ids)
    rows = []
    for layer in sorted(capture.self_queries):
        query = torch.cat(capture.self_queries[layer], dim=1)  # (H, all, d)
        keys = memory.cache.layers[layer].keys[0]  # (Hkv, length, d)
        total = min(query.shape[1], last)
        ends = memory.length + query.shape[1] - total + torch.arange(total, device=keys.device)
        query = query[:, -total:]
        scores = _frame_scores(query, keys.unsqueeze(1), query.shape[-1] ** -0.5)[:, :, 0]
        causal = torch.arange(keys.shape[1], device=keys.device) <= ends[:, None]
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        visual = weights[..., first : first + frames * pooled].unflatten(-1, (frames, pooled))
        rows.append(visual.sum(-1).mean(0))
    return torch.stack(rows, dim=1)
