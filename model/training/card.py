"""Measure a released model and write the results into its model card.

`python -m model.training.card assets/crosslmm-tiny` runs the held-out evaluation at training length
and at the length that the app uses, wear and masking, writes `evaluation.json`, and replaces the
part of the folder's README.md that stands between the two results marks.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

from model.engine import Engine
from model.training.evaluate import Film, held_out_worlds, known_kinds, measure
from model.training.machine import machine_kind
from model.training.masking import masking
from model.training.wear import wear
from model.types import WhatIf

START, END = "<!-- results: written by model.training.card -->", "<!-- end of results -->"
RUNS = ((1, 20, 32), (2, 6, 128))  # seed, videos, frames
KNOCK_OUT_RUN = (5, 8, 32)
KNOCK_OUTS = {
    "both": WhatIf(),
    "V2V off": WhatIf(v2v=False),
    "T2V off": WhatIf(t2v=False),
    "both off": WhatIf(v2v=False, t2v=False),
}


def evaluate(engine: Engine) -> list[dict]:
    """The reports of `RUNS`, each with the command that repeats it."""
    reports = []
    for seed, videos, frames in RUNS:
        worlds = held_out_worlds(seed, videos, frames, 1.0)
        tally = measure(engine, worlds, known_kinds(engine), frames, Film())
        command = "python -m model.training.evaluate"
        command += f" --seed {seed} --videos {videos} --frames {frames} --json"
        reports.append({"command": command, **tally.report()})
    return reports


def knock_outs(engine: Engine) -> dict[str, dict]:
    """Right answers by kind with one branch, or both, switched off in the trained model."""
    seed, videos, frames = KNOCK_OUT_RUN
    found = {}
    for name, what_if in KNOCK_OUTS.items():
        worlds = held_out_worlds(seed, videos, frames, 1.0)
        tally = measure(engine, worlds, known_kinds(engine), frames, Film(), what_if)
        found[name] = tally.report()
    return found


def markdown(results: dict) -> str:
    """The tables of the model card."""
    short, long = results["runs"]
    lines = [
        f"Measured {results['date']} on {results['machine']}; held-out worlds, written as H.264 "
        "files and read back by the product's decoder, answers compared word for word. Number of "
        'questions in brackets; "chance" is the better of two guessers, one that knows the '
        "commonest answer and one that knows an answer of the same kind about the same video. "
        "The whole reports are in `evaluation.json`.",
        "",
        f"| kind | {RUNS[0][2]} frames | {RUNS[1][2]} frames | chance |",
        "|---|---|---|---|",
    ]
    for kind in short["kinds"]:
        cells = [_cell(run["kinds"].get(kind)) for run in (short, long)]
        lines.append(f"| {kind} | {' | '.join(cells)} | {short['kinds'][kind]['chance']} |")
    lines += [
        f"| **all** | **{short['overall']:.2f}** | **{long['overall']:.2f}** | |",
        "",
        "Pointing, in questions with evidence: the frame with the most text-to-visual attention "
        "(mean over layers, as the page shows it) lies in the evidence's time, and the strongest "
        "patch of the strongest frame in its box.",
        "",
        f"| | {RUNS[0][2]} frames | {RUNS[1][2]} frames |",
        "|---|---|---|",
    ]
    for name, told in (("frame_top1", "frame"), ("patch_top1", "patch")):
        cells = " | ".join(f"{run['pointing'][name]:.2f}" for run in (short, long))
        lines.append(f"| {told} | {cells} |")
    every, branches = results["masking"]["all"], results["knock_outs"]
    kinds = next(iter(branches.values()))["kinds"]
    lines += [
        "",
        "What each branch carries in this model: the same questions with its gates closed "
        f"({KNOCK_OUT_RUN[2]} frames; `python -m model.training.evaluate --no-t2v --no-v2v`). It "
        "was trained with both, so this is no ablation.",
        "",
        f"| kind | {' | '.join(branches)} |",
        "|---" * (len(branches) + 1) + "|",
    ]
    for kind in kinds:
        cells = [_cell(report["kinds"].get(kind)) for report in branches.values()]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    cells = " | ".join(f"**{report['overall']:.2f}**" for report in branches.values())
    lines.append(f"| **all** | {cells} |")
    lines += [
        "",
        f"With the frames of the evidence hidden, {every['evidence']:.0%} of the right answers "
        f"change; with as much of something else hidden, {every['other']:.0%} "
        f"({every['n']} questions; `python -m model.training.masking`).",
        "",
        "The same questions after other encodings (`python -m model.training.wear`):",
        "",
        "| film | right | points lost |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['overall']:.2f} ({row['n']}) | {row['points_lost']} |"
        for name, row in results["wear"].items()
    ]
    return "\n".join(lines)


def _cell(row: dict | None) -> str:
    return "-" if row is None else f"{row['accuracy']:.2f} ({row['n']})"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wear-videos", type=int, default=5)
    parser.add_argument("--masking-videos", type=int, default=10)
    args = parser.parse_args()
    engine = Engine.load(str(args.folder))
    results = {
        "date": datetime.date.today().isoformat(),
        "machine": machine_kind(),
        "runs": evaluate(engine),
        "knock_outs": knock_outs(engine),
        "masking": masking(engine, 4, args.masking_videos, 32),
        "wear": wear(engine, 3, args.wear_videos, 32),
    }
    (args.folder / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")
    card = args.folder / "README.md"
    text = card.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise SystemExit(f"{card} needs the two lines {START!r} and {END!r} around its results")
    before, after = text.split(START)[0], text.split(END)[1]
    card.write_text(f"{before}{START}\n{markdown(results)}\n{END}{after}", encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
