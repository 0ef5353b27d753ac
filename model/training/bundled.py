"""Train the bundled model from nothing: `python -m model.training.bundled --out runs/bundled`.

1. `model.training.encoder`: the image encoder, on single frames.
2. A library of scenes, rendered and encoded once.
3. Projector, LLM and dual cross-attention on questions about videos put together from the library:
   short videos first; a kind of question goes on to longer ones when it is answered well enough.

Each part is skipped when its result is there, and the last one resumes from its checkpoint.
The attention of answer tokens is guided to the evidence with a small weight, so where the finished
model points is partly taught, not emergent; the model card says so. Visual tokens are asked, with
the same weight, which object came in last and which before it (`model.training.order_guide`).
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
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig, SiglipVisionModel

from model.configuration_crosslmm import CrossLMMConfig
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.processing_crosslmm import CrossLMMProcessor
from model.training.cpu_attention import register_explicit_attention
from model.training.curriculum import LEVELS, Curriculum
from model.training.evidence_guide import EvidenceGuide
from model.training.library import SceneLibrary, Video, encode_library, render_library
from model.training.order_guide import OrderGuide
from model.training.packing import IGNORE, Packed, PromptIds, pack
from model.training.tokenizer import train_tokenizer
from model.training.world_phrases import OUTSIDE_ANSWER
from model.training.world_questions import KINDS, QA, all_texts, questions

TRAINED_KINDS = (
    "number", "word", "colour", "when", "before", "after", "count", "where", "exists", "absent",
    "outside",
)  # fmt: skip
NOT_TRAINED = ("scenes", "direction")  # of the world's kinds, by default
FRAMES_PER_STEP = 80
QUESTIONS_PER_STEP = 48
QUESTIONS_PER_VIDEO = 6  # at most
TRIES = 12  # videos drawn to find one that allows a kind of question
MOST_VIDEOS = 24  # of short ones; a frame has one sign at most, and numbers need many examples
WHOLE_FROM = 0.8  # of the training time: from here on every patch is in the memory
VARIED_FROM = 12  # frames at which "when" is good: then videos start late and are sampled thinly
INTERVALS = (1, 1, 1, 2, 3, 5, 7)  # seconds between sampled frames, once "when" works
HELD_OUT_SCENES = 400  # the library's last scenes are never trained on


def model_config(
    encoder: SiglipVisionModel, vocabulary: int, ids: dict[str, int]
) -> CrossLMMConfig:
    """The bundled model: a 192-wide, 6-layer LLM, dual cross-attention in layers 0, 2 and 4."""
    return CrossLMMConfig(
        vision_config={k: v for k, v in encoder.config.to_dict().items() if k != "_name_or_path"},
        text_config={
            "model_type": "qwen2",
            "vocab_size": vocabulary,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "max_position_embeddings": 4096,
            "initializer_range": 0.04,
            "tie_word_embeddings": True,
            "eos_token_id": ids["eos"],
            "pad_token_id": ids["pad"],
        },
        pooled_grid=1,
        dcal_interval=2,
        gate_init=0.5,
        time_encoding="clock",
        patch_position="learned",
        projector_norm=True,
        video_token_id=ids["video"],
        frame_rate=1.0,
        max_frames=128,
        multi_turn=False,
    )


@torch.no_grad()
def initialise(crosslmm: CrossLMMForConditionalGeneration, features: torch.Tensor) -> None:
    """Whiten the encoder's output inside the projector and sharpen cross-attention.

    Features (F, N, Dv): a sample of the library. Whitening is a linear map, so it is folded into
    the projector's first layer and the architecture stays as it is.
    """
    model = crosslmm.model
    flat = features.flatten(0, 1).double()
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh((flat - mean).T.cov())
    whiten = vectors * (values + 1e-4 * values.mean()).rsqrt() @ vectors.T
    projector = model.multi_modal_projector
    width = projector.linear_1.in_features
    weight = torch.randn(projector.linear_1.out_features, width, dtype=torch.double)
    weight = weight / width**0.5 @ whiten
    projector.linear_1.weight.copy_(weight)
    projector.linear_1.bias.copy_(-weight @ mean)
    nn.init.normal_(projector.linear_2.weight, std=projector.linear_2.in_features**-0.5)
    for table in (model.time_embedding.digits, model.row_embedding, model.column_embedding):
        nn.init.normal_(table.weight, std=0.3)
    for layer in model.language_model.layers:
        if layer.dual_cross_attention is not None:
            for branch in layer.dual_cross_attention.children():
                branch.q_proj.weight.normal_(std=2 / width**0.5)
                branch.k_proj.weight.normal_(std=1.5 / width**0.5)
                branch.v_proj.weight.normal_(std=1 / width**0.5)


class Trainer:
    """The third part of the recipe."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rng = random.Random(args.seed)
        torch.manual_seed(args.seed)
        encoder = SiglipVisionModel.from_pretrained(args.encoder)
        side, grid = (
            encoder.config.image_size,
            encoder.config.image_size // encoder.config.patch_size,
        )
        render_library(args.library, args.scenes, args.seed, side, args.processes)
        encode_library(args.library, args.encoder, side, args.processes)
        self.library = SceneLibrary(args.library, grid * grid, encoder.config.hidden_size)
        shots = self.library.shots
        self.shots = {"train": shots[:-HELD_OUT_SCENES], "held_out": shots[-HELD_OUT_SCENES:]}
        tokenizer = train_tokenizer([*all_texts(800), "user\n", "assistant\n", "system\n"])
        ids = {
            "eos": tokenizer.eos_token_id,
            "pad": tokenizer.pad_token_id,
            "video": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        }
        config = model_config(encoder, len(tokenizer), ids)
        for name, value in json.loads(args.override).items():
            setattr(config, name, value)
        config.validate_choices()
        self.crosslmm = CrossLMMForConditionalGeneration(config)
        self.crosslmm.set_attn_implementation(register_explicit_attention())
        self.crosslmm.model.vision_tower.load_state_dict(encoder.state_dict())
        self.crosslmm.generation_config = GenerationConfig(
            eos_token_id=ids["eos"], pad_token_id=ids["pad"], max_new_tokens=96
        )
        sample = torch.from_numpy(self.library.features[::37][:2000].copy())
        initialise(self.crosslmm, sample)
        self.processor = CrossLMMProcessor.for_config(config, tokenizer)
        self.prompt = PromptIds(self.processor)
        self.crosslmm.model.vision_tower.requires_grad_(False)
        self.guide = EvidenceGuide(self.crosslmm)
        self.order = OrderGuide(self.crosslmm)
        self.kept: torch.Tensor | None = None  # (B, T, n) patches that stay in the memory
        self._embed = self.crosslmm.model.embed_frames
        self.crosslmm.model.embed_frames = self._embed_some
        self.curriculum = Curriculum(tuple(args.kinds), args.level)
        trained = [*self.crosslmm.parameters(), *self.order.parameters()]
        trained = [p for p in trained if p.requires_grad]
        decay, plain = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
            lr=args.learning_rate,
            betas=(0.9, 0.98),
        )
        self.step, self.seconds, self.astray, self.disorder = 0, 0.0, 0.0, 0.0
        self.checkpoint = args.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self._resume()
        elif args.start is not None:
            self._start_from(args.start)

    def _embed_some(
        self, features: torch.Tensor, times: torch.Tensor, grid: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`embed_frames` with a random part of each frame's patches left out of the memory.

        Most of a step's cost is keys and values of patches, and most patches show background. The
        last part of training sees all of them again.
        """
        pooled, memory = self._embed(features, times, grid)
        self.kept = None
        share = self.args.keep if self.crosslmm.training and self.done < WHOLE_FROM else 1.0
        if share < 1:
            count = round(share * memory.shape[2])
            self.kept = torch.rand(memory.shape[:3]).topk(count, dim=-1).indices
            memory = memory.gather(2, self.kept.unsqueeze(-1).expand(-1, -1, -1, memory.shape[3]))
        return pooled, memory

    @property
    def done(self) -> float:
        """Share of the training that is over: of its steps, where they are given, or its time."""
        if self.args.steps is not None:
            return self.step / self.args.steps
        return self.seconds / (self.args.minutes * 60)

    def _resume(self) -> None:
        saved = torch.load(self.checkpoint, weights_only=False)
        self.crosslmm.load_state_dict(saved["model"])
        self.order.load_state_dict(saved["order"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.curriculum.restore(saved["curriculum"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.rng.seed(f"{self.args.seed} {self.step}")

    def _start_from(self, path: Path) -> None:
        """Take the weights of an earlier run, except the encoder, which may be a newer one."""
        weights = torch.load(path, weights_only=False)["model"]
        kept = {k: v for k, v in weights.items() if not k.startswith("model.vision_tower.")}
        found = self.crosslmm.load_state_dict(kept, strict=False)
        # An ablation may lack branches that the start has.
        odd = [k for k in found.unexpected_keys if ".dual_cross_attention." not in k]
        odd += [k for k in found.missing_keys if ".vision_tower." not in f".{k}"]
        if odd:
            raise SystemExit(f"{path} is of another model; it differs in {', '.join(odd[:3])} ...")

    def save(self) -> None:
        """Write the model with its processor, and the state to go on from."""
        state = {
            "model": self.crosslmm.state_dict(),
            "order": self.order.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curriculum": self.curriculum.state(),
            "step": self.step,
            "seconds": self.seconds,
        }
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.rename(self.checkpoint)
        self.crosslmm.save_pretrained(self.args.out)
        self.processor.save_pretrained(self.args.out)

    def batch(
        self, split: str, level: int, kinds: list[str], rng: random.Random
    ) -> tuple[list[Video], Packed, torch.Tensor]:
        """Videos of one length, their questions and their features (B, T, N, Dv)."""
        self.library.shots = self.shots[split]
        frames = LEVELS[level]
        count = min(MOST_VIDEOS, max(1, FRAMES_PER_STEP // frames))
        most = min(QUESTIONS_PER_VIDEO, QUESTIONS_PER_STEP // count)
        videos, asked = [], []
        while len(videos) < count:
            varied = LEVELS[self.curriculum.level.get("when", 0)] >= VARIED_FROM
            interval = rng.choice(INTERVALS) if varied else 1
            start = rng.choice((0, rng.uniform(0, 2400))) if varied else 0
            # Each video is made for one kind, or signs would be in too few of them.
            (wanted,) = rng.choices(kinds, [self.curriculum.weight(kind) for kind in kinds])
            for _ in range(TRIES):
                video = self.library.video(rng, frames, interval, start)
                found = questions(video.scenes, rng, kinds, video.times.tolist(), per_kind=3)
                found += self._refused(video, rng)
                if any(qa.kind == wanted for qa in found):
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
        return videos, packed, features

    def _refused(self, video: Video, rng: random.Random) -> list[QA]:
        """Questions of the kinds that are not trained: the model is to say what it can answer."""
        others = [kind for kind in NOT_TRAINED if kind not in self.curriculum.level]
        asked = questions(video.scenes, rng, others, video.times.tolist(), per_kind=1)
        return [QA("outside", qa.question, OUTSIDE_ANSWER) for qa in asked]

    def forward(self, packed: Packed, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss over answers' tokens, and the predicted ids (B, L)."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.crosslmm(
                input_ids=packed.input_ids,
                attention_mask=packed.attention_mask,
                position_ids=packed.position_ids,
                video_features=features,
                frame_times=packed.frame_times,
                use_cache=False,
            ).logits[:, :-1]
        labels = packed.labels[:, 1:]
        wanted = labels != IGNORE
        loss = F.cross_entropy(logits[wanted].float(), labels[wanted])
        predicted = torch.full_like(packed.labels, IGNORE)
        predicted[:, 1:] = logits.argmax(-1)
        return loss, predicted

    @staticmethod
    def right(packed: Packed, predicted: torch.Tensor) -> list[tuple[QA, bool]]:
        """Which answers are right in every token, their end included."""
        return [
            (qa, torch.equal(predicted[row, a:b], packed.input_ids[row, a:b]))
            for row, spans in enumerate(packed.spans)
            for qa, a, b in spans
        ]

    def train_step(self) -> float:
        """One update; returns the loss on answers."""
        level = self.curriculum.sample_level(self.rng)
        kinds = self.curriculum.kinds_at(level)
        videos, packed, features = self.batch("train", level, kinds, self.rng)
        cosine = 0.5 + 0.5 * math.cos(math.pi * self.done)
        factor = min(1, (self.step + 1) / 200) * max(0.02, cosine)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.learning_rate * factor
        self.crosslmm.train()
        loss, predicted = self.forward(packed, features)
        total = loss
        guided = self.args.guide * max(0.2, 1 - self.done / 0.8)
        if guided:
            off = self.guide.loss(packed, videos, self.kept)
            self.astray = 0.98 * self.astray + 0.02 * off.item()
            disorder = self.order.loss(packed, videos)
            self.disorder = 0.98 * self.disorder + 0.02 * disorder.item()
            total = total + guided * (off + disorder)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.crosslmm.parameters(), 1.0)
        self.optimizer.step()
        for qa, right in self.right(packed, predicted):
            self.curriculum.record(qa.kind, level, right, self.done)
        return loss.item()

    @torch.no_grad()
    def evaluate(self, level: int, batches: int = 12) -> dict[str, float]:
        """Exact-match accuracy by kind on scenes that training never saw."""
        self.crosslmm.eval()
        rng, found = random.Random(7), defaultdict(list)
        for _ in range(batches):
            _, packed, features = self.batch("held_out", level, list(self.curriculum.level), rng)
            for qa, right in self.right(packed, self.forward(packed, features)[1]):
                found[qa.kind].append(right)
        return {kind: round(sum(v) / len(v), 3) for kind, v in sorted(found.items())}

    def run(self) -> None:
        """Train until the minutes are used up, or the steps."""
        average, clock = 0.0, time.time()
        while self.done < 1:
            average = 0.98 * average + 0.02 * self.train_step()
            self.step += 1
            now = time.time()
            self.seconds, clock = self.seconds + now - clock, now
            if self.step % 100 == 0:
                levels = {
                    kind: f"{LEVELS[level]}:{self.curriculum.accuracy[kind, level]:.2f}"
                    for kind, level in self.curriculum.level.items()
                }
                print(
                    f"{self.step} {self.seconds:.0f}s loss {average:.3f} "
                    f"astray {self.astray:.2f} disorder {self.disorder:.2f} {levels}",
                    flush=True,
                )
            if self.step % 250 == 0:
                self.save()
            if self.step % 1000 == 0:
                top = max(self.curriculum.level.values())
                print(
                    f"  held-out at {LEVELS[top]} frames {self.evaluate(top)} "
                    f"gates {[tuple(round(g, 2) for g in pair) for pair in self.crosslmm.gates]}",
                    flush=True,
                )
                clock = time.time()
        self.save()


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, help="default: OUT/encoder")
    parser.add_argument("--library", type=Path, help="default: OUT/library")
    parser.add_argument("--start", type=Path, help="checkpoint.pt of an earlier run to go on from")
    parser.add_argument("--scenes", type=int, default=8_000)
    parser.add_argument("--minutes", type=float, default=90, help="of the third part")
    parser.add_argument("--steps", type=int, help="of the third part, instead of --minutes")
    parser.add_argument(
        "--level", type=int, choices=range(len(LEVELS)), help="one length from the beginning"
    )
    parser.add_argument("--kinds", nargs="+", default=TRAINED_KINDS, choices=KINDS)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--keep", type=float, default=0.4, help="share of patches trained on")
    parser.add_argument("--guide", type=float, default=0.1, help="weight of the evidence loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: all")
    parser.add_argument("--processes", type=int, default=2, help="for rendering")
    parser.add_argument("--override", default="{}", help="JSON of config fields, for ablations")
    args = parser.parse_args(argv)
    args.encoder = args.encoder or args.out / "encoder"
    args.library = args.library or args.out / "library"
    return args


def main() -> None:
    """Command line."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    if not (args.encoder / "config.json").exists():
        command = [sys.executable, "-m", "model.training.encoder", "--out", str(args.encoder)]
        subprocess.run([*command, "--seed", str(args.seed)], check=True)
    trainer = Trainer(args)
    trainer.run()
    for level in (3, 7, 10):
        print(f"held-out at {LEVELS[level]} frames {trainer.evaluate(level, 30)}", flush=True)


if __name__ == "__main__":
    main()
