"""What jemalloc is worth in training on a CPU: `python -m tests.bench.allocator`.

The same steps of the bundled model's recipe, in one process with one thread, with glibc's allocator
and with jemalloc, taking turns. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from model.loading import BUNDLED
from model.training import bundled
from model.training.machine import machine_kind
from model.training.recipe import environment

ROUNDS = 2
SCENES = 600  # of the library; its last 400 are held out
LEVEL = 3  # videos of eight frames


def train(options: list[str]) -> None:
    """Train, and print the seconds that the steps took."""
    trainer = bundled.started(bundled.arguments(options), bundled.Trainer)
    trainer.run()
    print(trainer.progress.seconds)


def seconds_of(folder: Path, steps: int, variables: dict[str, str]) -> float:
    """Seconds of `steps`, in a new process with these environment variables."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        options = ["--start", str(BUNDLED), "--encoder", str(folder / "encoder"), "--out", out]
        options += ["--library", str(folder / "library"), "--scenes", str(SCENES)]
        options += ["--level", str(LEVEL), "--steps", str(steps), "--cpu", "--threads", "1"]
        command = [sys.executable, "-m", "tests.bench.allocator", "--train", *options]
        told = subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, text=True)
    return float(told.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    both = {"glibc": dict(os.environ), "jemalloc": environment(cpu=True)}
    if both["glibc"] == both["jemalloc"]:
        raise SystemExit(
            "jemalloc was not found, or LD_PRELOAD is set; there is nothing to compare."
        )
    found: dict[str, list[float]] = {name: [] for name in both}
    with tempfile.TemporaryDirectory() as folder:
        seconds_of(Path(folder), 1, both["jemalloc"])  # makes the library
        for _ in range(ROUNDS):
            for name, variables in both.items():
                found[name].append(seconds_of(Path(folder), args.steps, variables))
    step = {name: statistics.median(times) / args.steps for name, times in found.items()}
    told = {
        "date": date.today().isoformat(),
        "machine": machine_kind(),
        "steps": args.steps,
        "seconds_a_step": {name: round(seconds, 3) for name, seconds in step.items()},
        "ratio": round(step["glibc"] / step["jemalloc"], 2),
    }
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(sys.argv[2:])
    else:
        main()
