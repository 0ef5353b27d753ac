"""The maps of one answer as small plain arrays: what fits is kept, in full frame order.

Shapes: L the answer's tokens, K layers, H heads, T frames, N patches or pooled tokens per frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from model.attention_maps import (
    TextMaps,
    average,
    patch_shares,
    self_attention_shares,
    text_to_visual,
)
from model.map_capture import MapCapture
from model.types import AttentionMap, AttentionSummary, FrameView, MapKind

if TYPE_CHECKING:
    from model.modeling_crosslmm import CrossLMMForConditionalGeneration
    from model.video_memory import VideoMemory

_SHARE = {"t2v": 0.5, "self": 0.25, "v2v": 0.25}  # of the budget
_BYTES = 2  # of a float16


@dataclass(frozen=True)
class Room:
    """What of one map fits: which axes are kept apart, and whether all frames have patches."""

    words: bool  # tokens apart, mean over heads
    both: bool  # tokens and heads apart
    patch_words: bool = False
    patch_heads: bool = False
    patch_frames: int = 0  # how many frames have patches

    @classmethod
    def measure(
        cls, budget: int, tokens: int, layers: int, heads: int, frames: int, patches: int, few: int
    ) -> Room:
        """Divide `budget` bytes; `few` frames keep their patches where not all can."""
        grid = layers * frames * _BYTES
        left = budget - grid * heads
        words = left >= grid * tokens
        left -= grid * tokens if words else grid
        both = words and left >= grid * tokens * heads
        left -= grid * tokens * heads if both else 0
        for apart in ((both, both), (words, False), (False, False)):
            copies = (tokens if apart[0] else 1) * (heads if apart[1] else 1)
            if patches > 1 and grid * copies * patches <= left:
                return cls(words, both, *apart, frames)
        few = min(few, frames) if patches > 1 else 0
        return cls(words, both, False, False, few)


@dataclass
class _Rows:
    """Collects one map layer by layer."""

    room: Room
    words: list[np.ndarray] = field(default_factory=list)
    heads: list[np.ndarray] = field(default_factory=list)
    both: list[np.ndarray] = field(default_factory=list)
    patches: list[np.ndarray] = field(default_factory=list)

    def add(self, mass: torch.Tensor) -> None:
        """Add a layer's (H, L, T)."""
        words = mass.mean(0)  # (L, T)
        self.words.append(_plain(words if self.room.words else words.mean(0, keepdim=True)))
        self.heads.append(_plain(mass.mean(1)))
        if self.room.both:
            self.both.append(_plain(mass.transpose(0, 1)))

    def add_patches(self, spread: torch.Tensor) -> None:
        """Add a layer's (L or 1, H or 1, F, N)."""
        self.patches.append(_plain(spread.unflatten(-1, (math.isqrt(spread.shape[-1]), -1))))

    def done(
        self, kind: MapKind, layers: Sequence[int], seen: np.ndarray, total: int, frames: list[int]
    ) -> AttentionMap:
        """Put frames in their places among `total`; `seen` are those that the model had."""
        return AttentionMap(
            kind=kind,
            measure="share",
            layers=tuple(layers),
            words=_placed(np.stack(self.words, 1), seen, total),
            heads=_placed(np.stack(self.heads), seen, total),
            both=_placed(np.stack(self.both, 1), seen, total) if self.both else None,
            patches=np.stack(self.patches, 1) if self.patches else None,
            patch_frames=tuple(int(seen[f]) for f in frames) if self.patches else (),
        )


def _plain(tensor: torch.Tensor) -> np.ndarray:
    return tensor.half().cpu().numpy()


def _placed(values: np.ndarray, seen: np.ndarray, total: int) -> np.ndarray:
    """Spread the last axis over all frames; what was hidden has exactly 0."""
    if len(seen) == total:
        return values
    out = np.zeros((*values.shape[:-1], total), values.dtype)
    out[..., seen] = values
    return out


