"""What each branch is for: `python -m model.training.ablation --out O --encoder E --library L`.

Every variant gets the same steps on the same videos from the same random weights, with the encoder
and the library of scenes that `model.training.bundled` left in its folder. Lengths are fixed, no
curriculum. Accuracy is exact match on scenes that no training saw. With `--start`, a model of
that recipe, all go on from there instead; it had both branches, so a variant without one has to
learn to do without. Two stages share the steps of one. Runs that are in OUT/ablation.json already
are not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import torch

from model.training.bundled import Trainer, arguments
from model.training.curriculum import LEVELS

RATE, GUIDE = 1.5e-3, 0.1  # for short runs: the recipe's own rate is for long ones
TESTS = 60  # batches of held-out videos
FINE = ("number", "word", "colour")  # detail that is seen in 1 to 3 frames
KINDS = (
    *FINE, "when", "where", "exists", "absent", "count", "before", "after", "outside",
)  # fmt: skip
VARIANTS: dict[str, dict] = {
    "both": {},
    "neither": {"v2v": False, "t2v": False},
    "T2V only": {"v2v": False},
    "V2V only": {"t2v": False},
    "both, 9 tokens": {"pooled_grid": 3},
    "neither, 9 tokens": {"v2v": False, "t2v": False, "pooled_grid": 3},
    "both, V2V over 3 frames": {"v2v_scope": "window", "v2v_window": 1},
    "both, V2V over the video": {"v2v_scope": "video"},
    "both, K = 4": {"dcal_interval": 4, "dcal_layers": [0, 4]},
    "both, K = 1": {"dcal_interval": 1, "dcal_layers": [0, 1, 2, 3, 4]},
    "no pooling": {"v2v": False, "t2v": False, "pooled_grid": 14},
    "both, in two stages": {},
}
# The paper's two stages: the share of the steps in which T2V is absent.
FIRST_STAGE = {"both, in two stages": 1 / 3}


def train(args: argparse.Namespace, variant: str, seed: int) -> dict:
    """Train one variant; its accuracy by kind, and what it took."""
    clock = time.perf_counter()
    first = round(args.steps * FIRST_STAGE.get(variant, 0))
    start = args.start
    if first:
        stage_1 = _trained(args, "stage_1", first, VARIANTS[variant] | {"t2v": False}, seed, start)
        start = stage_1.out / "model"
    trainer = _trained(args, "run", args.steps - first, VARIANTS[variant], seed, start)
    seconds = time.perf_counter() - clock
    right = trainer.evaluate(args.level, TESTS)
    return {
        "kinds": right,
        "fine_detail": round(fmean(right[kind] for kind in FINE), 4),
        "gates": [[round(gate, 3) for gate in pair] for pair in trainer.crosslmm.gates],
        "seconds": round(seconds),
    }


def _trained(
    args: argparse.Namespace, name: str, steps: int, override: dict, seed: int, start: Path | None
) -> Trainer:
    """A trainer that has taken its steps, in OUT/name."""
    options = {
        "--out": args.out / name, "--encoder": args.encoder, "--library": args.library,
        "--steps": steps, "--level": args.level, "--seed": seed,
        "--override": json.dumps(override), "--learning-rate": RATE, "--guide": GUIDE,
    }  # fmt: skip
    if start is not None:
        options["--start"] = start
    words = [str(word) for pair in options.items() for word in pair]
    run = arguments([*words, "--fixed", "--kinds", *args.kinds])
    run.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(run.out / "checkpoints", ignore_errors=True)  # of another variant
    trainer = Trainer(run)
    trainer.run()
    return trainer


def table(runs: dict[str, dict[str, dict]]) -> str:
    """Means over seeds as Markdown, a column for each variant."""

    def mean(found: dict[str, dict], kind: str) -> str:
        return f"{fmean(run['kinds'][kind] for run in found.values()):.2f}"

    def fine(found: dict[str, dict]) -> Iterable[float]:
        return [run["fine_detail"] for run in found.values()]

    lines = [f"| | {' | '.join(runs)} |", "|---" * (len(runs) + 1) + "|"]
    for kind in next(iter(next(iter(runs.values())).values()))["kinds"]:
        lines.append(f"| {kind} | {' | '.join(mean(found, kind) for found in runs.values())} |")
    cells = [
        f"**{fmean(fine(found)):.2f}** ({min(fine(found)):.2f} to {max(fine(found)):.2f})"
        for found in runs.values()
    ]
    lines.append(f"| **{', '.join(FINE)}** | {' | '.join(cells)} |")
    lines.append(f"| seeds | {' | '.join(str(len(found)) for found in runs.values())} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=Path, help="model folder to start from")
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--level", type=int, default=1, choices=range(len(LEVELS)))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--threads", type=int, default=0, help="0: all")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "ablation.json"
    budget = {
        "steps": args.steps,
        "frames": LEVELS[args.level],
        "kinds": args.kinds,
        "from_nothing": args.start is None,
    }
    report = {**budget, "runs": {}}
    if file.exists():
        report = json.loads(file.read_text())
        if any(report[name] != value for name, value in budget.items()):
            raise SystemExit(f"{file} holds runs of other settings; give another --out.")
    for seed in args.seeds:
        for variant in args.variants:
            found = report["runs"].setdefault(variant, {})
            if str(seed) in found:
                continue
            found[str(seed)] = train(args, variant, seed)
            file.write_text(json.dumps(report, indent=1) + "\n")
            print(f"{variant}, seed {seed}: {found[str(seed)]}", flush=True)
    print(table(report["runs"]))


if __name__ == "__main__":
    main()
