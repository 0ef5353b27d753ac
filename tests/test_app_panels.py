"""The figures, and that nothing a visitor or a model writes becomes markup."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from app import fragments
from app.chat import Line
from app.panels.attention import attention_panel
from app.panels.draw import clock, percent, quantity, ticks
from app.panels.savings import savings_panel
from app.sessions import Turn
from model.types import Answer, AskRequest
from tests.fake_engine import FakeEngine

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


def test_empty_panels_invite() -> None:
    assert "Where it looked" in attention_panel(None, None)
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
