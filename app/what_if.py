"""A what-if: the shown question asked once more, changed. Knows nothing of Gradio."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace

from app.chat import Asks
from app.jobs import Cancelled, Queued
from app.panels.draw import clock
from app.sessions import Session
from model.types import Answer, AskRequest, Failure, InputError, Piece, Progress, WhatIf

_TIME = re.compile(r"(?:(\d{1,2}):)?(\d{1,3}):(\d{2}(?:\.\d+)?)|(\d+(?:\.\d+)?)")
_STAGES = {
    "loading": "The model is still loading",
    "reading": "Reading the video",
    "encoding": "Taking the frames in anew",
    "answering": "Answering",
}


@dataclass(frozen=True)
class Tried:
    """How far a what-if is: words so far, and at the end the answer or what is wrong."""

    what_if: WhatIf
    stage: str = "Waiting for the model"
    text: str = ""
    answer: Answer | None = None
    problem: str = ""

    @property
    def finished(self) -> bool:
        """Whether nothing more comes."""
        return self.answer is not None or bool(self.problem)


def read_time(text: str) -> float:
    """Seconds of `m:ss`, `h:mm:ss` or a plain number.

    Raises:
        InputError: it is none of these.

    """
    found = _TIME.fullmatch(text.strip())
    if found is None:
        raise InputError(f"A time is written like 1:23 or as seconds, but it says {text!r}.")
    hours, minutes, seconds, plain = found.groups()
    if plain is not None:
        return float(plain)
    return 3600 * int(hours or 0) + 60 * int(minutes) + float(seconds)


def read_form(form: Mapping[str, object]) -> WhatIf:
    """What the form's fields say.

    Raises:
        InputError: a field cannot be understood, or nothing is changed.

    """
    tokens, start, end = (str(form.get(name, "")).strip() for name in ("tokens", "from", "to"))
    hidden: tuple[tuple[float, float], ...] = ()
    if start or end:
        if not (start and end):
            raise InputError("A hidden stretch needs both times, for example 0:10 to 0:20.")
        hidden = ((read_time(start), read_time(end)),)
    if tokens and not tokens.isdecimal():
        raise InputError(f"Tokens per frame are a number, but it says {tokens!r}.")
    what_if = WhatIf(
        v2v=not form.get("v2v"),
        t2v=not form.get("t2v"),
        pooled_tokens=int(tokens) if tokens else None,
        hidden=hidden,
    )
    if what_if == WhatIf():
        raise InputError("Choose at least one change, then ask again.")
    return what_if


def told(what_if: WhatIf) -> str:
    """Name a what-if in a few words."""
    parts = []
    if not what_if.t2v:
        parts.append("without text to video")
    if not what_if.v2v:
        parts.append("without video to video")
    if what_if.pooled_tokens is not None:
        count = what_if.pooled_tokens
        parts.append(f"with {count} token{'s' if count > 1 else ''} per frame")
    parts += [f"with {_span(start, end)} hidden" for start, end in what_if.hidden]
    return ", ".join(parts)


def _span(start: float, end: float) -> str:
    return f"{clock(start)} to {clock(math.ceil(end))}"


def changed(request: AskRequest, what_if: WhatIf) -> AskRequest:
    """The same question with a what-if; a number of tokens that was chosen before it stays."""
    tokens = what_if.pooled_tokens or request.what_if.pooled_tokens
    return replace(request, what_if=replace(what_if, pooled_tokens=tokens))


async def try_what_if(session: Session, worker: Asks, what_if: WhatIf) -> AsyncIterator[Tried]:
    """Ask the shown question again, changed; the conversation stays as it is.

    Closing the iterator stops the job.
    """
    looking = session.looking
    if looking.look is None or looking.request is None:
        yield Tried(what_if, problem="Ask something first; then it can be asked again, changed.")
        return
    if session.job is not None and not session.job.done:
        yield Tried(what_if, problem="An answer is still on its way. Try again when it is there.")
        return
    token = looking.token
    job = session.job = worker.submit(changed(looking.request, what_if))
    now = Tried(what_if)
    try:
        yield now
        async for batch in job.batches():
            for event in batch:
                now = _after(now, event)
            if looking.token != token:  # another answer is shown by now
                return
            yield now
    finally:
        if not job.done:
            job.cancel()


def _after(now: Tried, event: object) -> Tried:
    match event:
        case Piece(text):
            return replace(now, text=now.text + text, stage=_STAGES["answering"])
        case Progress(stage, done, total):
            count = f" · {done} of {total}" if total else ""
            return replace(now, stage=_STAGES[stage] + count)
        case Queued(before):
            return replace(now, stage=f"{before} before this one")
        case Answer():
            if event.stopped:
                return replace(now, problem="Stopped.")
            return replace(now, answer=event)
        case Failure(message, _):
            return replace(now, problem=message)
        case Cancelled():
            return replace(now, problem="Stopped.")
    return now
