"""Make the sample videos: `python -m model.training.make_samples --out assets/samples`.

Their seeds are below 1,000,000 and thus outside of training. Beside the videos and their posters it
writes `samples.json`, which names for each video a few questions and their true answers.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from model.training.world import make_world, seeded
from model.training.world_parts import World
from model.training.world_questions import QA, questions
from model.training.world_render import render
from model.training.world_video import write_video

WIDTH, HEIGHT, FRAME_RATE = 1280, 720, 25
POSTER = (480, 270)
SUGGESTED = 4  # questions for a sample, at most


@dataclass(frozen=True)
class Sample:
    """What a sample video is made of, and the kinds of question to suggest, best first."""

    name: str
    title: str
    seed: int
    duration: float
    interval: float  # see `model.training.world`
    kinds: tuple[str, ...]


SAMPLES: tuple[Sample, ...] = (
    Sample(
        "short", "Forty seconds", 900_011, 40, 1.0, ("word", "before", "when", "number", "colour")
    ),
    Sample(
        "medium", "Two minutes", 900_001, 120, 1.0, ("colour", "where", "before", "when", "number")
    ),
    Sample(
        "long", "Five minutes", 900_007, 320, 2.5, ("where", "colour", "after", "number", "word")
    ),
)


def suggested(world: World, sample: Sample) -> list[QA]:
    """Carefully typed questions of the sample's kinds, about different things."""
    rng = seeded("suggested", sample.seed)
    chosen: list[QA] = []
    for kind in sample.kinds:
        for _ in range(200):
            item = next(iter(questions(world, rng, [kind], per_kind=1)), None)
            if item is None or len(chosen) == SUGGESTED:
                break
            careful = item.question[0].isupper() and item.question.endswith(("?", "."))
            dull = item.answer in ("nothing", "it stands still", "0:00", "1")
            repeated = any(other.evidence[0] == item.evidence[0] for other in chosen)
            if careful and not dull and not repeated:
                chosen.append(item)
                break
    return chosen


def make_sample(sample: Sample, out: Path) -> dict[str, object]:
    """Write one video and its poster; returns its entry in `samples.json`."""
    world = make_world(sample.seed, sample.duration, interval=sample.interval)
    write_video(
        world,
        out / f"{sample.name}.mp4",
        width=WIDTH,
        height=HEIGHT,
        frame_rate=FRAME_RATE,
        crf=24,
        options={"preset": "medium"},
    )
    signs = [p for p in world.scenes if p.scene.sign is not None]
    shown = signs[0].start + signs[0].scene.sign.start + 0.1 if signs else world.duration / 2
    picture = Image.fromarray(render(world, shown, WIDTH, HEIGHT))
    picture = picture.resize(POSTER, Image.Resampling.LANCZOS)
    picture.save(out / f"{sample.name}.jpg", quality=82)
    return entry(sample)


def entry(sample: Sample) -> dict[str, object]:
    """What `samples.json` says of a sample."""
    world = make_world(sample.seed, sample.duration, interval=sample.interval)
    return {
        "file": f"{sample.name}.mp4",
        "poster": f"{sample.name}.jpg",
        "title": sample.title,
        "duration": sample.duration,
        "seed": sample.seed,
        "interval": sample.interval,
        "questions": [
            {"kind": item.kind, "question": item.question, "answer": item.answer}
            for item in suggested(world, sample)
        ],
    }


def main(arguments: list[str] | None = None) -> None:
    """Make all samples."""
    parser = argparse.ArgumentParser(description="Make the sample videos.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write them to")
    parser.add_argument("--questions", action="store_true", help="only write samples.json anew")
    args = parser.parse_args(arguments)
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    entries = [entry(sample) if args.questions else make_sample(sample, out) for sample in SAMPLES]
    (out / "samples.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    for made in entries:
        size = (out / str(made["file"])).stat().st_size
        print(f"{made['file']}: {made['duration']} s, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
