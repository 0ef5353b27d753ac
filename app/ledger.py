"""What a turn or a whole conversation cost, in three systems. Plain numbers, no drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from model.types import Answer

NAMES = {
    "crosslmm": "CrossLMM, here",
    "llava-onevision": "LLaVA-OneVision's pooling",
    "unpooled": "No pooling",
}


@dataclass(frozen=True)
class Entry:
    """One system's cost over some turns."""

    system: str
    tokens_per_frame: int
    visual_tokens: int  # in its LLM, the video's once however many questions
    operations: float  # computed
    kv_bytes: int  # computed; the most at any time
    seconds: float | None  # measured; None: this system was not run


@dataclass(frozen=True)
class Ledger:
    """Some turns of one conversation."""

    questions: int
    read: int  # how many of them had to read the video; the others reused it
    original_tokens: int
    pooled_tokens: int
    text_tokens: int
    generated_tokens: int
    entries: tuple[Entry, ...]  # ours first


def count(answers: Sequence[Answer]) -> Ledger:
    """Add turns up; at least one."""
    savings = [answer.savings for answer in answers]
    entries = []
    for turns in zip(*(one.systems for one in savings), strict=True):
        ours = turns[0].system == "crosslmm"
        entries.append(
            Entry(
                system=turns[0].system,
                tokens_per_frame=turns[-1].tokens_per_frame,
                visual_tokens=max(turn.visual_tokens for turn in turns),
                operations=sum(
                    turn.operations(answer.memory_reused)
                    for turn, answer in zip(turns, answers, strict=True)
                ),
                kv_bytes=max(turn.kv_bytes for turn in turns),
                seconds=sum(answer.timings.total for answer in answers) if ours else None,
            )
        )
    return Ledger(
        questions=len(answers),
        read=sum(not answer.memory_reused for answer in answers),
        original_tokens=max(one.original_tokens for one in savings),
        pooled_tokens=max(one.pooled_tokens for one in savings),
        text_tokens=sum(one.text_tokens for one in savings),
        generated_tokens=sum(answer.tokens.generated for answer in answers),
        entries=tuple(entries),
    )


def as_data(ledger: Ledger) -> dict[str, Any]:
    """The ledger for programs, saying of every figure whether it is measured or computed."""
    entries = {}
    for entry in ledger.entries:
        figures = asdict(entry)
        del figures["system"], figures["seconds"]
        computed = {name: figures.pop(name) for name in ("operations", "kv_bytes")}
        entries[entry.system] = {
            **figures,
            "computed": computed,
            "measured": None if entry.seconds is None else {"seconds": round(entry.seconds, 4)},
        }
    return {
        "questions": ledger.questions,
        "times_the_video_was_read": ledger.read,
        "tokens": {
            "original": ledger.original_tokens,
            "pooled": ledger.pooled_tokens,
            "text": ledger.text_tokens,
            "generated": ledger.generated_tokens,
        },
        "systems": entries,
    }
