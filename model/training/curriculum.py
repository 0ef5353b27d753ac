"""Which kind of question is asked on videos of which length, by how well it is answered."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection

# Frames per video; a kind climbs when it is answered well. Single frames teach reading: a step on
# them holds ten times as many signs as one on short videos.
LEVELS = (1, 3, 5, 8, 12, 18, 26, 36, 48, 72, 96)
FIRST = 2  # the highest level at which a kind that a trained model does not know begins
SHORTEST = {"direction": 1}  # the level at which a kind begins that shorter videos cannot show
PROMOTE = 0.85  # exact-match accuracy at its highest level that lets a kind climb, at first
# From a share of the training time on, every kind is also asked at this level: long videos must
# not stay unseen because a kind is hard.
AT_LEAST = ((0.1, 3), (0.15, 4), (0.25, 5), (0.35, 6), (0.45, 7), (0.65, 8), (0.75, 9), (0.88, 10))
# The last level to which a kind is brought so, where not the longest. A video has one list of what
# happens: of long ones, a step holds two lists and hundreds of other answers' tokens.
BROUGHT_TO = {"scenes": 5}
LONGEST = {"scenes": 6}  # the highest level at which a kind begins, where not the last
AT_HIGHEST = 0.6  # share of a kind's batches that have the length it is to learn now
AT_TOP = 0.25  # the same when that is the last one
# How often a kind is asked, where not 1: these can be asked of every video and would crowd out
# the others, or have answers of ten times as many tokens.
# Numbers need the most examples (a digit must be bound to its place), and a video has few signs.
SHARE = {
    "outside": 0.08, "absent": 0.35, "exists": 0.4, "number": 3.0, "word": 1.5, "before": 2.5,
    "after": 2.5, "scenes": 2.5, "count": 1.5, "direction": 2.5,
}  # fmt: skip


class Curriculum:
    """Which kind of question is asked on videos of which length.

    `level`: up to which all but the `new` kinds are asked from the beginning; `fixed`: no kind
    ever climbs.
    """

    def __init__(
        self,
        kinds: Collection[str],
        level: int = 0,
        *,
        new: Collection[str] = (),
        fixed: bool = False,
    ) -> None:
        self.level = {kind: min(level, FIRST) if kind in new else level for kind in kinds}
        if not fixed:
            for kind, at in self.level.items():
                least, most = SHORTEST.get(kind, 0), LONGEST.get(kind, len(LEVELS) - 1)
                self.level[kind] = min(max(at, least), most)
        self.fixed, self.share = fixed, dict(SHARE)
        self.accuracy: dict[tuple[str, int], float] = defaultdict(float)
        self.count: dict[tuple[str, int], int] = defaultdict(int)

    def sample_level(self, rng: random.Random) -> int:
        """The length for a batch: one that a kind in need of practice has reached."""
        kinds = list(self.level)
        (kind,) = rng.choices(kinds, [self.weight(k) for k in kinds])
        highest = self.level[kind]
        if highest == len(LEVELS) - 1:
            # Nothing is left to climb for, and a step on shorter videos holds more of them.
            return highest if rng.random() < AT_TOP else max(rng.choices(range(highest), k=2))
        return highest if rng.random() < AT_HIGHEST else rng.randint(0, highest)

    def kinds_at(self, level: int) -> list[str]:
        """Kinds that may be asked on videos of this length."""
        return [kind for kind, reached in self.level.items() if reached >= level]

    def weight(self, kind: str) -> float:
        """Kinds that are answered badly are asked more often."""
        return self.share.get(kind, 1.0) * (1.15 - self.accuracy[kind, self.level[kind]])

    def record(self, kind: str, level: int, right: bool, done: float) -> None:
        """Note one answer, and promote the kind when it is good enough at its top level.

        `done` is the share of the training time that is used up; the bar sinks in its second half.
        """
        key = (kind, level)
        self.count[key] += 1
        rate = max(1 / self.count[key], 0.01)
        self.accuracy[key] += rate * (right - self.accuracy[key])
        if self.fixed:
            return
        bar = PROMOTE - 0.35 * max(0.0, done - 0.5)
        good = self.accuracy[key] > bar and self.count[key] >= 150
        if good and level == self.level[kind] < len(LEVELS) - 1:
            self.level[kind] += 1
        for since, least in AT_LEAST:
            if done >= since:
                brought = min(least, BROUGHT_TO.get(kind, least))
                self.level[kind] = max(self.level[kind], brought)

    def state(self) -> dict:
        """Everything, as plain data."""
        return {
            "level": self.level,
            "accuracy": list(self.accuracy.items()),
            "count": list(self.count.items()),
        }

    def restore(self, state: dict) -> None:
        """Undo `state`; kinds that are new keep level 0."""
        self.level.update({k: v for k, v in state["level"].items() if k in self.level})
        self.accuracy.update(dict(state["accuracy"]))
        self.count.update(dict(state["count"]))
