"""Pretrain the bundled model's image encoder: dense labels for every patch of single frames.

`python -m model.training.encoder --out runs/encoder` renders frames, trains a SigLIP-class encoder
to name the object, sign colour and sign text under each patch, the object that a sign stands beside
and how many of its kind there are, and saves it with `save_pretrained`.
Resumes from its last checkpoint when run again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from model.training.frames import render_frame, scene_shape
from model.training.outputs import Outputs
from model.training.sign_crops import SignPainter
from model.training.world import sample_scene, seeded
from model.training.world_facts import (
    COLOUR_IDS,
    LONGEST_SIGN,
    NOUN_IDS,
    SIGN_CHARACTERS,
    own_characters,
    patch_labels,
)
from model.training.world_parts import MAX_COUNT

TRAIN_SEED = 1_000_000  # held-out evaluation uses smaller seeds
SIGN_SHARE = 0.85  # reading is the hard part: scenes without a sign are mostly drawn again
CROP = 7  # patches; holds the widest sign
PAINTED_SHARE = 0.8  # of crops that get a sign painted anew
# Object, sign colour, the sign's text (all of it on each of its patches), and the one character
# that lies on the patch itself: that one is learnt first and helps to read the rest. Then what
# needs the whole frame: how many of an object there are. The object of a sign's patches is the one
# beside it, so "the sign next to the cat" is found in one step, as the cat is.
CLASSES = (
    (len(NOUN_IDS) + 1, len(COLOUR_IDS) + 1)
    + (len(SIGN_CHARACTERS) + 1,) * (LONGEST_SIGN + 1)
    + (MAX_COUNT + 1,)
)
COUNT = len(CLASSES) - 1
MIDDLE = COUNT + 1  # where an object's middle is: asked of an earlier layer, to count them later
MIDDLE_LAYER = 1
FLOCKS = 0.4  # of the frames show several of a kind
CROP_EVERY = 3  # steps, once whole frames are trained on
LOOK = 0.3  # weight of the loss on signs' attention to what they stand beside


def encoder_config(side: int = 112) -> SiglipVisionConfig:
    """The bundled encoder: 8 x 8 patches of a 112 x 112 frame, 14 x 14 tokens."""
    return SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        patch_size=8,
        image_size=side,
        vision_use_head=False,
        hidden_act="gelu_pytorch_tanh",
    )


def grid_waves(grid: int, width: int) -> torch.Tensor:
    """Position embeddings to start from, (grid * grid, width): waves along rows and columns.

    Strokes cross patch borders, so the first thing to learn is to look at the neighbour; from small
    random positions that takes thousands of steps.
    """
    waves = math.pi * 2.0 ** (-torch.arange(width // 4) * 16 / width)
    angles = torch.arange(grid)[:, None] * waves
    axis = torch.cat((angles.sin(), angles.cos()), dim=1)  # (grid, width / 2)
    rows, columns = (
        axis[:, None].expand(-1, grid, -1),
        axis[None].expand(grid, -1, -1),
    )
    return 0.5 * torch.cat((rows, columns), dim=-1).flatten(0, 1)


class DenseEncoder(nn.Module):
    """An encoder and one linear head per kind of label; the heads are thrown away afterwards."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.encoder = SiglipVisionModel(config)
        table = grid_waves(config.image_size // config.patch_size, config.hidden_size)
        self.encoder.embeddings.position_embedding.weight.data.copy_(table)
        self.head = nn.Linear(config.hidden_size, sum(CLASSES))
        self.middle = nn.Linear(config.hidden_size, 2)
        self.looks, self.hidden = Outputs(), Outputs()
        for i in (-2, -1):
            self.looks.watch(i, self.encoder.encoder.layers[i].self_attn)
        self.hidden.watch("middle", self.encoder.encoder.layers[MIDDLE_LAYER])

    def forward(self, pixels: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """Pixels (F, 3, S, S) in -1..1 -> logits (F, N, sum of classes).

        For crops, `places` (F, n) are the positions of their patches in the whole frame.
        """
        tower = self.encoder
        if places is None:
            embedded = tower.embeddings(pixels)
        else:
            embedded = tower.embeddings.patch_embedding(pixels).flatten(2).mT
            embedded = embedded + tower.embeddings.position_embedding(places)
        features = tower.encoder(inputs_embeds=embedded).last_hidden_state
        return self.head(F.layer_norm(features, features.shape[-1:]))


def normalise(frames: np.ndarray | torch.Tensor) -> torch.Tensor:
    """(F, S, S, 3) uint8 -> (F, 3, S, S) float in -1..1, as SigLIP's processor does."""
    return torch.as_tensor(frames).permute(0, 3, 1, 2).float() / 127.5 - 1


def render_examples(args: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Frames and labels of `count` scenes from `seed` on, one moment of each."""
    seed, count, side, grid = args
    frames = np.empty((count, side, side, 3), np.uint8)
    labels = np.empty((count, grid * grid, MIDDLE + 1), np.uint8)
    for i in range(count):
        rng = seeded("encoder", seed + i)
        shape = scene_shape(rng)
        kind = "flock" if rng.random() < FLOCKS else None
        scene = sample_scene(rng, kind=kind, aspect=shape[0] / shape[1])
        while kind is None and scene.sign is None and rng.random() < SIGN_SHARE:
            scene = sample_scene(rng, aspect=shape[0] / shape[1])
        t = rng.uniform(0, scene.duration * 0.999)
        if scene.sign is not None and rng.random() < 0.85:
            t = rng.uniform(scene.sign.start, scene.sign.end * 0.999)
        frames[i] = render_frame(scene, t, shape, side, rng)
        truth = patch_labels(scene, t, grid)
        own = own_characters(scene.sign, truth["sign_chars"])
        nouns = np.where(truth["sign_colours"] > 0, truth["owners"], truth["nouns"])
        kinds = (nouns, truth["sign_colours"], truth["sign_chars"], own)
        stacked = np.dstack([*kinds, truth["counts"], truth["middles"]])
        labels[i] = stacked.reshape(grid * grid, -1)
    return frames, labels


def mirrored(
    frames: np.ndarray, labels: np.ndarray, rng: random.Random
) -> tuple[np.ndarray, np.ndarray]:
    """Half of the frames without a sign, chosen anew each time, left to right."""
    frames, labels = frames.copy(), labels.copy()
    grid = int(labels.shape[1] ** 0.5)
    for frame, label in zip(frames, labels, strict=True):
        if not label[:, 1].any() and rng.random() < 0.5:
            frame[:] = frame[:, ::-1].copy()
            cells = label.reshape(grid, grid, -1)
            label[:] = cells[:, ::-1].reshape(grid * grid, -1)
    return frames, labels


def crop(
    frames: np.ndarray,
    labels: np.ndarray,
    rng: random.Random,
    patch: int,
    painter: SignPainter | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut `CROP` x `CROP` patches out of each frame, around its sign where it has one.

    Reading takes by far the most steps to learn, and signs cover 4 % of the patches: on crops a
    step of the same length sees four times as many. A painter puts new signs on most crops.
    """
    grid = int(labels.shape[1] ** 0.5)
    labels = labels.reshape(len(labels), grid, grid, -1)
    pixels, truth, places = [], [], []
    for frame, label in zip(frames, labels, strict=True):
        corner = None
        if painter is not None and rng.random() < PAINTED_SHARE:
            corner = _free_corner(label, rng)
        fresh = corner is not None
        top, left = corner if fresh else _marked_corner(label, rng)
        rows, columns = slice(top, top + CROP), slice(left, left + CROP)
        piece = frame[top * patch : (top + CROP) * patch, left * patch : (left + CROP) * patch]
        known = label[rows, columns].copy()
        known[known[..., 1] > 0, 0] = 0  # a piece may not show what its sign stands beside,
        known[..., COUNT:] = 0  # nor all there is
        if fresh:
            piece, known = painter.paint(piece, known)
        pixels.append(piece)
        truth.append(known.reshape(CROP * CROP, -1))
        places.append((np.arange(grid)[rows, None] * grid + np.arange(grid)[columns]).ravel())
    return np.stack(pixels), np.stack(truth), np.stack(places)


def _free_corner(label: np.ndarray, rng: random.Random, tries: int = 6) -> tuple[int, int] | None:
    """Top and left of a random crop that shows nothing of a sign, if a few tries find one."""
    for _ in range(tries):
        top, left = (rng.randint(0, len(label) - CROP) for _ in range(2))
        if not label[top : top + CROP, left : left + CROP, 1].any():
            return top, left
    return None


def _marked_corner(label: np.ndarray, rng: random.Random) -> tuple[int, int]:
    """Top and left of a random crop that holds the sign, or else all objects if they fit."""
    marked = np.argwhere(label[..., 1] > 0)
    if not len(marked):
        marked = np.argwhere(label[..., 0] > 0)
    low, high = np.zeros(2, int), np.full(2, len(label) - CROP)
    if len(marked):
        first = np.maximum(marked.max(0) + 1 - CROP, 0)
        last = np.minimum(marked.min(0), len(label) - CROP)
        fits = first <= last
        low, high = np.where(fits, first, low), np.where(fits, last, high)
    return rng.randint(low[0], high[0]), rng.randint(low[1], high[1])


def losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """Mean loss over kinds of label and each kind's accuracy on labelled patches."""
    total, accuracy = torch.zeros(()), []
    on_sign = labels[..., 1] > 0
    for kind, part in enumerate(logits.split(CLASSES, dim=-1)):
        truth = labels[..., kind].long()
        known = truth > 0
        if kind == 0:  # what a sign stands beside is not always clear
            asked = (known, ~known & ~on_sign)
        elif kind == 1:  # most patches show nothing: something and nothing count the same
            asked = (known, ~known)
        elif kind == COUNT:  # most objects are alone
            asked = (truth == 1, truth > 1)
        else:  # characters on signs, where 0 is "no further character"
            asked = (on_sign,)
        for chosen in asked:
            if chosen.any():
                total = total + F.cross_entropy(part[chosen].float(), truth[chosen])
        hit = part.argmax(-1) == truth
        accuracy.append(_share(hit, known & ~on_sign if kind == 0 else known))
        if kind == 0:
            owners = _share(hit, known & on_sign)
    return total, [*accuracy, owners]


def _share(hit: torch.Tensor, of: torch.Tensor) -> float:
    return hit[of].float().mean().item() if of.any() else 1.0


def middle_loss(net: DenseEncoder, labels: torch.Tensor) -> torch.Tensor:
    """Which patches of an object are its middle, by an earlier layer: copies are counted by it."""
    known = labels[..., MIDDLE].long()
    if not (known > 0).any():
        return torch.zeros(())
    hidden = net.hidden["middle"].float()
    logits = net.middle(F.layer_norm(hidden, hidden.shape[-1:]))
    weight = torch.tensor([1.0, 4.0])  # there is one middle to several other patches
    return F.cross_entropy(logits[known > 0], known[known > 0] - 1, weight)


def look_loss(looks: Outputs, labels: torch.Tensor) -> torch.Tensor:
    """Mean of -log(share of a sign's attention on the object beside it), in one head of a layer.

    From the labels alone, a thousand steps taught nothing about the owners of signs.
    """
    noun, sign = labels[..., 0].long(), labels[..., 1] > 0
    looking = sign & (noun > 0)
    beside = noun[:, None, :] == noun[:, :, None]  # (F, N, N)
    beside = beside & looking[:, :, None] & ~sign[:, None, :]
    known = beside.any(-1)
    if not known.any():
        return torch.zeros(())
    terms = []
    for _, weights in looks.values():  # (F, H, N, N)
        share = (weights[:, 0].float() * beside).sum(-1)[known]
        terms.append(-(share + 1e-4).log().mean())
    return torch.stack(terms).mean()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=32_000, help="distinct training frames")
    parser.add_argument("--steps", type=int, default=5_600)
    parser.add_argument(
        "--crop-steps", type=int, default=3_200, help="of these, first on crops; then half"
    )
    parser.add_argument("--batch", type=int, default=32, help="frames; four times as many crops")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--start", type=Path, help="checkpoint.pt of an encoder to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="for rendering")
    parser.add_argument("--threads", type=int, default=0, help="for training; 0: all")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    config = encoder_config()
    side, grid = config.image_size, config.image_size // config.patch_size

    started = time.time()
    first = TRAIN_SEED * (args.seed + 1)
    jobs = [(first + i, 500, side, grid) for i in range(0, args.frames, 500)]
    cache = args.out / "frames.npz"
    if cache.exists():
        data = np.load(cache)
        frames, labels = data["frames"], data["labels"]
    else:
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            parts = pool.map(render_examples, jobs, chunksize=1)
        frames, labels = (np.concatenate(x) for x in zip(*parts, strict=True))
        np.savez(cache, frames=frames, labels=labels)
    held_out = render_examples((50_000, 500, side, grid))
    print(f"rendered {len(frames)} frames in {time.time() - started:.0f} s", flush=True)

    net = DenseEncoder(config)
    net.encoder.set_attn_implementation("eager")  # quicker than SDPA for training on a CPU
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.learning_rate, weight_decay=0.05)
    warmup = min(200, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(
            (s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1, s / args.steps)) + 1e-3
        ),
    )
    checkpoint, step = args.out / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        step = saved["step"]
    elif args.start is not None:
        net.load_state_dict(torch.load(args.start, weights_only=True)["net"])
    order = random.Random(args.seed + step)
    painter = SignPainter(order, side, config.patch_size)
    clock = time.time()
    while step < args.steps:
        crops = step < args.crop_steps or step % CROP_EVERY == 0
        batch = args.batch * (4 if crops else 1)
        chosen = np.array([order.randrange(len(frames)) for _ in range(batch)])
        net.train()
        images, truth, places = frames[chosen], labels[chosen], None
        if crops:
            images, truth, places = crop(images, truth, order, config.patch_size, painter)
            places = torch.from_numpy(places)
        else:
            images, truth = mirrored(images, truth, order)
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(normalise(images), places)
        loss, _ = losses(logits, torch.from_numpy(truth))
        loss = loss + LOOK * look_loss(net.looks, torch.from_numpy(truth))
        loss = loss + middle_loss(net, torch.from_numpy(truth))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        step += 1
        if step % 100 == 0 or step == args.steps:
            report = evaluate(net, held_out)
            print(
                f"step {step} loss {loss.item():.3f} held-out {report} "
                f"{(time.time() - clock):.0f} s",
                flush=True,
            )
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "schedule": schedule.state_dict(), "step": step}, checkpoint)
    net.encoder.save_pretrained(args.out)
    report["seconds"] = round(time.time() - started)
    (args.out / "report.json").write_text(json.dumps(report, indent=1))


@torch.no_grad()
def evaluate(net: DenseEncoder, held_out: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """Accuracy on patches of objects and signs of frames that training never saw."""
    net.eval()
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.cat([net(normalise(part)) for part in np.array_split(held_out[0], 10)])
    _, accuracy = losses(logits, torch.from_numpy(held_out[1]))
    return {
        "object": round(accuracy[0], 4),
        "colour": round(accuracy[1], 4),
        "text": round(float(np.mean(accuracy[2 : COUNT - 1])), 4),
        "character": round(accuracy[COUNT - 1], 4),
        "count": round(accuracy[COUNT], 4),
        "beside": round(accuracy[-1], 4),
    }


if __name__ == "__main__":
    main()
