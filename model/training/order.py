"""What came when in a video, by the frames that were sampled, and what a question asks of it."""

from __future__ import annotations

import math
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
from model.training.world_questions import QA, left_edge

NAMES = {name: i for noun, i in NOUN_IDS.items() for name in (noun, plural(noun))}
_NAMED = re.compile(rf"\b({'|'.join(sorted(NAMES, key=len, reverse=True))})\b")
MOTIONS = (STILL, "left", "right", "up", "down")
NOWHERE = -1  # of a head that would disturb the answer: it is to look at no frame
# What an answer's tokens are to read of visual tokens, and with which of three heads: what came
# before an object, what came in (the leftmost, and what else to its right), how it moves since
# then, how many of it there are.
HEADS = {"previous": 0, "latest": 1, "second": 2, "third": 2, "motion": 2, "copies": 2}
READERS = {
    "before": ("previous",), "after": ("latest",),
    "scenes": ("latest", "second", "third", "copies"),
    "direction": ("motion",), "count": ("copies",),
}  # fmt: skip
# Which way something moves is the difference of two places: where it came in, where it was last.
PLACE_HEADS = (0, 2)
FAR = 0.06  # of the picture: what has moved less since it came may be taken for standing still


@dataclass(frozen=True)
class Order:
    """What came when, by the T frames of a video that were sampled."""

    ids: torch.Tensor  # (E,) of the objects in the order they came; IGNORE: not alone
    arrival: torch.Tensor  # (E,) index of the first frame that shows it
    event: torch.Tensor  # (T,) index of the last object to come; -1: nothing yet
    crowded: torch.Tensor  # (T,) bool: several kinds of object are to be seen
    together: torch.Tensor  # (E, 3) ids of all that came with it, from the left; 0: no more
    motion: torch.Tensor  # (T,) index in MOTIONS of what came last, since it came; IGNORE
    places: torch.Tensor  # (T, 2) x and y of what came last, if it is one thing; NaN
    last: torch.Tensor  # (E,) index of the last frame that shows it
    copies: torch.Tensor  # (T,) how many there are of the kind that came last; IGNORE
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
        newest = [_newest(here) for here in seen]
        ids = [NOUN_IDS[one.noun] if firsts.count(one.first) == 1 else IGNORE for one in came]
        return cls(
            torch.tensor(ids, dtype=torch.long),
            torch.from_numpy(np.searchsorted(video.times, firsts)),
            torch.from_numpy(np.searchsorted(firsts, video.times, side="right")) - 1,
            torch.tensor([len(here) > 1 for here in seen]),
            torch.tensor([_together(came, t) for t in firsts], dtype=torch.long).view(-1, 3),
            torch.tensor([_motion(new, t) for new, t in zip(newest, times, strict=True)]),
            torch.tensor([_place(new, t) for new, t in zip(newest, times, strict=True)]),
            torch.from_numpy(np.searchsorted(video.times, [one.seen[-1] for one in came])),
            torch.tensor([_copies(new, t) for new, t in zip(newest, times, strict=True)]),
            tuple(
                tuple(box for one in new for box in one.boxes(t))
                for new, t in zip(newest, times, strict=True)
            ),
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

    def came(self, place: int) -> torch.Tensor:
        """Id of what came last, its `place` from the left (0 to 2), (T,); 0: there is none."""
        nothing = torch.zeros(1, 3, dtype=torch.long)
        return torch.cat((nothing, self.together))[self.event + 1, place]

    @property
    def previous(self) -> torch.Tensor:
        """Id of the object that came before the last one, (T,); 0: none; IGNORE: not alone."""
        return torch.cat((torch.zeros(2, dtype=torch.long), self.ids))[self.event + 1]

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


def _newest(here: Sequence[Appearance]) -> list[Appearance]:
    """What came last of what a frame shows; several, where they came together."""
    last = max((one.first for one in here), default=0)
    return [one for one in here if one.first == last]


def _together(came: Sequence[Appearance], first: float) -> list[int]:
    """Ids of what came in at a time, from the left, three at most; 0: no more."""
    found = sorted((one for one in came if one.first == first), key=left_edge)
    return ([NOUN_IDS[one.noun] for one in found] + [0, 0, 0])[:3]


def _motion(newest: Sequence[Appearance], now: float) -> int:
    if len(newest) != 1 or len(newest[0].actors) != 1 or now == newest[0].first:
        return IGNORE
    if not newest[0].actors[0].moves:
        return MOTIONS.index(STILL)
    (x0, y0), (x1, y1) = (_place(newest, t) for t in (newest[0].first, now))
    right, down = x1 - x0, y1 - y0
    return MOTIONS.index(heading(right, down)) if max(abs(right), abs(down)) >= FAR else IGNORE


def _place(newest: Sequence[Appearance], now: float) -> tuple[float, float]:
    if len(newest) != 1 or len(newest[0].actors) != 1:
        return math.nan, math.nan
    left, top, right, bottom = newest[0].boxes(now)[0]
    return (left + right) / 2, (top + bottom) / 2


def _copies(newest: Sequence[Appearance], now: float) -> int:
    counts = {len(one.actors) for one in newest}
    whole = all(actor.visible(now - one.offset) for one in newest for actor in one.actors)
    return counts.pop() if len(counts) == 1 and whole else IGNORE


def named(question: str) -> int:
    """Id of the object that a question names; -1: of none."""
    found = _NAMED.findall(question.lower())
    return NAMES[max(found, key=len)] if found else -1
