"""Maps for the engine without weights: every kind, with words and heads that look elsewhere."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
from PIL import Image

from model.types import AskRequest, AttentionMap, AttentionSummary, FrameView

HEADS, GRID, LLM_LAYERS = 2, 14, 5


def with_maps(
    summary: AttentionSummary, request: AskRequest, pictures: tuple[bytes, ...]
) -> AttentionSummary:
    """Add maps to a fake answer: odd words look back to front, head 1 a little later.

    "untrained" in the question makes a model whose cross-attention is not to be trusted.
    """
    frames, tokens = len(summary.times), len(summary.tokens)
    what_if = request.what_if
    shown = np.ones(frames, bool)
    for start, end in what_if.hidden:
        shown &= (summary.times < start) | (summary.times >= end)
    base = summary.t2v[0] * shown  # (K, T)
    base = base / np.maximum(base.sum(-1, keepdims=True), 1e-9)
    focused = "focused" in request.question  # all of it looks at the same moment
    turns = (np.arange(tokens) % 2 == 1) & (not focused)
    both = np.stack([np.where(t, base[:, ::-1], base) for t in turns])[:, :, None]
    turned = np.roll(both, 0 if focused else 3, axis=-1)
    both = np.concatenate([both, turned], axis=2) * shown  # (W, K, H, T)
    text = _map("t2v", "share", summary.layers, both, _blobs(tokens, len(summary.layers), frames))
    calm = 0.6 * np.repeat(base.mean(0)[None, None, None], LLM_LAYERS, 1)
    own = np.repeat(np.repeat(calm, tokens, 0), HEADS, 2)
    inner = _map("self", "share", tuple(range(LLM_LAYERS)), own, None)
    focus = np.repeat(base[None, :, None], HEADS, 2)
    visual = _map("v2v", "focus", summary.layers, focus, _blobs(1, len(summary.layers), frames))
    visual = dataclasses.replace(visual, both=None)
    maps = [
        *([text] if what_if.t2v else []),
        *([visual] if what_if.v2v else []),
        inner,
    ]
    trusted = what_if.t2v and "untrained" not in request.question
    return dataclasses.replace(
        summary,
        main="t2v" if trusted else "self",
        maps=tuple(maps),
        pictures=pictures,
        hidden=tuple(np.flatnonzero(~shown).tolist()),
    )


def _map(
    kind: str, measure: str, layers: tuple[int, ...], both: np.ndarray, patches: np.ndarray | None
) -> AttentionMap:
    both = both.astype(np.float16)
    frames = tuple(range(both.shape[-1])) if patches is not None else ()
    return AttentionMap(kind, measure, layers, both.mean(2), both.mean(0), both, patches, frames)


def _blobs(words: int, layers: int, frames: int) -> np.ndarray:
    """One warm spot in each frame, lower in later layers: (W, K, H, F, g, g)."""
    y, x = np.mgrid[0:GRID, 0:GRID]
    spots = [np.exp(-((y - 3 - 3 * k) ** 2 + (x - 9) ** 2) / 4.0) for k in range(layers)]
    grids = np.stack(spots) / np.stack(spots).sum((1, 2), keepdims=True)
    shape = (words, layers, HEADS, frames, GRID, GRID)
    return np.broadcast_to(grids[None, :, None, None], shape).astype(np.float16)


def picture(width: int, height: int, index: int) -> bytes:
    """A colourful frame."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // width, y * 255 // height, 0 * x + index * 5 % 256], -1)
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, "JPEG")
    return out.getvalue()


def views(summary: AttentionSummary, order: list[int]) -> tuple[FrameView, ...]:
    """The strongest frames, each with a warm spot."""
    rows, columns = np.mgrid[0:GRID, 0:GRID]
    made = []
    for place, index in enumerate(order):
        blob = np.exp(-((rows - 5 - place % 4) ** 2 + (columns - 9 + place) ** 2) / 4.0)
        made.append(
            FrameView(
                index=index,
                time=float(summary.times[index]),
                mass=float(summary.t2v.mean((0, 1))[index]),
                jpeg=summary.pictures[index],
                patches=np.repeat(blob[None].astype(np.float32), len(summary.layers), 0),
            )
        )
    return tuple(made)
