"""One turn of the chat, with a worker that is a list of events."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from app.chat import BUSY, Pace, Update, run_turn, time_left
from app.jobs import Cancelled, Job, JobEvent, Queued
from app.sessions import Session, Turn
from app.settings import Settings
from app.sources import Video
from model.types import AskRequest, Failure, Piece, Progress
from tests.fake_engine import FakeEngine

SETTINGS = Settings(max_question_chars=50, max_history_turns=2)


class Script:
    """A worker that answers with given events."""

    def __init__(self, *events: JobEvent) -> None:
        self.events = events
        self.requests: list[AskRequest] = []
        self.cancelled: list[Job] = []

    def submit(self, request: AskRequest) -> Job:
        self.requests.append(request)
        job = Job(request, len(self.requests), self.cancelled.append)
        for event in self.events:
            job.put(event)
        return job


@pytest.fixture
def session(tmp_path: Path) -> Session:
    info = ANSWER.video
    video = Video(tmp_path / "video.mp4", "video.mp4", info, (), False)
    return Session("id", tmp_path, video)


def answer(question: str = "What?") -> Sequence[JobEvent]:
    return list(FakeEngine().ask(AskRequest("/video.mp4", question), lambda: False))


EVENTS = answer()
ANSWER = EVENTS[-1]


def turn(session: Session, worker: Script, message: str = "What?") -> list[Update]:
    async def collect() -> list[Update]:
        return [update async for update in run_turn(session, message, worker, SETTINGS)]

    return asyncio.run(collect())


def test_a_turn_ends_with_its_answer(session: Session) -> None:
    updates = turn(session, Script(*EVENTS))
    assert updates[-1].finished
    assert updates[-1].answer is ANSWER
    assert updates[-1].line.kind == "done"
    assert "Answered in" in updates[-1].line.text
    (got,) = session.turns
    assert (got.question, got.answer, got.outcome) == ("What?", ANSWER.text, "answered")
    assert session.last_answer() is ANSWER


def test_the_request_holds_the_video_and_what_was_answered_before(session: Session) -> None:
    session.turns = [Turn(str(n), "a", "answered") for n in range(3)]
    session.turns.append(Turn("x", "", "failed", "no"))
    worker = Script(*EVENTS)
    turn(session, worker, "  Why? ")
    assert worker.requests == [
        AskRequest(str(session.video.path), "Why?", history=(("1", "a"), ("2", "a")))
    ]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("", "Type a question first."),
        ("  \n ", "Type a question first."),
        ("x" * 51, "The question has 51 characters; at most 50 are taken."),
    ],
)
def test_what_cannot_be_asked_is_told(session: Session, message: str, said: str) -> None:
    worker = Script()
    (update,) = turn(session, worker, message)
    assert (update.line.kind, update.line.text) == ("problem", said)
    assert not update.accepted
    assert not worker.requests and not session.turns


def test_a_question_before_a_video(session: Session) -> None:
    session.video = None
    (update,) = turn(session, Script())
    assert update.line.text == "Choose a sample or upload a video first, then ask."


def test_one_turn_at_a_time(session: Session) -> None:
    session.job = Job(AskRequest("/v", "?"), 1, lambda job: None)
    (update,) = turn(session, Script())
    assert "still on its way" in update.line.text


def test_a_conversation_has_an_end_at_its_beginning(session: Session) -> None:
    session.turns = [Turn(str(n), "a", "answered") for n in range(SETTINGS.max_turns)]
    turn(session, Script(*EVENTS))
    assert len(session.turns) == SETTINGS.max_turns
    assert [session.turns[0].question, session.turns[-1].question] == ["1", "What?"]


def test_what_was_told_in_between_stays_until_the_answer(session: Session) -> None:
    async def ask_in_between() -> list[Update]:
        got = []
        async for update in run_turn(session, "What?", Script(*EVENTS), SETTINGS):
            got.append(update)
            if len(got) == 1:  # the first turn goes on writing lines after this
                session.job = Job(AskRequest("/v", "?"), 1, lambda job: None)
                async for other in run_turn(session, "And?", Script(), SETTINGS):
                    assert not other.accepted
        return got

    updates = asyncio.run(ask_in_between())
    said = [BUSY in update.line.text for update in updates]
    assert said == [False, *[True] * (len(updates) - 2), False]


def test_a_question_replaces_the_last_one(session: Session) -> None:
    session.turns = [Turn("1", "a", "answered"), Turn("2", "b", "answered")]
    session.replacing = True
    worker = Script(*EVENTS)
    turn(session, worker, "Third?")
    assert [one.question for one in session.turns] == ["1", "Third?"]
    assert worker.requests[0].history == (("1", "a"),)
    assert not session.replacing


def test_the_end_of_a_stage_is_foretold_from_its_pace() -> None:
    pace = Pace()
    assert pace.left(Progress("encoding", 10, 100), now=50.0) is None
    assert pace.left(Progress("encoding", 11, 100), now=50.5) is None  # too early to tell
    assert pace.left(Progress("encoding", 30, 100), now=54.0) == pytest.approx(14.0)
    assert pace.left(Progress("answering", 0, 0), now=55.0) is None
    assert [time_left(s) for s in (0.2, 8.4, 43, 89.9, 200)] == [
        "about 1 s left",
        "about 8 s left",
        "about 45 s left",
        "about 90 s left",
        "about 3 min left",
    ]


def test_a_failure_keeps_the_text_so_far(session: Session) -> None:
    failure = Failure("The model's process ended.", user=False)
    updates = turn(session, Script(Piece("It is "), Piece("at"), failure))
    assert updates[-1].line.kind == "problem"
    assert session.turns == [Turn("What?", "It is at", "failed", failure.message)]


def test_a_turn_stopped_before_its_first_word(session: Session) -> None:
    updates = turn(session, Script(Progress("reading", 0, 8), Cancelled()))
    assert (updates[-1].line.text, session.turns[0].outcome) == ("Stopped.", "stopped")


@pytest.mark.parametrize(
    ("event", "stage", "share", "said"),
    [
        (Queued(1), "waiting", None, "1 question comes before yours"),
        (Queued(3), "waiting", None, "3 questions come before yours"),
        (Progress("loading", 0, 0), "loading", None, "The model is still loading"),
        (Progress("reading", 1, 4), "reading", 0.25, "Reading the video · 1 of 4"),
        (Progress("encoding", 2, 4), "encoding", 0.5, "Encoding · 2 of 4 frames"),
        (Progress("answering", 0, 0), "answering", None, "Answering"),
    ],
)
def test_the_line_tells_the_stage(
    session: Session, event: JobEvent, stage: str, share: float | None, said: str
) -> None:
    job = Job(AskRequest("/v", "?"), 1, lambda job: None)
    job.put(event)

    class Once:
        def submit(self, _: AskRequest) -> Job:
            return job

    async def look() -> Update:
        updates = run_turn(session, "What?", Once(), SETTINGS)
        await anext(updates)
        try:
            return await anext(updates)
        finally:
            await updates.aclose()

    line = asyncio.run(look()).line
    assert (line.stage, line.share) == (stage, share)
    assert said in line.text


def test_a_visitor_who_leaves_stops_the_job(session: Session) -> None:
    worker = Script(Piece("It"))

    async def leave() -> None:
        updates = run_turn(session, "What?", worker, SETTINGS)
        await anext(updates)
        await anext(updates)
        await updates.aclose()

    asyncio.run(leave())
    assert worker.cancelled == [session.job]
    assert session.turns[0].outcome == "stopped"


def test_a_turn_whose_conversation_ended_shows_nothing_more(session: Session) -> None:
    async def replace() -> list[Update]:
        got = []
        async for update in run_turn(session, "What?", Script(*EVENTS), SETTINGS):
            got.append(update)
            session.turns = []
        return got

    *_, last = asyncio.run(replace())
    assert (last.line.kind, last.answer, last.finished) == ("idle", None, True)


def test_events_from_another_thread_reach_the_loop(session: Session) -> None:
    worker = Script()

    async def collect() -> list[Update]:
        got = []
        async for update in run_turn(session, "What?", worker, SETTINGS):
            got.append(update)
            if len(got) == 1:
                loop = asyncio.get_running_loop()
                for number, event in enumerate(EVENTS):
                    loop.call_later(0.002 * number, asyncio.ensure_future, put(event))
        return got

    async def put(event: JobEvent) -> None:
        await asyncio.to_thread(session.job.put, event)

    assert asyncio.run(collect())[-1].answer is ANSWER
