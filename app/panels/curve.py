"""Cost over the length of the video, on logarithmic axes, with "you are here"."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from app.ledger import NAMES
from app.panels.draw import clock, esc, quantity
from model.types import Answer, CurvePoint, SystemCost

_CSS = {"crosslmm": "ours", "llava-onevision": "peer", "unpooled": "whole"}
_TIMES = (1, 10, 60, 600, 3600, 36000)
_TABLE_TIMES = (60.0, 600.0, 3600.0)


def cost_curves(answer: Answer) -> str:
    """Two plots, operations and memory, their legend and the same as a table."""
    frames, duration = len(answer.frame_times), answer.video.duration
    systems = answer.savings.systems
    if not frames or duration <= 0 or any(len(one.curve) < 2 for one in systems):
        return ""
    spacing = duration / frames
    plots = "".join(
        _plot(name, unit, value, systems, spacing, frames)
        for name, unit, value in (
            ("Operations", "", lambda point: point.operations),
            ("Key/value memory", "B", lambda point: point.kv_bytes),
        )
    )
    return (
        f'<h3>Over the length of the video</h3><div class="curves">{plots}</div>{_legend()}'
        f'<p class="muted note">One frame every {_spacing(spacing)}, as in this turn, with this '
        "question. Dotted: more tokens than the language model has positions.</p>"
        f"{_table(systems, spacing)}"
    )


def _spacing(spacing: float) -> str:
    return f"{spacing:.2g} s" if spacing < 10 else f"{spacing:.0f} s"


def value_at(
    curve: Sequence[CurvePoint], frames: float, value: Callable[[CurvePoint], float]
) -> float:
    """The curve between its points: a straight line where both axes are logarithmic."""
    after = next((i for i, p in enumerate(curve) if p.frames >= frames), len(curve) - 1)
    low, high = curve[max(0, after - 1)], curve[max(1, after)]
    share = math.log(frames / low.frames) / math.log(high.frames / low.frames)
    return math.exp((1 - share) * math.log(value(low)) + share * math.log(value(high)))


def _plot(
    name: str,
    unit: str,
    value: Callable[[CurvePoint], float],
    systems: Sequence[SystemCost],
    spacing: float,
    here: int,
) -> str:
    first, last = _reach(here * spacing, spacing, systems[0].curve[-1].frames)
    lows = [value_at(one.curve, first / spacing, value) for one in systems]
    highs = [value_at(one.curve, last / spacing, value) for one in systems]
    bottom, top = math.log(min(lows) / 1.5), math.log(max(highs) * 1.5)

    def x(time: float) -> float:
        return 100 * math.log(time / first) / math.log(last / first)

    def y(amount: float) -> float:
        return 100 - 100 * (math.log(amount) - bottom) / (top - bottom)

    def line(one: SystemCost, start: float, end: float, css: str) -> str:
        inner = [p.frames for p in one.curve if start < p.frames < end]
        points = (
            f"{x(at * spacing):.2f} {y(value_at(one.curve, at, value)):.2f}"
            for at in (start, *inner, end)
        )
        return f'<path class="{css}" d="M{" L".join(points)}"/>'

    parts = []
    for one in reversed(systems):  # ours on top
        most = min(last / spacing, max(first / spacing, float(one.most_frames)))
        css = _CSS[one.system]
        parts.append(line(one, first / spacing, most, css))
        if most < last / spacing:
            parts.append(line(one, most, last / spacing, css + " beyond"))
    dots = "".join(
        f'<span class="dot {_CSS[one.system]}" style="left:{x(here * spacing):.2f}%;'
        f'top:{y(value_at(one.curve, here, value)):.2f}%"></span>'
        for one in reversed(systems)
    )
    at = x(here * spacing)
    side = " to-left" if at > 55 else ""
    told = "; ".join(
        f"{NAMES[one.system]} {quantity(value_at(one.curve, here, value))}{unit}" for one in systems
    )
    return (
        f'<figure class="curve-plot" role="img" aria-label="{esc(name)} over the length of the '
        f'video. Here, at {clock(here * spacing)}: {esc(told)}.">'
        f"<figcaption>{esc(name)}</figcaption>"
        f'<div class="field">{_value_ticks(bottom, top, unit, y)}'
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
        f'{"".join(parts)}</svg><span class="here-line{side}" style="left:{at:.2f}%">'
        f"<em>you are here</em></span>{dots}{_time_ticks(first, last, x)}</div></figure>"
    )


def _reach(here: float, spacing: float, most: int) -> tuple[float, float]:
    """First and last time on the axis: from seconds to an hour, or more around a long video."""
    first = max(spacing, min(10.0, here / 3))
    return first, min(most * spacing, max(3600.0, 4 * here))


def _value_ticks(bottom: float, top: float, unit: str, y: Callable[[float], float]) -> str:
    decades = range(math.ceil(bottom / math.log(10)), math.floor(top / math.log(10)) + 1)
    step = max(1, math.ceil(len(decades) / 4))
    return "".join(
        f'<span class="level" style="top:{y(10.0**power):.2f}%">'
        f"<em>{_round(power)}{unit}</em></span>"
        for power in decades
        if power % step == 0
    )


def _round(power: int) -> str:
    return quantity(10.0**power).replace(".00", "").replace("0.0 ", "0 ")


def _time_ticks(first: float, last: float, x: Callable[[float], float]) -> str:
    marks = []
    for at in _TIMES:
        if first <= at <= last:
            left = x(at)
            edge = " at-start" if left < 5 else " at-end" if left > 92 else ""
            marks.append(f'<span class="tick{edge}" style="left:{left:.2f}%">{clock(at)}</span>')
    return f'<div class="axis">{"".join(marks)}</div>'


def _legend() -> str:
    shown = "".join(
        f'<span><i class="stroke {_CSS[system]}"></i>{esc(name)}</span>'
        for system, name in NAMES.items()
    )
    return f'<p class="key">{shown}</p>'


def _table(systems: Sequence[SystemCost], spacing: float) -> str:
    """The curves in numbers, for those who cannot or do not want to see them."""
    rows = [
        _table_row(one, at, at / spacing)
        for at in _TABLE_TIMES
        if 1 <= at / spacing <= systems[0].curve[-1].frames
        for one in systems
    ]
    heads = ("Length", "System", "Operations", "Memory", "Fits")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return (
        '<details class="more"><summary>The curves as a table</summary>'
        f'<table class="points"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></details>"
    )


def _table_row(one: SystemCost, at: float, frames: float) -> str:
    operations = value_at(one.curve, frames, lambda point: point.operations)
    kept = value_at(one.curve, frames, lambda point: point.kv_bytes)
    fits = "yes" if frames <= one.most_frames else "no"
    return (
        f'<tr><th scope="row">{clock(at)}</th><td>{esc(NAMES[one.system])}</td>'
        f"<td>{quantity(operations)}</td><td>{quantity(kept)}B</td><td>{fits}</td></tr>"
    )
