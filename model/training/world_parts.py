"""What the procedural world is made of: its words, and scenes as plain data.

Positions and sizes are fractions of the picture (0..1, y down), times are seconds. A scene has a
clock of its own that starts at 0, so scenes can be put one after another in any order; a video is a
sequence of `Placed` scenes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom

NOUNS: dict[str, str] = {
    # animals
    "cat": "🐱", "dog": "🐶", "fox": "🦊", "lion": "🦁", "frog": "🐸", "pig": "🐷",
    "cow": "🐮", "monkey": "🐵", "panda": "🐼", "rabbit": "🐰", "chick": "🐥", "penguin": "🐧",
    "owl": "🦉", "whale": "🐳", "octopus": "🐙", "crab": "🦀", "bee": "🐝", "butterfly": "🦋",
    "turtle": "🐢", "elephant": "🐘",
    # food
    "apple": "🍎", "banana": "🍌", "eggplant": "🍆", "strawberry": "🍓", "carrot": "🥕",
    "pizza": "🍕", "burger": "🍔", "cake": "🎂", "egg": "🍳", "donut": "🍩", "cookie": "🍪",
    "melon": "🍉", "pineapple": "🍍", "avocado": "🥑", "pear": "🍐", "lollipop": "🍭",
    # vehicles
    "car": "🚗", "bus": "🚌", "tractor": "🚜", "bicycle": "🚲", "rocket": "🚀", "sailboat": "⛵",
    "plane": "✈", "helicopter": "🚁", "truck": "🚚", "train": "🚂",
    # things
    "guitar": "🎸", "clock": "⏰", "key": "🔑", "umbrella": "☔", "ball": "⚽", "balloon": "🎈",
    "camera": "📷", "lamp": "💡", "hat": "🎩", "gift": "🎁", "drum": "🥁", "robot": "🤖",
    "ghost": "👻", "snowman": "⛄", "sunflower": "🌻", "cactus": "🌵", "mushroom": "🍄",
    "house": "🏠", "tent": "⛺", "bell": "🔔", "star": "⭐", "crown": "👑", "trophy": "🏆",
    "moon": "🌙",
}  # fmt: skip

SIGN_COLOURS: dict[str, Colour] = {
    "red": (212, 32, 38),
    "orange": (247, 128, 20),
    "yellow": (252, 214, 40),
    "green": (22, 140, 66),
    "blue": (30, 90, 214),
    "purple": (122, 44, 164),
    "white": (246, 246, 244),
    "black": (24, 24, 28),
}

SIGN_WORDS: tuple[str, ...] = (
    "TAXI", "OPEN", "EXIT", "STOP", "SALE", "HOTEL", "CAFE", "BANK", "PARK", "FOOD", "SHOP",
    "FIRE", "ROAD", "GATE", "ZOO", "BAR", "LIFT", "BEACH", "LAKE", "FARM", "NORTH", "SOUTH",
    "EAST", "WEST", "MILK", "TEA", "FREE", "SLOW", "PUSH", "PULL", "MENU", "WIFI", "PORT",
    "HELP", "QUIET", "NEWS", "MUSIC", "TOUR", "DESK", "KIDS", "POOL", "GOLD", "SPA", "TOWN",
)  # fmt: skip

BACKGROUNDS: tuple[str, ...] = ("plain", "gradient", "stripes", "checks", "dots", "noise")
SHAPES: tuple[str, ...] = ("disc", "ring", "triangle", "diamond", "bar")
ASPECT = 16 / 9
MAX_COUNT = 5


@dataclass(frozen=True)
class Background:
    """What is behind everything.

    `pan` is how far the picture slides over the whole scene, as fractions of its width and height.
    """

    kind: str
    colours: tuple[Colour, Colour, Colour]
    angle: float  # radians, of a gradient or of stripes
    scale: float  # size of one stripe, check or dot, fraction of the picture's height
    seed: int
    pan: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Actor:
    """An object that is asked about; its centre goes evenly from (x0, y0) to (x1, y1)."""

    noun: str
    width: float
    height: float
    x0: float
    y0: float
    x1: float
    y1: float
    start: float
    end: float

    @property
    def moves(self) -> bool:
        """Whether the object changes its place."""
        return (self.x0, self.y0) != (self.x1, self.y1)

    def visible(self, t: float) -> bool:
        """Whether the object is in the picture at local time `t`."""
        return self.start <= t < self.end

    def box(self, t: float) -> Box:
        """The object's box at local time `t` (clamped to its time in the picture)."""
        share = (t - self.start) / (self.end - self.start) if self.moves else 0.0
        share = min(max(share, 0.0), 1.0)
        x = self.x0 + (self.x1 - self.x0) * share
        y = self.y0 + (self.y1 - self.y0) * share
        return (
            x - self.width / 2,
            y - self.height / 2,
            x + self.width / 2,
            y + self.height / 2,
        )


@dataclass(frozen=True)
class Sign:
    """A plate with a number or a word, shown for a short time beside the object `near`."""

    text: str
    colour: str
    kind: str  # "number" or "word"
    box: Box
    start: float
    end: float
    near: str

    def visible(self, t: float) -> bool:
        """Whether the sign is in the picture at local time `t`."""
        return self.start <= t < self.end


def sign_ink(sign: Sign) -> Box:
    """The part of a sign's box that its letters fill."""
    left, top, right, bottom = sign.box
    width, height = right - left, bottom - top
    return (
        left + width * 0.07,
        top + height * 0.144,
        right - width * 0.07,
        bottom - height * 0.184,
    )


@dataclass(frozen=True)
class Distractor:
    """A plain shape that nobody asks about."""

    shape: str
    colour: Colour
    box: Box


@dataclass(frozen=True)
class Scene:
    """One shot: a background and what happens before it, on a clock of its own (0..duration)."""

    duration: float
    background: Background
    actors: tuple[Actor, ...] = ()
    sign: Sign | None = None
    distractors: tuple[Distractor, ...] = ()

    @property
    def nouns(self) -> tuple[str, ...]:
        """The objects' names in order of their first appearance, each once."""
        ordered = sorted(self.actors, key=lambda actor: actor.start)
        return tuple(dict.fromkeys(actor.noun for actor in ordered))


class Placed(NamedTuple):
    """A scene and the second of the video at which it starts."""

    scene: Scene
    start: float

    @property
    def end(self) -> float:
        """The second at which the scene is over."""
        return self.start + self.scene.duration


@dataclass(frozen=True)
class World:
    """A whole video."""

    seed: int
    duration: float
    scenes: tuple[Placed, ...]

    def at(self, t: float) -> Placed:
        """The scene at second `t`; times outside of the video give its first or last scene."""
        for placed in self.scenes:
            if t < placed.end:
                return placed
        return self.scenes[-1]
