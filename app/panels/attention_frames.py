"""Frames with heat over them: the strongest ones, and the one behind a cell of the grid."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from app.looking import Look
from app.panels.draw import clock, esc, percent, seek_button

_HEAT = (255, 122, 24)  # as --heat in page.css, over a picture in either theme
_HEAT_ALPHA = 0.82
_OVERLAY_WIDTH = 160  # pixels; the browser smooths the rest


def heat_overlay(patches: np.ndarray, width: int, height: int) -> bytes:
    """Paint patch weights (g, g) over a picture of this shape: PNG, clear to hot."""
    weights = patches / (float(patches.max()) or 1.0)
    size = (_OVERLAY_WIDTH, max(1, round(_OVERLAY_WIDTH * height / width)))
    grid = Image.fromarray((255 * weights).astype(np.uint8), mode=None)
    alpha = grid.resize(size, Image.Resampling.BICUBIC).point(lambda v: int(v * _HEAT_ALPHA))
    picture = Image.new("RGB", size, _HEAT)
    picture.putalpha(alpha)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def strongest(look: Look, most: int) -> str:
    """The frames with most of what is chosen, mean over layers."""
    mass = look.rows().mean(0)
    hidden = set(look.attention.hidden)
    order = [f for f in np.argsort(-mass, kind="stable").tolist() if f not in hidden][:most]
    shown = "".join(_frame(look, frame, float(mass[frame])) for frame in order)
    return f'<h3>Strongest frames</h3><div class="frames">{shown}</div>' if shown else ""


def _frame(look: Look, frame: int, share: float) -> str:
    time = float(look.attention.times[frame])
    at = clock(time)
    inside = (
        f"{picture(look, None, frame)}"
        f'<span class="caption"><b>{esc(at)}</b><span>{esc(percent(share))}</span></span>'
    )
    return seek_button(time, inside, css="frame")


def picture(look: Look, row: int | None, frame: int) -> str:
    """A frame with the patches that were looked at, of one layer or the mean of all."""
    jpeg = look.picture(frame)
    if jpeg is None or look.map is None:
        return '<span class="picture no-picture">not kept</span>'
    with Image.open(io.BytesIO(jpeg)) as opened:
        width, height = opened.size
    source = f"{look.address}/{frame}.jpg" if look.address else _data(jpeg, "jpeg")
    patches = look.map.patch_map(row, frame, look.tokens, look.head)
    overlay = ""
    if patches is not None:
        heat = _data(heat_overlay(patches, width, height), "png")
        overlay = f'<img class="overlay" src="{heat}" alt="">'
    at = clock(float(look.attention.times[frame]))
    return (
        f'<span class="picture" style="aspect-ratio:{width}/{height}">'
        f'<img src="{esc(source)}" alt="Frame at {esc(at)}">{overlay}</span>'
    )


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def chosen_cell(look: Look) -> str:
    """The frame behind the chosen cell, with its numbers."""
    cell, shown = look.choice.cell, look.map
    if cell is None or shown is None or cell[0] >= len(shown.layers):
        return ""
    row, frame = cell
    time, value = float(look.attention.times[frame]), percent(float(look.rows()[row, frame]))
    whose = f"of the attention of “{esc(look.word.bare)}”" if look.word else "of its attention"
    if shown.measure == "focus":
        whose = "narrow"
    if frame in look.attention.hidden:
        whose += "; this frame was hidden from the model"
    return (
        '<figure class="cell" aria-live="polite">'
        f"{picture(look, row, frame)}"
        f"<figcaption><b>Layer {shown.layers[row]} at {seek_button(time, clock(time))}</b>"
        f'<span>{value} {whose}</span><span class="muted">{_patch_note(look, frame)}</span>'
        '<button type="button" class="close" data-look="cell:none" aria-label="Close this frame">'
        "Close</button></figcaption></figure>"
    )


def _patch_note(look: Look, frame: int) -> str:
    """What the heat on the picture is, or why there is none."""
    shown = look.map
    assert shown is not None
    if shown.patches is None:
        if shown.kind == "self":
            return "The language model has one token for the whole frame; nothing finer is known."
        return "How it was spread within the frame is not kept for this kind."
    if frame not in shown.patch_frames:
        return "How it was spread within the frame was kept for the strongest frames only."
    told = "Heat: where in the frame"
    if look.head is not None and shown.patches.shape[2] == 1:
        told += ", mean of all heads"
    if look.word is not None and len(shown.patches) == 1:
        told += ", all words together"
    return told + "."
