"""Train the bundled model from nothing: `python -m model.training.bundled --out runs/bundled`.

1. `model.training.encoder`: the image encoder, on single frames.
2. A library of scenes, rendered and encoded once.
3. Projector, LLM and dual cross-attention on questions about videos put together from the library:
   short videos first; a kind of question goes on to longer ones when it is answered well enough.

Each part is skipped when its result is there, and the last one resumes from its checkpoint.
The attention of answer tokens is guided to the evidence with a small weight at first, so where the
finished model points is partly taught, not emergent; the model card says so.
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
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig, SiglipVisionModel

from model.configuration_crosslmm import CrossLMMConfig
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.processing_crosslmm import CrossLMMProcessor
from model.training.cpu_attention import register_explicit_attention
from model.training.library import SceneLibrary, Video, encode_library, render_library
from model.training.packing import IGNORE, Packed, PromptIds, pack
from model.training.tokenizer import train_tokenizer
from model.training.world_questions import KINDS, QA, all_texts, questions

LEVELS = (5, 8, 12, 18, 26, 36, 48)  # frames per video; a kind climbs when it is answered well
PROMOTE = 0.85  # exact-match accuracy at its highest level that lets a kind climb, at first
# From a share of the training time on, every kind is also asked at this level: long videos must
# not stay unseen because a kind is hard.
AT_LEAST = ((0.65, 3), (0.8, 5))
FIRST_KINDS = ("number", "word", "colour", "when", "where", "exists", "absent", "outside")
FRAMES_PER_STEP = 80
QUESTIONS_PER_VIDEO = 6
# How often a kind is asked, where not 1: these can be asked of every video and would crowd out
# the others.
# Numbers need the most examples (a digit must be bound to its place), and a video has few signs.
SHARE = {"outside": 0.08, "absent": 0.25, "exists": 0.5, "number": 4.0, "word": 1.5}
TRIES = 8  # videos drawn to find one that allows a kind of question
MOST_VIDEOS = 10  # of short ones: text then costs more than frames
WHOLE_FROM = 0.8  # of the training time: from here on every patch is in the memory
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


class Curriculum:
    """Which kind of question is asked on videos of which length."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        self.level = dict.fromkeys(kinds, 0)
        self.accuracy: dict[tuple[str, int], float] = defaultdict(float)
        self.count: dict[tuple[str, int], int] = defaultdict(int)

    def sample_level(self, rng: random.Random) -> int:
        """The length for a batch: one that a kind in need of practice has reached."""
        kinds = list(self.level)
        (kind,) = rng.choices(kinds, [self.weight(k) for k in kinds])
        highest = self.level[kind]
        return highest if rng.random() < 0.6 else rng.randint(0, highest)

    def kinds_at(self, level: int) -> list[str]:
        """Kinds that may be asked on videos of this length."""
        return [kind for kind, reached in self.level.items() if reached >= level]

    def weight(self, kind: str) -> float:
        """Kinds that are answered badly are asked more often."""
        return SHARE.get(kind, 1.0) * (1.15 - self.accuracy[kind, self.level[kind]])

    def record(self, kind: str, level: int, right: bool, done: float) -> None:
        """Note one answer, and promote the kind when it is good enough at its top level.

        `done` is the share of the training time that is used up; the bar sinks in its second half.
        """
        key = (kind, level)
        self.count[key] += 1
        rate = max(1 / self.count[key], 0.01)
        self.accuracy[key] += rate * (right - self.accuracy[key])
        bar = PROMOTE - 0.35 * max(0.0, done - 0.5)
        good = self.accuracy[key] > bar and self.count[key] >= 150
        if good and level == self.level[kind] < len(LEVELS) - 1:
            self.level[kind] += 1
        for since, least in AT_LEAST:
            if done >= since:
                self.level[kind] = max(self.level[kind], least)

    def state(self) -> dict:
        """Everything, as plain data."""
        return {
            "level": self.level,
            "accuracy": list(self.accuracy.items()),
            "count": list(self.count.items()),
        }

    def restore(self, state: dict) -> None:
        """Undo `state`; kinds that are new keep level 0."""
        self.level.update({k: v for k, v in state["level"].items() if k in self.level})
        self.accuracy.update(dict(state["accuracy"]))
        self.count.update(dict(state["count"]))


