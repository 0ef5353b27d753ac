"""One chat turn, from message to streamed reply. Knows nothing of Gradio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from app.jobs import Cancelled, Job, JobEvent, Queued, Stopping
from app.panels.draw import seconds
from app.sessions import Session, Turn
from app.settings import Settings
from model.types import Answer, AskRequest, Failure, InputError, Piece, Progress, Stage

_UPDATE_SECONDS = 0.1  # reads as fluent, and leaves a slow browser time to draw

_STAGE_TEXT = {
    "loading": "The model is still loading; your question comes first when it is ready",
    "reading": "Reading the video",
    "encoding": "Encoding frames",
    "answering": "Answering",
}


class Asks(Protocol):
    """What a turn needs of the worker."""

    def submit(self, request: AskRequest) -> Job:
        """Queue a question."""
        ...


@dataclass(frozen=True)
class Line:
    """The line above the question box: how far the turn is, how it ended, or what is wrong."""

    kind: Literal["idle", "working", "done", "problem"]
    text: str = ""
    stage: Stage | Literal["waiting"] | None = None
    share: float | None = None  # of the stage, 0..1; None when not known


@dataclass(frozen=True)
class Update:
    """What changed on the page."""

    line: Line
    accepted: bool = True  # False: nothing was asked, the question stays in its box
    answer: Answer | None = None
    finished: bool = False


def check_question(session: Session, message: str, settings: Settings) -> str:
    """Return the question to ask; raises `InputError` when there is none or it cannot be asked."""
    question = message.strip()
    if session.video is None:
        raise InputError("Choose a sample or upload a video first, then ask.")
    if not question:
        raise InputError("Type a question first.")
    if len(question) > settings.max_question_chars:
        raise InputError(
            f"The question has {len(question)} characters; "
            f"at most {settings.max_question_chars} are taken."
        )
    if session.job is not None and not session.job.done:
        raise InputError("An answer is still on its way. Wait for it or press Stop.")
    return question


async def run_turn(
    session: Session, message: str, worker: Asks, settings: Settings
) -> AsyncIterator[Update]:
    """Ask, and yield an update for all that happens; the turn itself is in `session.turns`.

    Closing the iterator stops the job.
    """
    try:
        question = check_question(session, message, settings)
    except InputError as error:
        yield Update(Line("problem", str(error)), accepted=False, finished=True)
        return
    assert session.video is not None
    request = AskRequest(
        video=str(session.video.path),
        question=question,
        history=session.history(settings.max_history_turns),
        max_frames=settings.max_frames,
        max_new_tokens=settings.max_new_tokens,
        strongest_frames=settings.strongest_frames,
        bounds=settings.read_bounds,
    )
    turn = Turn(question)
    session.turns.append(turn)
    job = session.job = worker.submit(request)
    try:
        yield Update(Line("working", "Waiting for the model", "waiting"))
        async for batch in job.batches():
            update = _apply(batch, turn)
            _drop_old_maps(session, turn)
            if all(one is not turn for one in session.turns):  # another video, or a new start
                yield Update(Line("idle"), finished=True)
                return
            yield update
            if not update.finished:
                await asyncio.sleep(_UPDATE_SECONDS)
    finally:
        if turn.outcome == "running":  # nobody waits for it any more
            turn.outcome = "stopped"
            job.cancel()


def _drop_old_maps(session: Session, newest: Turn) -> None:
    """Keep the attention of one answer for a visitor: that of a long answer fills megabytes."""
    if newest.result is None:
        return
    for turn in session.turns:
        if turn is not newest and turn.result is not None:
            turn.result = replace(turn.result, attention=None)


def _apply(batch: list[JobEvent], turn: Turn) -> Update:
    """Bring a turn up to date; the last event decides what the line says."""
    update = Update(Line("working", _STAGE_TEXT["answering"], "answering"))
    for event in batch:
        match event:
            case Piece(text):
                turn.answer += text
                update = Update(Line("working", _STAGE_TEXT["answering"], "answering"))
            case Progress(stage, done, total):
                update = Update(_progress(stage, done, total))
            case Queued(before):
                others = "1 question comes" if before == 1 else f"{before} questions come"
                update = Update(Line("working", f"{others} before yours", "waiting"))
            case Stopping():
                update = Update(Line("working", "Stopping", "waiting"))
            case Answer():
                turn.answer, turn.result = event.text, event
                turn.outcome = "stopped" if event.stopped else "answered"
                update = Update(Line("done", told(event)), answer=event, finished=True)
            case Failure(message, _):
                turn.outcome, turn.problem = "failed", message
                update = Update(Line("problem", message), finished=True)
            case Cancelled():
                turn.outcome = "stopped"
                update = Update(Line("done", "Stopped."), finished=True)
    return update


def _progress(stage: Stage, done: int, total: int) -> Line:
    text = _STAGE_TEXT[stage]
    if total and stage != "loading":
        unit = " frames" if stage == "encoding" else ""
        text = f"{text.removesuffix(' frames')} · {done} of {total}{unit}"
    return Line("working", text, stage, done / total if total else None)


def told(answer: Answer) -> str:
    """Sum a finished turn up in one line."""
    times = answer.timings
    parts = ["Stopped"] if answer.stopped else []
    parts.append(f"First word after {seconds(times.first_token)}, {seconds(times.total)} in all")
    if answer.memory_reused:
        parts.append("the video was not read again")
    return " · ".join([*parts, *answer.notices])
