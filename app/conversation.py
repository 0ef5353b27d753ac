"""A conversation to take along, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from app.fragments import plain
from app.ledger import as_data, count
from app.panels.draw import clock, seconds
from app.run_card import as_text, run_card
from app.sessions import Session, Turn
from model.ask import as_json
from model.types import Answer, ModelInfo

MARKDOWN, JSON = "text/markdown; charset=utf-8", "application/json"


def as_markdown(session: Session, model: ModelInfo | None) -> str:
    """Questions and answers, with nothing in them that could be taken for markup."""
    title = session.video.title if session.video is not None else "no video"
    lines = [f"# Conversation about {plain(title)}", ""]
    if session.video is not None:
        info = session.video.info
        facts = f"{clock(info.duration)}, {info.width} x {info.height}, {info.codec}"
        lines += [f"Video: {plain(facts)}  "]
    if model is not None:
        lines += [f"Model: {plain(model.name)} ({plain(model.revision or 'revision not known')})"]
    for number, turn in enumerate(session.turns, start=1):
        lines += ["", f"## Question {number}", "", plain(turn.question), "", *_reply(turn)]
    return "\n".join(lines).rstrip() + "\n"


def _reply(turn: Turn) -> list[str]:
    answer = [plain(turn.answer), ""] if turn.answer else []
    if turn.outcome == "failed":
        return ["**Answer**", "", *answer, f"*{plain(turn.problem)}*"]
    if turn.outcome == "stopped":
        return ["**Answer**", "", *answer, "*Stopped.*"]
    if turn.outcome == "running":
        return ["*Still being answered.*"]
    return ["**Answer**", "", *answer, *_small_print(turn.result)]


def _small_print(answer: Answer | None) -> list[str]:
    if answer is None:
        return []
    times = answer.timings
    parts = [f"First word after {seconds(times.first_token)}, {seconds(times.total)} in all"]
    if answer.memory_reused:
        parts.append("the video was not read again")
    if answer.attention is not None:
        parts.append(f"looked most at {clock(answer.attention.peak)}")
    return [f"*{'; '.join(parts)}.*"]


def as_data_of(session: Session, model: ModelInfo | None) -> dict[str, Any]:
    """The same for programs, with what each answer and all of them cost."""
    answers = session.answers()
    return {
        "video": session.video.title if session.video is not None else None,
        "turns": [_turn(turn) for turn in session.turns],
        "savings": as_data(count(answers)) if answers else None,
        "run_card": run_card(answers[-1], model, session.video, session.choices)
        if answers
        else None,
    }


def _turn(turn: Turn) -> dict[str, Any]:
    told: dict[str, Any] = {
        "question": turn.question,
        "answer": turn.answer,
        "outcome": turn.outcome,
    }
    if turn.problem:
        told["problem"] = turn.problem
    if turn.result is not None:
        whole = as_json(turn.result)
        told |= {name: whole[name] for name in ("model", "tokens", "timings", "attention")}
        told["memory_reused"] = turn.result.memory_reused
        told["savings"] = as_data(count([turn.result]))
    return told


def _card(session: Session, model: ModelInfo | None) -> str:
    answers = session.answers()
    if not answers:
        return as_text({})
    return as_text(run_card(answers[-1], model, session.video, session.choices))


EXPORTS: dict[str, tuple[str, Callable[[Session, ModelInfo | None], str]]] = {
    "conversation.md": (MARKDOWN, as_markdown),
    "conversation.json": (JSON, lambda session, model: as_text(as_data_of(session, model))),
    "run-card.json": (JSON, _card),
}
