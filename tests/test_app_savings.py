"""The panel "What it saved": its ledger adds up, its curves lie where the numbers are."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ElementTree

import pytest

from app.ledger import as_data, count
from app.panels.curve import cost_curves, value_at
from app.panels.draw import quantity
from app.panels.savings import savings_panel
from model.types import Answer, AskRequest
from tests.fake_engine import FakeEngine


def ask(engine: FakeEngine, question: str) -> Answer:
    *_, last = engine.ask(AskRequest("/video.mp4", question), lambda: False)
    return last


@pytest.fixture(scope="module")
def answers() -> list[Answer]:
    engine = FakeEngine()
    return [ask(engine, question) for question in ("One?", "And two?", "Three then?")]


def parse(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(html)


def rows(html: str) -> list[list[str]]:
    """The table of costs, a list of cells for each row."""
    table = parse(html).find(".//table[@class='costs']")
    return [
        [" ".join("".join(cell.itertext()).split()) for cell in row] for row in table.iter("tr")
    ]


def test_a_conversation_pays_for_the_video_once(answers: list[Answer]) -> None:
    turn, whole = count(answers[-1:]), count(answers)
    assert (whole.questions, whole.read, turn.read) == (3, 1, 0)
    for now, all_of_it, cost in zip(
        turn.entries, whole.entries, answers[0].savings.systems, strict=True
    ):
        assert now.operations == cost.question_operations
        assert all_of_it.operations == cost.video_operations + 3 * cost.question_operations
        assert all_of_it.kv_bytes == now.kv_bytes == cost.kv_bytes
        assert all_of_it.visual_tokens == now.visual_tokens
    ours, *others = whole.entries
    assert ours.seconds == pytest.approx(sum(one.timings.total for one in answers))
    assert all(one.seconds is None for one in others)
    assert whole.text_tokens == 3 * turn.text_tokens
    assert whole.pooled_tokens == turn.pooled_tokens


def test_a_video_read_twice_is_paid_twice(answers: list[Answer]) -> None:
    again = [answers[0], dataclasses.replace(answers[1], memory_reused=False)]
    cost = answers[0].savings.unpooled
    assert count(again).entries[-1].operations == 2 * cost.operations()


def test_programs_are_told_what_is_measured(answers: list[Answer]) -> None:
    told = as_data(count(answers))
    assert told["systems"]["crosslmm"]["measured"]["seconds"] > 0
    assert told["systems"]["unpooled"]["measured"] is None
    assert set(told["systems"]["unpooled"]["computed"]) == {"operations", "kv_bytes"}
    assert told["tokens"]["original"] == 48 * 196


def test_the_table_shows_the_ledger_and_marks_it(answers: list[Answer]) -> None:
    html = savings_panel(answers)
    head, first, *_ = table = rows(html)
    assert [cell.split()[-1] for cell in head[1:]] == ["computed"] * 3 + ["measured"]
    assert first == ["This turn"]
    assert table[5] == ["Conversation, 3 questions"]
    whole = count(answers)
    for shown, entry in zip(table[6:], whole.entries, strict=True):
        assert shown[2].startswith(quantity(entry.operations))
        assert shown[3].startswith(quantity(entry.kv_bytes) + "B")
    assert table[6][4].endswith(" s") and table[7][4] == table[8][4] == "–"
    factor = whole.entries[2].operations / whole.entries[0].operations
    assert table[8][2].endswith(f"{factor:.0f}×")
    assert "not run" in html and "cost only its own text" in html


def test_the_first_turn_shows_no_conversation_and_all_its_times(answers: list[Answer]) -> None:
    html = savings_panel(answers[:1])
    assert len(rows(html)) == 5
    for name in ("Reading", "Encoding", "Prefill", "First word"):
        assert f"<dt>{name}</dt>" in html
    later = savings_panel(answers)
    assert "<dt>Encoding</dt>" not in later and "not read again" in later


def test_here_lies_on_the_curve(answers: list[Answer]) -> None:
    html = cost_curves(answers[0])
    plot = parse(f"<div>{html}</div>").find(".//figure")
    paths = {path.get("class"): path.get("d") for path in plot.iter("path")}
    assert set(paths) == {
        name + end for name in ("ours", "peer", "whole") for end in ("", " beyond")
    }
    dots = {}
    for dot in plot.iter("span"):
        if (dot.get("class") or "").startswith("dot "):
            left, top = map(float, re.findall(r":([\d.]+)%", dot.get("style")))
            dots[dot.get("class").removeprefix("dot ")] = left, top
    assert len({left for left, _ in dots.values()}) == 1
    for name, (left, top) in dots.items():
        line = paths[name] + (" " + paths[name + " beyond"] if name + " beyond" in paths else "")
        points = [tuple(map(float, one.split())) for one in re.findall(r"[\d.]+ [\d.]+", line)]
        before = max(point for point in points if point[0] <= left)
        after = min(point for point in points if point[0] >= left)
        share = (left - before[0]) / ((after[0] - before[0]) or 1)
        assert top == pytest.approx(before[1] + share * (after[1] - before[1]), abs=1)
    assert dots["ours"][1] > dots["peer"][1] > dots["whole"][1]  # lower on the page is cheaper


def test_the_curve_between_its_points(answers: list[Answer]) -> None:
    curve = answers[0].savings.unpooled.curve
    for point in curve:
        assert value_at(curve, point.frames, lambda p: p.operations) == pytest.approx(
            point.operations
        )
    between = value_at(curve, 48, lambda p: p.operations)
    assert curve[5].operations < between < curve[6].operations


@pytest.mark.parametrize("seconds", [0.5, 24.0, 7200.0, 5 * 3600.0])
def test_axes_have_times_whatever_the_length(seconds: float, answers: list[Answer]) -> None:
    video = dataclasses.replace(answers[0].video, duration=seconds)
    plot = parse(f"<div>{cost_curves(dataclasses.replace(answers[0], video=video))}</div>")
    figures = plot.findall(".//figure")
    assert len(figures) == 2
    for figure in figures:
        marks = figure.findall(".//span")
        shown = [one.text for one in marks if (one.get("class") or "").startswith("tick")]
        levels = [one for one in marks if one.get("class") == "level"]
        assert len(shown) >= 2 and len(levels) >= 2
        for place in re.findall(r"(?:left|top):(-?[\d.]+)%", ElementTree.tostring(figure).decode()):
            assert -0.01 <= float(place) <= 100.01