class EvidenceGuide:
    """Share of T2V attention on the evidence, read from the projections by hooks."""

    def __init__(self, crosslmm: CrossLMMForConditionalGeneration) -> None:
        self.grid = crosslmm.config.original_grid
        self.layers = crosslmm.config.dcal_layers[1:]  # the first sees the question's noun too late
        self.seen: dict[tuple[int, str], torch.Tensor] = {}
        self.branches = {}
        for i in self.layers:
            branch = crosslmm.model.language_model.layers[i].dual_cross_attention.t2v
            if branch is None:
                continue
            self.branches[i] = branch
            for name in ("q_proj", "k_proj"):
                getattr(branch, name).register_forward_hook(self._keep(i, name))

    def _keep(self, layer: int, name: str):  # noqa: ANN202 (a torch hook)
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            self.seen[layer, name] = output

        return hook

    def patches(self, qa: QA, video: Video) -> torch.Tensor:
        """Patches that hold the evidence, (T * N,) bool."""
        centres = (torch.arange(self.grid) + 0.5) / self.grid
        mask = torch.zeros(len(video.times), self.grid, self.grid, dtype=torch.bool)
        for evidence in qa.evidence:
            times = torch.as_tensor(video.times)
            shown = (times >= evidence.start - 1e-6) & (times < evidence.end)
            left, top, right, bottom = evidence.box or (0, 0, 1, 1)
            box = ((centres >= top) & (centres <= bottom))[:, None] & (
                (centres >= left) & (centres <= right)
            )
            mask[shown] |= box
        return mask.flatten()

    def loss(
        self, packed: Packed, videos: list[Video], kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean of -log(share of attention on the evidence) over answer tokens that have any.

        `kept` (B, T, n): the patches in the memory, where not all are.
        """
        terms = []
        for row, (spans, video) in enumerate(zip(packed.spans, videos, strict=True)):
            columns, masks = [], []
            for qa, start, end in spans:
                evidence = self.patches(qa, video)
                if kept is not None:
                    evidence = evidence.unflatten(0, (len(video.times), -1))
                    evidence = evidence.gather(1, kept[row]).flatten()
                if qa.evidence and evidence.any():
                    # The column before a token predicts it; the end token looks at nothing.
                    columns += [c - packed.text_start for c in range(start - 1, end - 2)]
                    masks += [evidence] * (end - 1 - start)
            if not columns:
                continue
            target = torch.stack(masks)
            for layer, branch in self.branches.items():
                query = self.seen[layer, "q_proj"][row, columns].unflatten(
                    -1, (-1, branch.head_dim)
                )
                key = self.seen[layer, "k_proj"][row].unflatten(-1, (-1, branch.head_dim))
                query = query.unflatten(1, (key.shape[1], -1))  # (Lq, Hkv, G, d)
                scores = torch.einsum("lhgd,mhd->lhgm", query, key).float() * branch.scaling
                share = (scores.softmax(-1) * target[:, None, None]).sum(-1).mean((1, 2))
                terms.append(-(share + 1e-4).log())
        return torch.cat(terms).mean() if terms else torch.zeros(())


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
        self.kept: torch.Tensor | None = None  # (B, T, n) patches that stay in the memory
        self._embed = self.crosslmm.model.embed_frames
        self.crosslmm.model.embed_frames = self._embed_some
        self.curriculum = Curriculum(tuple(args.kinds))
        decay = [p for p in self.crosslmm.parameters() if p.requires_grad and p.dim() > 1]
        plain = [p for p in self.crosslmm.parameters() if p.requires_grad and p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
            lr=args.learning_rate,
            betas=(0.9, 0.98),
        )
        self.step, self.seconds, self.astray = 0, 0.0, 0.0
        self.checkpoint = args.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self._resume()

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
        """Share of the training time that is used up."""
        return self.seconds / (self.args.minutes * 60)

    def _resume(self) -> None:
        saved = torch.load(self.checkpoint, weights_only=False)
        self.crosslmm.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.curriculum.restore(saved["curriculum"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.rng.seed(f"{self.args.seed} {self.step}")

    def save(self) -> None:
        """Write the model with its processor, and the state to go on from."""
        state = {
            "model": self.crosslmm.state_dict(),
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
        videos, asked = [], []
        while len(videos) < min(MOST_VIDEOS, max(1, FRAMES_PER_STEP // frames)):
            varied = self.curriculum.level.get("when", 0) >= 2
            interval = rng.choice(INTERVALS) if varied else 1
            start = rng.choice((0, rng.uniform(0, 2400))) if varied else 0
            # Each video is made for one kind, or signs would be in too few of them.
            (wanted,) = rng.choices(kinds, [self.curriculum.weight(kind) for kind in kinds])
            for _ in range(TRIES):
                video = self.library.video(rng, frames, interval, start)
                found = questions(video.scenes, rng, kinds, video.times.tolist(), per_kind=3)
                if any(qa.kind == wanted for qa in found):
                    break
            if not found:
                continue
            weights = [self.curriculum.weight(qa.kind) for qa in found]
            order = sorted(
                range(len(found)), key=lambda i: -(rng.random() ** (1 / weights[i]))
            )  # weighted sampling without replacement
            asked.append([found[i] for i in order[:QUESTIONS_PER_VIDEO]])
            videos.append(video)
        packed = pack(videos, asked, self.prompt, rng, max_gap=256)
        features = torch.stack(
            [torch.from_numpy(self.library.features[v.frames]) for v in videos]
        ).to(torch.bfloat16)
        return videos, packed, features

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
            total = total + guided * off
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
        """Train until the minutes are used up."""
        average, clock = 0.0, time.time()
        while self.seconds < self.args.minutes * 60:
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
                    f"astray {self.astray:.2f} {levels}",
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
        for level in (2, 4, 6):
            print(f"held-out at {LEVELS[level]} frames {self.evaluate(level, 30)}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, help="default: OUT/encoder")
    parser.add_argument("--library", type=Path, help="default: OUT/library")
    parser.add_argument("--scenes", type=int, default=8_000)
    parser.add_argument("--minutes", type=float, default=70, help="of the third part")
    parser.add_argument("--kinds", nargs="+", default=FIRST_KINDS, choices=KINDS)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--keep", type=float, default=0.4, help="share of patches trained on")
    parser.add_argument("--guide", type=float, default=0.1, help="weight of the evidence loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: all")
    parser.add_argument("--processes", type=int, default=2, help="for rendering")
    parser.add_argument("--override", default="{}", help="JSON of config fields, for ablations")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.encoder = args.encoder or args.out / "encoder"
    args.library = args.library or args.out / "library"
    if args.threads:
        torch.set_num_threads(args.threads)
    if not (args.encoder / "config.json").exists():
        command = [sys.executable, "-m", "model.training.encoder", "--out", str(args.encoder)]
        subprocess.run([*command, "--seed", str(args.seed)], check=True)
    Trainer(args).run()


if __name__ == "__main__":
    main()
