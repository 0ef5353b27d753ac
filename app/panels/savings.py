"""The panel "What it saved": tokens, operations, memory and time, of a turn and a conversation.

What was counted from the model's shape is marked as computed, what a clock said as measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from app.ledger import count
from app.panels.curve import cost_curves
from app.panels.draw import empty_panel, percent, seconds
from app.panels.ledger import cost_table, mark, tokens_line
from model.types import Answer, Timings

TITLE = "What it saved"

_PUBLISHED_TOKENS = 196  # per frame, of LLaVA-OneVision with the encoder it was published with


def savings_panel(answers: Sequence[Answer], below: str = "") -> str:
    """Draw the panel of the newest of a conversation's answers; `below` is HTML for its end."""
    if not answers:
        return empty_panel(
            TITLE,
            "After an answer: how few visual tokens the language model had to carry, and what "
            "that spared in operations, memory and time.",
        )
    answer = answers[-1]
    turn, conversation = count([answer]), count(answers)
    parts = [
        f"<h2>{TITLE}</h2>",
        f'<p class="headline"><strong>{percent(answer.savings.reduction)}</strong> '
        '<span class="muted">fewer visual tokens in the language model</span></p>',
        f"<h3>Tokens of this turn {mark('measured')}</h3>",
        tokens_line(turn),
        "<h3>What it cost</h3>",
        cost_table(turn, conversation),
        _remark(answer),
        cost_curves(answer),
        f"<h3>Time of this turn {mark('measured')}</h3>",
        _timings(answer.timings, answer.memory_reused),
        below,
    ]
    return f'<section class="panel" id="panel-savings">{"".join(parts)}</section>'


def _remark(answer: Answer) -> str:
    reused = (
        "This question reused the video as it was kept and cost only its own text. "
        if answer.memory_reused
        else "The first question pays for reading the video, a later one only for its own text. "
    )
    peer = answer.savings.llava_onevision.tokens_per_frame
    original = answer.savings.unpooled.tokens_per_frame
    pooling = (
        ""
        if peer == _PUBLISHED_TOKENS
        else "LLaVA-OneVision halves the sides of a frame's grid: 196 tokens of its own 729, "
        f"{peer} of {original} here. "
    )
    return (
        f'<p class="muted note">{reused}All three are counted alike, as if each kept the video; '
        f"the other two were not run. {pooling}</p>"
    )


def _timings(times: Timings, reused: bool) -> str:
    rows = [("First word", times.first_token), ("Whole turn", times.total)]
    if not reused:
        spent = (("Reading", times.decode), ("Encoding", times.encode), ("Prefill", times.prefill))
        rows = [*spent, *rows]
    shown = "".join(f"<div><dt>{name}</dt><dd>{seconds(value)}</dd></div>" for name, value in rows)
    note = (
        "The video was kept from an earlier question and not read again."
        if reused
        else "Reading goes on beside encoding and prefill, so the parts may add up to more."
    )
    return f'<dl class="figures">{shown}</dl><p class="muted note">{note}</p>'
