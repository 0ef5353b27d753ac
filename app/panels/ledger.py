"""The ledger of the panel "What it saved": tokens, and a table of three systems."""

from __future__ import annotations

from app.ledger import NAMES, Entry, Ledger
from app.panels.draw import esc, quantity, seconds

_MARKS = {
    "computed": "counted from the model's shape and the number of frames, not run",
    "measured": "by the clock, in this conversation",
}


def mark(kind: str) -> str:
    """A label that says where a figure comes from."""
    return f'<span class="mark" title="{_MARKS[kind]}">{kind}</span>'


def tokens_line(turn: Ledger) -> str:
    """From original to pooled tokens, and what stands beside them."""
    kinds = (
        ("original", turn.original_tokens, "what the encoder sees"),
        ("pooled", turn.pooled_tokens, "for the video in the language model"),
        ("text", turn.text_tokens, "of the question"),
        ("generated", turn.generated_tokens, "of the answer"),
    )
    cells = "".join(
        f'<div title="{told}"><dt>{name}</dt><dd>{quantity(number)}</dd></div>'
        for name, number, told in kinds
    )
    return f'<dl class="figures tokens">{cells}</dl>'


def cost_table(turn: Ledger, conversation: Ledger) -> str:
    """This turn and, from the second question on, the whole conversation."""
    groups = [_group("This turn", turn)]
    if conversation.questions > 1:
        groups.append(_group(f"Conversation, {conversation.questions} questions", conversation))
    heads = (
        ("Visual tokens", "computed"),
        ("Operations", "computed"),
        ("Key/value memory", "computed"),
        ("Time", "measured"),
    )
    columns = "".join(f'<th scope="col">{name} {mark(kind)}</th>' for name, kind in heads)
    return (
        '<table class="costs"><caption class="unseen">What it cost, beside the same model without '
        "pooling and with LLaVA-OneVision's</caption>"
        f"<thead><tr><td></td>{columns}</tr></thead>{''.join(groups)}</table>"
    )


def _group(title: str, ledger: Ledger) -> str:
    ours = ledger.entries[0]
    most = {
        name: max(getattr(entry, name) for entry in ledger.entries) or 1
        for name in ("visual_tokens", "operations", "kv_bytes")
    }
    rows = "".join(_row(entry, ours, most) for entry in ledger.entries)
    head = f'<tr><th class="group" scope="rowgroup" colspan="5">{esc(title)}</th></tr>'
    return f"<tbody>{head}{rows}</tbody>"


def _row(entry: Entry, ours: Entry, most: dict[str, float]) -> str:
    here = entry is ours
    cells = "".join(
        _cell(getattr(entry, name), getattr(ours, name), most[name], unit, here)
        for name, unit in (("visual_tokens", ""), ("operations", ""), ("kv_bytes", "B"))
    )
    time = seconds(entry.seconds) if entry.seconds is not None else '<span class="muted">–</span>'
    per_frame = f"<small>{quantity(entry.tokens_per_frame)} per frame</small>"
    css = "here" if here else "other"
    return (
        f'<tr class="{css}"><th scope="row">{esc(NAMES[entry.system])}{per_frame}</th>'
        f"{cells}<td>{time}</td></tr>"
    )


def _cell(value: float, ours: float, most: float, unit: str, here: bool) -> str:
    times = "" if here or not ours else f"<small>{_factor(value / ours)}</small>"
    bar = f'<i class="share" style="--share:{100 * value / most:.2f}%"></i>'
    return f"<td>{quantity(value)}{unit}{times}{bar}</td>"


def _factor(times: float) -> str:
    if times >= 99.5:
        return f"{times:,.0f}×"
    return f"{times:.1f}×" if times < 9.95 else f"{times:.0f}×"
