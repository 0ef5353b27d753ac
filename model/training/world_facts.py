"""What is true of the procedural world: per frame, per patch, and over a whole video.

All of it is computed from the scenes' data; nothing is rendered. A video is given as the sequence
of its placed scenes, so the same code serves a `World` and scenes that training put together.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from model.training.world_parts import (
    NOUNS,
    SIGN_COLOURS,
    Actor,
    Box,
    Placed,
    Scene,
    Sign,
    World,
    sign_ink,
)

NOUN_IDS = {noun: index for index, noun in enumerate(NOUNS, start=1)}
COLOUR_IDS = {colour: index for index, colour in enumerate(SIGN_COLOURS, start=1)}
SIGN_CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHARACTER_IDS = {character: index for index, character in enumerate(SIGN_CHARACTERS, start=1)}
LONGEST_SIGN = 5
MARGIN = 1e-6  # seconds; keeps a time that was computed from a span inside of it


@dataclass(frozen=True)
class FrameFacts:
    """What one frame shows."""

    time: float
    objects: tuple[tuple[str, Box], ...]
    sign: Sign | None


def scene_facts(scene: Scene, local_times: Iterable[float]) -> tuple[FrameFacts, ...]:
    """What is visible in a scene at each of the given local times."""
    facts = []
    for t in local_times:
        objects = tuple((actor.noun, actor.box(t)) for actor in scene.actors if actor.visible(t))
        sign = scene.sign if scene.sign is not None and scene.sign.visible(t) else None
        facts.append(FrameFacts(t, objects, sign))
    return tuple(facts)


def patch_labels(scene: Scene, t: float, grid: int) -> dict[str, np.ndarray]:
    """Dense labels of a frame for a grid of patches, by what lies under each patch's centre.

    `nouns` (grid, grid): `NOUN_IDS`; `sign_colours` (grid, grid): `COLOUR_IDS`; `sign_chars`
    (grid, grid, 5): `CHARACTER_IDS` of the whole text on every patch of the sign; `owners`
    (grid, grid): on a sign, `NOUN_IDS` of the object that is clearly nearest to it; `counts`
    (grid, grid): on an object, how many of its kind the frame shows; `middles` (grid, grid): 1
    on an object, 2 where its middle is; 0 is nothing.
    """
    nouns = np.zeros((grid, grid), np.int64)
    counts = np.zeros((grid, grid), np.int64)
    middles = np.zeros((grid, grid), np.int64)
    colours = np.zeros((grid, grid), np.int64)
    owners = np.zeros((grid, grid), np.int64)
    chars = np.zeros((grid, grid, LONGEST_SIGN), np.int64)
    (facts,) = scene_facts(scene, (t,))
    centres = (np.arange(grid) + 0.5) / grid
    for noun, (left, top, right, bottom) in facts.objects:
        x = (2 * centres - left - right) / (right - left)
        y = (2 * centres - top - bottom) / (bottom - top)
        # A superellipse: the corners of an object's box show the background.
        inside = (x[None, :] ** 4 + y[:, None] ** 4) <= 1
        nouns[inside] = NOUN_IDS[noun]
        counts[inside] = sum(other == noun for other, _ in facts.objects)
        middles[inside] = 1
        middles[int((top + bottom) / 2 * grid), int((left + right) / 2 * grid)] = 2
    if facts.sign is not None:
        left, top, right, bottom = facts.sign.box
        rows = np.flatnonzero((centres >= top) & (centres < bottom))
        columns = np.flatnonzero((centres >= left) & (centres < right))
        covered = np.ix_(rows, columns)
        colours[covered] = COLOUR_IDS[facts.sign.colour]
        text = [CHARACTER_IDS[character] for character in facts.sign.text]
        chars[covered] = text + [0] * (LONGEST_SIGN - len(text))
        beside, clear = _beside(scene, facts.sign)
        owners[covered] = NOUN_IDS[beside[0]] if clear else 0
    return {
        "nouns": nouns,
        "sign_colours": colours,
        "sign_chars": chars,
        "owners": owners,
        "counts": counts,
        "middles": middles,
    }


def own_characters(sign: Sign | None, texts: np.ndarray) -> np.ndarray:
    """The character on each patch of a sign, (grid, grid), from its text on all (grid, grid, 5)."""
    own = np.zeros(texts.shape[:2], np.int64)
    covered = np.argwhere(texts[..., 0] > 0)
    if sign is not None and len(covered):
        left, _, right, _ = sign_ink(sign)
        for row, column in covered:
            share = ((column + 0.5) / len(own) - left) / (right - left)
            index = int(np.floor(share * len(sign.text)))
            if 0 <= index < len(sign.text):
                own[row, column] = texts[row, column, index]
    return own


@dataclass(frozen=True)
class Appearance:
    """One object, or several of one kind, in one scene; times are seconds of the video."""

    noun: str
    actors: tuple[Actor, ...]
    offset: float  # when the scene starts
    seen: tuple[float, ...]  # the sampled times that show it
    end: float

    @property
    def first(self) -> float:
        """The time of the first sampled frame that shows it."""
        return self.seen[0]

    def boxes(self, t: float) -> list[Box]:
        """Where it is at second `t` of the video, one box for each copy."""
        return [actor.box(t - self.offset) for actor in self.actors]


@dataclass(frozen=True)
class SignSeen:
    """A sign in the video; times are seconds of the video."""

    sign: Sign
    start: float
    end: float
    seen: tuple[float, ...]  # the sampled times that show it
    beside: tuple[str, ...]  # what is visible with it, the nearest first
    clear: bool  # whether the nearest one is clearly nearer than the others


@dataclass(frozen=True)
class Timeline:
    """Everything that the sampled frames of a video show."""

    times: tuple[float, ...]
    end: float
    appearances: tuple[Appearance, ...]  # by first sampled time; only what was sampled
    signs: tuple[SignSeen, ...]  # all, also those between two samples
    shown: dict[str, int]  # in how many scenes each noun is, sampled or not

    def next_time(self, t: float) -> float:
        """The sampled time after `t`, or the end of the video."""
        index = bisect_right(self.times, t)
        return self.times[index] if index < len(self.times) else max(self.end, t + MARGIN)

    def once(self, noun: str) -> Appearance | None:
        """The appearance of a noun that is in exactly one scene, if a sample shows it."""
        if self.shown.get(noun) != 1:
            return None
        return next((seen for seen in self.appearances if seen.noun == noun), None)


def make_timeline(
    video: World | Sequence[Placed | tuple[Scene, float]],
    sample_times: Sequence[float] | None = None,
) -> Timeline:
    """What a video shows at the sampled times; without them, at every change in it."""
    scenes = video.scenes if isinstance(video, World) else video
    placed = [Placed(*scene) for scene in scenes]
    if not placed:
        raise ValueError("a video needs at least one scene; got none")
    times = _all_times(placed) if sample_times is None else sorted(sample_times)
    appearances, signs = [], []
    shown: dict[str, int] = {}
    cursor = 0
    for index, current in enumerate(placed):
        last = index == len(placed) - 1
        begin = cursor
        # A decoder may give the last frame a time a little past the end; it shows the last scene.
        while cursor < len(times) and (last or times[cursor] < current.end):
            cursor += 1
        within = times[begin:cursor]
        for noun in current.scene.nouns:
            shown[noun] = shown.get(noun, 0) + 1
            appearance = _appearance(current, noun, within)
            if appearance.seen:
                appearances.append(appearance)
        if current.scene.sign is not None:
            signs.append(_sign_seen(current, current.scene.sign, within))
    appearances.sort(key=lambda appearance: appearance.first)
    return Timeline(tuple(times), placed[-1].end, tuple(appearances), tuple(signs), shown)


def _all_times(placed: Sequence[Placed]) -> list[float]:
    """A moment just after every change, and two a second between."""
    times = set(np.arange(0, placed[-1].end, 0.5).tolist())
    for scene, start in placed:
        times.add(start + MARGIN)
        times.update(start + actor.start + MARGIN for actor in scene.actors)
        if scene.sign is not None:
            times.add(start + scene.sign.start + MARGIN)
    return sorted(times)


def _appearance(placed: Placed, noun: str, within: Sequence[float]) -> Appearance:
    scene, start = placed
    actors = tuple(actor for actor in scene.actors if actor.noun == noun)
    seen = tuple(t for t in within if any(actor.visible(t - start) for actor in actors))
    return Appearance(noun, actors, start, seen, start + max(actor.end for actor in actors))


def _sign_seen(placed: Placed, sign: Sign, within: Sequence[float]) -> SignSeen:
    scene, start = placed
    seen = tuple(t for t in within if sign.visible(t - start))
    beside, clear = _beside(scene, sign)
    return SignSeen(sign, start + sign.start, start + sign.end, seen, beside, clear)


def _beside(scene: Scene, sign: Sign) -> tuple[tuple[str, ...], bool]:
    """What is visible with a sign, the nearest first, and whether that one is clearly nearer."""
    middle = (sign.start + sign.end) / 2
    gaps: dict[str, float] = {}
    for actor in scene.actors:
        if actor.visible(middle):
            gap = _gap(sign.box, actor.box(middle))
            gaps[actor.noun] = min(gap, gaps.get(actor.noun, gap))
    beside = tuple(sorted(gaps, key=lambda noun: gaps[noun]))
    clear = len(beside) == 1 or (len(beside) > 1 and gaps[beside[0]] + 0.06 < gaps[beside[1]])
    return beside, clear


def heading(right: float, down: float) -> str:
    """The direction of a way by its larger part."""
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"


def _gap(first: Box, second: Box) -> float:
    """The distance between two boxes, in heights of a 16:9 picture."""
    across = max(first[0] - second[2], second[0] - first[2], 0.0) * 16 / 9
    down = max(first[1] - second[3], second[1] - first[3], 0.0)
    return float(np.hypot(across, down))
