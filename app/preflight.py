"""The card that tells what a video will take before it is read, and lets the visitor change it."""

from __future__ import annotations

from dataclasses import replace

from app.choices import Choices
from app.panels.draw import esc
from app.settings import show_bytes
from model.types import InputError, VideoPlan

WAITING = "What this video takes is told as soon as the model is loaded."
_BITS = {"int8": "8 bits", "int4": "4 bits"}


def adjust(choices: Choices, told: str) -> Choices:
    """Apply one of the card's controls, for example `frames:64` or `tokens:4`.

    Raises:
        InputError: it is not a number.

    """
    name, _, value = told.partition(":")
    field = {"frames": "max_frames", "tokens": "pooled_tokens"}.get(name)
    if field is None or not (value.isascii() and value.lstrip("-").isdecimal() and len(value) < 10):
        raise InputError("Type a whole number there, for example 64.")
    return replace(choices, **{field: max(1, int(value))})


def plan_card(plan: VideoPlan | None, notices: tuple[str, ...] = ()) -> str:
    """Draw the card; without a plan only what there is to say."""
    told = "".join(f'<p class="plan-notice" role="status">{esc(one)}</p>' for one in notices)
    if plan is None:
        return f'<div class="plan">{told}</div>'
    told += "".join(
        f'<p class="plan-notice" role="status">{esc(one)}</p>'
        for one in plan.notices
        if one not in notices
    )
    facts = " · ".join(_facts(plan))
    return f'<div class="plan">{_controls(plan)}<p class="plan-facts">{esc(facts)}</p>{told}</div>'


def _controls(plan: VideoPlan) -> str:
    tokens = "".join(
        f'<option value="{n}"{" selected" if n == plan.tokens_per_frame else ""}>{n}</option>'
        for n in plan.token_choices
    )
    return (
        '<span class="plan-controls"><label>Frames <input type="number" inputmode="numeric" '
        f'min="1" step="1" value="{plan.frames}" data-adjust="frames" '
        f'title="1 to {plan.most_frames:,} for this video"></label>'
        f'<label>Tokens per frame <select data-adjust="tokens">{tokens}</select></label></span>'
    )


def _facts(plan: VideoPlan) -> list[str]:
    rate = plan.frame_rate
    every = f"{rate:.3g} per second" if rate >= 0.995 else f"one every {1 / rate:.3g} s"
    facts = [
        every,
        f"{plan.original_tokens:,} visual tokens, {plan.pooled_tokens:,} after pooling",
        _time(plan.seconds),
        f"{show_bytes(plan.peak_bytes)} of memory",
    ]
    if plan.kv_precision in _BITS:
        facts.append(f"keys and values at {_BITS[plan.kv_precision]}")
    return facts


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "time not measured yet"
    if seconds < 90:
        return f"about {max(1, round(seconds))} s to read"
    return f"about {round(seconds / 60)} min to read"