def text_map(
    memory: VideoMemory,
    capture: MapCapture,
    maps: TextMaps,
    positions: Sequence[int],
    *,
    last: int,
    budget: int,
    seen: np.ndarray,
    total: int,
) -> AttentionMap:
    """Reduce T2V to what fits in `budget` bytes."""
    count, layers, heads, frames = maps.head_mass.shape
    patches = memory.config.original_tokens_per_frame
    room = Room.measure(budget, count, layers, heads, frames, patches, len(maps.frames))
    rows = _Rows(room)
    everywhere = room.patch_frames == frames
    for place, layer in enumerate(maps.layers):
        mass = maps.head_mass[:, place].transpose(0, 1)  # (H, L, T)
        rows.add(mass)
        if everywhere:
            query = torch.cat(capture.t2v_queries[layer], dim=1)[:, -last:][:, list(positions)]
            spread = patch_shares(
                query,
                memory.state.t2v[layer],
                patches,
                query.shape[-1] ** -0.5,
                maps.totals[layer],
                words=room.patch_words,
                heads=room.patch_heads,
            )
            rows.add_patches(spread)
        else:
            few = maps.patches[place]  # (F, N)
            rows.add_patches((few / few.sum(-1, keepdim=True).clamp_min(1e-30))[None, None])
    return rows.done(
        "t2v", maps.layers, seen, total, list(range(frames)) if everywhere else maps.frames
    )


def self_map(
    memory: VideoMemory,
    capture: MapCapture,
    positions: Sequence[int],
    *,
    last: int,
    budget: int,
    seen: np.ndarray,
    total: int,
) -> AttentionMap:
    """Reduce the LLM's self-attention to what fits in `budget` bytes; only within the turn."""
    layers, frames = sorted(capture.self_queries), memory.num_frames
    heads = memory.config.text_config.num_attention_heads
    pooled = memory.config.pooled_tokens_per_frame
    room = Room.measure(budget, len(positions), len(layers), heads, frames, pooled, 0)
    rows = _Rows(room)
    for layer in layers:
        shares = self_attention_shares(memory, capture, layer, last=last)[:, list(positions)]
        mass = shares.sum(-1)
        rows.add(mass)
        if room.patch_frames:
            spread = shares / mass.unsqueeze(-1).clamp_min(1e-30)
            rows.add_patches(average(spread, mass, words=room.patch_words, heads=room.patch_heads))
    return rows.done("self", layers, seen, total, list(range(frames)))


def visual_map(capture: MapCapture, *, budget: int, few: Sequence[int] = ()) -> AttentionMap | None:
    """V2V of a whole video, from what was kept while it was built; frames as the model had them.

    In `frame` scope each pooled token sees only its own frame, so the map tells how narrow its
    look is there. In `window` and `video` scope it tells how much each frame is looked at.
    """
    layers = sorted({*capture.v2v_focus, *capture.v2v_window, *capture.v2v_video})
    if not layers:
        return None
    if capture.v2v_focus:
        rows = [torch.cat(capture.v2v_focus[layer]).T for layer in layers]
    elif capture.v2v_window:
        rows = [_received(torch.cat(capture.v2v_window[layer])) for layer in layers]
    else:
        rows = [capture.v2v_video[layer] for layer in layers]
    heads = _plain(torch.stack(rows))  # (K, H, T)
    patches, frames = None, list(range(heads.shape[-1]))
    if capture.v2v_patches:
        kept = [torch.cat(capture.v2v_patches[layer]) for layer in layers]  # (T, H or 1, N)
        size = sum(one.numel() * _BYTES for one in kept)
        if size > budget:
            kept = [one.float().mean(1, keepdim=True) for one in kept]
            size = sum(one.numel() * _BYTES for one in kept)
        if size > budget:
            frames = list(few)
            kept = [one[frames] for one in kept]
        grids = torch.stack(kept).transpose(1, 2)[None]  # (1, K, H or 1, F, N)
        patches = _plain(grids.unflatten(-1, (math.isqrt(grids.shape[-1]), -1)))
    words = heads.astype(np.float32).mean(1)[None].astype(np.float16)
    measure = "focus" if capture.v2v_focus else "share"
    apart = tuple(frames) if patches is not None else ()
    return AttentionMap("v2v", measure, tuple(layers), words, heads, None, patches, apart)


def _received(window: torch.Tensor) -> torch.Tensor:
    """(T, H, w + 1) given by each frame to those before it and itself -> (H, T) received."""
    frames, heads, width = window.shape
    out = window.new_zeros(heads, frames + width - 1)
    for step in range(width):  # the frame `width - 1 - step` before
        out[:, step : step + frames] += window[:, :, step].T
    return out[:, width - 1 :] / frames


