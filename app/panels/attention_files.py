"""The maps of an answer as files: a figure (PNG) and every number (NPZ)."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from app.looking import Look, Word, words_of
from app.panels.attention_grid import DECADES, KIND_NAMES, levels, signed, spread
from app.panels.draw import clock, percent, ticks
from model.types import AskRequest, AttentionMap, ModelInfo

_UNITS = {
    ("t2v", "share"): "share of a token's attention in one layer on one frame; over all frames 1",
    ("self", "share"): "share of a token's self-attention in one layer on one frame; the rest of 1 "
    "lies on text",
    ("v2v", "share"): "share of all pooled tokens' attention in one layer on one frame; over all "
    "frames 1",
    ("v2v", "focus"): "1 - entropy / log(patches) of the pooled tokens' attention within their own "
    "frame: 0 evenly over it, 1 on a single patch",
}
_PATCH_UNIT = "share of the attention on that frame; each grid sums to 1"


def maps_npz(look: Look, request: AskRequest | None, model: ModelInfo | None) -> bytes:
    """All maps of an answer with times, layers, tokens and units; the keys are in the README."""
    attention = look.attention
    arrays: dict[str, object] = {
        "question": request.question if request is not None else "",
        "answer": look.answer.text,
        "model": look.answer.model,
        "times": attention.times,
        "tokens": np.array(attention.tokens, dtype=str),
        "word_of_token": _word_of_token(attention.tokens),
        "hidden_frames": np.array(attention.hidden, dtype=int),
        "kinds": np.array([one.kind for one in look.maps], dtype=str),
    }
    if model is not None:
        arrays["gate_layers"] = np.array(model.dcal_layers, dtype=int)
        arrays["gates"] = np.array(model.gates, dtype=np.float32).reshape(-1, 2)
        arrays["gates_unit"] = "tanh(gamma) of (V2V, T2V)"
    for one in look.maps:
        arrays |= {f"{one.kind}_{name}": value for name, value in _arrays(one).items()}
    out = io.BytesIO()
    np.savez_compressed(out, **{name: np.asarray(value) for name, value in arrays.items()})
    return out.getvalue()


def _arrays(one: AttentionMap) -> dict[str, object]:
    arrays: dict[str, object] = {
        "unit": _UNITS[one.kind, one.measure],
        "layers": np.array(one.layers, dtype=int),
        "words": one.words,
        "heads": one.heads,
    }
    if one.both is not None:
        arrays["both"] = one.both
    if one.patches is not None:
        arrays["patches"] = one.patches
        arrays["patch_frames"] = np.array(one.patch_frames, dtype=int)
        arrays["patches_unit"] = _PATCH_UNIT
    return arrays


def _word_of_token(tokens: tuple[str, ...]) -> np.ndarray:
    words: tuple[Word, ...] = words_of(tokens)
    out = np.full(len(tokens), -1)
    for place, word in enumerate(words):
        out[word.tokens] = place
    return out


# The figure.

_WIDTH, _LEFT, _RIGHT, _TOP = 1400, 110, 190, 96
_INK, _SOFT, _GROUND, _HEAT = (28, 31, 30), (95, 102, 99), (244, 242, 239), (224, 89, 11)


def maps_png(look: Look, request: AskRequest | None, model: ModelInfo | None) -> bytes:
    """The chosen map as it is drawn in the panel, with its axes, gates and legend."""
    shown = look.map
    assert shown is not None
    values = look.rows()
    height = max(14, min(44, 520 // len(values)))
    bottom = _TOP + (height + 3) * len(values)
    figure = Image.new("RGB", (_WIDTH, bottom + 110), "white")
    draw = ImageDraw.Draw(figure)
    _title(draw, look, request)
    top = float(values.max()) or 1.0
    plot = _WIDTH - _LEFT - _RIGHT
    drawn = levels(spread(values, look.attention.times, look.duration), top, look.choice.log)
    gates = dict(zip(model.dcal_layers, model.gates, strict=True)) if model else {}
    for place, layer in enumerate(shown.layers):
        y = _TOP + place * (height + 3)
        figure.paste(_cells(drawn[place]).resize((plot, height), Image.Resampling.BOX), (_LEFT, y))
        _text(draw, (_LEFT - 12, y + height / 2), f"layer {layer}", 14, _SOFT, "rm")
        if layer in gates:
            v2v, t2v = (signed(gate) for gate in gates[layer])
            told = f"V2V {v2v}  T2V {t2v}"
            _text(draw, (_WIDTH - _RIGHT + 12, y + height / 2), told, 13, _SOFT, "lm")
    for at in ticks(look.duration, most=9):
        x = _LEFT + plot * at / look.duration
        draw.line([(x, bottom), (x, bottom + 6)], fill=_SOFT)
        _text(draw, (x, bottom + 10), clock(at), 14, _INK, "mt")
    low = f"{100 * top / 10**DECADES:.1g} %" if look.choice.log else "0 %"
    unit = f"{_UNITS[shown.kind, shown.measure]}"
    scale = f"white {low}, orange {percent(top)}{' (logarithmic)' if look.choice.log else ''}"
    _text(draw, (_LEFT, bottom + 46), f"Time in the video. Colour: {scale}", 14, _INK, "lt")
    _text(draw, (_LEFT, bottom + 70), unit, 13, _SOFT, "lt")
    out = io.BytesIO()
    figure.save(out, "PNG")
    return out.getvalue()


def _title(draw: ImageDraw.ImageDraw, look: Look, request: AskRequest | None) -> None:
    shown = look.map
    assert shown is not None
    whose = f"“{look.word.bare}”" if look.word else "all words"
    head = f"head {look.head}" if look.head is not None else "mean of heads"
    kind = KIND_NAMES[shown.kind][0]
    what = f"{kind}, {head}" + (f", {whose}" if shown.kind != "v2v" else "")
    asked = f"{request.question}  →  " if request is not None else ""
    _text(draw, (_LEFT, 18), what, 20, _INK, "lt")
    told = f"{asked}{look.answer.text}".replace("\n", " ")
    _text(draw, (_LEFT, 48), told if len(told) <= 150 else told[:149] + "…", 14, _SOFT, "lt")
    _text(draw, (_LEFT, 69), look.answer.model, 13, _SOFT, "lt")


def _cells(row: np.ndarray) -> Image.Image:
    """Levels 0..1 as colours between the ground's and heat, one pixel high."""
    low, high = np.array(_GROUND, float), np.array(_HEAT, float)
    return Image.fromarray((low + row[:, None] * (high - low)).round().astype(np.uint8)[None])


def _text(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    size: int,
    colour: tuple[int, int, int],
    anchor: str,
) -> None:
    draw.text(place, text, fill=colour, font=ImageFont.load_default(size), anchor=anchor)
