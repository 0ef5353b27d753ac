"""Do answers survive smaller numbers? `python -m tests.bench.precision`.

Asks the bundled model about new made-up worlds of 32 frames, in bf16, in NF4 and with the
text-to-visual keys and values in int8 and int4, and compares the answers. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from model.engine import Engine
from model.map_capture import MapCapture
from model.training.evaluate import known_kinds
from model.training.machine import machine_kind
from model.training.world import make_world, seeded
from model.training.world_questions import QA, questions
from model.training.world_render import render
from model.video_memory import VideoMemory

FRAMES = 32
FIRST = 700  # seeds of worlds begin here, below every training seed


def memories(
    engine: Engine, worlds: Iterable[int], precision: str
) -> Iterator[tuple[VideoMemory, list[QA]]]:
    """Worlds rendered straight to frames, and what to ask about each."""
    kinds = known_kinds(engine)
    prefix, _ = engine.processor.prompt_ids("?")
    for seed in worlds:
        world = make_world(seed, FRAMES)
        frames = [render(world, float(t), 224, 126) for t in range(FRAMES)]
        memory = VideoMemory(engine.crosslmm, precision=precision, prefix_ids=prefix)
        memory.append(engine.processor.preprocess_frames(frames), torch.arange(FRAMES))
        yield memory.finish(), questions(world, seeded("precision", seed), kinds, range(FRAMES))


@dataclass(frozen=True)
class Given:
    """An answer, and the logits (vocabulary,) of its first token, float32."""

    kind: str
    text: str
    logits: torch.Tensor


def answers(engine: Engine, worlds: Iterable[int], precision: str = "native") -> list[Given]:
    """What is answered, with the text-to-visual keys and values kept in `precision`."""
    given = []
    for memory, asked in memories(engine, worlds, precision):
        for qa in asked:
            _, suffix = engine.processor.prompt_ids(qa.question)
            ids = memory.input_ids(suffix)
            with torch.inference_mode(), memory.turn(MapCapture()) as cache:
                out = engine.crosslmm.generate(
                    ids,
                    past_key_values=cache,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            text = engine.processor.tokenizer.decode(out.sequences[0, ids.shape[1] :])
            given.append(Given(qa.kind, text, out.logits[0][0].float()))
    return given


def changed(found: list[Given], expected: list[Given]) -> dict[str, int]:
    """How many answers are not the same in every word, by kind."""
    pairs = zip(found, expected, strict=True)
    return dict(Counter(a.kind for a, b in pairs if a.text != b.text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, default=40)
    parser.add_argument("--model", default=None)
    args = parser.parse_args()
    worlds = range(FIRST, FIRST + args.worlds)
    engine = Engine.load(args.model, quantization="none")
    expected = answers(engine, worlds)
    found = {
        precision: changed(answers(engine, worlds, precision), expected)
        for precision in ("int8", "int4")
    }
    engine.crosslmm.to(torch.bfloat16)  # what is not quantised in NF4 is bf16
    four_bits = Engine.load(args.model, quantization="4bit")
    found["nf4"] = changed(answers(four_bits, worlds), answers(engine, worlds))
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": machine_kind(),
        "model": engine.info.revision,
        "questions": len(expected),
        "same": {name: len(expected) - sum(kinds.values()) for name, kinds in found.items()},
        "changed": found,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
