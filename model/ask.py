"""Ask a video something from the command line.

`python -m model.ask VIDEO "QUESTION"` prints the answer; with `--json` one object with tokens,
timings and attention. Bad input: one sentence on stderr, exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict

from model.types import Answer, AskRequest, InputError, ModelFault


def as_json(answer: Answer) -> dict:
    """The answer as plain data; see the README for the fields."""
    attention = answer.attention
    return {
        "answer": answer.text,
        "model": answer.model,
        "tokens": asdict(answer.tokens),
        "frame_times": [round(float(t), 3) for t in answer.frame_times],
        "timings": {name: round(value, 4) for name, value in asdict(answer.timings).items()},
        "attention": attention
        and {
            "times": [round(float(t), 3) for t in attention.times],
            "t2v": [[round(float(x), 6) for x in layer] for layer in attention.t2v_mean()],
            "peak": round(attention.peak, 3),
        },
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; `--help` is its documentation."""
    parser = argparse.ArgumentParser(prog="python -m model.ask", description="Ask a video.")
    parser.add_argument("video", help="a local file: mp4, webm or mkv")
    parser.add_argument("question")
    parser.add_argument(
        "--model", help="folder, hub id or ENCODER+LLM (default: the bundled model)"
    )
    parser.add_argument("--pooled-grid", type=int, help="pooled tokens per side of a frame")
    parser.add_argument("--quantization", default="auto", help="auto, none, 8bit or 4bit")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--max-frames", type=int, help="frames to sample at most")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parse(arguments)
    try:
        if args.max_frames is not None and args.max_frames < 1:
            raise InputError(f"--max-frames must be at least 1, got {args.max_frames}.")
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch; see app/worker_child.py
        from model.engine import Engine
        from model.video_sandbox import probe

        probe(args.video)  # a bad file is known before the model is loaded
        engine = Engine.load(
            args.model,
            quantization=args.quantization,
            device=args.device,
            pooled_grid=args.pooled_grid,
        )
        request = AskRequest(args.video, args.question, max_frames=args.max_frames)
        answer = None
        for event in engine.ask(request):
            if isinstance(event, Answer):
                answer = event
    except (InputError, ModelFault) as error:
        print(f"ask: {error}", file=sys.stderr)
        return 2
    assert answer is not None
    if engine.info.note and not args.json:
        print(engine.info.note, file=sys.stderr)
    print(json.dumps(as_json(answer)) if args.json else answer.text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
