"""The figures, and that nothing a visitor or a model writes becomes markup."""

from __future__ import annotations

import dataclasses
import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from app import fragments
from app.chat import Line
from app.panels.attention import attention_panel, column_edges, heat_overlay, merge_columns
from app.panels.draw import clock, percent, quantity, ticks
from app.panels.savings import savings_panel
from app.sessions import Turn
from model.types import Answer, AskRequest
from tests.fake_engine import INFO, LAYERS, FakeEngine

HOSTILE = '<img src=x onerror="alert(1)">'


@pytest.fixture(scope="module")
def answer() -> Answer:
    *_, last = FakeEngine().ask(AskRequest("/video.mp4", "What?"), lambda: False)
    return last


def parse(html: str) -> ElementTree.Element:
    """Read HTML that is also XML but for its empty elements."""
    closed = re.sub(r"<(img|br)([^>]*?)/?>", r"<\1\2/>", html).replace("&nbsp;", " ")
    return ElementTree.fromstring(closed.replace(" hidden>", ' hidden="">'))


def test_times_numbers_and_ticks() -> None:
    assert [clock(s) for s in (0, 9.99, 60, 3599, 3600)] == [
        "0:00",
        "0:09",
        "1:00",
        "59:59",
        "1:00:00",
    ]
    assert [percent(p) for p in (0, 0.004, 0.12, 0.995, 1)] == [
        "0 %",
        "0.4 %",
        "12 %",
        "99.5 %",
        "100 %",
    ]
    assert [quantity(n) for n in (48, 9408, 3.1e9, 2e12)] == ["48", "9.41 k", "3.10 G", "2.00 T"]
    for duration in (0.5, 7, 24, 300, 320, 3600, 14400):
        marks = ticks(duration)
        assert marks[0] == 0 and marks[-1] <= duration and 1 <= len(marks) <= 5


def test_one_row_for_each_layer_with_its_gates(answer: Answer) -> None:
    html = attention_panel(answer.attention, answer.video.duration, INFO)
    root = parse(html)
    rows = root.findall(".//svg[@class='cells']")
    assert len(rows) == len(LAYERS)
    peaks = answer.attention.t2v_mean().argmax(axis=1)
    for layer, row, peak in zip(LAYERS, rows, peaks, strict=True):
        at = clock(answer.attention.times[peak])
        assert row.get("aria-label") == f"Layer {layer}: most at {at}"
    for pair in INFO.gates:
        for value in pair:
            assert f"{value:+.2f}".replace("-", "−") in html


def test_cells_lie_at_their_time_and_tell_their_share(answer: Answer) -> None:
    root = parse(attention_panel(answer.attention, answer.video.duration, INFO))
    mass = answer.attention.t2v_mean()
    edges = column_edges(answer.attention.times, answer.video.duration)
    cells = root.findall(".//svg[@class='cells']")[1].findall("{*}rect") or root.findall(
        ".//svg[@class='cells']"
    )[1].findall("rect")
    strongest = max(cells, key=lambda cell: float(cell.get("fill-opacity")))
    column = int(mass[1].argmax())
    expected = 1000 * edges[column] / answer.video.duration
    assert float(strongest.get("x")) == pytest.approx(expected, abs=0.1)
    shown = float(strongest.get("fill-opacity"))
    assert shown == pytest.approx(mass[1].max() / mass.max(), abs=0.002)


def test_long_videos_are_drawn_in_few_columns_without_losing_attention() -> None:
    mass = np.random.default_rng(0).dirichlet(np.ones(1800), size=3)
    edges = column_edges(np.arange(1800) + 0.5, 1800)
    merged, borders = merge_columns(mass, edges)
    assert merged.shape == (3, 240)
    assert np.allclose(merged.sum(1), 1)
    assert len(borders) == 241 and borders[0] == 0 and borders[-1] == 1800
    same, _ = merge_columns(mass[:, :240], edges[:241])
    assert same.shape == (3, 240)


