"""Questions about a video of the procedural world, their answers, and where the answer is seen.

Everything is judged by the frames that were sampled: what no frame shows is not asked for, and
"when" means the first sampled frame that shows it. Objects that are in several scenes are asked
about only where the question has one answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from model.training.world import make_world, seeded
from model.training.world_facts import Appearance, SignSeen, Timeline, heading, make_timeline
from model.training.world_parts import NOUNS, Box, Placed, Scene, World
from model.training.world_phrases import (
    NOTHING,
    OUTSIDE_ANSWER,
    PHRASES,
    SIGN_NAMES,
    STILL,
    fill,
    outside_question,
    plural,
    typed,
    with_article,
)

KINDS: tuple[str, ...] = (
    "number", "word", "colour", "when", "before", "after", "count", "where", "exists", "scenes",
    "direction", "absent", "outside",
)  # fmt: skip
# The better of two guessers on 64 frames of one second: one gives the commonest answer to the kind,
# the other the right answer to any question of that kind about the same video. "absent" counts as a
# yes-or-no question; whether a question is out of the world can be told without the video.
CHANCE: dict[str, float] = {
    "number": 0.52, "word": 0.59, "colour": 0.41, "when": 0.16, "before": 0.25, "after": 0.25,
    "count": 0.44, "where": 0.42, "exists": 0.5, "scenes": 0.0, "direction": 0.5, "absent": 0.5,
    "outside": 1.0,
}  # fmt: skip
MOST_SCENES = 6
PLACES = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
ONLY_COMMON = 0.1  # how often a kind is asked where only a common answer is possible
_COMMON = {"1": 0.4, STILL: 0.4, NOTHING: 0.3}
_SIGN_FORMS = ("number", "word", "colour")
_ABSENT_FORMS = (*_SIGN_FORMS, "when", "before", "after", "where", "direction")


@dataclass(frozen=True)
class Evidence:
    """Where an answer is seen: seconds [start, end) of the video, and the box if there is one.

    `named`: it shows what the question names, and the answer is something else. `part`: the one of
    the names in a list that it is for, counted from 0.
    """

    start: float
    end: float
    box: Box | None = None
    named: bool = False
    part: int = 0


@dataclass(frozen=True)
class QA:
    """A question, its only right answer, and the evidence (none where nothing is to be seen)."""

    kind: str
    question: str
    answer: str
    evidence: tuple[Evidence, ...] = ()


@dataclass(frozen=True)
class _Fact:
    """Something that can be asked for; the wording is chosen later."""

    answer: str
    noun: str = ""
    sign: str = ""
    evidence: tuple[Evidence, ...] = ()


def questions(
    video: World | Sequence[Placed | tuple[Scene, float]],
    rng: random.Random,
    kinds: Sequence[str] | None = None,
    sample_times: Sequence[float] | None = None,
    *,
    per_kind: int = 2,
) -> list[QA]:
    """Up to `per_kind` questions of each kind that the video allows.

    `video` is a world, or scenes with the second at which each starts. `sample_times` are the
    seconds of the frames that will be looked at; without them the whole video counts.
    """
    unknown = set(kinds or ()) - set(KINDS)
    if unknown:
        raise ValueError(
            f"kinds must be among {', '.join(KINDS)}; got {', '.join(sorted(unknown))}"
        )
    timeline = make_timeline(video, sample_times)
    asked = []
    for kind in KINDS if kinds is None else kinds:
        if kind == "outside":
            asked += [
                QA(kind, typed(rng, outside_question(rng)), OUTSIDE_ANSWER) for _ in range(per_kind)
            ]
        elif kind == "absent":
            asked += [_absent(timeline, rng) for _ in range(per_kind)]
        else:
            facts = _FACTS[kind](timeline, rng)
            chosen = _choose(facts, rng, per_kind, balanced=kind in _BALANCED)
            asked += [_word(kind, fact, rng) for fact in chosen]
    return asked


def clock(seconds: float) -> str:
    """A time as m:ss, or h:mm:ss from an hour on; the second in progress."""
    whole = int(seconds + 1e-3)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"


def all_texts(worlds: int = 1500, seed: int = 1_000_000) -> Iterator[str]:
    """Many questions and answers, for training a tokenizer."""
    for index in range(worlds):
        rng = seeded("texts", seed, index)
        duration = rng.choice((30, 60, 120, 600, 1800, 3600))
        interval = max(duration / 240, 1.0)
        world = make_world(seed + index, duration, interval=interval)
        for item in questions(world, rng, per_kind=3):
            yield item.question
            yield item.answer


def _choose(facts: list[_Fact], rng: random.Random, number: int, *, balanced: bool) -> list[_Fact]:
    """Some facts without repetition; balanced: every answer that there is with the same chance.

    The answers in `_COMMON` are held back, or they would be right most of the time: above all where
    the video allows no other.
    """
    groups: dict[str, list[_Fact]] = {}
    for fact in rng.sample(facts, len(facts)):
        groups.setdefault(fact.answer, []).append(fact)
    chosen: list[_Fact] = []
    while groups and len(chosen) < number:
        answers = sorted(groups)
        if all(answer in _COMMON for answer in answers) and rng.random() > ONLY_COMMON:
            break
        weights = [
            (1 if balanced else len(groups[answer])) * _COMMON.get(answer, 1) for answer in answers
        ]
        answer = rng.choices(answers, weights)[0]
        chosen.append(groups[answer].pop())
        if not groups[answer]:
            del groups[answer]
    return chosen


def _word(kind: str, fact: _Fact, rng: random.Random) -> QA:
    sign = fact.sign and fill(fact.sign, fact.noun or "sign")
    question = fill(rng.choice(PHRASES[kind]), fact.noun or "sign", sign)
    return QA(kind, typed(rng, question), fact.answer, fact.evidence)


# Evidence.


def _span(appearance: Appearance) -> tuple[Evidence, ...]:
    """All of an appearance: one box for each copy, or for each sampled frame where it moves."""
    if not any(actor.moves for actor in appearance.actors):
        return tuple(
            Evidence(appearance.first, appearance.end, box)
            for box in appearance.boxes(appearance.first)
        )
    stops = (*appearance.seen[1:], appearance.end)
    return tuple(
        Evidence(t, stop, box)
        for t, stop in zip(appearance.seen, stops, strict=True)
        for box in appearance.boxes(t)
    )


def _first_frame(timeline: Timeline, appearance: Appearance) -> tuple[Evidence, ...]:
    """The first sampled frame that shows it."""
    first = appearance.first
    end = min(timeline.next_time(first), max(appearance.end, first + 0.5))
    return tuple(Evidence(first, end, box) for box in appearance.boxes(first))


# What can be asked for, kind by kind.


def _sign_facts(timeline: Timeline, rng: random.Random) -> list[tuple[SignSeen, _Fact]]:
    """Each sign that was sampled and that can be named, with a fact that lacks its answer."""
    facts = []
    for seen in timeline.signs:
        if not seen.seen:
            continue
        evidence = (Evidence(seen.start, seen.end, seen.sign.box),)
        near = seen.sign.near
        same = sum(near in other.beside for other in timeline.signs)
        named = seen.clear and seen.beside[0] == near and same == 1
        if len(timeline.signs) == 1 and not (named and rng.random() < 0.4):
            facts.append((seen, _Fact("", "", "the sign", evidence)))
        elif named:
            facts.append((seen, _Fact("", near, rng.choice(SIGN_NAMES), evidence)))
    return facts


def _texts(kind: str) -> Callable[[Timeline, random.Random], list[_Fact]]:
    def facts(timeline: Timeline, rng: random.Random) -> list[_Fact]:
        return [
            _Fact(seen.sign.text.lower(), fact.noun, fact.sign, fact.evidence)
            for seen, fact in _sign_facts(timeline, rng)
            if seen.sign.kind == kind
        ]

    return facts


def _colours(timeline: Timeline, rng: random.Random) -> list[_Fact]:
    return [
        _Fact(seen.sign.colour, fact.noun, fact.sign, fact.evidence)
        for seen, fact in _sign_facts(timeline, rng)
    ]


def _unique(timeline: Timeline) -> list[Appearance]:
    """The appearances of objects that are in one scene only."""
    return [seen for seen in timeline.appearances if timeline.shown[seen.noun] == 1]


def _whens(timeline: Timeline, rng: random.Random) -> list[_Fact]:
    return [
        _Fact(clock(seen.first), seen.noun, evidence=_first_frame(timeline, seen))
        for seen in _unique(timeline)
    ]


def _neighbours(step: int) -> Callable[[Timeline, random.Random], list[_Fact]]:
    def facts(timeline: Timeline, rng: random.Random) -> list[_Fact]:
        order = timeline.appearances
        firsts = [seen.first for seen in order]
        found = []
        for index, seen in enumerate(order):
            if timeline.shown[seen.noun] != 1 or firsts.count(seen.first) > 1:
                continue
            if not 0 <= index + step < len(order):
                found.append(_Fact(NOTHING, seen.noun, evidence=_span(seen)))
                continue
            other = order[index + step]
            # One answer only: a single object, and nothing else coming in with it.
            if len(other.actors) == 1 and firsts.count(other.first) == 1:
                answer = with_article(other.noun)
                beside = tuple(replace(one, named=True) for one in _span(seen))
                found.append(_Fact(answer, seen.noun, evidence=_span(other) + beside))
        return found

    return facts


def _counts(timeline: Timeline, rng: random.Random) -> list[_Fact]:
    return [
        _Fact(str(len(seen.actors)), seen.noun, evidence=_span(seen)) for seen in _unique(timeline)
    ]


def _wheres(timeline: Timeline, rng: random.Random) -> list[_Fact]:
    facts = []
    for seen in _unique(timeline):
        actor = seen.actors[0]
        if len(seen.actors) > 1 or actor.moves:
            continue
        # Near the line between two places nobody could say which it is.
        if (
            min(abs(value - line) for value in (actor.x0, actor.y0) for line in (1 / 3, 2 / 3))
            > 0.05
        ):
            place = PLACES[int(actor.y0 * 3)][int(actor.x0 * 3)]
            facts.append(_Fact(place, seen.noun, evidence=_span(seen)))
    return facts


def _missing(timeline: Timeline) -> list[str]:
    return [noun for noun in NOUNS if noun not in timeline.shown]


def _existences(timeline: Timeline, rng: random.Random) -> list[_Fact]:
    shown = {seen.noun: seen for seen in reversed(timeline.appearances)}
    facts = [_Fact("yes", noun, evidence=_span(seen)) for noun, seen in shown.items()]
    return facts + [_Fact("no", noun) for noun in _missing(timeline)]


def _stories(timeline: Timeline, rng: random.Random) -> list[_Fact]:
    moments: dict[float, list[Appearance]] = {}
    for seen in timeline.appearances:
        moments.setdefault(seen.first, []).append(seen)
    if not moments:
        return []
    parts, evidence, count = [], [], 0
    for first, together in list(moments.items())[:MOST_SCENES]:
        names = []
        for seen in sorted(together, key=left_edge):
            names.append(with_article(seen.noun) if len(seen.actors) == 1 else plural(seen.noun))
            evidence += [replace(one, part=count) for one in _first_frame(timeline, seen)]
            count += 1
        parts.append(f"{clock(first)} {' and '.join(names)}")
    more = ", ..." if len(moments) > MOST_SCENES else ""
    return [_Fact(", ".join(parts) + more, evidence=tuple(evidence))]


def left_edge(seen: Appearance) -> float:
    """How far left an appearance reaches in its first frame; what comes together is so ordered."""
    return min(left for left, *_ in seen.boxes(seen.first))


def _directions(timeline: Timeline, rng: random.Random) -> list[_Fact]:
    facts = []
    for seen in _unique(timeline):
        actor = seen.actors[0]
        if len(seen.actors) > 1 or len(seen.seen) < 2:
            continue
        if not actor.moves:
            facts.append(_Fact(STILL, seen.noun, evidence=_span(seen)))
            continue
        before, after = seen.boxes(seen.seen[0])[0], seen.boxes(seen.seen[-1])[0]
        right, down = after[0] - before[0], after[1] - before[1]
        if max(abs(right), abs(down)) < 0.12:
            continue
        facts.append(_Fact(heading(right, down), seen.noun, evidence=_span(seen)))
    return facts


def _absent(timeline: Timeline, rng: random.Random) -> QA:
    """A question that takes for granted what the video does not show; mostly the object itself."""
    signed = {noun for seen in timeline.signs for noun in seen.beside}
    bare = [seen for seen in _unique(timeline) if seen.noun not in signed]
    if bare and rng.random() < 0.2:
        seen = rng.choice(bare)
        form = rng.choice(_SIGN_FORMS)
        noun, answer, evidence = seen.noun, "There is no sign.", _span(seen)
    else:
        missing = _missing(timeline)
        if not missing:
            raise ValueError("every object is in this video, so none can be asked for as absent")
        form = rng.choice(_ABSENT_FORMS)
        noun = rng.choice(missing)
        answer, evidence = f"There is no {noun}.", ()
    question = fill(rng.choice(PHRASES[form]), noun, fill(rng.choice(SIGN_NAMES), noun))
    return QA("absent", typed(rng, question), answer, evidence)


_FACTS: dict[str, Callable[[Timeline, random.Random], list[_Fact]]] = {
    "number": _texts("number"),
    "word": _texts("word"),
    "colour": _colours,
    "when": _whens,
    "before": _neighbours(-1),
    "after": _neighbours(1),
    "count": _counts,
    "where": _wheres,
    "exists": _existences,
    "scenes": _stories,
    "direction": _directions,
}
_BALANCED = ("colour", "count", "where", "exists", "direction")
