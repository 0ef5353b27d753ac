"""How much of what pooling loses does distillation give back? A small, whole experiment.

    python -m model.training.distill_demo --out runs/distill_demo

1. Full: the bundled model without its dual cross-attention learns to answer with a grid of tokens
   of each frame in the LLM. Its answers are guided to the evidence, as in the bundled recipe.
2. Pooled: the same weights with one token per frame. What it loses is what pooling alone costs.
3. Distilled: only the dual cross-attention moves, from closed gates, taught by the full model on
   frames and questions; the answers it learns from are the full model's own.

All three answer the same questions about the same frames, of scenes that no training saw.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from model.conversion_branches import seed_branches
from model.loading import BUNDLED
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training.cpu_attention import register_explicit_attention
from model.training.data import IGNORE
from model.training.distill import DistillLoss, full_token_logits
from model.training.distill_frames import KINDS, Asked, Frames
from model.training.library import Video
from model.training.look_guide import LookGuide
from model.training.losses import answer_columns
from model.training.machine import machine_kind
from model.training.stages import STAGES, part_of

LONGEST_ANSWER = 6  # tokens that the teacher may write
GUIDED = 0.3  # weight of the guide's loss


class Demo:
    """The model, its frames, and the two ways to look at them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.grid = args, args.grid
        torch.manual_seed(args.seed)
        self.crosslmm = CrossLMMForConditionalGeneration.from_pretrained(
            args.model, dtype=torch.float32
        )
        self.crosslmm.config.pooled_grid = 1
        self.frames = Frames(self.crosslmm, args.model, args.out / "frames", args.scenes)
        self.crosslmm.set_attn_implementation(register_explicit_attention())
        seed_branches(self.crosslmm)
        self.loss = DistillLoss(self.crosslmm, self.grid)

    def draw(self, part: str, seed: int) -> Iterator[tuple[list[Video], Asked]]:
        """Batches of frames with questions."""
        return self.frames.draw(part, seed, self.args.videos, self.args.questions)

    def full(self, batch: dict) -> torch.Tensor:
        """Logits of all answer tokens, all tokens of the grid in the LLM, no cross-attention."""
        return full_token_logits(self.crosslmm, batch, batch["video_features"], self.grid)

    def pooled(self, batch: dict) -> torch.Tensor:
        """The same with one token per frame, and the dual cross-attention as it is."""
        return self.loss.student(batch, batch["video_features"])[0]


@torch.no_grad()
def accuracy(demo: Demo, logits: Callable[[dict], torch.Tensor]) -> dict[str, float]:
    """Share of answers right in every token, by kind and over all, on held-out scenes."""
    right: dict[str, list[bool]] = defaultdict(list)
    source = demo.draw("held_out", 1)
    for _ in range(demo.args.measure):
        batch = demo.frames.batch(*next(source), demo.grid)
        with torch.autocast("cpu", torch.bfloat16):
            found = logits(batch).argmax(-1)
        columns, wanted, targets = answer_columns(batch["labels"])
        hits = torch.ones_like(batch["labels"], dtype=torch.bool)
        rows = wanted.nonzero()
        hits[rows[:, 0], columns[rows[:, 1]] + 1] = found == targets
        for row, spans in enumerate(batch["packed"].spans):
            for qa, start, end in spans:
                right[qa.kind].append(bool(hits[row, start:end].all()))
    every = [hit for hits in right.values() for hit in hits]
    kinds = {kind: round(sum(hits) / len(hits), 4) for kind, hits in sorted(right.items())}
    return {"all": round(sum(every) / len(every), 4), "questions": len(every), **kinds}


@torch.no_grad()
def teacher_answers(demo: Demo, videos: list[Video], asked: Asked) -> Asked:
    """The same questions with the full model's own greedy answers, all written in step."""
    tokenizer, end = demo.frames.prompt.tokenizer, demo.frames.prompt.end[0]
    empty = [[dataclasses.replace(qa, answer="") for qa in some] for some in asked]
    packed = demo.frames.layout(videos, empty, demo.grid**2, LONGEST_ANSWER - 1)
    batch = demo.frames.batch(videos, asked, demo.grid)
    batch |= {
        "teacher_input_ids": packed.input_ids,
        "teacher_attention_mask": packed.attention_mask,
        "teacher_position_ids": packed.position_ids,
    }
    spans = [(row, start) for row, some in enumerate(packed.spans) for _, start, _ in some]
    rows, starts = (torch.tensor(values) for values in zip(*spans, strict=True))
    ended = torch.zeros(len(spans), dtype=torch.bool)
    for place in range(LONGEST_ANSWER):
        labels = torch.full_like(packed.input_ids, IGNORE)
        labels[rows, starts + place] = 0  # only says where logits are wanted
        batch["teacher_labels"] = labels
        with torch.autocast("cpu", torch.bfloat16):
            found = demo.full(batch).argmax(-1)
        columns, wanted, _ = answer_columns(labels)
        at = wanted.nonzero()
        packed.input_ids[at[:, 0], columns[at[:, 1]] + 1] = found
        ended |= packed.input_ids[rows, starts + place] == end
        if bool(ended.all()):
            break
    answers = iter(packed.input_ids[row, s : s + LONGEST_ANSWER].tolist() for row, s in spans)

    def text(ids: list[int]) -> str:
        ids = ids[: ids.index(end)] if end in ids else ids
        return tokenizer.decode(ids, skip_special_tokens=True)

    return [[dataclasses.replace(qa, answer=text(next(answers))) for qa in some] for some in asked]


