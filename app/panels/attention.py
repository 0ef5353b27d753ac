"""The panel "Where it looked": an answer's attention over the video's time, layer by layer."""

from __future__ import annotations

from app.looking import Look
from app.panels.attention_frames import chosen_cell, strongest
from app.panels.attention_grid import KIND_NAMES, grid
from app.panels.draw import clock, empty_panel, esc, percent, seek_button
from model.types import ModelInfo

TITLE = "Where it looked"

_PRONOUNCED = 2.0  # times an even share; below, no moment is said to stand out

EXPLAINED = (
    "To find each word of its answer, the model weighs every moment of the video against the "
    "others. The colour shows where that weight lies: from left to right is the video's time, "
    "each row is one layer of the model, from the first at the top to the last. The gates say how "
    "much a layer lets this look count: 0 is closed, 1 is fully open."
)


def attention_panel(look: Look | None, model: ModelInfo | None, most: int = 6) -> str:
    """Draw the panel of one answer; `most` frames with pictures."""
    if look is None:
        return empty_panel(
            TITLE,
            "After an answer: the moments of the video that its words looked at, in every layer "
            "of the model, and the frames they looked at most.",
        )
    if look.map is None:
        return empty_panel(TITLE, "No attention was kept of this answer.")
    parts = [
        f'<div class="panel-head"><h2>{TITLE}</h2>{_files(look)}</div>',
        _headline(look),
        _why_not_text(look, model),
        _words(look),
        _controls(look),
        grid(look, model),
        chosen_cell(look),
        strongest(look, most),
        f'<details class="explained"><summary>What is this?</summary><p>{EXPLAINED}</p></details>',
    ]
    return f'<section class="panel" id="panel-attention">{"".join(parts)}</section>'


def _headline(look: Look) -> str:
    """One sentence that needs no knowledge of attention."""
    mass = look.rows().mean(0)
    at, total = int(mass.argmax()), float(mass.sum())
    share = float(mass[at])
    time = float(look.attention.times[at])
    moment = seek_button(time, clock(time))
    shown = look.map
    assert shown is not None
    seen = max(1, len(mass) - len(look.attention.hidden))
    times_even = share * seen / total if total else 0.0
    if shown.measure == "focus":
        return (
            f'<p class="headline">Looked most closely at {moment}<span class="muted">, while it '
            "read the video: its eye rested on few spots of that frame.</span></p>"
        )
    whose = f"for “{esc(look.word.bare)}”" if look.word else "for its answer"
    if shown.kind == "v2v":
        whose = "while it read the video"
    if times_even < _PRONOUNCED:
        return (
            f'<p class="headline">No moment stands out <span class="muted">{whose}: it looked at '
            "the whole video about alike.</span></p>"
        )
    text = f" {percent(1 - total)} lay on text." if shown.kind == "self" and total < 0.995 else ""
    return (
        f'<p class="headline">Most at {moment}<span class="muted"> {whose}: {percent(share)} of '
        f"its attention, {times_even:.0f} times an even share.{text}</span></p>"
    )


def _why_not_text(look: Look, model: ModelInfo | None) -> str:
    """Why something else than text to video comes first."""
    if look.attention.main == "t2v":
        return ""
    if not look.attention.layers:
        told = "Text to video was off or is not part of this model"
    elif model is not None and model.trained:
        told = "The text-to-video gates of this model are closed"
    else:
        told = "The cross-attention of this model is new and has not been trained yet"
    return (
        f'<p class="remark">{told}, so it adds nothing to the answer. What you see first is how '
        "the language model itself looks at the video.</p>"
    )


def _words(look: Look) -> str:
    """The answer, each word of it a button."""
    shown = look.map
    if shown is None or shown.kind == "v2v":
        return (
            '<p class="words-note">The video is read before the question is, so this map is the '
            "same for every word of every answer.</p>"
        )
    if len(look.words) < 2:
        return ""  # nothing to choose
    if not shown.exact(slice(0, 1)):
        return '<p class="words-note">Long answer and video: all words are shown together.</p>'
    chosen = look.choice.word if look.word is not None else None
    buttons = "".join(
        f'<button type="button" data-look="word:{place}" aria-pressed="{_flag(place == chosen)}">'
        f"{esc(word.text)}</button>"
        for place, word in enumerate(look.words)
    )
    every = (
        f'<button type="button" class="every" data-look="word:all" '
        f'aria-pressed="{_flag(chosen is None)}">All words</button>'
    )
    return (
        '<div class="answer-words" role="group" aria-label="Words of the answer: choose one to '
        f'see where it looked">{every}{buttons}</div>'
    )


def _controls(look: Look) -> str:
    shown = look.map
    assert shown is not None
    here = {one.kind for one in look.maps}
    kinds = "".join(
        f'<button type="button" data-look="kind:{kind}" title="{esc(told)}" '
        f'aria-pressed="{_flag(kind == shown.kind)}">{esc(name)}</button>'
        for kind, (name, told) in KIND_NAMES.items()
        if kind in here
    )
    chosen = ' selected=""'
    heads = "".join(
        f'<option value="{head}"{chosen if head == look.head else ""}>Head {head}</option>'
        for head in range(shown.num_heads)
    )
    scales = "".join(
        f'<button type="button" data-look="scale:{value}" '
        f'aria-pressed="{_flag(look.choice.log == (value == "log"))}">{name}</button>'
        for value, name in (("linear", "Linear"), ("log", "Log"))
    )
    inexact = ""
    if not shown.exact(look.tokens, look.head):
        inexact = '<span class="muted">this head for all words together</span>'
    return (
        '<div class="look-controls">'
        f'<div class="segments" role="group" aria-label="Kind of attention">{kinds}</div>'
        '<label class="pick"><span class="unseen">Heads</span><select data-look-select="head" '
        f'aria-label="Heads"><option value="all">Mean of heads</option>{heads}</select></label>'
        f'<div class="segments" role="group" aria-label="Scale">{scales}</div>{inexact}</div>'
    )


def _files(look: Look) -> str:
    if not look.address:
        return ""
    return (
        '<span class="files"><span class="muted">Maps</span>'
        f'<a href="{esc(look.address)}/maps.png" download="" aria-label="Download the map as PNG">'
        f'PNG</a><a href="{esc(look.address)}/maps.npz" download="" '
        'aria-label="Download all maps as NPZ">NPZ</a></span>'
    )


def _flag(value: bool) -> str:
    return "true" if value else "false"
