"""The filmstrip and the answer's attention, drawn under the player."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image

from app.filmstrip import Filmstrip
from app.panels.timeline import timeline
from model.filmstrip import MOST_PICTURES, frames_read
from model.types import AttentionSummary, FramesRead


def jpeg(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (320, 180), (shade, 0, 0)).save(out, "JPEG")
    return out.getvalue()


def test_pictures_are_spread_over_all_frames_however_they_are_read() -> None:
    times = [2.0 * frame for frame in range(100)]
    pictures = [jpeg(frame) for frame in range(100)]
    whole = frames_read(0, times, pictures, 100)
    strip = Filmstrip()
    for first in range(0, 100, 16):
        part = slice(first, first + 16)
        strip.add(frames_read(first, times[part], pictures[part], 100))
    assert strip.times == times
    assert strip.pictures == list(whole.pictures)
    assert len(whole.pictures) == MOST_PICTURES
    gaps = np.diff([time for time, _ in whole.pictures])
    assert gaps.min() >= 8.0 and gaps.max() <= 10.0
    with Image.open(io.BytesIO(whole.pictures[0][1])) as small:
        assert small.size == (144, 81)
    assert len(frames_read(0, times[:3], pictures[:3], 3).pictures) == 3


def test_the_same_frames_again_change_nothing_and_others_begin_anew() -> None:
    strip, event = Filmstrip(), FramesRead(0, (0.0, 1.0), ((0.0, b"a"),))
    assert strip.add(event)
    assert not strip.add(event)
    assert strip.add(FramesRead(0, (0.5,), ((0.5, b"b"),)))
    assert (strip.times, strip.pictures) == ([0.5], [(0.5, b"b")])


def test_a_picture_stands_over_the_time_that_is_closest_to_it() -> None:
    strip = Filmstrip([0.0, 2.0, 6.0], [(0.0, b"a"), (2.0, b"b"), (6.0, b"c")])
    drawn = timeline(10.0, strip)
    places = re.findall(r'class="shot" style="left:([\d.]+)%;width:([\d.]+)%"', drawn)
    assert [tuple(map(float, place)) for place in places] == [(0, 10), (10, 30), (40, 60)]
    assert "M0.0 0v6M200.0 0v6M600.0 0v6" in drawn
    assert timeline(0.0, strip) == ""


@pytest.mark.parametrize(("share", "pins"), [(0.5, 1), (0.0, 0)])
def test_what_stands_out_is_pinned_at_its_time(share: float, pins: int) -> None:
    mass = np.full(50, (1 - share) / 50)
    mass[20] += share
    times = np.arange(50) * 2.0
    t2v = np.broadcast_to(mass, (1, 1, 50)).astype(np.float32)
    attention = AttentionSummary(times, (0,), ("a",), t2v, (), 40.0)
    drawn = timeline(100.0, Filmstrip(), attention)
    assert re.findall(r'left:([\d.]+)%" data-seek', drawn) == ["40.00"] * pins
    assert ("No moment stands out" in drawn) == (not pins)
