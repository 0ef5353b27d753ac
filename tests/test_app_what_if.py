"""What-ifs: what the form says, how they are asked, and two answers side by side."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from app.jobs import Job
from app.looking import Looking
from app.panels.what_if import comparable, what_if_form, what_if_result
from app.sessions import Session
from app.what_if import Tried, read_form, read_time, told, try_what_if
from model.types import Answer, AskRequest, InputError, WhatIf
from tests.fake_engine import INFO, FakeEngine
from tests.test_app_panels import HOSTILE, parse

REQUEST = AskRequest("/video.mp4", "What is it?", max_new_tokens=9)


def ask(request: AskRequest) -> Answer:
    *_, last = FakeEngine().ask(request, lambda: False)
    return last


@pytest.fixture
def session() -> Session:
    one = Session("id", Path("/nowhere"))
    one.looking.show(ask(REQUEST), REQUEST)
    return one


class OneWorker:
    """Answers at once, in the caller's thread."""

    def __init__(self) -> None:
        self.asked: list[AskRequest] = []

    def submit(self, request: AskRequest) -> Job:
        self.asked.append(request)
        job = Job(request, len(self.asked), lambda _: None)
        for event in FakeEngine().ask(request, lambda: False):
            job.put(event)
        return job


def run(session: Session, worker: OneWorker, what_if: WhatIf) -> list[Tried]:
    async def collect() -> list[Tried]:
        return [one async for one in try_what_if(session, worker, what_if)]

    return asyncio.run(collect())


@pytest.mark.parametrize(
    ("text", "seconds"), [("0:07", 7), ("1:02:03", 3723), (" 90 ", 90), ("2:05.5", 125.5)]
)
def test_times_are_read_as_they_are_written(text: str, seconds: float) -> None:
    assert read_time(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "1:2:3:4", "-3", "1e9x", "0:7", "nan", "inf"])
def test_what_is_no_time_is_told(text: str) -> None:
    with pytest.raises(InputError, match="1:23"):
        read_time(text)


def test_the_form_becomes_a_what_if() -> None:
    form = {"t2v": True, "v2v": False, "tokens": "4", "from": "0:10", "to": "0:20"}
    what_if = read_form(form)
    assert what_if == WhatIf(t2v=False, pooled_tokens=4, hidden=((10.0, 20.0),))
    assert told(what_if) == (
        "without text to video, with 4 tokens per frame, with 0:10 to 0:20 hidden"
    )
    assert read_form({"v2v": True}) == WhatIf(v2v=False)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({}, "at least one change"),
        ({"from": "0:10"}, "both times"),
        ({"from": "0:20", "to": "0:10"}, "end after it begins"),
        ({"from": "x", "to": "0:10"}, "1:23"),
        ({"tokens": "-4"}, "a number"),
        ({"tokens": "5"}, "square"),
        ({"tokens": ["4"]}, "a number"),
    ],
)
def test_what_the_form_cannot_mean_is_told(form: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_form(form)


def test_a_what_if_asks_the_same_and_leaves_the_conversation_alone(session: Session) -> None:
    worker, what_if = OneWorker(), WhatIf(hidden=((5.0, 9.0),))
    shown = session.looking.look
    *_, last = run(session, worker, what_if)
    assert last.answer is not None and last.finished
    (asked,) = worker.asked
    assert (asked.question, asked.history, asked.what_if) == (
        "What is it?",
        REQUEST.history,
        what_if,
    )
    assert session.turns == [] and session.looking.look is shown


def test_a_number_of_tokens_that_was_chosen_before_stays(session: Session) -> None:
    before = dataclasses.replace(REQUEST, what_if=WhatIf(pooled_tokens=4))
    session.looking.show(ask(before), before)
    worker = OneWorker()
    run(session, worker, WhatIf(t2v=False))
    run(session, worker, WhatIf(pooled_tokens=9))
    kept, other = (request.what_if for request in worker.asked)
    assert kept == WhatIf(t2v=False, pooled_tokens=4) and other == WhatIf(pooled_tokens=9)
    html = what_if_form(session.looking.look, INFO, 4)
    assert "4 (as it is)" in html and '<option value="1">' in html


def test_a_what_if_waits_for_no_other_answer(session: Session) -> None:
    session.job = Job(REQUEST, 1, lambda _: None)
    (only,) = run(session, OneWorker(), WhatIf(t2v=False))
    assert "still on its way" in only.problem
    empty = Session("id", Path("/nowhere"))
    (only,) = run(empty, OneWorker(), WhatIf(t2v=False))
    assert "Ask something first" in only.problem


def test_a_failing_what_if_is_told(session: Session) -> None:
    class Refuses:
        def submit(self, request: AskRequest) -> Job:
            from model.types import Failure

            job = Job(request, 1, lambda _: None)
            job.put(Failure("Leave at least one to be seen.", user=True))
            return job

    *_, last = run(session, Refuses(), WhatIf(hidden=((0.0, 99.0),)))
    assert last.problem == "Leave at least one to be seen."
    assert "Leave at least one" in what_if_result(session.looking.look, last)


def tried(what_if: WhatIf, question: str = "What is it?") -> Tried:
    return Tried(what_if, answer=ask(AskRequest("/video.mp4", question, what_if=what_if)))


def test_both_answers_stand_side_by_side_with_their_difference(session: Session) -> None:
    look, hidden = session.looking.look, tried(WhatIf(hidden=((5.0, 9.0),)), "And now?")
    root = parse(what_if_result(look, hidden))
    text = " ".join(root.itertext())
    assert "The answer changes." in text and "0:05 to 0:09 hidden" in text
    assert look.answer.text in text and hidden.answer.text in text
    before, after = comparable(look, hidden.answer)
    change = after.rows() - before.rows()
    rows = root.findall(".//span[@class='cells change']")
    assert len(rows) == len(before.layers)
    for row, values in zip(rows, change, strict=True):
        way = "more" if values[np.abs(values).argmax()] > 0 else "less"
        assert row.get("aria-label").endswith(way)
    stripes = len(root.findall(".//span[@class='hidden-frame']"))
    times = look.attention.times
    assert stripes == ((times >= 5) & (times < 9)).sum()


def test_without_text_to_video_the_models_own_attention_is_compared(session: Session) -> None:
    html = what_if_result(session.looking.look, tried(WhatIf(t2v=False)))
    assert "The answer stays the same." in html and "Difference: language model" in html
    assert "there is none to compare" in html


def test_the_form_fits_the_model_and_the_answer(session: Session) -> None:
    assert what_if_form(None, INFO) == ""
    html = what_if_form(session.looking.look, INFO)
    offered = re.findall(r'<option value="(\d+)"', html)
    assert offered == ["4", "9", "16", "25", "36"]
    start, end = re.search(r'data-from="([\d:]+)" data-to="([\d:]+)"', html).groups()
    assert read_time(start) <= session.looking.look.attention.peak < read_time(end)


def test_no_answer_of_a_what_if_becomes_markup() -> None:
    looking = Looking()
    looking.show(ask(AskRequest("/video.mp4", HOSTILE)), REQUEST)
    for html in (
        what_if_result(looking.look, tried(WhatIf(v2v=False), HOSTILE)),
        what_if_result(looking.look, Tried(WhatIf(), text=HOSTILE, stage=HOSTILE)),
        what_if_result(looking.look, Tried(WhatIf(), problem=HOSTILE)),
    ):
        assert "onerror" in html and "<img" not in html
