"""Make the bundled model from nothing: `python -m model.training.recipe --out runs/tiny`.

Four parts, each a command of its own with a folder of its own:

1. OUT/encoder: `model.training.encoder`.
2. OUT/base: `model.training.bundled`, which also makes OUT/library, 17 GB of scenes.
   Several processes share each of its steps.
3. OUT/places: `model.training.place_path`, from OUT/base/model.
4. OUT/times: `model.training.time_path`, from OUT/places/model.

Given again after a break, it goes on where it was. OUT/recipe.json notes the seconds of each part
and the machine kind. OUT/times/model is the result, for `model.training.release`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path

import torch

from model.training.machine import machine_kind

# Steps and not minutes: a quicker machine is to bring longer videos at the same pace.
BASE = ("--steps", "28000")
# Of both paths: videos of all lengths, and evidence guided as at the end of the base.
PATHS = ("--level", "10", "--guide", ".3")
PLACES = (*PATHS, "--learning-rate", "5e-4", "--steps", "1000")
TIMES = (*PATHS, "--learning-rate", "1e-3", "--steps", "3800")
NOTE = "recipe.json"
# Memory that was freed stays with the process for a minute: page faults cost more than memory.
JEMALLOC = "dirty_decay_ms:60000,muzzy_decay_ms:60000"


@dataclass(frozen=True)
class Part:
    """One part: its folder's name, and the command after `python -m`."""

    name: str
    command: tuple[str, ...]


def parts(args: argparse.Namespace) -> tuple[Part, ...]:
    """All parts in order, as `args` want them."""
    out, seed = args.out, ("--seed", str(args.seed))
    encoder, library = str(out / "encoder"), str(out / "library")
    made = ("--encoder", encoder, "--library", library, *seed, *(("--cpu",) if args.cpu else ()))
    base = ("model.training.bundled", "--out", str(out / "base"), *made)
    base += BASE if args.minutes is None else ("--minutes", str(args.minutes))
    if args.processes > 1:
        spread = ("--standalone", "--nproc-per-node", str(args.processes), "-m", "--")
        base = ("torch.distributed.run", *spread, *base)

    def path(module: str, name: str, start: str, options: Sequence[str]) -> Part:
        model = str(out / start / "model")
        return Part(name, (module, "--start", model, "--out", str(out / name), *options, *made))

    return (
        # The base would make it, too; but there each process has one thread.
        Part("encoder", ("model.training.encoder", "--out", encoder, *seed)),
        Part("base", base),
        path("model.training.place_path", "places", "base", PLACES),
        path("model.training.time_path", "times", "places", TIMES),
    )


def environment(cpu: bool) -> dict[str, str]:
    """Environment variables of the parts: on a CPU, with jemalloc where it is installed.

    Tensors of ever new sizes cut glibc's heap in pieces, until its search for free ones takes a
    third of a step (`python -m tests.bench.allocator`).
    """
    own = dict(os.environ)
    if not cpu or sys.platform != "linux" or "LD_PRELOAD" in own:
        return own
    library = find_library("jemalloc")
    if library is None:
        print("Training on a CPU is quicker with jemalloc: apt-get install libjemalloc2")
        return own
    return {"MALLOC_CONF": JEMALLOC, **own, "LD_PRELOAD": library}


def run(args: argparse.Namespace) -> None:
    """Run the parts that are not done yet.

    Raises SystemExit with a sentence where one fails.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / NOTE
    note = json.loads(file.read_text()) if file.exists() else {"parts": {}}
    note["machine"] = machine_kind(accelerated=not args.cpu)
    variables = environment(args.cpu or not torch.cuda.is_available())
    for part in parts(args):
        told = note["parts"].setdefault(part.name, {"seconds": 0, "done": False})
        if told["done"]:
            print(f"{part.name}: done before, in {told['seconds']} s", flush=True)
            continue
        told["command"] = " ".join(("python -m", *part.command))
        print(f"{part.name}: {told['command']}", flush=True)
        before, started = told["seconds"], time.monotonic()
        try:
            command = [sys.executable, "-m", *part.command]
            code = subprocess.run(command, env=variables).returncode
            told["done"] = code == 0
        finally:  # also after Ctrl-C
            told["seconds"] = before + round(time.monotonic() - started)
            file.write_text(json.dumps(note, indent=1) + "\n")
        if code:
            raise SystemExit(
                f"The part {part.name!r} ended with exit code {code}; what it said stands above. "
                "The same command goes on from its last checkpoint."
            )
    print(f"The model is in {args.out / 'times' / 'model'}.", flush=True)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help=f"of the base, instead of {BASE[1]} steps")
    parser.add_argument(
        "--processes",
        type=int,
        default=torch.cuda.device_count() or 2,
        help="that share the steps of the base; GPUs, or 2 on a CPU",
    )
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    args = parser.parse_args(argv)
    if args.processes < 1:
        parser.error(f"--processes must be at least 1, not {args.processes}")
    return args


if __name__ == "__main__":
    run(arguments())