def teach(demo: Demo) -> list[dict]:
    """Batches with the full model's answers and the probabilities of their tokens."""
    source, sets = demo.draw("train", 4), []
    for _ in range(demo.args.sets):
        videos, asked = next(source)
        batch = demo.frames.batch(videos, teacher_answers(demo, videos, asked), demo.grid)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            batch["teacher_log_probs"] = demo.full(batch).float().log_softmax(-1)
        sets.append(batch)
    return sets


def train(
    demo: Demo, rates: dict[str, float], minutes: float, losses: Iterator[torch.Tensor]
) -> dict[str, float]:
    """Updates of the parts in `rates` until the minutes are used up."""
    groups = []
    for name, parameter in demo.crosslmm.named_parameters():
        parameter.requires_grad_(part_of(name) in rates)
        if parameter.requires_grad:
            rate = rates[part_of(name)] * (10 if name.endswith("gate") else 1)
            groups.append({"params": [parameter], "rate": rate})
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    parameters = [group["params"][0] for group in groups]
    began, step, average = time.monotonic(), 0, None
    while (done := (time.monotonic() - began) / 60 / minutes) < 1:
        factor = min(1, (step + 1) / 50) * (0.52 + 0.48 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        loss = next(losses)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        if step % 50 == 0:
            print(f"{step} {done * minutes * 60:.0f}s loss {average:.3f}", flush=True)
    return {"updates": step, "minutes": minutes, "loss": round(average, 4)}


def full_losses(demo: Demo) -> Iterator[torch.Tensor]:
    """Cross-entropy of the full model on right answers, and looking at the evidence."""
    guide = LookGuide(demo.crosslmm, demo.grid)
    for videos, asked in demo.draw("train", 2):
        batch = demo.frames.batch(videos, asked, demo.grid)
        with torch.autocast("cpu", torch.bfloat16):
            logits = demo.full(batch)
        targets = answer_columns(batch["teacher_labels"])[2]
        yield F.cross_entropy(logits.float(), targets) + GUIDED * guide.loss(
            batch["teacher_packed"], videos
        )


def distill_losses(demo: Demo, sets: list[dict]) -> Iterator[torch.Tensor]:
    """KL to the full model on its own answers, over the same batches again and again."""
    while True:
        for i in torch.randperm(len(sets)).tolist():
            tokens = (sets[i]["labels"] != IGNORE).sum()
            with torch.autocast("cpu", torch.bfloat16):
                yield demo.loss(sets[i]) / tokens


def experiment(args: argparse.Namespace) -> dict:
    """All three parts; the first is skipped when its result is there."""
    demo, file = Demo(args), args.out / "full.pt"
    crosslmm, began = demo.crosslmm, time.monotonic()
    if file.exists():
        saved = torch.load(file, weights_only=True)
        crosslmm.load_state_dict(saved["weights"])
        figures = saved["figures"]
    else:
        rates = {"llm": args.full_rate, "projector": args.full_rate}
        figures = train(demo, rates, args.full_minutes, full_losses(demo))
        seed_branches(crosslmm)
        torch.save({"weights": crosslmm.state_dict(), "figures": figures}, file)
    report: dict = {"full_training": figures}
    report["full"] = accuracy(demo, demo.full)
    report["pooled"] = accuracy(demo, demo.pooled)
    print(f"full {report['full']}\npooled {report['pooled']}", flush=True)
    sets = teach(demo)
    print(f"teacher done {time.monotonic() - began:.0f}s", flush=True)
    rates = dict.fromkeys(STAGES["dcal"].rates, args.distill_rate)
    report["distill_training"] = train(
        demo, rates, args.distill_minutes, distill_losses(demo, sets)
    )
    report["distilled"] = accuracy(demo, demo.pooled)
    report["gates"] = [[round(gate, 4) for gate in pair] for pair in crosslmm.gates]
    lost = report["full"]["all"] - report["pooled"]["all"]
    back = report["distilled"]["all"] - report["pooled"]["all"]
    report["share_of_loss_recovered"] = round(back / lost, 4) if lost > 0 else None
    return report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--result", type=Path, help="JSON file for the figures")
    parser.add_argument("--grid", type=int, default=14, help="side of the full model's token grid")
    parser.add_argument("--scenes", type=int, default=5000, help="to train on")
    parser.add_argument("--videos", type=int, default=16, help="frames in a batch")
    parser.add_argument("--questions", type=int, default=4, help="at most, about each frame")
    parser.add_argument("--sets", type=int, default=150, help="batches that the teacher answers")
    parser.add_argument("--measure", type=int, default=25, help="batches measured")
    parser.add_argument("--full-minutes", type=float, default=13)
    parser.add_argument("--distill-minutes", type=float, default=7)
    parser.add_argument("--full-rate", type=float, default=1e-3)
    parser.add_argument("--distill-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    paths = ("out", "model", "result")
    settings = {name: value for name, value in vars(args).items() if name not in paths}
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{machine_kind()}, shared with other work",
        "kinds": KINDS,
        "settings": settings,
        **experiment(args),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.result:
        args.result.parent.mkdir(parents=True, exist_ok=True)
        args.result.write_text(text + "\n")


if __name__ == "__main__":
    main()
