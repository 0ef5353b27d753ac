"""The frames of a visitor's video that the model has read so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.types import FramesRead


@dataclass
class Filmstrip:
    """Times of all sampled frames, and small pictures of some."""

    times: list[float] = field(default_factory=list)  # seconds, rising
    pictures: list[tuple[float, bytes]] = field(default_factory=list)  # (seconds, JPEG)

    def add(self, event: FramesRead) -> bool:
        """Take frames in; the first ones begin anew. Tells whether there is more to be seen."""
        if event.first == 0:
            same = self.times == list(event.times) and len(self.pictures) == len(event.pictures)
            if same:
                return False
            self.times, self.pictures = [], []
        del self.times[event.first :]
        self.times += event.times
        self.pictures += event.pictures
        return bool(event.pictures)
