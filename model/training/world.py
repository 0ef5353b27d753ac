"""The procedural world: made-up videos, each following from a seed.

Durations are drawn in units of `interval`, the seconds between two frames that a model will look
at: a sign is shown for 1 to 3 of them, whether a video is sampled each second or each five seconds.
"""

from __future__ import annotations

import colorsys
import hashlib
import random
from collections.abc import Sequence

from model.training.world_parts import (
    ASPECT,
    BACKGROUNDS,
    MAX_COUNT,
    NOUNS,
    SHAPES,
    SIGN_COLOURS,
    SIGN_WORDS,
    Actor,
    Background,
    Box,
    Distractor,
    Placed,
    Scene,
    Sign,
    World,
)

__all__ = [
    "ASPECT",
    "NOUNS",
    "SIGN_COLOURS",
    "SIGN_WORDS",
    "Actor",
    "Background",
    "Box",
    "Distractor",
    "Placed",
    "Scene",
    "Sign",
    "World",
    "make_world",
    "sample_duration",
    "sample_scene",
    "seeded",
]


MOST_EVENTS = 44  # scenes of one video with objects in them, so that the names suffice


def seeded(*parts: int | str) -> random.Random:
    """A random generator that depends on all of `parts`, the same on every machine."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def sample_duration(rng: random.Random, interval: float = 1.0) -> float:
    """How long a scene lasts: often short, sometimes long."""
    return interval * rng.choice((rng.uniform(4, 8), rng.uniform(5, 12), rng.uniform(8, 20)))


def sample_scene(
    rng: random.Random,
    *,
    kind: str | None = None,
    nouns: Sequence[str] | None = None,
    duration: float | None = None,
    interval: float = 1.0,
    aspect: float = ASPECT,
) -> Scene:
    """One scene from the distribution that every video is made of.

    `kind` is "filler" (nothing to ask about), "solo" (one object), "flock" (several of one kind) or
    "group" (two or three kinds); drawn when not given. `nouns` are the names that may be used.
    `aspect` is width / height of the picture in which objects shall look undistorted.
    """
    if kind is None:
        kind = rng.choices(("filler", "solo", "flock", "group"), (20, 42, 20, 18))[0]
    if duration is None:
        duration = sample_duration(rng, interval)
    background = _background(rng, duration / interval)
    pool = list(NOUNS if nouns is None else nouns)
    if kind == "filler" or not pool:
        return Scene(duration, background, distractors=_distractors(rng, [], aspect))
    if kind == "solo":
        actors = _solo(rng, rng.choice(pool), duration, interval, aspect)
    elif kind == "flock":
        actors = _flock(rng, rng.choice(pool), duration, aspect)
    elif kind == "group":
        chosen = rng.sample(pool, min(len(pool), rng.choice((2, 2, 3))))
        actors = _group(rng, chosen, duration, interval, aspect)
    else:
        raise ValueError(f"kind must be filler, solo, flock or group, not {kind!r}")
    sign = None
    if rng.random() < (0.45 if kind == "flock" else 0.7):
        sign = _sign(rng, actors, duration, interval)
    taken = [actor.box(t) for actor in actors for t in (actor.start, actor.end)]
    if sign is not None:
        taken.append(sign.box)
    distractors = _distractors(rng, taken, aspect) if rng.random() < 0.3 else ()
    return Scene(duration, background, tuple(actors), sign, distractors)


def make_world(
    seed: int,
    duration: float,
    *,
    num_scenes: int | None = None,
    interval: float = 1.0,
    aspect: float = ASPECT,
) -> World:
    """The video of a seed: scenes from `sample_scene`, no object's name used in two of them.

    When a long video runs out of names, the rest is filler, spread over the video. At least eight
    names are always left over, so that it can be asked for something that is not there.
    """
    if duration < 4 * interval:
        raise ValueError(f"a video must last at least {4 * interval:g} s, not {duration:g} s")
    rng = seeded("world", seed)
    if num_scenes is None:
        lengths = [sample_duration(rng, interval)]
        while sum(lengths) < duration - 3 * interval:
            lengths.append(sample_duration(rng, interval))
    else:
        lengths = [sample_duration(rng, interval) for _ in range(num_scenes)]
    stretch = duration / sum(lengths)
    kinds = _kinds(rng, len(lengths))
    pool = rng.sample(list(NOUNS), len(NOUNS) - 8)
    scenes, start = [], 0.0
    for kind, length in zip(kinds, lengths, strict=True):
        scene = sample_scene(
            rng,
            kind=kind,
            nouns=pool,
            duration=length * stretch,
            interval=interval,
            aspect=aspect,
        )
        pool = [noun for noun in pool if noun not in scene.nouns]
        scenes.append(Placed(scene, start))
        start += scene.duration
    return World(seed, duration, tuple(scenes))


def _kinds(rng: random.Random, number: int) -> list[str]:
    """The kind of each scene: fillers between the events, and never more names than there are."""
    events = min(max(number - round(number * rng.uniform(0.1, 0.3)), 1), MOST_EVENTS)
    kinds = rng.choices(("solo", "flock", "group"), (42, 20, 18), k=events)
    kinds += ["filler"] * (number - events)
    rng.shuffle(kinds)
    return kinds


# Drawing the parts of a scene.


def _background(rng: random.Random, units: float) -> Background:
    hue = rng.random()
    dark = rng.random() < 0.25
    value = rng.uniform(0.22, 0.42) if dark else rng.uniform(0.72, 0.97)
    saturation = rng.uniform(0.12, 0.5)
    colours = []
    for shift in (0.0, rng.uniform(0.04, 0.1), -rng.uniform(0.05, 0.16)):
        lift = 1 + rng.uniform(0.04, 0.16) * (1 if dark else -1) * (shift != 0)
        red, green, blue = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, min(value * lift, 1))
        colours.append((round(red * 255), round(green * 255), round(blue * 255)))
    kind = rng.choices(BACKGROUNDS, (16, 26, 12, 12, 14, 20))[0]
    pan = (0.0, 0.0)
    if kind != "plain" and rng.random() < 0.35:
        reach = min(0.4, rng.uniform(0.015, 0.035) * units)
        pan = rng.choice(((reach, 0.0), (-reach, 0.0), (0.0, reach), (0.0, -reach)))
    first, second, third = colours
    return Background(
        kind,
        (first, second, third),
        rng.uniform(0, 6.283),
        rng.uniform(0.07, 0.2),
        rng.getrandbits(31),
        pan,
    )


def _overlap(first: Box, second: Box, gap: float) -> bool:
    return (
        first[0] < second[2] + gap
        and second[0] < first[2] + gap
        and first[1] < second[3] + gap
        and second[1] < first[3] + gap
    )


def _around(x: float, y: float, width: float, height: float) -> Box:
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _inside(value: float, half: float) -> float:
    """`value` moved so that a box of half-size `half` around it stays in the picture."""
    return min(max(value, half + 0.01), 0.99 - half)


def _solo(
    rng: random.Random, noun: str, duration: float, interval: float, aspect: float
) -> list[Actor]:
    size = rng.uniform(0.28, 0.45)
    width = size / aspect
    # The cell first, then the place in it: every answer to "where is it?" is then equally likely.
    x = _inside((rng.randrange(3) + 0.5) / 3 + rng.uniform(-0.1, 0.1), width / 2)
    y = _inside((rng.randrange(3) + 0.5) / 3 + rng.uniform(-0.1, 0.1), size / 2)
    units = duration / interval
    start = 0.0
    if units > 6 and rng.random() < 0.3:
        start = rng.uniform(1.2, units / 3) * interval
    if rng.random() < 0.5:
        return [Actor(noun, width, size, x, y, x, y, start, duration)]
    # A moving object crosses the picture at a pace that shows; in a long scene it is gone then.
    stay = min(duration - start, rng.uniform(4, 10) * interval)
    path = _path(rng, x, y, width, size, stay / interval)
    return [Actor(noun, width, size, *path, start, start + stay)]


def _path(
    rng: random.Random, x: float, y: float, width: float, size: float, units: float
) -> tuple[float, float, float, float]:
    """A straight way through (x, y) at 0.045 to 0.13 of the picture in each unit of time."""
    across = rng.random() < 0.5
    half = (width if across else size) / 2
    room = 0.98 - 2 * half
    reach = min(max(rng.uniform(0.045, 0.13) * units, 0.28), room)
    low = rng.uniform(0.01 + half, 0.99 - half - reach)
    ends = (low, low + reach) if rng.random() < 0.5 else (low + reach, low)
    return (ends[0], y, ends[1], y) if across else (x, ends[0], x, ends[1])


def _flock(rng: random.Random, noun: str, duration: float, aspect: float) -> list[Actor]:
    number = rng.randint(2, MAX_COUNT)
    size = rng.uniform(0.22, 0.34 if number < 4 else 0.28)
    boxes = _scatter(rng, [size] * number, aspect)
    return [
        Actor(noun, size / aspect, size, x, y, x, y, 0.0, duration)
        for x, y in boxes
    ]  # fmt: skip


def _group(
    rng: random.Random, chosen: Sequence[str], duration: float, interval: float, aspect: float
) -> list[Actor]:
    sizes = [rng.uniform(0.24, 0.36) for _ in chosen]
    places = _scatter(rng, sizes, aspect)
    units = duration / interval
    # Usually they come one after another, at least a sampled frame apart, so that order exists.
    step = rng.uniform(1.3, max(1.4, (units - 2.5) / len(chosen))) * interval
    together = rng.random() < 0.2 or step * (len(chosen) - 1) > duration - 1.5 * interval
    actors = []
    for index, (noun, size, (x, y)) in enumerate(zip(chosen, sizes, places, strict=False)):
        start = 0.0 if together else index * step
        actors.append(Actor(noun, size / aspect, size, x, y, x, y, start, duration))
    return actors


def _scatter(
    rng: random.Random, sizes: Sequence[float], aspect: float
) -> list[tuple[float, float]]:
    """Centres for squares of these sizes that keep clear of each other."""
    while True:
        centres: list[tuple[float, float]] = []
        boxes: list[Box] = []
        for size in sizes:
            for _ in range(30):
                width = size / aspect
                x = rng.uniform(width / 2 + 0.01, 0.99 - width / 2)
                y = rng.uniform(size / 2 + 0.01, 0.99 - size / 2)
                box = _around(x, y, width, size)
                if not any(_overlap(box, other, 0.02) for other in boxes):
                    centres.append((x, y))
                    boxes.append(box)
                    break
        if len(centres) == len(sizes):
            return centres


def _sign(
    rng: random.Random, actors: Sequence[Actor], duration: float, interval: float
) -> Sign | None:
    """A sign beside one of the actors, or None where there is no room or no time for it."""
    owner = rng.choice(actors)
    span = rng.uniform(1.15, 3.0) * interval
    earliest = max(owner.start, 0.3 * interval)
    if owner.end - earliest < span + 0.2 * interval:
        return None
    start = rng.uniform(earliest, owner.end - span - 0.1 * interval)
    if rng.random() < 0.55:
        kind, text = "number", str(rng.randint(100, 999))
    else:
        kind, text = "word", rng.choice(SIGN_WORDS)
    width = rng.uniform(0.28, 0.34) + 0.03 * max(len(text) - 3, 0)
    height = rng.uniform(0.15, 0.2)
    busy = [
        actor.box(t) for actor in actors for t in (start, start + span / 2, start + span)
    ]  # where anything is while the sign is shown
    target = owner.box(start + span / 2)
    x, y = (target[0] + target[2]) / 2, (target[1] + target[3]) / 2
    beside = (width + target[2] - target[0]) / 2 + 0.025
    below = (height + target[3] - target[1]) / 2 + 0.03
    places = [(x, y + below), (x, y - below), (x + beside, y), (x - beside, y)]
    rng.shuffle(places)
    # A moving owner needs more distance; then anywhere near will do.
    places += [(x + rng.uniform(-0.4, 0.4), y + rng.uniform(-0.5, 0.5)) for _ in range(12)]
    for place_x, place_y in places:
        centre_x, centre_y = _inside(place_x, width / 2), _inside(place_y, height / 2)
        box = _around(centre_x, centre_y, width, height)
        if not any(_overlap(box, other, 0.008) for other in busy):
            colour = rng.choice(tuple(SIGN_COLOURS))
            return Sign(text, colour, kind, box, start, start + span, owner.noun)
    return None


def _distractors(rng: random.Random, taken: Sequence[Box], aspect: float) -> tuple[Distractor, ...]:
    shapes = []
    for _ in range(rng.choice((0, 1, 2, 3))):
        size = rng.uniform(0.08, 0.2)
        width = size / aspect
        centre = (rng.uniform(width, 1 - width), rng.uniform(size, 1 - size))
        box = _around(*centre, width, size)
        if any(_overlap(box, other, 0.02) for other in taken):
            continue
        red, green, blue = colorsys.hsv_to_rgb(
            rng.random(), rng.uniform(0.25, 0.6), rng.uniform(0.4, 0.9)
        )
        colour = (round(red * 255), round(green * 255), round(blue * 255))
        shapes.append(Distractor(rng.choice(SHAPES), colour, box))
    return tuple(shapes)
