"""Do answers survive what happens to real videos? The same questions after other encodings.

`python -m model.training.wear --seed 3 --videos 6` asks about the same held-out worlds as plain
H.264 files and at low bitrate, in three other sizes and shapes, at 15 and 60 frames a second, in
VP9 and in AV1, and prints the share of right answers of each.
"""

from __future__ import annotations

import argparse
import json

from model.engine import Engine
from model.training.evaluate import Film, held_out_worlds, known_kinds, measure

PLAIN = "as made: 640 x 360, 25 frames/s, H.264"
FILMS = {
    PLAIN: Film(),
    "low bitrate (crf 36)": Film(crf=36),
    "320 x 180": Film(size=(320, 180)),
    "480 x 480": Film(size=(480, 480)),
    "1280 x 544": Film(size=(1280, 544)),
    "15 frames/s": Film(frame_rate=15),
    "60 frames/s": Film(frame_rate=60),
    "VP9": Film(codec="libvpx-vp9"),
    "AV1": Film(codec="libsvtav1"),
}


def wear(engine: Engine, seed: int, videos: int, frames: int) -> dict[str, dict[str, float]]:
    """Share of right answers, number of questions and points lost, of each film."""
    rows: dict[str, dict[str, float]] = {}
    for name, film in FILMS.items():
        worlds = held_out_worlds(seed, videos, frames, 1.0)
        report = measure(engine, worlds, known_kinds(engine), frames, film).report()
        rows[name] = {
            "overall": report["overall"],
            "n": sum(row["n"] for row in report["kinds"].values()),
        }
        rows[name]["points_lost"] = round(100 * (rows[PLAIN]["overall"] - report["overall"]), 1)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--videos", type=int, default=6)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--model", default=None)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = wear(Engine.load(args.model), args.seed, args.videos, args.frames)
    if args.json:
        print(json.dumps(rows))
        return
    for name, row in rows.items():
        print(f"{name:40} {row['overall']:.3f}  n {row['n']}  points lost {row['points_lost']}")


if __name__ == "__main__":
    main()
