"""A few small pictures of a video, told while it is read, for a strip under the player."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

from model.types import FramesRead

MOST_PICTURES = 24  # of one video
SIDE = 144  # pixels, longer side


def frames_read(
    first: int, times: Sequence[float], pictures: Sequence[bytes], total: int
) -> FramesRead:
    """Tell of frames `first`, `first + 1`, ... of `total`, with pictures of some of them."""
    most = min(MOST_PICTURES, total)
    chosen = {round((slot + 0.5) * total / most - 0.5) for slot in range(most)}
    shown = tuple(
        (float(time), _small(picture))
        for place, (time, picture) in enumerate(zip(times, pictures, strict=True), start=first)
        if place in chosen
    )
    return FramesRead(first, tuple(float(time) for time in times), shown)


def _small(jpeg: bytes) -> bytes:
    out = io.BytesIO()
    with Image.open(io.BytesIO(jpeg)) as picture:
        picture.thumbnail((SIDE, SIDE))
        picture.save(out, "JPEG", quality=70)
    return out.getvalue()
