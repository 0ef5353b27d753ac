"""How far "seen at m:ss" can be trusted: `python -m tests.bench.moments`.

Asks about new made-up worlds (48 and 128 frames) and compares the frame that an answer's attention
points to with where the answer is seen, by the share of the attention that `app.moments` goes by.
A hit is the right frame or the one beside it. Prints one JSON object; the thresholds in
`app.moments` are chosen from it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from app.moments import CLEAR, LIKELY, around_peak
from model.engine import Engine
from model.training.evaluate import Film, ask, asked_of, held_out_worlds, known_kinds
from model.training.world_questions import QA
from model.types import Answer

RUNS = ((7, 8, 48), (8, 5, 128))  # seed, videos, frames
BOUNDS = (0.0, 0.2, 0.33, 0.45, 0.6, 0.8, 1.01)


def hit(qa: QA, answer: Answer, peak: int) -> bool:
    """Whether the frame at `peak`, or one beside it, shows what the answer is about."""
    times = answer.frame_times[max(0, peak - 1) : peak + 2]
    return any(e.start - 1e-3 <= t < e.end for e in qa.evidence for t in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None)
    args = parser.parse_args()
    engine = Engine.load(args.model)
    seen: list[tuple[float, bool]] = []  # share, hit
    unseen: list[float] = []  # of questions about what no frame shows
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for seed, videos, frames in RUNS:
            for world in held_out_worlds(seed, videos, frames, 1.0):
                path = Film().write(world, Path(folder))
                for qa in asked_of(engine, world, path, known_kinds(engine), frames):
                    answer = ask(engine, path, qa.question, frames)
                    if answer.attention is None:
                        continue
                    peak, share = around_peak(answer.attention.timeline())
                    if qa.evidence:
                        seen.append((share, hit(qa, answer, peak)))
                    else:
                        unseen.append(share)
                engine.forget(str(path))
    shares, hits = (np.array(column) for column in zip(*seen, strict=True))
    rows = []
    for low, high in zip(BOUNDS, BOUNDS[1:], strict=False):
        chosen = (shares >= low) & (shares < high)
        rows.append(
            {
                "share_from": low,
                "questions": int(chosen.sum()),
                "hits": round(float(hits[chosen].mean()), 3) if chosen.any() else None,
                "of_what_is_not_seen": sum(low <= share < high for share in unseen),
            }
        )
    told = {
        name: {
            "questions": int((shares >= bound).sum()),
            "hits": round(float(hits[shares >= bound].mean()), 3),
            "of_what_is_not_seen": round(float(np.mean([s >= bound for s in unseen])), 3),
        }
        for name, bound in (("likely", LIKELY), ("clear", CLEAR))
    }
    report = {
        "date": datetime.date.today().isoformat(),
        "model": engine.info.revision,
        "unseen_questions": len(unseen),
        **told,
        "below_likely": round(float(hits[shares < LIKELY].mean()), 3),
        "rows": rows,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
