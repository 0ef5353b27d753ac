"""Single frames of the made-up world with questions, for the small distillation experiment."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoProcessor

from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training.encoder import normalise
from model.training.frames import render_frame, scene_shape
from model.training.library import Video
from model.training.packing import Packed, PromptIds, pack
from model.training.world import sample_scene, seeded
from model.training.world_parts import Placed
from model.training.world_questions import QA, questions

KINDS = ("exists", "where", "colour")
SEED = 9_000_000  # scenes apart from those of the bundled model's training
HELD_OUT = 600  # scenes for measuring
ENCODED = 64  # frames at a time

Asked = list[list[QA]]


class Frames:
    """One moment of each of many scenes, encoded once."""

    def __init__(
        self, crosslmm: CrossLMMForConditionalGeneration, source: Path, folder: Path, scenes: int
    ) -> None:
        config = crosslmm.config
        self.prompt = PromptIds(AutoProcessor.from_pretrained(source))
        self.videos: list[Video] = []
        pictures, side = [], config.vision_config.image_size
        for i in range(scenes + HELD_OUT):
            rng = seeded("distill", SEED + i)
            shape = scene_shape(rng)
            scene = sample_scene(rng, aspect=shape[0] / shape[1])
            t = rng.uniform(0, scene.duration * 0.999)
            if scene.sign is not None and rng.random() < 0.85:
                t = rng.uniform(scene.sign.start, scene.sign.end * 0.999)
            placed = (Placed(scene, -t),)
            self.videos.append(Video(placed, np.zeros(1), np.array([i])))
            pictures.append(None if folder.exists() else render_frame(scene, t, shape, side, rng))
        file = folder / "features.npy"
        if not file.exists():
            folder.mkdir(parents=True)
            np.save(file, _encode(crosslmm, np.stack(pictures)))
        self.features = np.load(file, mmap_mode="r")
        self.parts = {"held_out": range(HELD_OUT), "train": range(HELD_OUT, len(self.videos))}

    def draw(
        self, part: str, seed: int, count: int, each: int
    ) -> Iterator[tuple[list[Video], Asked]]:
        """Ever new batches of `count` frames with up to `each` questions, the same for a seed."""
        rng = random.Random(seed)
        while True:
            videos: list[Video] = []
            asked: Asked = []
            while len(videos) < count:
                video = self.videos[rng.choice(self.parts[part])]
                found = questions(video.scenes, rng, KINDS, [0.0], per_kind=2)
                if found:
                    videos.append(video)
                    asked.append(rng.sample(found, min(each, len(found))))
            yield videos, asked

    def layout(self, videos: list[Video], asked: Asked, per_frame: int, extra: int = 0) -> Packed:
        """Prompts with `per_frame` tokens of each frame."""
        return pack(videos, asked, self.prompt, random.Random(0), 0, per_frame, extra)

    def batch(self, videos: list[Video], asked: Asked, grid: int) -> dict:
        """What the losses take: the student's layout with one token a frame, and the teacher's."""
        features = np.stack([self.features[video.frames] for video in videos])
        batch = {"video_features": torch.from_numpy(features).to(torch.bfloat16)}
        for prefix, per_frame in (("", 1), ("teacher_", grid * grid)):
            packed = self.layout(videos, asked, per_frame)
            for name in ("input_ids", "attention_mask", "position_ids", "labels"):
                batch[prefix + name] = getattr(packed, name)
            batch |= {"frame_times": packed.frame_times, f"{prefix}packed": packed}
        return batch


@torch.inference_mode()
def _encode(crosslmm: CrossLMMForConditionalGeneration, pictures: np.ndarray) -> np.ndarray:
    parts = []
    for start in range(0, len(pictures), ENCODED):
        with torch.autocast("cpu", torch.bfloat16):
            found = crosslmm.model.encode_frames(normalise(pictures[start : start + ENCODED]))
        parts.append(found.to(torch.float16).numpy())
    return np.concatenate(parts)
