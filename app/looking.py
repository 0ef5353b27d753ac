"""What a visitor looks at in the panel "Where it looked": an answer, and a choice of its maps."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field, replace

import numpy as np

from model.types import Answer, AskRequest, AttentionMap, AttentionSummary, InputError, MapKind

KINDS: tuple[MapKind, ...] = ("t2v", "v2v", "self")


@dataclass(frozen=True)
class Word:
    """A word of an answer and the tokens that make it up."""

    text: str
    tokens: slice

    @property
    def bare(self) -> str:
        """The word without the marks around it, where something is left."""
        return self.text.strip(".,;:!?…\"'()[]“”‘’") or self.text


def words_of(tokens: tuple[str, ...]) -> tuple[Word, ...]:
    """Put tokens together to the words between an answer's spaces, in order."""
    words: list[Word] = []
    for place, token in enumerate(tokens):
        begins = not words or token[:1].isspace() or tokens[place - 1][-1:].isspace()
        if begins and token.strip():
            words.append(Word(token.strip(), slice(place, place + 1)))
        elif words and token.strip():
            last = words[-1]
            words[-1] = Word(last.text + token.rstrip(), slice(last.tokens.start, place + 1))
    return tuple(words)


@dataclass(frozen=True)
class Choice:
    """Which of an answer's maps is drawn, and how."""

    kind: MapKind | None = None  # None: what the answer shows first
    word: int | None = None  # None: all of the answer
    head: int | None = None  # None: the mean of all
    log: bool = False
    cell: tuple[int, int] | None = None  # row of the map, frame


@dataclass(frozen=True)
class Look:
    """An answer's attention with a choice: all that the panel draws."""

    answer: Answer
    attention: AttentionSummary
    choice: Choice = Choice()
    address: str = ""  # under which pictures and files lie, relative to the page

    @property
    def maps(self) -> tuple[AttentionMap, ...]:
        """All maps; where none were kept, the one that every answer has."""
        if self.attention.maps or not self.attention.layers:
            return self.attention.maps
        t2v = self.attention.t2v
        return (AttentionMap("t2v", "share", self.attention.layers, t2v, t2v.mean(0)[:, None]),)

    @property
    def map(self) -> AttentionMap | None:
        """The chosen map, or what there is."""
        wanted = self.choice.kind or self.attention.main
        return next((one for one in self.maps if one.kind == wanted), None) or next(
            iter(self.maps), None
        )

    @property
    def words(self) -> tuple[Word, ...]:
        """The answer's words."""
        return words_of(self.attention.tokens)

    @property
    def word(self) -> Word | None:
        """The chosen word; video to video knows none."""
        shown = self.map
        if self.choice.word is None or shown is None or shown.kind == "v2v":
            return None
        return self.words[self.choice.word] if self.choice.word < len(self.words) else None

    @property
    def tokens(self) -> slice | None:
        """Tokens of the chosen word; None: all."""
        return self.word.tokens if self.word is not None else None

    @property
    def head(self) -> int | None:
        """The chosen head, where the map has it."""
        shown, head = self.map, self.choice.head
        return head if shown is not None and head is not None and head < shown.num_heads else None

    @property
    def duration(self) -> float:
        """Seconds of the time axis."""
        times = self.attention.times
        return max(self.answer.video.duration, float(times[-1]) if len(times) else 0.0, 1e-3)

    def rows(self) -> np.ndarray:
        """What the grid draws, (layers, T)."""
        assert self.map is not None
        return self.map.rows(self.tokens, self.head)

    def picture(self, frame: int) -> bytes | None:
        """JPEG of a frame, where it was kept."""
        if frame < len(self.attention.pictures):
            return self.attention.pictures[frame]
        return next((v.jpeg for v in self.attention.frames if v.index == frame), None)

    def frame_at(self, seconds: float) -> int:
        """The frame whose column lies at a time."""
        return int(np.abs(self.attention.times - seconds).argmin())


@dataclass
class Looking:
    """One visitor's view of the panel."""

    look: Look | None = None
    request: AskRequest | None = None  # what was asked; to ask it again with a what-if
    token: str = ""  # guards pictures and files

    def show(self, answer: Answer | None, request: AskRequest | None) -> None:
        """Turn to an answer, all of it, keeping how maps are drawn."""
        self.look, self.request = None, None
        if answer is None or answer.attention is None:
            return
        before = self.choice
        self.token = secrets.token_urlsafe(18)
        self.request = request
        kind = before.kind if answer.attention.main == "t2v" else None
        self.look = Look(
            answer,
            answer.attention,
            Choice(kind=kind, head=before.head, log=before.log),
            f"looked/{self.token}",
        )

    # Lives on when a new answer comes: nobody wants to choose a scale again and again.
    choice: Choice = field(default_factory=Choice)

    def choose(self, choice: Choice) -> None:
        """Draw something else of the same answer."""
        self.choice = choice
        if self.look is not None:
            self.look = replace(self.look, choice=choice)

    def apply(self, told: str) -> None:
        """Do what a control of the panel stands for, for example `kind:self` or `cell:2:13.5`.

        Raises:
            InputError: there is no such control.

        """
        if self.look is None:
            return
        name, _, value = told.partition(":")
        now = self.look.choice
        try:
            match name:
                case "kind" if value in KINDS:
                    now = replace(now, kind=value, cell=None)
                case "word":
                    now = replace(now, word=_number(value, len(self.look.words)))
                case "head":
                    now = replace(now, head=_number(value, 1 << 10))
                case "scale":
                    now = replace(now, log=value == "log")
                case "cell":
                    now = replace(now, cell=self._cell(value))
                case _:
                    raise ValueError(told)
        except (ValueError, IndexError):
            raise InputError(f"The panel has no control {told!r}.") from None
        self.choose(now)

    def _cell(self, value: str) -> tuple[int, int] | None:
        if value == "none":
            return None
        assert self.look is not None and self.look.map is not None
        row, _, seconds = value.partition(":")
        if not (0 <= int(row) < len(self.look.map.layers) and math.isfinite(float(seconds))):
            raise ValueError(value)
        return int(row), self.look.frame_at(float(seconds))


def _number(value: str, below: int) -> int | None:
    if value == "all":
        return None
    if not 0 <= int(value) < below:
        raise ValueError(value)
    return int(value)
