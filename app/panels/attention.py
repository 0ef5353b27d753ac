"""The panel "Where it looked": attention over the video's time, and the strongest frames."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from app.panels.draw import axis, clock, empty_panel, esc, percent, seek_button
from model.types import AttentionSummary, FrameView, ModelInfo

TITLE = "Where it looked"

_MOST_COLUMNS = 240  # more would be thinner than a pixel
_HEAT = (255, 122, 24)  # as --heat in page.css, over a picture in either theme
_HEAT_ALPHA = 0.82
_OVERLAY_WIDTH = 160  # pixels; the browser smooths the rest


def attention_panel(
    attention: AttentionSummary | None, duration: float, model: ModelInfo | None
) -> str:
    """Draw the panel of one answer."""
    if attention is None:
        return empty_panel(
            TITLE,
            "After an answer: which moments its words looked at, in every dual cross-attention "
            "layer, and the frames they looked at most.",
        )
    duration = max(duration, float(attention.times[-1]), 1e-3)
    mass = attention.t2v_mean()  # (layers, T)
    gates = dict(zip(model.dcal_layers, model.gates, strict=True)) if model else {}
    parts = [
        f"<h2>{TITLE}</h2>",
        _headline(attention, mass),
        _heat_map(attention, mass, duration, gates),
        _strongest(attention.frames),
    ]
    return f'<section class="panel" id="panel-attention">{"".join(parts)}</section>'


def _headline(attention: AttentionSummary, mass: np.ndarray) -> str:
    at = int(np.argmax(mass.mean(axis=0)))
    share = percent(float(mass.mean(axis=0)[at]))
    peak = seek_button(attention.peak, clock(attention.peak))
    return (
        f'<p class="headline">Most at {peak}<span class="muted">, with {share} of the attention '
        "of the answer's words.</span></p>"
    )


def column_edges(times: np.ndarray, duration: float) -> np.ndarray:
    """Borders of the frames' columns: halfway between neighbours, (T + 1,) seconds."""
    middles = (times[1:] + times[:-1]) / 2
    return np.concatenate([[0.0], middles, [duration]])


def merge_columns(
    mass: np.ndarray, edges: np.ndarray, most: int = _MOST_COLUMNS
) -> tuple[np.ndarray, np.ndarray]:
    """Sum neighbouring frames until at most `most` columns are left."""
    frames = mass.shape[1]
    if frames <= most:
        return mass, edges
    starts = np.unique(np.linspace(0, frames, most + 1).astype(int)[:-1])
    return np.add.reduceat(mass, starts, axis=1), np.append(edges[starts], edges[-1])


def _heat_map(
    attention: AttentionSummary,
    mass: np.ndarray,
    duration: float,
    gates: dict[int, tuple[float, float]],
) -> str:
    mass, edges = merge_columns(mass, column_edges(attention.times, duration))
    top = float(mass.max()) or 1.0
    x = 1000 * edges / duration
    rows = [_mean_row(mass.mean(axis=0), x)]
    for layer, row in zip(attention.layers, mass, strict=True):
        cells = "".join(
            f'<rect x="{x[i]:.1f}" width="{x[i + 1] - x[i]:.2f}" height="10" '
            f'fill-opacity="{share / top:.3f}"/>'
            for i, share in enumerate(row)
            if share > 0.004 * top
        )
        peak = clock((edges[int(row.argmax())] + edges[int(row.argmax()) + 1]) / 2)
        rows.append(
            f'<span class="row-name">Layer {layer}</span>'
            f'<svg class="cells" viewBox="0 0 1000 10" preserveAspectRatio="none" role="img" '
            f'aria-label="Layer {layer}: most at {peak}">{cells}</svg>'
            f"{_gates(gates.get(layer))}"
        )
    placed = "".join(
        f'<div class="heat-row" style="--row:{place}">{row}</div>'
        for place, row in enumerate(rows, start=2)
    )
    legend = (
        '<div class="legend"><span>share of a layer\'s attention</span>'
        f'<span class="ramp"></span><span>up to {percent(top)}</span></div>'
    )
    return (
        '<div class="heat-map">'
        '<span class="column-name"></span><span class="column-name">text to video</span>'
        '<span class="column-name gate-name">gates</span>'
        f"{placed}"
        f'<div class="plot" data-duration="{duration:.3f}" style="--rows:{len(rows)}">'
        '<span class="playhead"></span><span class="pointer"></span></div>'
        f'<div class="axis-cell" style="--row:{len(rows) + 2}">{axis(duration)}</div></div>{legend}'
    )


def _mean_row(mean: np.ndarray, x: np.ndarray) -> str:
    top = float(mean.max()) or 1.0
    points = "".join(
        f"L{x[i]:.1f} {20 - 19 * share / top:.2f}L{x[i + 1]:.1f} {20 - 19 * share / top:.2f}"
        for i, share in enumerate(mean)
    )
    return (
        '<span class="row-name">All layers</span>'
        '<svg class="curve" viewBox="0 0 1000 20" preserveAspectRatio="none" aria-hidden="true">'
        f'<path d="M0 20{points}L1000 20Z"/></svg><span class="gates"></span>'
    )


def _gates(pair: tuple[float, float] | None) -> str:
    if pair is None:
        return '<span class="gates"></span>'
    bars = "".join(
        f'<span class="gate {css}" title="{told}: gate {_signed(value)}"><i>{name}</i>'
        f'<b style="--open:{min(1.0, abs(value)):.3f}"></b><em>{_signed(value)}</em></span>'
        for name, css, told, value in (
            ("V2V", "v2v", "video to video", pair[0]),
            ("T2V", "t2v", "text to video", pair[1]),
        )
    )
    return f'<span class="gates">{bars}</span>'


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _strongest(frames: tuple[FrameView, ...]) -> str:
    if not frames:
        return ""
    shown = "".join(_frame(view) for view in frames)
    return f'<h3>Strongest frames</h3><div class="frames">{shown}</div>'


def _frame(view: FrameView) -> str:
    with Image.open(io.BytesIO(view.jpeg)) as picture:
        width, height = picture.size
    picture_data = base64.b64encode(view.jpeg).decode()
    overlay_data = base64.b64encode(heat_overlay(view.patches, width, height)).decode()
    at, share = clock(view.time), percent(view.mass)
    inside = (
        f'<span class="picture" style="aspect-ratio:{width}/{height}">'
        f'<img src="data:image/jpeg;base64,{picture_data}" alt="Frame at {esc(at)}">'
        f'<img class="overlay" src="data:image/png;base64,{overlay_data}" alt=""></span>'
        f'<span class="caption"><b>{esc(at)}</b><span>{esc(share)}</span></span>'
    )
    return seek_button(view.time, inside, css="frame")


def heat_overlay(patches: np.ndarray, width: int, height: int) -> bytes:
    """Paint patch weights (layers, grid, grid) over a picture of this shape: PNG, clear to hot."""
    weights = patches.mean(axis=0)
    weights = weights / (float(weights.max()) or 1.0)
    size = (_OVERLAY_WIDTH, max(1, round(_OVERLAY_WIDTH * height / width)))
    grid = Image.fromarray((255 * weights).astype(np.uint8), mode=None)
    alpha = grid.resize(size, Image.Resampling.BICUBIC).point(lambda v: int(v * _HEAT_ALPHA))
    picture = Image.new("RGB", size, _HEAT)
    picture.putalpha(alpha)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()
