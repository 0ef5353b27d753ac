"""Layers over time as rows of colour. Each row is a small picture used as a mask, so that the
page's own colours show through, light or dark.
"""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from app.looking import Look
from app.panels.draw import axis, clock, esc, percent
from model.types import AttentionMap, ModelInfo

COLUMNS = 960  # as many as a wide screen shows
DECADES = 3  # of the logarithmic scale
DENSE = 10  # from so many rows on they are low, and gates only bars

KIND_NAMES = {
    "t2v": ("Text to video", "what the answer's words look at in the frames' own patches"),
    "v2v": ("Video to video", "what the video's pooled tokens look at while the video is read"),
    "self": ("Language model", "the LLM's own attention to the frames' pooled tokens"),
}


def column_edges(times: np.ndarray, duration: float) -> np.ndarray:
    """Borders of the frames' columns: halfway between neighbours, (T + 1,) seconds."""
    middles = (times[1:] + times[:-1]) / 2
    return np.concatenate([[0.0], middles, [duration]])


def spread(rows: np.ndarray, times: np.ndarray, duration: float) -> np.ndarray:
    """(K, T) -> (K, COLUMNS): each column has its frame's value; of several frames the largest."""
    edges = np.round(column_edges(times, duration) / duration * COLUMNS).astype(int)
    out = np.zeros((len(rows), COLUMNS), np.float32)
    for frame in range(len(times)):
        left = min(edges[frame], COLUMNS - 1)
        part = out[:, left : max(edges[frame + 1], left + 1)]
        sign = np.where(np.abs(rows[:, frame, None]) > np.abs(part), rows[:, frame, None], part)
        part[:] = sign
    return out


def levels(rows: np.ndarray, top: float, log: bool) -> np.ndarray:
    """Values -> 0..1, on a linear scale or on one of `DECADES` powers of ten below `top`."""
    share = np.clip(rows / (top or 1.0), 0, 1)
    if not log:
        return share
    return np.clip(1 + np.log10(np.maximum(share, 1e-30)) / DECADES, 0, 1)


def mask(row: np.ndarray) -> str:
    """A picture one pixel high whose opacity is `row` (0..1), as CSS takes it."""
    alpha = Image.fromarray((255 * row[None]).round().astype(np.uint8))
    picture = Image.new("LA", alpha.size)
    picture.putalpha(alpha)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return f"url(data:image/png;base64,{base64.b64encode(out.getvalue()).decode()})"


def grid(look: Look, model: ModelInfo | None) -> str:
    """Draw the chosen map with its gates, its time axis and its legend."""
    shown = look.map
    assert shown is not None
    values = look.rows()
    top = float(values.max()) if values.size else 0.0
    drawn = levels(spread(values, look.attention.times, look.duration), top, look.choice.log)
    gates = dict(zip(model.dcal_layers, model.gates, strict=True)) if model else {}
    rows = [mean_row(values.mean(0), look)]
    for place, layer in enumerate(shown.layers):
        peak = look.attention.times[int(values[place].argmax())]
        rows.append(
            f'<span class="row-name">{layer}</span>'
            f'<span class="cells" data-row="{place}" role="img" style="--map:{mask(drawn[place])}" '
            f'aria-label="Layer {layer}: most at {clock(peak)}, {percent(values[place].max())}">'
            f"</span>{_gates(gates.get(layer))}"
        )
    return table(
        rows, look, "layer", _marks(look), "cell-plot", dense=len(shown.layers) >= DENSE
    ) + legend(shown, top, look.choice.log)


def table(
    rows: list[str], look: Look, name: str, marks: str, css: str, *, dense: bool, gates: bool = True
) -> str:
    """Rows over the video's time axis: names, cells, gates, and the plot over the cells."""
    placed = "".join(
        f'<div class="heat-row" style="--row:{place}">{row}</div>'
        for place, row in enumerate(rows, start=2)
    )
    keys = (
        ' tabindex="0" role="group" aria-label="Layers over time. Arrow keys choose a layer and '
        'a moment, Enter shows that frame."'
        if css == "cell-plot"
        else ""
    )
    head = f'<span class="column-name">{name}</span><span class="column-name"></span>'
    right = '<span class="column-name gate-name">gates</span>' if gates else "<span></span>"
    return (
        f'<div class="heat-map{" dense" if dense else ""}">{head}{right}{placed}'
        f'<div class="plot {css}" data-duration="{look.duration:.3f}" '
        f'style="--rows:{len(rows)}"{keys}>{marks}'
        '<span class="playhead"></span><span class="pointer"></span></div>'
        f'<div class="axis-cell" style="--row:{len(rows) + 2}">{axis(look.duration)}</div></div>'
    )


def mean_row(mean: np.ndarray, look: Look, name: str = "all", css: str = "") -> str:
    """The mean of all layers as a curve."""
    x = 1000 * column_edges(look.attention.times, look.duration) / look.duration
    top = float(mean.max()) or 1.0
    points = "".join(
        f"L{x[i]:.1f} {20 - 19 * share / top:.2f}L{x[i + 1]:.1f} {20 - 19 * share / top:.2f}"
        for i, share in enumerate(mean)
    )
    return (
        f'<span class="row-name">{esc(name)}</span>'
        f'<svg class="curve {css}" viewBox="0 0 1000 20" preserveAspectRatio="none" '
        f'aria-hidden="true"><path d="M0 20{points}L1000 20Z"/></svg><span class="gates"></span>'
    )


def _marks(look: Look) -> str:
    """Show where the chosen cell is, and which frames were hidden."""
    edges = 100 * column_edges(look.attention.times, look.duration) / look.duration
    marks = "".join(
        f'<span class="hidden-frame" style="left:{edges[f]:.2f}%;'
        f'width:{edges[f + 1] - edges[f]:.2f}%"></span>'
        for f in look.attention.hidden
    )
    cell = look.choice.cell
    if cell is not None:
        row, frame = cell
        marks += (
            f'<span class="chosen-cell" data-row="{row}" style="left:{edges[frame]:.2f}%;'
            f'width:{edges[frame + 1] - edges[frame]:.2f}%"></span>'
        )
    return marks


def legend(shown: AttentionMap, top: float, log: bool) -> str:
    """Say what the colours stand for."""
    if shown.measure == "focus":
        told = "how narrow the look is in a frame (0 % evenly over it, 100 % on a single patch)"
    elif shown.kind == "v2v":
        told = "share of the looks of all frames"
    else:
        told = "share of a layer's attention on one frame"
    low = f"{100 * top / 10**DECADES:.1g} % or less" if log else "0 %"
    return (
        f'<div class="legend"><span>{told}</span><span class="scale-ends"><span>{low}</span>'
        f'<span class="ramp"></span><span>{percent(top)}</span></span></div>'
    )


def _gates(pair: tuple[float, float] | None) -> str:
    if pair is None:
        return '<span class="gates"></span>'
    bars = "".join(
        f'<span class="gate {css}" title="{told}: gate {signed(value)} (0 is closed, 1 is fully '
        f'open)"><i>{name}</i>'
        f'<b style="--open:{min(1.0, abs(value)):.3f}"></b><em>{signed(value)}</em></span>'
        for name, css, told, value in (
            ("V2V", "v2v", "video to video", pair[0]),
            ("T2V", "t2v", "text to video", pair[1]),
        )
    )
    return f'<span class="gates">{bars}</span>'


def signed(value: float) -> str:
    """Write a gate with its sign."""
    return f"{value:+.2f}".replace("-", "−")
