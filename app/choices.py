"""What a visitor chose for their turns, within what the app allows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from app.settings import Settings
from model.types import MOST_FRAMES


@dataclass(frozen=True)
class Choices:
    """None: the app's own setting, and where that is None, the model's."""

    max_frames: int | None = None
    max_new_tokens: int | None = None
    pooled_tokens: int | None = None  # per frame

    def over(self, other: Choices) -> Choices:
        """These, and the other's where these say nothing."""
        return Choices(
            self.max_frames or other.max_frames,
            self.max_new_tokens or other.max_new_tokens,
            self.pooled_tokens or other.pooled_tokens,
        )


MOST_NEW_TOKENS = 2048  # of one answer, where the app sets no limit of its own
MOST_POOLED_TOKENS = 4096  # of one frame; no encoder has more to pool

_LABELS = {
    "max_frames": "The number of frames",
    "max_new_tokens": "The length of answers",
    "pooled_tokens": "The tokens of a frame",
}


def within(choices: Choices, settings: Settings) -> tuple[Choices, tuple[str, ...]]:
    """Clamp every number to what is possible here, with a sentence for each that was changed."""
    most = {
        "max_frames": settings.max_frames or MOST_FRAMES,
        "max_new_tokens": settings.max_new_tokens or MOST_NEW_TOKENS,
        "pooled_tokens": MOST_POOLED_TOKENS,
    }
    notices = []
    for name, limit in most.items():
        asked = getattr(choices, name)
        if asked is None:
            continue
        given = min(max(asked, 1), limit)
        if given != asked:
            choices = replace(choices, **{name: given})
            notices.append(f"{_LABELS[name]} became {given}; 1 to {limit} can be chosen here.")
    return choices, tuple(notices)
