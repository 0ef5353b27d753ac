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


@dataclass(frozen=True)
class Sample:
    """What a sample video is made of, and the kinds of question that are suggested for it."""

    name: str
    title: str
    seed: int
    duration: float
    interval: float  # see `model.training.world`
    kinds: tuple[str, ...]


SAMPLES: tuple[Sample, ...] = (
    Sample("short", "Forty seconds", 900_011, 40, 1.0, ("number", "count", "word", "when")),
    Sample("medium", "Two minutes", 900_001, 120, 1.0, ("colour", "before", "count", "where")),
    Sample("long", "Five minutes", 900_007, 320, 2.5, ("number", "when", "direction", "after")),
)


def suggested(world: World, sample: Sample) -> list[QA]:
    """One carefully typed question of each of the sample's kinds, about different things."""
    rng = seeded("suggested", sample.seed)
    chosen: list[QA] = []
    for kind in sample.kinds:
        for _ in range(200):
            (item,) = questions(world, rng, [kind], per_kind=1)
            careful = item.question[0].isupper() and item.question.endswith(("?", "."))
            dull = item.answer in ("nothing", "it stands still", "0:00", "1")
            repeated = any(other.evidence[0] == item.evidence[0] for other in chosen)
            if careful and not dull and not repeated:
                chosen.append(item)
                break
        else:
            raise ValueError(f"sample {sample.name!r} has no good question of kind {kind!r}")
    return chosen


def make_sample(sample: Sample, out: Path) -> dict[str, object]:
    """Write one video and its poster; returns its entry in `samples.json`."""
    world = make_world(sample.seed, sample.duration, interval=sample.interval)
    video, poster = f"{sample.name}.mp4", f"{sample.name}.jpg"
    write_video(
        world,
        out / video,
        width=WIDTH,
        height=HEIGHT,
        frame_rate=FRAME_RATE,
        crf=24,
        options={"preset": "medium"},
    )
    signs = [p for p in world.scenes if p.scene.sign is not None]
    shown = signs[0].start + signs[0].scene.sign.start + 0.1 if signs else world.duration / 2
    picture = Image.fromarray(render(world, shown, WIDTH, HEIGHT))
    picture.resize(POSTER, Image.Resampling.LANCZOS).save(out / poster, quality=82)
    return {
        "file": video,
        "poster": poster,
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
    out: Path = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    entries = [make_sample(sample, out) for sample in SAMPLES]
    (out / "samples.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    for entry in entries:
        size = (out / str(entry["file"])).stat().st_size
        print(f"{entry['file']}: {entry['duration']} s, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
