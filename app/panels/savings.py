"""The panel "What it saved": tokens, operations, memory and time of one turn.

What was counted from the model's shape is marked as computed, what a clock said as measured.
"""

from __future__ import annotations

from app.panels.draw import empty_panel, esc, percent, quantity, seconds
from model.types import Answer, Timings

TITLE = "What it saved"


def savings_panel(answer: Answer | None) -> str:
    """Draw the panel of one answer."""
    if answer is None:
        return empty_panel(
            TITLE,
            "After an answer: how few visual tokens the language model had to carry, and what "
            "that spared in operations, memory and time.",
        )
    saved = answer.savings
    parts = [
        f"<h2>{TITLE}</h2>",
        f'<p class="headline"><strong>{percent(saved.reduction)}</strong> '
        '<span class="muted">fewer visual tokens in the language model</span></p>',
        f'<h3>This turn {_mark("computed")}</h3><div class="ledger">',
        _pair("Visual tokens", saved.original_tokens, saved.pooled_tokens, ""),
        _pair("Operations", saved.operations_unpooled, saved.operations, ""),
        _pair("Key/value memory", saved.kv_bytes_unpooled, saved.kv_bytes, "B"),
        "</div>",
        '<p class="key"><span><i class="swatch before"></i>every token in the language model</span>'
        '<span><i class="swatch after"></i>pooled, as here</span></p>',
        f"<h3>Time {_mark('measured')}</h3>",
        _timings(answer.timings, answer.memory_reused),
        _facts(answer),
    ]
    return f'<section class="panel" id="panel-savings">{"".join(parts)}</section>'


def _mark(kind: str) -> str:
    told = {
        "computed": "counted from the model's shape and the number of frames",
        "measured": "by the clock, in this turn",
    }[kind]
    return f'<span class="mark" title="{told}">{kind}</span>'


def _pair(name: str, before: float, after: float, unit: str) -> str:
    """Two bars on one scale, with the factor between them."""
    width = 100 * after / before if before else 0.0
    times = f"{before / after:.3g}× less" if after and before > after else "no less"
    return (
        f'<div class="pair"><span class="name">{esc(name)}</span>'
        f'<span class="factor">{times}</span>'
        f'<span class="bar before"></span><span class="value">{quantity(before)}{unit}</span>'
        f'<span class="bar after" style="--share:{width:.3f}%"></span>'
        f'<span class="value">{quantity(after)}{unit}</span></div>'
    )


def _timings(times: Timings, reused: bool) -> str:
    rows = [("First word", times.first_token), ("Whole turn", times.total)]
    if not reused:
        spent = (("Reading", times.decode), ("Encoding", times.encode), ("Prefill", times.prefill))
        rows = [*spent, *rows]
    shown = "".join(f"<div><dt>{name}</dt><dd>{seconds(value)}</dd></div>" for name, value in rows)
    note = (
        '<p class="muted note">The video was kept from an earlier question and not read again.</p>'
        if reused
        else ""
    )
    return f'<dl class="figures">{shown}</dl>{note}'


def _facts(answer: Answer) -> str:
    facts = (
        f"{len(answer.frame_times)} frames read",
        f"{answer.tokens.text} text tokens",
        f"{answer.tokens.generated} tokens generated",
    )
    return f'<p class="muted note">{" · ".join(facts)}</p>'
