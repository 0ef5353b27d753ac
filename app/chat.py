"""One chat turn, from message to streamed reply. Knows nothing of Gradio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from app.choices import Choices
from app.jobs import Cancelled, Job, JobEvent, Queued, Stopping
from app.moments import seen_at
from app.panels.draw import seconds
from app.sessions import Session, Turn
from app.settings import Settings
from model.types import (
    Answer,
    AskRequest,
    Failure,
    FramesRead,
    InputError,
    Piece,
    Progress,
    Stage,
    WhatIf,
)

_UPDATE_SECONDS = 0.1  # reads as fluent, and leaves a slow browser time to draw

RESTARTED = "If you had one: the app was restarted, so please add the video again."

_STAGE_TEXT = {
    "loading": "The model is still loading; your question comes first when it is ready",
    "reading": "Reading the video",
    "encoding": "Encoding frames",
    "answering": "Answering",
}


BUSY = "An answer is still on its way. Your question stays in the box: send it when this is done."

_PACE_SECONDS = 1.0  # a stage must have taken this long before its end is foretold


class Asks(Protocol):
    """What a turn needs of the worker."""

    def submit(self, request: AskRequest) -> Job:
        """Queue a question."""
        ...


@dataclass(frozen=True)
class Line:
    """The line above the question box: how far the turn is, how it ended, or what is wrong."""

    kind: Literal["idle", "note", "working", "done", "problem"]
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
    frames: bool = False  # there is more to be seen on the filmstrip


def check_question(session: Session, message: str, settings: Settings) -> str:
    """Return the question to ask; raises `InputError` when there is none or it cannot be asked."""
    question = message.strip() if isinstance(message, str) else ""
    if session.video is None:
        told = "Choose a sample or upload a video first, then ask."
        raise InputError(f"{told} {RESTARTED}" if session.early else told)
    if not question:
        raise InputError("Type a question first.")
    if len(question) > settings.max_question_chars:
        raise InputError(
            f"The question has {len(question)} characters; "
            f"at most {settings.max_question_chars} are taken."
        )
    if session.job is not None and not session.job.done:
        raise InputError(BUSY)
    return question


@dataclass
class Pace:
    """When the stage that runs now will be over, from how far it has come since it began."""

    stage: Stage | None = None
    began: float = 0.0
    first: int = 0  # what was done when it began

    def left(self, event: Progress, now: float) -> float | None:
        """Seconds left of the stage; None where that cannot be told (yet)."""
        if event.stage != self.stage:
            self.stage, self.began, self.first = event.stage, now, event.done
        spent, made = now - self.began, event.done - self.first
        if spent < _PACE_SECONDS or made <= 0 or not event.total:
            return None
        return spent * (event.total - event.done) / made


async def run_turn(
    session: Session,
    message: str,
    worker: Asks,
    settings: Settings,
    choices: Choices | None = None,
) -> AsyncIterator[Update]:
    """Ask, and yield an update for all that happens; the turn itself is in `session.turns`.

    `choices` are those of this turn alone; the session's own when not given.

    Closing the iterator stops the job.
    """
    choices = choices or session.choices
    try:
        question = check_question(session, message, settings)
        what_if = WhatIf(pooled_tokens=choices.pooled_tokens)
    except InputError as error:
        # The running answer goes on writing its own lines; it repeats this one from now on.
        session.remark = BUSY if str(error) == BUSY else ""
        yield Update(Line("problem", str(error)), accepted=False, finished=True)
        return
    session.remark = ""
    if session.replacing and session.turns:
        session.turns.pop()
    session.replacing = False
    assert session.video is not None
    request = AskRequest(
        video=str(session.video.path),
        question=question,
        history=session.history(settings.max_history_turns),
        max_frames=choices.max_frames or settings.max_frames,
        max_new_tokens=choices.max_new_tokens or settings.max_new_tokens,
        strongest_frames=settings.strongest_frames,
        bounds=settings.read_bounds,
        map_bytes=settings.map_bytes,
        what_if=what_if,
    )
    turn = Turn(question, request=request)
    session.turns.append(turn)
    del session.turns[: -settings.max_turns]
    job = session.job = worker.submit(request)
    try:
        yield Update(Line("working", "Waiting for the model", "waiting"))
        pace, line = Pace(), Line("working", "Waiting for the model", "waiting")
        async for batch in job.batches():
            if all(one is not turn for one in session.turns):  # another video, or a new start
                yield Update(Line("idle"), finished=True)
                return
            seen = [session.strip.add(one) for one in batch if isinstance(one, FramesRead)]
            rest = [one for one in batch if not isinstance(one, FramesRead)]
            update = _apply(rest, turn, pace) if rest else Update(line)
            update, line = replace(update, frames=any(seen)), update.line
            session.thin_out(settings.kept_maps)
            yield _with_remark(update, session)
            if not update.finished:
                await asyncio.sleep(_UPDATE_SECONDS)
    finally:
        if turn.outcome == "running":  # nobody waits for it any more
            turn.outcome = "stopped"
            job.cancel()


def _with_remark(update: Update, session: Session) -> Update:
    """Tell what was said to a question that came in between, until the answer is there."""
    if not session.remark:
        return update
    if update.finished:
        session.remark = ""
        return update
    return replace(update, line=replace(update.line, text=session.remark))


def _apply(batch: list[JobEvent], turn: Turn, pace: Pace) -> Update:
    """Bring a turn up to date; the last event decides what the line says."""
    update = Update(Line("working", _STAGE_TEXT["answering"], "answering"))
    for event in batch:
        match event:
            case Piece(text):
                turn.answer += text
                update = Update(Line("working", _STAGE_TEXT["answering"], "answering"))
            case Progress():
                update = Update(_progress(event, pace.left(event, time.monotonic())))
            case Queued(before):
                others = "1 question comes" if before == 1 else f"{before} questions come"
                update = Update(Line("working", f"{others} before yours", "waiting"))
            case Stopping():
                update = Update(Line("working", "Stopping", "waiting"))
            case Answer():
                turn.answer, turn.result = event.text, event
                turn.outcome = "stopped" if event.stopped else "answered"
                turn.seen = seen_at(event.attention)
                update = Update(Line("done", told(event)), answer=event, finished=True)
            case Failure(message, _):
                turn.outcome, turn.problem = "failed", message
                update = Update(Line("problem", message), finished=True)
            case Cancelled():
                turn.outcome = "stopped"
                update = Update(Line("done", "Stopped."), finished=True)
    return update


def _progress(event: Progress, left: float | None) -> Line:
    stage, done, total = event.stage, event.done, event.total
    text = _STAGE_TEXT[stage]
    if total and stage != "loading":
        unit = " frames" if stage == "encoding" else ""
        text = f"{text.removesuffix(' frames')} · {done} of {total}{unit}"
    if left is not None and done < total:
        text += f" · {time_left(left)}"
    return Line("working", text, stage, done / total if total else None)


def time_left(left: float) -> str:
    """Say how long something will go on, as roughly as it is known."""
    if left < 10:
        return f"about {max(1, round(left))} s left"
    if left < 90:
        return f"about {5 * round(left / 5)} s left"
    return f"about {round(left / 60)} min left"


def told(answer: Answer) -> str:
    """Sum a finished turn up in one line."""
    how = "Stopped after" if answer.stopped else "Answered in"
    parts = [f"{how} {seconds(answer.timings.total)}"]
    if answer.memory_reused:
        parts.append("the video was not read again")
    return " · ".join([*parts, *answer.notices])
