"""Seconds to the first token on five minutes of video, by stage, and of a second question.

    python -m tests.bench.first_token [--model SOURCE] [--max-frames N]

The file is 720p H.264 at 25 fps with a moving texture, made anew in a temporary folder; the model
is loaded and warm before the clock starts. Prints one JSON object. `overlap` is the time to the
first token over that of the slowest stage; stages after each other would reach `in_a_row`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from datetime import date
from pathlib import Path

from model.engine import Engine
from model.training.machine import machine_kind
from model.types import Answer, AskRequest
from tests.bench.decoding import make_files
from tests.media import make_video


def first_answer(engine: Engine, path: Path, question: str, frames: int | None) -> Answer:
    request = AskRequest(str(path), question, max_frames=frames)
    return next(event for event in engine.ask(request) if isinstance(event, Answer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--max-frames", type=int, default=None)
    args = parser.parse_args()
    engine = Engine.load(args.model)
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder) / "warm.mp4"
        make_video(warm, duration=2)
        first_answer(engine, warm, "Is there a cat?", None)
        video = make_files(Path(folder), quick=True)["five"]
        first = first_answer(engine, video, "Is there a cat?", args.max_frames)
        second = first_answer(engine, video, "Is there a dog?", args.max_frames)
    rounded = {
        name: {key: round(value, 3) for key, value in asdict(answer.timings).items()}
        for name, answer in (("first", first), ("second", second))
    }
    times = first.timings
    stages = (times.decode, times.encode, times.prefill)
    report = {
        "machine": machine_kind(),
        "date": date.today().isoformat(),
        "video_seconds": round(first.video.duration, 1),
        "frames": len(first.frame_times),
        **rounded,
        "overlap": round(times.first_token / max(stages), 2),
        "in_a_row": round(sum(stages) / max(stages), 2),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
