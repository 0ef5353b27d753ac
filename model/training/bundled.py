"""Train the bundled model, all but its paths: `python -m model.training.bundled --out runs/base`.

1. `model.training.encoder`: the image encoder, on single frames.
2. A library of scenes, rendered and encoded once.
3. Projector, LLM and dual cross-attention on questions about videos put together from the library:
   short videos first; a kind of question goes on to longer ones when it is answered well enough.

Each part is skipped when its result is there, and the last one resumes from its checkpoint.
Several processes, under `torchrun`, share each of its steps.
The attention of answer tokens is guided to the evidence with a small weight, so where the finished
model points is partly taught, not emergent; the model card says so. Visual tokens are asked, with
the same weight, which object came in last and which before it (`model.training.order_guide`).

The paper's two stages are two runs: `--override '{"t2v": false}'`, then `--start` with its model.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    gather_object,
    send_to_device,
    set_seed,
)
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import SiglipVisionConfig, SiglipVisionModel

from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training.bundled_model import initialise, new_model
from model.training.collate import Batch
from model.training.cpu_attention import register_explicit_attention
from model.training.curriculum import LEVELS, Curriculum
from model.training.guided_loss import GuidedLoss, batch_of
from model.training.library import SceneLibrary, Video, encode_library, render_library
from model.training.packing import PromptIds, pack
from model.training.release import KINDS_FILE, kinds_of
from model.training.stages import STAGES, parameter_groups
from model.training.updates import Progress, Updates
from model.training.world_phrases import OUTSIDE_ANSWER
from model.training.world_questions import KINDS, QA, questions
from model.types import InputError

TRAINED_KINDS = (
    "number", "word", "colour", "when", "before", "after", "count", "where", "exists", "scenes",
    "direction", "absent", "outside",
)  # fmt: skip
FRAMES_PER_STEP = 80
QUESTIONS_PER_STEP = 48
QUESTIONS_PER_VIDEO = 16  # at most; a long video is paid for mostly by its frames
TRIES = 12  # videos drawn to find one that allows a kind of question
TOGETHER = 0.5  # of the videos drawn for a list: it names things that came together; 1 in 8 does
MOST_VIDEOS = 24  # of short ones; a frame has one sign at most, and numbers need many examples
GUIDED_UNTIL = 0.7  # of the training time: then the guides' weight sinks
GUIDE_LEFT = 0.2  # share of the guides' weight that stays to the end
WHOLE_FROM = 0.8  # of the training time: from here on every patch is in the memory
LATEST = 2400  # seconds at which half of the videos begin at the latest; the others begin at 0
THIN_FROM = 12  # frames at which "when" is good: then videos are sampled thinly
INTERVALS = (1, 1, 1, 2, 3, 5, 7)  # seconds between sampled frames, once "when" works
WEIGHT_DECAY = 0.05
HEADS_RATE = 4  # times the learning rate: what a linear head has not found, it cannot teach
HEADS_FILE = "heads.safetensors"  # beside OUT/model: the guides' linear heads, for `--start`
HELD_OUT_SCENES = 400  # the library's last scenes are never trained on


class RecipeProgress(Progress):
    """Also the time that was used, and what the curriculum knows."""

    def __init__(self, curriculum: Curriculum) -> None:
        super().__init__()
        self.seconds, self.curriculum = 0.0, curriculum

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        more = {"seconds": self.seconds, "curriculum": self.curriculum.state()}
        return {**super().state_dict(), **more}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        super().load_state_dict(state)
        self.seconds = state["seconds"]
        self.curriculum.restore(state["curriculum"])


class Trainer(Updates):
    """The third part of the recipe."""

    progress: RecipeProgress

    def __init__(self, args: argparse.Namespace) -> None:
        several = [
            # A head has no gradient where a step asks nothing of it.
            DistributedDataParallelKwargs(
                find_unused_parameters=True, gradient_as_bucket_view=True, broadcast_buffers=False
            ),
            # While one process makes the encoder and the library, the others wait.
            InitProcessGroupKwargs(timeout=timedelta(days=1)),
        ]
        accelerator = Accelerator(mixed_precision="bf16", cpu=args.cpu, kwargs_handlers=several)
        super().__init__(accelerator, args.out)
        self.args = args
        set_seed(args.seed, device_specific=True)
        with accelerator.main_process_first():
            make_encoder(args)
            self._make_library()
        encoder = SiglipVisionModel.from_pretrained(args.encoder)
        grid = encoder.config.image_size // encoder.config.patch_size
        self.library = SceneLibrary(args.library, grid * grid, encoder.config.hidden_size)
        shots = self.library.shots
        self.shots = {"train": shots[:-HELD_OUT_SCENES], "held_out": shots[-HELD_OUT_SCENES:]}
        self.crosslmm, self.processor = new_model(encoder, json.loads(args.override), args.start)
        sample = torch.from_numpy(self.library.features[::37][:2000].copy())
        initialise(self.crosslmm, sample)
        new: set[str] = set()
        if args.start is not None:
            self._start_from(args.start)
            new = set(args.kinds) - set(kinds_of(args.start))
        self.quicken(self.crosslmm)
        self.prompt = PromptIds(self.processor)
        self.curriculum = Curriculum(args.kinds, args.level, new=new, fixed=args.fixed)
        self._prepare()

    def _make_library(self) -> None:
        args, processes = self.args, self.args.processes
        side = SiglipVisionConfig.from_pretrained(args.encoder).image_size
        render_library(args.library, args.scenes, args.seed, side, processes)
        encode_library(args.library, args.encoder, side, processes)

    def _prepare(self) -> None:
        (comma,), (_, and_, _) = self.prompt.encode(","), self.prompt.encode("a and a")
        loss = self.make_loss((comma, and_))
        if self.args.start is not None and (self.args.start.parent / HEADS_FILE).exists():
            # Those of new questions begin anew; without the old ones, much would be unlearnt.
            taken, own = load_file(self.args.start.parent / HEADS_FILE), loss.order.state_dict()
            same = {k: v for k, v in taken.items() if k in own and v.shape == own[k].shape}
            loss.order.load_state_dict(same, strict=False)
        self.freeze()
        rates = dict.fromkeys(STAGES["2"].rates, self.args.learning_rate)
        groups = parameter_groups(self.crosslmm, rates, WEIGHT_DECAY)
        rate = HEADS_RATE * self.args.learning_rate
        groups.append({"params": list(loss.order.parameters()), "lr": rate})
        self.prepare(loss, groups, betas=(0.9, 0.98))
        self.guided = self.accelerator.unwrap_model(self.loss)
        self.progress = RecipeProgress(self.curriculum)
        self.register(LambdaLR(self.optimizer, self._rate), self.progress)
        # Videos are drawn anew after a break; what they are drawn by is resumed.
        step, index = self.progress.step, self.accelerator.process_index
        self.rng = random.Random(f"{self.args.seed} {step}" + f" {index}" * (index > 0))
        # Of all processes alike, or each would wait for the one with the longest videos.
        self.levels = random.Random(f"{self.args.seed} {step} levels")

    def make_loss(self, separators: tuple[int, int]) -> GuidedLoss:
        """The loss; `separators`: ids of the tokens between the parts of a list."""
        return GuidedLoss(self.crosslmm, separators)

    def quicken(self, crosslmm: CrossLMMForConditionalGeneration) -> None:
        """Choose the attention that is quickest on this device."""
        if self.accelerator.device.type == "cpu":
            crosslmm.set_attn_implementation(register_explicit_attention())

    def freeze(self) -> None:
        """Choose what is not trained."""
        frozen = self.crosslmm if self.args.heads_only else self.crosslmm.model.vision_tower
        frozen.requires_grad_(False)

    def _rate(self, step: int) -> float:
        """Share of the learning rate: a cosine over the training time, after a short warm-up."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, self.done))
        return min(1, (step + 1) / 200) * max(0.02, cosine)

    @property
    def done(self) -> float:
        """Share of the training that is over: of its steps, where they are given, or its time."""
        if self.args.steps is not None:
            return self.progress.step / self.args.steps
        return self.progress.seconds / (self.args.minutes * 60)

    def _start_from(self, folder: Path) -> None:
        """Take the weights of another model of this recipe, except the encoder's."""
        weights = {
            name: tensor
            for name, tensor in load_file(folder / "model.safetensors").items()
            if not name.startswith("model.vision_tower.")
        }
        found = self.crosslmm.load_state_dict(weights, strict=False)
        # An ablation may lack branches that the start has, and a start, the paper's first stage,
        # lacks T2V; the head is tied to the embeddings.
        odd = [k for k in found.unexpected_keys if ".dual_cross_attention." not in k]
        known = ("model.vision_tower.", "lm_head.")
        odd += [k for k in found.missing_keys if not k.startswith(known) and ".t2v." not in k]
        if odd:
            raise InputError(
                f"{folder} is another model; it differs in {', '.join(odd[:3])}, for example."
            )

    def save(self) -> None:
        """Write a checkpoint to go on from, the guides' heads, and the model into OUT/model."""
        super().save()
        if not self.accelerator.is_main_process:
            return
        save_file(self.guided.order.state_dict(), self.out / HEADS_FILE)
        self.crosslmm.save_pretrained(self.out / "model")
        self.processor.save_pretrained(self.out / "model")
        (self.out / "model" / KINDS_FILE).write_text(json.dumps(list(self.curriculum.level)))

    def batch(
        self, split: str, level: int, kinds: list[str], rng: random.Random, parts: int = 1
    ) -> Batch:
        """Videos of one length with their questions, as `GuidedLoss` wants them.

        `parts`: how many batches are taken together in a step.
        """
        self.library.shots = self.shots[split]
        frames = LEVELS[level]
        count = max(1, min(MOST_VIDEOS, FRAMES_PER_STEP // frames) // parts)
        most = min(QUESTIONS_PER_VIDEO, QUESTIONS_PER_STEP // parts // count)
        videos, asked = [], []
        while len(videos) < count:
            thin = LEVELS[self.curriculum.level.get("when", 0)] >= THIN_FROM
            interval = rng.choice(INTERVALS) if thin else 1
            # From the beginning, or the place of a frame is learnt instead of the digits it has.
            start = rng.choice((0, rng.uniform(0, LATEST)))
            # Each video is made for one kind, or signs would be in too few of them.
            (wanted,) = rng.choices(kinds, [self.curriculum.weight(kind) for kind in kinds])
            together = wanted == "scenes" and rng.random() < TOGETHER
            for _ in range(TRIES):
                video = self.library.video(rng, frames, interval, start)
                found = questions(video.scenes, rng, kinds, video.times.tolist(), per_kind=3)
                found += self._refused(video, rng)
                mine = [qa for qa in found if qa.kind == wanted]
                if any(" and " in qa.answer or not together for qa in mine):
                    break
            if not found:
                continue
            weights = [self.curriculum.weight(qa.kind) for qa in found]
            order = sorted(
                range(len(found)), key=lambda i: -(rng.random() ** (1 / weights[i]))
            )  # weighted sampling without replacement
            asked.append([found[i] for i in order[:most]])
            videos.append(video)
        per_frame = self.crosslmm.config.pooled_tokens_per_frame
        packed = pack(videos, asked, self.prompt, rng, max_gap=256, per_frame=per_frame)
        features = torch.stack(
            [torch.from_numpy(self.library.features[v.frames]) for v in videos]
        ).to(torch.bfloat16)
        return batch_of(packed, videos, features)

    def _refused(self, video: Video, rng: random.Random) -> list[QA]:
        """Questions of the kinds that are not trained: the model is to say what it can answer."""
        others = [kind for kind in KINDS if kind not in self.curriculum.level]
        asked = questions(video.scenes, rng, others, video.times.tolist(), per_kind=1)
        return [QA("outside", qa.question, OUTSIDE_ANSWER) for qa in asked]

    def batches(self) -> Iterator[Batch]:
        """Batches without end, as the curriculum wants them at that moment."""
        while True:
            self.level = self.curriculum.sample_level(self.levels)
            fade = (1 - self.done) / (1 - GUIDED_UNTIL)
            self.guided.weight = self.args.guide * min(1.0, max(GUIDE_LEFT, fade))
            self.guided.keep = self.args.keep if self.done < WHOLE_FROM else 1.0
            kinds, parts = self.curriculum.kinds_at(self.level), self.accelerator.num_processes
            yield self.batch("train", self.level, kinds, self.rng, parts)

    @torch.no_grad()
    def evaluate(self, level: int, batches: int = 12) -> dict[str, float]:
        """Exact-match accuracy by kind on scenes that training never saw."""
        self.loss.eval()
        rng, found = random.Random(7), defaultdict(list)
        for _ in range(batches):
            batch = self.batch("held_out", level, list(self.curriculum.level), rng)
            self.loss(send_to_device(batch, self.accelerator.device))
            for qa, right in self.guided.right:
                found[qa.kind].append(right)
        self.loss.train()
        return {kind: round(sum(v) / len(v), 3) for kind, v in sorted(found.items())}

    def run(self) -> None:
        """Train until the minutes are used up, or the steps."""
        clock, told, batches = time.time(), defaultdict(float), self.batches()
        self.loss.train()
        while self.done < 1:
            figures = self.step(batches)
            figures |= self.guided.told
            now = time.time()
            self._record(self.progress.seconds + now - clock)
            clock = now
            for name in ("loss", *self.guided.told):
                told[name] = 0.98 * told[name] + 0.02 * figures[name]
            step = self.progress.step
            if step % 100 == 0:
                self.log({**figures, "seconds": round(self.progress.seconds)})
                self._tell(told)
            if step % 250 == 0:
                self.save()
            if step % 1000 == 0:
                top = max(self.curriculum.level.values())
                gates = [tuple(round(g, 2) for g in pair) for pair in self.crosslmm.gates]
                right = self.evaluate(top)
                self.accelerator.print(
                    f"  held-out at {LEVELS[top]} frames {right} gates {gates}", flush=True
                )
                clock = time.time()
        self.save()

    def _record(self, seconds: float) -> None:
        """Note the time and the last answers, of all processes alike: they end at one step."""
        answers = [(qa.kind, self.level, right) for qa, right in self.guided.right]
        found = gather_object([(seconds, answers)])
        self.progress.seconds = found[0][0]
        for _, answers in found:
            for answer in answers:
                self.curriculum.record(*answer, self.done)

    def _tell(self, told: Mapping[str, float]) -> None:
        """One line about the last steps, and about how well each kind is answered at its level."""
        levels = {
            kind: f"{LEVELS[level]}:{self.curriculum.accuracy[kind, level]:.2f}"
            for kind, level in self.curriculum.level.items()
        }
        means = " ".join(f"{name} {value:.3f}" for name, value in told.items())
        seconds = f"{self.progress.seconds:.0f}s"
        self.accelerator.print(f"{self.progress.step} {seconds} {means} {levels}", flush=True)


def make_encoder(args: argparse.Namespace) -> None:
    """Write `args.encoder`, where it is not: that of the start, or a newly trained one."""
    if (args.encoder / "config.json").exists():
        return
    if args.start is not None:  # its other weights know no other encoder
        start = CrossLMMForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32)
        start.model.vision_tower.save_pretrained(args.encoder)
        return
    command = [sys.executable, "-m", "model.training.encoder", "--out", str(args.encoder)]
    subprocess.run([*command, "--seed", str(args.seed)], check=True)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, help="default: OUT/encoder")
    parser.add_argument("--library", type=Path, help="default: OUT/library")
    parser.add_argument(
        "--start", type=Path, help="OUT/model of another run to go on from, or a released one"
    )
    parser.add_argument(
        "--scenes", type=int, default=20_000, help="of the library; almost a MB of disk each"
    )
    parser.add_argument("--minutes", type=float, default=280, help="of the third part")
    parser.add_argument("--steps", type=int, help="of the third part, instead of --minutes")
    parser.add_argument(
        "--level", type=int, default=0, choices=range(len(LEVELS)), help="length to begin with"
    )
    parser.add_argument("--fixed", action="store_true", help="stay at the length of the beginning")
    parser.add_argument(
        "--heads-only",
        action="store_true",
        help="train the guides' linear heads alone, for a start that came without",
    )
    parser.add_argument("--kinds", nargs="+", default=TRAINED_KINDS, choices=KINDS)
    parser.add_argument("--learning-rate", type=float, default=7e-4)
    parser.add_argument("--keep", type=float, default=0.4, help="share of patches trained on")
    parser.add_argument("--guide", type=float, default=0.2, help="weight of the evidence loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--threads", type=int, default=0, help="0: all")
    parser.add_argument("--processes", type=int, default=2, help="for rendering")
    parser.add_argument("--override", default="{}", help="JSON of config fields, for ablations")
    args = parser.parse_args(argv)
    args.encoder = args.encoder or args.out / "encoder"
    args.library = args.library or args.out / "library"
    return args


def started(args: argparse.Namespace, trainer: type[Trainer]) -> Trainer:
    """A `trainer` for a command line.

    Raises SystemExit with a sentence where the start does not fit.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        return trainer(args)
    except InputError as error:
        raise SystemExit(str(error)) from error


def main() -> None:
    """Command line."""
    trainer = started(arguments(), Trainer)
    trainer.run()
    for level in (3, 7, 10):
        right = trainer.evaluate(level, 30)
        trainer.accelerator.print(f"held-out at {LEVELS[level]} frames {right}", flush=True)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
