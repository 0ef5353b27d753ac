"""What programs are told of videos, answers, maps and savings: plain data, small enough to send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from app.ledger import as_data, count
from app.run_card import run_card
from app.sessions import Session
from app.sources import Video
from model.ask import as_json
from model.types import Answer, AttentionMap, AttentionSummary, InputError, ModelInfo


def video_data(video: Video, session: Session) -> dict[str, Any]:
    """What is told of an added video."""
    info = video.info
    return {
        "session": session.name,
        "title": video.title,
        "duration": info.duration,
        "width": info.width,
        "height": info.height,
        "codec": info.codec,
        "frame_rate": info.frame_rate,
    }


def answer_data(answer: Answer, notices: Sequence[str] = ()) -> dict[str, Any]:
    """What is told of an answer: as on the command line, and how the turn went."""
    return {
        **as_json(answer),
        "stopped": answer.stopped,
        "memory_reused": answer.memory_reused,
        "notices": [*notices, *answer.notices],
    }


def maps_data(
    attention: AttentionSummary, model: ModelInfo | None, kind: str, token: int, head: int
) -> dict[str, Any]:
    """Rows of one kind of map, for all tokens or one, all heads or one; raises `InputError`."""
    kind = attention.main if kind == "main" else kind
    chosen = attention.map(kind)
    if chosen is None and kind == "t2v" and attention.layers:
        chosen = _from_shares(attention)
    if chosen is None:
        kinds = ", ".join(one.kind for one in attention.maps) or "none"
        raise InputError(f"There is no map of kind {kind!r}; this answer has: {kinds}.")
    _check("token", token, len(attention.tokens))
    _check("head", head, chosen.num_heads)
    tokens = None if token < 0 else slice(token, token + 1)
    one_head = None if head < 0 else head
    rows = chosen.rows(tokens, one_head)
    gates = dict(zip(model.dcal_layers, model.gates, strict=True)) if model is not None else {}
    return {
        "kind": kind,
        "measure": chosen.measure,
        "exact": chosen.exact(tokens, one_head),  # False: all tokens, for want of room
        "times": [round(float(time), 3) for time in attention.times],
        "layers": list(chosen.layers),
        "heads": chosen.num_heads,
        "tokens": list(attention.tokens),
        "rows": [[round(float(share), 6) for share in row] for row in rows],
        "timeline": [round(float(share), 6) for share in attention.timeline()],
        "peak": round(attention.peak, 3),
        "strongest": [
            {"index": view.index, "time": round(view.time, 3), "share": round(view.mass, 6)}
            for view in attention.frames
        ],
        "gates": {str(layer): {"v2v": pair[0], "t2v": pair[1]} for layer, pair in gates.items()},
    }


def _from_shares(attention: AttentionSummary) -> AttentionMap:
    """The map of a turn that had no room for maps: the mean of all heads, as if it were one."""
    mean = attention.t2v_mean()
    return AttentionMap("t2v", "share", attention.layers, attention.t2v, mean[:, None])


def _check(name: str, value: Any, count_of: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value < count_of:
        raise InputError(f"{name} must be -1 to {count_of - 1} here, not {value!r}.")


def savings_data(session: Session, model: ModelInfo | None) -> dict[str, Any]:
    """The panel "What it saved" in numbers."""
    answers = session.answers()
    saved = answers[-1].savings
    return {
        "reduction": round(saved.reduction, 6),
        "turn": as_data(count(answers[-1:])),
        "conversation": as_data(count(answers)),
        "curves": {
            one.system: {
                "most_frames": one.most_frames,
                "computed": [asdict(point) for point in one.curve],
            }
            for one in saved.systems
        },
        "run_card": run_card(answers[-1], model, session.video, session.choices),
    }
