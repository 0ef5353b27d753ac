"""Train a CrossLMM on LLaVA-style data, on one GPU, many, or several machines.

    accelerate launch --mixed_precision bf16 -m model.training.train --stage 1 \
        --model START --data captions.json --media-root videos --out runs/stage1
    accelerate launch --config_file model/training/configs/many_gpus.yaml -m model.training.train \
        --stage 2 --model runs/stage1/model --data instructions.jsonl --out runs/stage2

`--stage 1|2` are the paper's. `--train dcal` moves only the dual cross-attention, over a base that
may be quantised; with `--distill` it needs videos and questions only. The trained checkpoint is
OUT/model; `--resume` goes on from the newest of OUT/checkpoints to the same losses as without the
break. Samples that cannot be used are skipped and listed in OUT/skipped.jsonl.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from model.training.loop import train
from model.training.stages import STAGES
from model.types import InputError


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="accelerate launch -m model.training.train",
        description=__doc__.split("\n", 1)[0],
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--stage", choices=("1", "2"), help="of the paper's recipe")
    what.add_argument("--train", choices=("dcal",), help="only the dual cross-attention")
    parser.add_argument("--distill", action="store_true", help="the full-token model is the target")
    parser.add_argument("--model", help="folder or hub id to start from; default: the bundled one")
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="JSON or JSONL files")
    parser.add_argument("--media-root", type=Path, default=Path(), help="folder of the media paths")
    parser.add_argument("--out", type=Path, required=True, help="folder of this run")
    parser.add_argument("--resume", action="store_true", help="from the newest checkpoint in OUT")
    parser.add_argument("--quantization", choices=("none", "8bit", "4bit"), default="none")
    parser.add_argument("--pooled-grid", type=int, help="pooled tokens per side of a frame")
    parser.add_argument("--teacher-grid", type=int, help="default: all that the LLM knows")
    parser.add_argument("--frames", type=int, help="most frames of a video: 32 or 64 by default")
    parser.add_argument("--frame-rate", type=float, help="frames per second, until --frames is met")
    parser.add_argument("--max-text-tokens", type=int, default=2048)
    parser.add_argument("--max-answer-tokens", type=int, default=256, help="that a teacher writes")
    parser.add_argument("--batch-size", type=int, default=1, help="samples at a time, per process")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per update")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--steps", type=int, help="updates, instead of --epochs")
    parser.add_argument("--learning-rate", type=float, help="of all parts but the encoder")
    parser.add_argument("--encoder-learning-rate", type=float)
    parser.add_argument("--warm-up", type=float, default=0.03, help="share of all updates")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--max-norm", type=float, default=1.0, help="of the gradient")
    parser.add_argument(
        "--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True
    )
    parser.add_argument("--save-every", type=int, default=500, help="updates")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode")
    parser.add_argument("--tracker", help="tensorboard, wandb or another that accelerate knows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    args = parser.parse_args(argv)
    args.rates = dict(STAGES[args.stage or args.train].rates)
    for part in args.rates:
        chosen = args.encoder_learning_rate if part == "encoder" else args.learning_rate
        args.rates[part] = args.rates[part] if chosen is None else chosen
    for name in ("batch_size", "accumulate", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = arguments(argv)
    try:
        train(args)
    except InputError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
