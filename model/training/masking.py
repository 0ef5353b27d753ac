"""Is the evidence the cause of the answer? Hide it, hide as much of something else, and compare.

`python -m model.training.masking --seed 4 --videos 10` asks held-out questions that have evidence
three times: on the whole video, with the frames of the evidence hidden, and with a stretch of equal
length hidden that shows none of it. The share of answers that change says what the model relies on.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from model.engine import Engine
from model.training.evaluate import Film, ask, asked_of, held_out_worlds, known_kinds
from model.training.world import seeded
from model.training.world_questions import QA
from model.types import WhatIf

Stretch = tuple[float, float]
LONGEST = 0.4  # share of the video; with longer evidence there is no room for a fair other stretch


def evidence_stretches(qa: QA) -> tuple[Stretch, ...]:
    """The evidence's time in the video, overlapping spans joined."""
    joined: list[Stretch] = []
    for start, end in sorted((e.start, e.end) for e in qa.evidence):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return tuple(joined)


def other_stretch(taken: tuple[Stretch, ...], end: float, rng: random.Random) -> Stretch | None:
    """A random stretch as long as `taken` together that touches none of it."""
    length = sum(b - a for a, b in taken)
    for _ in range(200):
        start = rng.uniform(0, max(end - length, 0))
        if all(start + length <= a or start >= b for a, b in taken):
            return start, start + length
    return None


def masking(engine: Engine, seed: int, videos: int, frames: int) -> dict[str, dict[str, float]]:
    """Share of right answers that change, by kind and for all."""
    changed: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for world in held_out_worlds(seed, videos, frames, 1.0):
            path, rng = Film().write(world, Path(folder)), seeded("masking", world.seed)
            for qa in asked_of(engine, world, path, known_kinds(engine), frames):
                spans = evidence_stretches(qa)
                other = other_stretch(spans, world.duration, rng) if spans else None
                if other is None or sum(b - a for a, b in spans) > LONGEST * world.duration:
                    continue
                answer = ask(engine, path, qa.question, frames).text
                if answer != qa.answer:  # a wrong answer has no cause worth finding
                    continue
                masked = [
                    ask(engine, path, qa.question, frames, WhatIf(hidden=hidden)).text
                    for hidden in (spans, (other,))
                ]
                changed[qa.kind].append((masked[0] != answer, masked[1] != answer))
            engine.forget(str(path))
    rows = {kind: _shares(pairs) for kind, pairs in sorted(changed.items())}
    rows["all"] = _shares([pair for pairs in changed.values() for pair in pairs])
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--videos", type=int, default=10)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--model", default=None)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = masking(Engine.load(args.model), args.seed, args.videos, args.frames)
    if args.json:
        print(json.dumps(rows))
        return
    for kind, row in rows.items():
        print(
            f"{kind:10} changed with the evidence hidden {row['evidence']:.2f}, "
            f"with as much else hidden {row['other']:.2f}  n {row['n']}"
        )


def _shares(pairs: list[tuple[bool, bool]]) -> dict[str, float]:
    if not pairs:
        return {"evidence": 0.0, "other": 0.0, "n": 0}
    evidence, other = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return {"evidence": round(evidence, 4), "other": round(other, 4), "n": len(pairs)}


if __name__ == "__main__":
    main()