@dataclass(frozen=True)
class Sights:
    """What the summary needs of a video beside its memory."""

    times: np.ndarray  # (T,) seconds of all frames, hidden ones too
    seen: np.ndarray  # indices of those that the model had
    pictures: tuple[bytes, ...]  # JPEG of all frames
    visual: AttentionMap | None = None  # frames as the model had them

    def visual_among_all(self) -> AttentionMap | None:
        """The V2V map with hidden frames in their places."""
        one, total = self.visual, len(self.times)
        if one is None or len(self.seen) == total:
            return one
        return AttentionMap(
            one.kind,
            one.measure,
            one.layers,
            _placed(one.words, self.seen, total),
            _placed(one.heads, self.seen, total),
            None,
            one.patches,
            tuple(int(self.seen[f]) for f in one.patch_frames),
        )


def summarize(
    crosslmm: CrossLMMForConditionalGeneration,
    memory: VideoMemory,
    capture: MapCapture,
    sights: Sights,
    tokens: Sequence[str],
    positions: Sequence[int],
    *,
    last: int,
    trusted: bool,
    strongest: int,
    budget: int,
) -> AttentionSummary:
    """Where the answer's tokens looked; call it inside the turn.

    Args:
        crosslmm: the model.
        memory: the video, its cache still holding the turn's text.
        capture: the queries of the turn.
        sights: times and pictures of the frames, and the V2V map.
        tokens: text of the answer's tokens.
        positions: which of the last `last` positions predicted them.
        last: how many positions predicted the answer's tokens, special ones too.
        trusted: whether T2V is trained and open; otherwise self-attention comes first.
        strongest: how many frames get a picture with patches.
        budget: most bytes of all maps.

    """
    seen, total = sights.seen, len(sights.times)
    place = {"last": last, "seen": seen, "total": total}
    text = text_to_visual(
        crosslmm, memory, capture, last=last, keep=list(positions), strongest=strongest
    )
    maps = []
    if text is not None and budget:
        share = int(budget * _SHARE["t2v"])
        maps.append(text_map(memory, capture, text, positions, budget=share, **place))
    visual = sights.visual_among_all()
    if visual is not None:
        maps.append(visual)
    if capture.self_queries:
        share = int(budget * _SHARE["self"])
        maps.append(self_map(memory, capture, positions, budget=share, **place))
    main: MapKind = "t2v" if text is not None and trusted else "self"
    t2v = np.zeros((len(tokens), 0, total), np.float32)
    if text is not None:
        t2v = _placed(text.mass.float().cpu().numpy(), seen, total)
    summary = AttentionSummary(
        times=sights.times,
        layers=tuple(text.layers) if text is not None else (),
        tokens=tuple(tokens),
        t2v=t2v,
        frames=(),
        peak=0.0,
        main=main,
        maps=tuple(maps),
        pictures=sights.pictures,
        hidden=tuple(sorted(set(range(total)) - set(seen.tolist()))),
        v2v_scope=memory.config.v2v_scope,
    )
    views = _text_views(summary, text, seen) if main == "t2v" else _self_views(summary, strongest)
    mass = summary.timeline()
    return replace(summary, frames=tuple(views), peak=float(summary.times[int(mass.argmax())]))


def _text_views(summary: AttentionSummary, text: TextMaps, seen: np.ndarray) -> list[FrameView]:
    mass = summary.t2v.mean((0, 1))
    grid = math.isqrt(text.patches.shape[-1])
    patches = text.patches.float().cpu().numpy()  # (K, F, N)
    return [
        _view(summary, int(seen[frame]), mass, patches[:, rank].reshape(-1, grid, grid))
        for rank, frame in enumerate(text.frames)
    ]


def _self_views(summary: AttentionSummary, strongest: int) -> list[FrameView]:
    shown = summary.map("self")
    if shown is None:
        return []
    mass, rows = summary.timeline(), shown.rows()
    views = []
    for frame in np.argsort(-mass, kind="stable")[:strongest].tolist():
        spread = [shown.patch_map(layer, frame) for layer in range(len(shown.layers))]
        whole = [np.ones((1, 1), np.float32) if one is None else one for one in spread]
        views.append(_view(summary, frame, mass, np.stack(whole) * rows[:, frame, None, None]))
    return views


def _view(
    summary: AttentionSummary, frame: int, mass: np.ndarray, patches: np.ndarray
) -> FrameView:
    return FrameView(
        index=frame,
        time=float(summary.times[frame]),
        mass=float(mass[frame]),
        jpeg=summary.pictures[frame],
        patches=patches,
    )
