"""A link that restores a run: the sample and the settings, and nothing that is private."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlencode

from app.choices import Choices, within
from app.settings import Settings
from app.sources import Sample, Video

_MOST_CHARS = 64  # of one value; longer ones are not from us
_NUMBERS = {"frames": "max_frames", "tokens": "pooled_tokens", "answer": "max_new_tokens"}


@dataclass(frozen=True)
class Restored:
    """What a link asks for, checked."""

    sample: Sample | None
    choices: Choices
    notices: tuple[str, ...]


def sample_name(video: Video | None) -> str | None:
    """Short name of the sample that a video is; None for a visitor's own."""
    return video.path.stem if video is not None and video.shared else None


def query(video: Video | None, choices: Choices, model: str) -> str:
    """The part of the link behind the page's address, with its `?`."""
    values: dict[str, object] = {"sample": sample_name(video), "model": model}
    values |= {name: getattr(choices, field) for name, field in _NUMBERS.items()}
    return "?" + urlencode({name: value for name, value in values.items() if value})


def restore(
    params: Mapping[str, str], settings: Settings, samples: Sequence[Sample], model: str
) -> Restored | None:
    """Read a link of ours; None where the address holds nothing of the kind.

    Whatever cannot be used is left out, with a sentence. `model` is the one that runs here, or
    empty while that is not known.
    """
    given = {
        name: params[name][:_MOST_CHARS]
        for name in ("sample", "model", *_NUMBERS)
        if params.get(name)
    }
    if not given.keys() - {"model"}:
        return None
    notices = []
    sample = next((one for one in samples if one.path.stem == given.get("sample")), None)
    if "sample" in given and sample is None:
        notices.append("The link names a sample that is not here.")
    numbers = {}
    for name, field in _NUMBERS.items():
        text = given.get(name)
        if text is not None and text.isascii() and text.isdecimal():
            numbers[field] = int(text)
        elif text is not None:
            notices.append(f"The link's {name} is not a number and was left out.")
    tokens = numbers.get("pooled_tokens")
    if tokens is not None and (tokens < 1 or math.isqrt(tokens) ** 2 != tokens):
        del numbers["pooled_tokens"]
        notices.append("The link's tokens form no square grid and were left out.")
    choices, clamped = within(Choices(**numbers), settings)
    if model and given.get("model", model) != model:
        notices.append("The link was made with another model than the one that runs here.")
    return Restored(sample, choices, (*notices, *clamped))


def told(restored: Restored) -> str:
    """One line about what was restored."""
    parts = [f"the sample “{restored.sample.title}”"] if restored.sample is not None else []
    if restored.choices.max_frames is not None:
        parts.append(f"at most {restored.choices.max_frames} frames")
    if restored.choices.pooled_tokens is not None:
        parts.append(f"{restored.choices.pooled_tokens} tokens per frame")
    if restored.choices.max_new_tokens is not None:
        parts.append(f"answers of at most {restored.choices.max_new_tokens} tokens")
    what = f"Restored from the link: {', '.join(parts)}." if parts else ""
    return " ".join(filter(None, [what, *restored.notices]))
