"""Measure the bundled model on new worlds, through real video files.

`python -m model.training.evaluate --seed S --videos N [--frames F] [--json]` makes N worlds from a
seed, writes them as H.264 files, reads them back through the product's own decoder, asks every kind
of question and compares answers word for word. Pointing: does the frame with most text-to-visual
mass lie inside the evidence's span, and its strongest patch inside its box?
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from model.engine import Engine
from model.training.encoder import TRAIN_SEED
from model.training.release import kinds_of
from model.training.world import make_world, seeded
from model.training.world_parts import World
from model.training.world_questions import CHANCE, KINDS, QA, questions
from model.training.world_video import write_video
from model.types import Answer, AskRequest, WhatIf


@dataclass
class Tally:
    """What was asked and what came out."""

    right: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    frame_hits: list[np.ndarray] = field(default_factory=list)  # per question: (layers,) bool
    frame_hit: list[bool] = field(default_factory=list)  # mean over layers, as the page shows it
    patch_hit: list[bool] = field(default_factory=list)
    wrong: list[dict] = field(default_factory=list)

    def add(self, qa: QA, answer: Answer) -> None:
        """Compare one answer with the truth."""
        right = answer.text == qa.answer
        self.right[qa.kind].append(right)
        if not right:
            self.wrong.append(
                {"kind": qa.kind, "question": qa.question, "answer": answer.text, "is": qa.answer}
            )
        attention = answer.attention
        if not qa.evidence or attention is None or not attention.t2v.size:
            return
        spans = [(e.start, e.end, e.box) for e in qa.evidence]

        def inside(frame: int) -> list:
            t = float(attention.times[frame]) + 1e-3
            return [box for start, end, box in spans if start <= t < end]

        mass = attention.t2v_mean()
        self.frame_hits.append(np.array([bool(inside(int(row.argmax()))) for row in mass]))
        self.frame_hit.append(bool(inside(int(mass.mean(0).argmax()))))
        strongest = attention.frames[0]
        patches = strongest.patches.mean(0)
        row, column = np.unravel_index(patches.argmax(), patches.shape)
        x, y = (column + 0.5) / patches.shape[1], (row + 0.5) / patches.shape[0]
        slack = 0.5 / patches.shape[0]  # half a patch: the box's edge cuts through patches
        boxes = [box for box in inside(strongest.index) if box is not None]
        if any(box is not None for _, _, box in spans):
            self.patch_hit.append(
                any(
                    left - slack <= x <= right + slack and top - slack <= y <= bottom + slack
                    for left, top, right, bottom in boxes
                )
            )

    def report(self) -> dict:
        """The figures, as the model card shows them."""
        every = [hit for hits in self.right.values() for hit in hits]
        layers = np.mean(self.frame_hits, axis=0) if self.frame_hits else []
        return {
            "overall": round(float(np.mean(every)), 4),
            "kinds": {
                kind: {
                    "accuracy": round(float(np.mean(hits)), 4),
                    "chance": CHANCE[kind],
                    "n": len(hits),
                }
                for kind, hits in sorted(self.right.items())
            },
            "pointing": {
                "frame_top1": _mean(self.frame_hit),
                "patch_top1": _mean(self.patch_hit),
                "by_layer": [round(float(x), 4) for x in layers],
            },
        }


def _mean(hits: list[bool]) -> float | None:
    return round(float(np.mean(hits)), 4) if hits else None


@dataclass(frozen=True)
class Film:
    """How a world is written as a video file."""

    size: tuple[int, int] = (640, 360)
    frame_rate: int = 25
    codec: str = "libx264"
    crf: int | None = None

    def write(self, world: World, folder: Path) -> Path:
        """Write `world` under a name that its seed gives."""
        suffix = ".webm" if "vp9" in self.codec else ".mp4"
        path = folder / f"{world.seed}{suffix}"
        width, height = self.size
        write_video(
            world,
            path,
            width=width,
            height=height,
            frame_rate=self.frame_rate,
            codec=self.codec,
            crf=self.crf,
        )
        return path


def held_out_worlds(seed: int, videos: int, frames: int, interval: float) -> Iterator[World]:
    """Worlds that no training has seen: their seeds lie below every training seed."""
    for index in range(videos):
        world_seed = (seed * 1000 + index) % TRAIN_SEED
        yield make_world(world_seed, frames * interval, interval=interval)


def known_kinds(engine: Engine) -> list[str]:
    """The kinds of question that the model was trained on."""
    return kinds_of(engine.folder)


def asked_of(engine: Engine, world: World, path: Path, kinds: list[str], frames: int) -> list[QA]:
    """The questions that the frames sampled from a file allow."""
    first = ask(engine, path, "?", frames)
    return questions(
        world, seeded("evaluate", world.seed), kinds, first.frame_times.tolist(), per_kind=2
    )


def ask(
    engine: Engine, path: Path, question: str, frames: int, what_if: WhatIf | None = None
) -> Answer:
    """One answer of the engine."""
    request = AskRequest(str(path), question, max_frames=frames, strongest_frames=1)
    if what_if is not None:
        request = replace(request, what_if=what_if)
    return next(event for event in engine.ask(request) if isinstance(event, Answer))


def measure(
    engine: Engine,
    worlds: Iterable[World],
    kinds: list[str],
    frames: int,
    film: Film,
    what_if: WhatIf | None = None,
) -> Tally:
    """Ask every question about every world, through real files."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for world in worlds:
            path = film.write(world, Path(folder))
            for qa in asked_of(engine, world, path, kinds, frames):
                tally.add(qa, ask(engine, path, qa.question, frames, what_if))
            engine.forget(str(path))
            path.unlink()
    return tally


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--videos", type=int, default=20)
    parser.add_argument("--frames", type=int, default=48, help="sampled frames in each video")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between them")
    parser.add_argument("--kinds", nargs="+", default=None, choices=KINDS)
    parser.add_argument("--model", default=None)
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--codec", default="libx264")
    parser.add_argument("--size", type=int, nargs=2, default=(640, 360), metavar=("W", "H"))
    parser.add_argument("--frame-rate", type=int, default=25)
    parser.add_argument("--crf", type=int, default=None)
    for branch in ("v2v", "t2v"):
        parser.add_argument(f"--no-{branch}", action="store_true", help="with this branch off")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--wrong", action="store_true", help="also list wrong answers")
    args = parser.parse_args()
    engine = Engine.load(args.model, quantization=args.quantization)
    worlds = held_out_worlds(args.seed, args.videos, args.frames, args.interval)
    film = Film(tuple(args.size), args.frame_rate, args.codec, args.crf)
    what_if = WhatIf(v2v=not args.no_v2v, t2v=not args.no_t2v)
    kinds = args.kinds or known_kinds(engine)
    tally = measure(engine, worlds, kinds, args.frames, film, what_if)
    report = tally.report()
    if args.wrong:
        report["wrong"] = tally.wrong
    if args.json:
        print(json.dumps(report))
    else:
        print(f"overall {report['overall']:.3f}")
        for kind, row in report["kinds"].items():
            print(f"{kind:10} {row['accuracy']:.3f}  chance {row['chance']:.3f}  n {row['n']}")
        print(f"pointing   {report['pointing']}")
        for row in report.get("wrong", ()):
            print(row)


if __name__ == "__main__":
    main()
