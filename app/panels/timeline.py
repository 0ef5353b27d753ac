"""Under the player, on its own time axis: the sampled frames, and where the last answer looked."""

from __future__ import annotations

import base64

import numpy as np

from app.filmstrip import Filmstrip
from app.moments import Moment, strongest
from app.panels.draw import axis, clock, esc, percent
from model.types import AttentionSummary

_MOST_TICKS = 600  # more would be a solid bar
_LABEL_SHARE = 0.09  # of the width: closer labels would overlap
_WAITING = "Where the answer looks is drawn here, over the video's time."
_FLAT = "No moment stands out: the answer's attention is spread over the video."


def timeline(duration: float, strip: Filmstrip, attention: AttentionSummary | None = None) -> str:
    """Draw both rows; `duration` is the video's in seconds, 0 without a video."""
    if duration <= 0:
        return ""
    ends = [strip.times[-1] if strip.times else 0.0]
    ends += [float(attention.times[-1])] if attention is not None else []
    duration = max(duration, *ends)
    return (
        '<section class="timeline" aria-label="The video\'s time">'
        f'<div class="track">{_pictures(strip, duration)}{_ticks(strip.times, duration)}'
        f"{_looked(attention, duration)}"
        f'<div class="plot" data-duration="{duration:.3f}">'
        '<span class="playhead"></span><span class="pointer"></span></div></div>'
        f"{axis(duration)}</section>"
    )


def _pictures(strip: Filmstrip, duration: float) -> str:
    """Each picture stands over the time that is closer to it than to the others."""
    times = np.array([time for time, _ in strip.pictures])
    borders = [0.0, *(times[1:] + times[:-1]) / 2, duration]
    shown = "".join(
        f'<button type="button" class="shot" style="left:{100 * borders[i] / duration:.2f}%;'
        f'width:{100 * (borders[i + 1] - borders[i]) / duration:.2f}%" data-seek="{time:.3f}" '
        f'tabindex="{-1 if i else 0}" title="{clock(time)}" '
        f'aria-label="Frame at {clock(time)}: go there">'
        f'<img src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" alt=""></button>'
        for i, (time, jpeg) in enumerate(strip.pictures)
    )
    empty = (
        "" if shown else "<p>The frames that the model sees come here when it reads the video.</p>"
    )
    return f'<div class="strip" role="group" aria-label="Sampled frames">{shown}{empty}</div>'


def _ticks(times: list[float], duration: float) -> str:
    """A mark for every frame that was sampled, at its true time."""
    step = max(1, len(times) // _MOST_TICKS)
    path = "".join(f"M{1000 * time / duration:.1f} 0v6" for time in times[::step])
    return (
        '<svg class="sampled" viewBox="0 0 1000 6" preserveAspectRatio="none" aria-hidden="true">'
        f'<path d="{path}"/></svg>'
    )


def _looked(attention: AttentionSummary | None, duration: float) -> str:
    if attention is None:
        return f'<div class="looked"><p>{_WAITING}</p></div>'
    mass = attention.timeline()
    moments = strongest(attention.times, mass)
    told = "" if moments else f"<p>{_FLAT}</p>"
    drawn = _curve(attention.times, mass, duration) + _pins(moments, duration)
    return f'<div class="looked">{drawn}{told}</div>'


def _curve(times: np.ndarray, mass: np.ndarray, duration: float) -> str:
    edges = 1000 * np.concatenate([[0.0], (times[1:] + times[:-1]) / 2, [duration]]) / duration
    heights = 30 - 29 * mass / (float(mass.max()) or 1.0)
    steps = "".join(
        f"L{edges[i]:.1f} {height:.1f}H{edges[i + 1]:.1f}" for i, height in enumerate(heights)
    )
    return (
        '<svg class="curve" viewBox="0 0 1000 30" preserveAspectRatio="none" role="img" '
        'aria-label="Attention of the answer over the video\'s time">'
        f'<path d="M0 30{steps}L1000 30Z"/></svg>'
    )


def _pins(moments: list[Moment], duration: float) -> str:
    """Marks of the strongest moments; a weaker one too close to another has no label."""
    pins, labelled = [], []
    for rank, moment in enumerate(moments):
        at = moment.time / duration
        apart = all(abs(at - other) > _LABEL_SHARE for other in labelled)
        labelled += [at] if apart else []
        edge = " at-start" if at < 0.03 else " at-end" if at > 0.97 else ""
        label = f"<b>{clock(moment.time)}</b>" if apart else ""
        told = f"{percent(moment.share)} of the attention"
        pins.append(
            f'<button type="button" class="pin{edge}{" first" if not rank else ""}" '
            f'style="left:{100 * at:.2f}%" data-seek="{moment.time:.3f}" title="{esc(told)}" '
            f'aria-label="Looked at {clock(moment.time)}, {esc(told)}: go there">{label}</button>'
        )
    return "".join(pins)
