"""Turn a training folder into the checkpoint that ships.

`python -m model.training.release runs/tiny/times/model assets/crosslmm-tiny` writes bf16 weights,
the processor, `card.json` (name, note and example questions for the page) and `SHA256SUMS`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.processing_crosslmm import CrossLMMProcessor
from model.training.world_questions import KINDS

NAME = "crosslmm-tiny"
KINDS_FILE = "kinds.json"  # in the folder of a trained model: what it was trained on
NOTE = (
    "This is the small bundled model. It only knows made-up videos like the samples: objects, "
    "signs with numbers and words, places and times."
)
EXAMPLES = {
    "number": "What number is on the sign?",
    "word": "What word is on the sign next to the elephant?",
    "colour": "What colour is the sign?",
    "when": "When does the elephant appear?",
    "where": "Where is the elephant?",
    "exists": "Is there a rabbit?",
    "count": "How many rabbits are there?",
    "before": "What appears right before the elephant?",
    "after": "What appears right after the elephant?",
    "scenes": "What happens in the video?",
    "direction": "Which way does the elephant move?",
}


def kinds_of(folder: Path) -> list[str]:
    """The kinds of question that a model was trained on: one of a run, or a released one."""
    if (folder / KINDS_FILE).exists():
        return json.loads((folder / KINDS_FILE).read_text())
    return json.loads((folder / "card.json").read_text()).get("kinds", list(KINDS))


def release(
    source: Path, target: Path, show: list[str] | None = None, unsure: Sequence[str] = ()
) -> None:
    """Write `target` from the model folder `source` of a run.

    `show` are the kinds of question that the page suggests, all that it was trained on when None;
    `unsure` those that it was trained on and mostly gets wrong, as its model card says.
    """
    kinds = kinds_of(source)
    crosslmm = CrossLMMForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
    crosslmm.save_pretrained(target)
    CrossLMMProcessor.from_pretrained(source).save_pretrained(target)
    card = {
        "name": NAME,
        "note": NOTE,
        "kinds": kinds,
        "unsure": [kind for kind in kinds if kind in unsure],
        "examples": [EXAMPLES[kind] for kind in show or kinds if kind in EXAMPLES],
    }
    (target / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    write_sums(target)


def write_sums(folder: Path) -> None:
    """Checksums of the files that loading reads, in `sha256sum`'s format."""
    names = sorted(
        file.name
        for file in folder.iterdir()
        if file.suffix in {".safetensors", ".json", ".jinja"} and file.name != "evaluation.json"
    )
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument(
        "--show", nargs="+", choices=sorted(EXAMPLES), help="kinds that the page suggests"
    )
    parser.add_argument(
        "--unsure", nargs="+", default=(), choices=sorted(EXAMPLES), help="kinds it gets wrong"
    )
    args = parser.parse_args()
    release(args.source, args.target, args.show, args.unsure)


if __name__ == "__main__":
    main()
