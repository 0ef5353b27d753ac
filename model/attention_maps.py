"""Where tokens looked: maps from stored queries, never a whole (heads, queries, keys) array.

A forward pass only remembers the queries of the tokens of interest. Their weights are worked out
afterwards from the keys that the memory holds anyway: per frame, the log-sum-exp of the scores; the
softmax over frames of those is the exact share of attention on each frame.

Shapes: H heads, L chosen tokens, T frames, N original tokens per frame, P pooled, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from model.key_value_store import KeyValueStore
from model.map_capture import MapCapture, block_tokens, frame_scores, frame_totals, score_bytes

if TYPE_CHECKING:
    from model.modeling_crosslmm import CrossLMMForConditionalGeneration
    from model.video_memory import VideoMemory


@torch.inference_mode()
def frame_mass(
    query: torch.Tensor, store: KeyValueStore, tokens_per_frame: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of each token's attention on each frame.

    Returns:
        mass: (H, L, T), every row over T sums to 1.
        log_total: (H, L) log-sum-exp of all scores, for `patch_weights`.

    """
    blocks = (keys[0] for keys, _ in store.blocks(block_tokens(query, tokens_per_frame)))
    frames = store.length // tokens_per_frame
    per_frame = frame_totals(query, blocks, frames, tokens_per_frame, scaling)
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
        scores = frame_scores(query, keys, scaling)[:, :, 0]
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
    totals: dict[int, torch.Tensor]  # of each layer, (H, L) log-sum-exp of all scores


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
    return TextMaps(layers, mass, head_mass, frames, patches, totals)


@torch.inference_mode()
def patch_shares(
    query: torch.Tensor,
    store: KeyValueStore,
    tokens_per_frame: int,
    scaling: float,
    log_total: torch.Tensor,
    *,
    words: bool,
    heads: bool,
) -> torch.Tensor:
    """How attention is spread within every frame: (L or 1, H or 1, T, N), each row sums to 1.

    Args:
        query: (H, L, d).
        store: keys of all frames.
        tokens_per_frame: N.
        scaling: of the scores.
        log_total: (H, L) from `frame_mass`: what is averaged counts by its true weight.
        words: keep tokens apart.
        heads: keep heads apart.

    """
    axes = [axis for axis, apart in ((0, heads), (1, words)) if not apart]
    parts = []
    for keys, _ in store.blocks(block_tokens(query, tokens_per_frame)):
        blocks = keys[0].unflatten(1, (-1, tokens_per_frame))
        scores = frame_scores(query, blocks, scaling)  # (H, L, n, N)
        if axes:
            weights = scores.sub_(log_total[..., None, None]).exp_().sum(axes, keepdim=True)
            spread = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
        else:
            spread = scores.softmax(-1)
        parts.append(spread.transpose(0, 1).half())
    return torch.cat(parts, dim=2)


def average(spread: torch.Tensor, share: torch.Tensor, *, words: bool, heads: bool) -> torch.Tensor:
    """(H, L, T, N) weighted by (H, L, T) -> (L or 1, H or 1, T, N) in float16, rows sum to 1."""
    axes = [axis for axis, apart in ((0, heads), (1, words)) if not apart]
    if axes:
        weight = share.unsqueeze(-1)
        spread = (spread * weight).sum(axes, keepdim=True)
        spread = spread / spread.sum(-1, keepdim=True).clamp_min(1e-30)
    return spread.transpose(0, 1).half()


@torch.inference_mode()
def self_attention_shares(
    memory: VideoMemory, capture: MapCapture, layer: int, *, last: int
) -> torch.Tensor:
    """The LLM's self-attention in one layer on each pooled token: (H, L, T, P).

    Rows sum to less than 1: the rest lies on the text. Call it inside the turn, while the cache
    still holds the text.
    """
    pooled, frames = memory.config.pooled_tokens_per_frame, memory.num_frames
    first = len(memory.prefix_ids)
    query = capture.rotated(layer, last)
    keys = memory.cache.layers[layer].keys[0]  # (Hkv, length, d)
    count = query.shape[1]
    # The cache ends with the last of these positions; each sees what came before it.
    ends = keys.shape[1] - count + torch.arange(count, device=keys.device)
    step = max(1, score_bytes(query) // (query.shape[0] * keys.shape[1] * 4))
    parts = []
    for rows, seen in zip(query.split(step, dim=1), ends.split(step), strict=True):
        scores = frame_scores(rows, keys.unsqueeze(1), query.shape[-1] ** -0.5)[:, :, 0]
        causal = torch.arange(keys.shape[1], device=keys.device) <= seen[:, None]
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        parts.append(weights[..., first : first + frames * pooled])
    return torch.cat(parts, dim=1).unflatten(-1, (frames, pooled))


def self_attention_mass(memory: VideoMemory, capture: MapCapture, *, last: int) -> torch.Tensor:
    """Share of the LLM's self-attention on each frame, mean over heads: (L, layers, T)."""
    shares = (
        self_attention_shares(memory, capture, layer, last=last)
        for layer in sorted(capture.self_queries)
    )
    return torch.stack([one.sum(-1).mean(0) for one in shares], dim=1)
