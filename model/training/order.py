"""What came when in a video, by the frames that were sampled, and what a question asks of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model.training.library import Video
from model.training.packing import IGNORE
from model.training.world_facts import NOUN_IDS, Appearance, heading, make_timeline
from model.training.world_parts import Box
from model.training.world_phrases import STILL, plural
from model.training.world_questions import QA

NAMES = {name: i for noun, i in NOUN_IDS.items() for name in (noun, plural(noun))}
MOTIONS = (STILL, "left", "right", "up", "down")
NOWHERE = -1  # of a head that would disturb the answer: it is to look at no frame
# What an answer's tokens are to read of visual tokens, and with which of three heads: what came
# before an object, what came in, how it moves since then, how many of it there are.
HEADS = {"previous": 0, "latest": 1, "motion": 2, "copies": 2}
READERS = {
    "before": ("previous",), "after": ("latest",), "scenes": ("latest", "copies"),
    "direction": ("motion",), "count": ("copies",),
}  # fmt: skip
FAR = 0.06  # of the picture: what has moved less since it came may be taken for standing still


@dataclass(frozen=True)
class Order:
    """What came when, by the T frames of a video that were sampled."""

    ids: torch.Tensor  # (E,) of the objects in the order they came; IGNORE: not alone
    arrival: torch.Tensor  # (E,) index of the first frame that shows it
    event: torch.Tensor  # (T,) index of the last object to come; -1: nothing yet
    crowded: torch.Tensor  # (T,) bool: several kinds of object are to be seen
    motion: torch.Tensor  # (T,) index in MOTIONS of the only object, since it came; IGNORE
    last: torch.Tensor  # (E,) index of the last frame that shows it
    copies: torch.Tensor  # (T,) how many there are of the only kind of object; IGNORE
    boxes: tuple[tuple[Box, ...], ...]  # of the T frames: where that is which came last
    shown: tuple[tuple[Box, ...], ...]  # of the T frames: everything, signs too

    @classmethod
    def of(cls, video: Video) -> Order:
        """That of the frames that were sampled."""
        times = video.times.tolist()
        timeline = make_timeline(video.scenes, times)
        came = timeline.appearances
        firsts = [one.first for one in came]
        seen = [[one for one in came if t in one.seen] for t in times]
        alone = [here[0] if len(here) == 1 else None for here in seen]
        ids = [NOUN_IDS[one.noun] if firsts.count(one.first) == 1 else IGNORE for one in came]
        return cls(
            torch.tensor(ids, dtype=torch.long),
            torch.from_numpy(np.searchsorted(video.times, firsts)),
            torch.from_numpy(np.searchsorted(firsts, video.times, side="right")) - 1,
            torch.tensor([len(here) > 1 for here in seen]),
            torch.tensor([_motion(one, t) for one, t in zip(alone, times, strict=True)]),
            torch.from_numpy(np.searchsorted(video.times, [one.seen[-1] for one in came])),
            torch.tensor([_copies(one, t) for one, t in zip(alone, times, strict=True)]),
            tuple(_newest(here, t) for here, t in zip(seen, times, strict=True)),
            tuple(
                (
                    *(box for one in here for box in one.boxes(t)),
                    *(one.sign.box for one in timeline.signs if t in one.seen),
                )
                for here, t in zip(seen, times, strict=True)
            ),
        )

    @property
    def news(self) -> torch.Tensor:
        """Per frame: the last one, itself included, that shows something new; or IGNORE, (T,)."""
        return torch.cat((torch.tensor([IGNORE]), self.arrival))[self.event + 1]

    def labels(self, back: int) -> torch.Tensor:
        """Id of the object that came last (`back` 0) or before it (1), (T,); 0: there is none."""
        padded = torch.cat((torch.zeros(2, dtype=torch.long), self.ids))
        return padded[self.event + 2 - back]

    def asked(self, qa: QA) -> list[tuple[int, int, int]]:
        """The frames at which three heads find what each part of an answer needs.

        That in which an object comes in, for "after" the next one; for a movement also the last
        that shows it. A list of what happens ends where there is nothing more to look at.
        IGNORE: as the head likes.
        """
        if qa.kind == "scenes":
            frames = [*self.arrival.tolist(), NOWHERE]
        else:
            found = (self.ids == named(qa.question)).nonzero().flatten().tolist()
            if not found:
                return []
            frames = [self.arrival[found[0]].item()]
            if qa.kind == "after":
                frames = [*self.arrival[found[0] + 1 :].tolist(), IGNORE][:1]
            elif qa.kind == "direction":
                return [(frames[0], NOWHERE, self.last[found[0]].item())]
        if qa.kind not in READERS:
            return [(frame, IGNORE, IGNORE) for frame in frames]
        heads = {HEADS[name] for name in READERS[qa.kind]}
        return [tuple(frame if i in heads else NOWHERE for i in range(3)) for frame in frames]


def _motion(alone: Appearance | None, now: float) -> int:
    if alone is None or len(alone.actors) != 1 or now == alone.first:
        return IGNORE
    if not alone.actors[0].moves:
        return MOTIONS.index(STILL)
    (x0, y0), (x1, y1) = (_centre(alone, t) for t in (alone.first, now))
    right, down = x1 - x0, y1 - y0
    return MOTIONS.index(heading(right, down)) if max(abs(right), abs(down)) >= FAR else IGNORE


def _centre(alone: Appearance, now: float) -> tuple[float, float]:
    left, top, right, bottom = alone.boxes(now)[0]
    return (left + right) / 2, (top + bottom) / 2


def _newest(here: Sequence[Appearance], now: float) -> tuple[Box, ...]:
    last = max((one.first for one in here), default=now)
    return tuple(box for one in here if one.first == last for box in one.boxes(now))


def _copies(alone: Appearance | None, now: float) -> int:
    if alone is None or not all(actor.visible(now - alone.offset) for actor in alone.actors):
        return IGNORE
    return len(alone.actors)


def named(question: str) -> int:
    """Id of the object that a question names; -1: of none."""
    words = question.lower()
    found = [noun for noun in NAMES if re.search(rf"\b{noun}\b", words)]
    return NAMES[max(found, key=len)] if found else -1
