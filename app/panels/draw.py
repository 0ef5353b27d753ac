"""What the figures share: escaping, times, numbers and the axis of a video."""

from __future__ import annotations

import html

import numpy as np

_TICK_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)


def esc(text: object) -> str:
    """Escape for HTML text and attributes."""
    return html.escape(str(text), quote=True)


def clock(time: float) -> str:
    """Write a time as m:ss, from an hour on as h:mm:ss; cut off, as players do."""
    whole = max(0, int(time + 1e-6))
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def percent(share: float) -> str:
    """Write a share with as many digits as tell something."""
    value = 100 * share
    if value >= 99.95:
        return "100 %"
    if value > 99 or (0 < value < 10):
        return f"{value:.1f} %"
    return f"{value:.0f} %"


def seconds(value: float) -> str:
    """Write a duration with three digits at most."""
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} s"


def quantity(number: float) -> str:
    """Write a large number with three digits and a prefix: 94.1 k, 3.10 G."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:#.3g} {prefix}".replace(". ", " ")
    return f"{number:.3g}"


def ticks(duration: float, most: int = 5) -> list[float]:
    """Round times for the axis, from 0 on, at most `most` of them."""
    step = next((s for s in _TICK_STEPS if duration / s <= most - 1), _TICK_STEPS[-1])
    while duration / step > most - 1:
        step *= 2
    return [float(at) for at in np.arange(0, duration + 1e-9, step)]


def axis(duration: float) -> str:
    """Draw the time axis under a figure as wide as the video is long."""
    marks = []
    for at in ticks(duration):
        left = 100 * at / duration
        edge = " at-start" if left < 3 else " at-end" if left > 95 else ""
        marks.append(f'<span class="tick{edge}" style="left:{left:.2f}%">{clock(at)}</span>')
    return f'<div class="axis" aria-hidden="true">{"".join(marks)}</div>'


def seek_button(time: float, label: str, css: str = "seek") -> str:
    """A button that makes the player jump; `label` is HTML."""
    return (
        f'<button type="button" class="{css}" data-seek="{time:.3f}" '
        f'aria-label="Go to {clock(time)} in the video">{label}</button>'
    )


def empty_panel(title: str, text: str) -> str:
    """A panel that has nothing to show yet."""
    ghost = '<div class="ghost" aria-hidden="true"><span></span><span></span><span></span></div>'
    return (
        f'<section class="panel panel-empty"><h2>{esc(title)}</h2><p>{esc(text)}</p>'
        f"{ghost}</section>"
    )
