"""Which moments an answer comes from, as far as its attention tells.

The measure is the share of the attention (text to visual; mean over words, layers and heads) on a
frame and its neighbours. `python -m tests.bench.moments` asks the bundled model about 13 made-up
videos of 48 and 128 frames (2026-11-23): the strongest frame lay where the answer is seen, or one
frame off, for all 94 answers (of 226) with a share of .45 or more, 55 of them from .6 on; for 97 %
of those between a third and .45, and for 90 % of those below .2. Of 62 answers about what is not to
be seen at all, 6 % reached .45 and one .6; 13 % reach a third, too many.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model.types import AttentionSummary

LIKELY, CLEAR = 0.45, 0.6  # least share of the attention
_TIMES_EVEN = 2.0  # and this many times what evenly spread attention would have there
_MARK_TIMES_EVEN = 3.0  # least height of a moment that is marked on the timeline
_MARK_SHARE = 0.08


@dataclass(frozen=True)
class Moment:
    """A moment of the video and how much of the attention is there."""

    time: float  # seconds
    share: float  # of the attention, on this frame and its neighbours, 0..1

    @property
    def clear(self) -> bool:
        """Whether the answer can be said to come from there; else it only seems so."""
        return self.share >= CLEAR


def _reach(mass: np.ndarray) -> int:
    return max(1, round(len(mass) / 100))


def _around(mass: np.ndarray) -> tuple[np.ndarray, int]:
    """Share of each frame with its neighbours, and how many there are on either side."""
    reach = _reach(mass)
    total = np.concatenate([[0.0], np.cumsum(mass)])
    at = np.arange(len(mass))
    first, last = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(mass))
    return total[last] - total[first], reach


def around_peak(mass: np.ndarray) -> tuple[int, float]:
    """The strongest frame, and the share of it and its neighbours."""
    peak = int(mass.argmax())
    return peak, float(_around(mass)[0][peak])


def seen_at(attention: AttentionSummary | None) -> Moment | None:
    """Where an answer comes from; None when its attention is too flat to say."""
    if attention is None or not len(attention.times):
        return None
    mass = attention.timeline()
    peak, share = around_peak(mass)
    even = min(1.0, (2 * _reach(mass) + 1) / len(mass))
    if share < LIKELY or share < _TIMES_EVEN * even:
        return None
    return Moment(float(attention.times[peak]), share)


def strongest(times: np.ndarray, mass: np.ndarray, most: int = 3) -> list[Moment]:
    """The moments that stand out, strongest first; none of a flat attention."""
    around, reach = _around(mass)
    least = max(_MARK_SHARE, _MARK_TIMES_EVEN * (2 * reach + 1) / len(mass))
    found: list[int] = []
    for frame in np.argsort(-mass, kind="stable"):
        apart = all(abs(int(frame) - other) > 2 * reach for other in found)
        if apart and around[frame] >= least:
            found.append(int(frame))
        if len(found) == most:
            break
    return [Moment(float(times[frame]), float(around[frame])) for frame in found]
