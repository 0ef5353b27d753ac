"""Which moments stand out, on attention that is known."""

from __future__ import annotations

import numpy as np
import pytest

from app.moments import Moment, seen_at, strongest
from model.types import AttentionSummary


def spread(frames: int, **bumps: float) -> np.ndarray:
    """Even attention but for some frames: `f12=0.5` puts half of all on frame 12."""
    mass = np.full(frames, (1 - sum(bumps.values())) / (frames - len(bumps)))
    for name, share in bumps.items():
        mass[int(name[1:])] = share
    return mass


def attention(mass: np.ndarray) -> AttentionSummary:
    t2v = np.broadcast_to(mass, (2, 3, len(mass))).astype(np.float32)
    times = np.arange(len(mass)) + 0.5
    return AttentionSummary(times, (0, 2, 4), ("a", "b"), t2v, (), 0.0)


def test_a_clear_a_likely_and_no_moment() -> None:
    clear, likely = (seen_at(attention(spread(48, f12=share))) for share in (0.7, 0.45))
    assert (clear.time, clear.clear) == (12.5, True)
    assert (likely.time, likely.clear) == (12.5, False)
    assert clear.share == pytest.approx(0.7 + 2 * 0.3 / 47)  # its neighbours count
    assert seen_at(attention(spread(48, f12=0.35))) is None
    assert seen_at(attention(spread(48))) is None
    assert seen_at(None) is None


def test_a_few_frames_are_not_a_moment_because_they_are_few() -> None:
    # Evenly spread over 6 frames, every three neighbours have half of it.
    assert seen_at(attention(spread(6))) is None
    assert seen_at(attention(np.ones(1))) is None


def test_neighbours_of_very_many_frames_are_more_than_three() -> None:
    mass = np.full(1000, 0.2 / 987)
    mass[500:513] = 0.8 / 13
    assert seen_at(attention(mass)).clear


def test_what_stands_out_is_marked_once_and_strongest_first() -> None:
    mass = spread(100, f20=0.25, f21=0.2, f70=0.3)
    times = np.arange(100.0)
    marked = strongest(times, mass)
    assert [moment.time for moment in marked] == [70.0, 20.0]
    assert isinstance(marked[0], Moment) and marked[1].share > marked[0].share
    assert strongest(times, spread(100)) == []
