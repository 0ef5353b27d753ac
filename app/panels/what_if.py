"""The part "What if" of the panel: a form, and two answers side by side with their difference."""

from __future__ import annotations

import numpy as np

from app.looking import Look
from app.panels.attention_grid import KIND_NAMES, column_edges, mask, mean_row, spread, table
from app.panels.draw import clock, esc, percent, seek_button
from app.what_if import Tried, told
from model.types import Answer, AttentionMap, ModelInfo

_MOST_TOKENS = 36  # per frame, that the form offers


def what_if_form(look: Look | None, model: ModelInfo | None, tokens: int | None = None) -> str:
    """The form under an answer, `tokens` per frame if not the model's own; else nothing."""
    if look is None:
        return ""
    own = tokens or (model.pooled_tokens_per_frame if model is not None else 0)
    most = min(_MOST_TOKENS, model.original_tokens_per_frame if model is not None else _MOST_TOKENS)
    squares = [side * side for side in range(1, most + 1) if side * side <= most]
    options = "".join(
        f'<option value="{count}">{count}</option>' for count in squares if count != own
    )
    peak, step = look.attention.peak, look.duration / max(1, len(look.attention.times))
    around = (clock(max(0.0, peak - 2 * step)), clock(min(look.duration, peak + 2 * step) + 1))
    return (
        '<details class="panel what-if"><summary><h2>What if …</h2>'
        '<span class="muted">it could not look there? Ask the same again with something taken '
        "away.</span></summary>"
        '<form class="what-if-form"><fieldset><legend>Take away</legend>'
        '<label><input type="checkbox" name="t2v"> the words\' own look at the frames '
        '<span class="muted">(text to video)</span></label>'
        '<label><input type="checkbox" name="v2v"> the second look while reading the video '
        '<span class="muted">(video to video)</span></label></fieldset>'
        '<fieldset class="line-up"><legend>Hide a stretch of the video</legend>'
        '<label>from <input name="from" size="6" placeholder="m:ss" autocomplete="off"></label>'
        '<label>to <input name="to" size="6" placeholder="m:ss" autocomplete="off"></label>'
        f'<button type="button" class="fill" data-from="{around[0]}" data-to="{around[1]}">'
        f"The strongest moment</button></fieldset>"
        '<fieldset class="line-up"><legend>Tokens per frame in the language model</legend>'
        f'<select name="tokens" aria-label="Tokens per frame"><option value="">{own} (as it is)'
        f"</option>{options}</select></fieldset>"
        '<button type="submit" class="again">Ask again</button></form></details>'
    )


def what_if_result(look: Look | None, tried: Tried | None) -> str:
    """How far a what-if is, or both answers and how their attention differs."""
    if look is None or tried is None:
        return ""
    name = esc(told(tried.what_if))
    title = f"<h2>What if … <span>{name}</span></h2>" if name else "<h2>What if …</h2>"
    if tried.problem:
        body = f'<p class="remark" role="alert">{esc(tried.problem)}</p>'
    elif tried.answer is None:
        body = (
            f'<p class="trying" role="status">{esc(tried.stage)}'
            '<button type="button" class="halt" data-halt="what-if">Stop</button></p>'
            f"{_answers(look, tried.text or '…', None, name)}"
        )
    else:
        body = _verdict(look.answer, tried.answer)
        body += _answers(look, tried.answer.text, tried.answer, name)
        body += _difference(look, tried.answer)
    return f'<section class="panel" id="panel-what-if">{title}{body}</section>'


def _verdict(before: Answer, after: Answer) -> str:
    same = before.text.strip() == after.text.strip()
    told = "The answer stays the same." if same else "The answer changes."
    return f'<p class="headline">{told}</p>'


def _answers(look: Look, text: str, after: Answer | None, name: str) -> str:
    def card(title: str, said: str, answer: Answer | None) -> str:
        peak = ""
        if answer is not None and answer.attention is not None:
            at = answer.attention.peak
            share = float(answer.attention.timeline().max())
            peak = (
                f'<p class="muted">Most at {seek_button(at, clock(at))}, {percent(share)}'
                f"{' inside the language model' if answer.attention.main == 'self' else ''}</p>"
            )
        return f'<div class="versus-card"><h3>{title}</h3><p>{esc(said)}</p>{peak}</div>'

    return (
        f'<div class="versus">{card("As it is", look.answer.text, look.answer)}'
        f"{card(name[:1].upper() + name[1:], text, after)}</div>"
    )


def comparable(look: Look, after: Answer) -> tuple[AttentionMap, AttentionMap] | None:
    """The first kind of map that both answers have, in the order in which it is of interest."""
    if after.attention is None or len(after.attention.times) != len(look.attention.times):
        return None
    for kind in (look.attention.main, "t2v", "self"):
        one = next((m for m in look.maps if m.kind == kind), None)
        other = after.attention.map(kind)
        if one is not None and other is not None and one.layers == other.layers:
            return one, other
    return None


def _difference(look: Look, after: Answer) -> str:
    pair = comparable(look, after)
    if pair is None or after.attention is None:
        return '<p class="muted">The attention of the two cannot be compared.</p>'
    one, other = pair
    before, now = one.rows(), other.rows()
    change = now - before
    top = float(np.abs(change).max()) or 1.0
    drawn = spread(change, look.attention.times, look.duration) / top
    rows = [
        mean_row(before.mean(0), look, "before", "before"),
        mean_row(now.mean(0), look, "after"),
    ]
    for place, layer in enumerate(one.layers):
        most = int(np.abs(change[place]).argmax())
        at, by = clock(float(look.attention.times[most])), change[place, most]
        more, less = mask(np.clip(drawn[place], 0, 1)), mask(np.clip(-drawn[place], 0, 1))
        way = "more" if by > 0 else "less"
        rows.append(
            f'<span class="row-name">{layer}</span><span class="cells change" role="img" '
            f'aria-label="Layer {layer}: changes most at {at}, {percent(abs(by))} {way}">'
            f'<i class="more" style="--map:{more}"></i><i class="less" style="--map:{less}"></i>'
            "</span>"
        )
    note = ""
    if one.kind != look.attention.main:
        note = (
            '<p class="muted note">Without text to video there is none to compare, so this is the '
            "attention inside the language model.</p>"
        )
    grid = table(
        rows, look, "layer", _hidden(look, after), "", dense=len(one.layers) >= 10, gates=False
    )
    legend = (
        f'<div class="legend"><span>change of the share on one frame</span>'
        f'<span class="scale-ends"><span>{percent(top)} less</span><span class="ramp both"></span>'
        f"<span>{percent(top)} more</span></span></div>"
    )
    title = f"<h3>Difference: {esc(KIND_NAMES[one.kind][0].lower())}</h3>"
    return f"{title}{note}{grid}{legend}"


def _hidden(look: Look, after: Answer) -> str:
    """Stripes over the frames that were hidden."""
    assert after.attention is not None
    edges = 100 * column_edges(look.attention.times, look.duration) / look.duration
    return "".join(
        f'<span class="hidden-frame" style="left:{edges[f]:.2f}%;'
        f'width:{edges[f + 1] - edges[f]:.2f}%"></span>'
        for f in after.attention.hidden
    )