def test_strongest_frames_can_be_clicked_and_keep_their_shape(answer: Answer) -> None:
    root = parse(attention_panel(answer.attention, answer.video.duration, INFO))
    frames = root.findall(".//button[@class='frame']")
    assert [float(frame.get("data-seek")) for frame in frames] == pytest.approx(
        [view.time for view in answer.attention.frames], abs=0.001
    )
    assert "aspect-ratio:320/180" in frames[0].find("span").get("style")


def test_heat_lies_where_the_weight_is() -> None:
    patches = np.zeros((2, 14, 14), np.float32)
    patches[:, 3, 11] = 1
    with Image.open(io.BytesIO(heat_overlay(patches, 640, 360))) as overlay:
        assert overlay.mode == "RGBA"
        assert overlay.width / overlay.height == pytest.approx(16 / 9, rel=0.02)
        alpha = np.asarray(overlay)[..., 3].astype(float)
    y, x = (np.indices(alpha.shape) * alpha).sum((1, 2)) / alpha.sum()
    assert x / alpha.shape[1] == pytest.approx(11.5 / 14, abs=0.02)
    assert y / alpha.shape[0] == pytest.approx(3.5 / 14, abs=0.02)
    assert not np.asarray(Image.open(io.BytesIO(heat_overlay(patches * 0, 9, 9))))[..., 3].any()


def test_the_panel_of_a_thirty_minute_video_is_small_and_quick(answer: Answer) -> None:
    times = np.arange(1800) + 0.5
    t2v = np.full((40, 28, 1800), 1 / 1800, np.float32)
    long = dataclasses.replace(
        answer.attention, times=times, t2v=t2v, layers=tuple(range(28)), frames=()
    )
    assert len(attention_panel(long, 1800, None)) < 1_000_000


def test_empty_panels_invite() -> None:
    assert "Where it looked" in attention_panel(None, 0, None)
    assert "What it saved" in savings_panel(())


def test_no_text_of_others_becomes_markup(answer: Answer) -> None:
    shown = [
        fragments.chips([HOSTILE]),
        fragments.notice(HOSTILE),
        fragments.model_note(HOSTILE),
        fragments.status_line(Line("problem", HOSTILE)),
        fragments.status_line(Line("working", HOSTILE, "reading")),
    ]
    for html in shown:
        assert "<img" not in html
        assert "&lt;img" in html


@pytest.mark.parametrize(
    "text",
    ["# title", "1. one", "- one", "**b** _i_ `c`", "![x](http://a/b.png)", "a | b", "> quote",
     "<b>x</b>", "&lt;", "    code", "===", "http://example.org www.example.org me@example.org"],
)  # fmt: skip
def test_messages_show_markdown_as_text(text: str) -> None:
    markdown_it = pytest.importorskip("markdown_it")
    html = markdown_it.MarkdownIt("commonmark").enable("table").render(fragments.plain(text))
    inside = html.strip().removeprefix("<p>").removesuffix("</p>")
    assert "<" not in inside
    import html as entities

    assert entities.unescape(inside) == text.strip()


def test_times_within_the_video_become_links() -> None:
    text = "At 0:07, then 1:02:03; not 12:34:56:78, 0:61 or 99:59."
    assert fragments.with_time_links(text, 4000) == (
        "At [0:07](#t=7), then [1:02:03](#t=3723); not 12:34:56:78, 0:61 or 99:59."
    )


def test_the_conversation_tells_how_each_turn_ended() -> None:
    turns = [
        Turn("q1", "a1", "answered"),
        Turn("q2", "part", "stopped"),
        Turn("q3", "", "stopped"),
        Turn("q4", "", "failed", "It broke."),
        Turn("q5"),
    ]
    shown = [(one["role"], one["content"]) for one in fragments.messages(turns, 10)]
    assert shown == [
        ("user", "q1"), ("assistant", "a1"),
        ("user", "q2"), ("assistant", "part *(stopped)*"),
        ("user", "q3"), ("assistant", "*Stopped before the first word.*"),
        ("user", "q4"), ("assistant", "*It broke.*"),
        ("user", "q5"),
    ]  # fmt: skip
