"""A library of scenes with the features of their frames, and videos put together from it.

Features of single frames do not depend on their neighbours, so a scene is rendered and encoded once
and used in any number of videos. Scenes are drawn with one frame per unit of time; a video that is
sampled every `s` seconds is the same frames with every time multiplied by `s`.
"""

from __future__ import annotations

import multiprocessing
import pickle
import random
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import SiglipVisionModel

from model.training.encoder import TRAIN_SEED, normalise
from model.training.frames import render_frame, scene_shape
from model.training.world import sample_scene, seeded
from model.training.world_parts import Actor, Placed, Scene, Sign


@dataclass(frozen=True)
class Shot:
    """A scene and where its frames are: local times `phase`, `phase + 1`, ..."""

    scene: Scene
    phase: float
    first: int  # index of its first frame in the library
    count: int
    step: int = 1  # from one frame's index to the next one's

    def backwards(self) -> Shot:
        """The same pictures in the opposite order."""
        return Shot(
            reversed_scene(self.scene),
            self.scene.duration - self.phase - (self.count - 1),
            self.first + self.step * (self.count - 1),
            self.count,
            -self.step,
        )

    def frames(self, start: int, count: int) -> range:
        """Indices in the library of `count` frames from the one of number `start` on."""
        first = self.first + self.step * start
        return range(first, first + self.step * count, self.step)


@dataclass(frozen=True)
class Video:
    """Scenes put one after another, as a sampled video would show them."""

    scenes: tuple[Placed, ...]
    times: np.ndarray  # (T,) seconds
    frames: np.ndarray  # (T,) indices into the library's features


def _render(args: tuple[int, int, int]) -> tuple[list[tuple[Scene, float, int]], np.ndarray]:
    seed, count, side = args
    shots, frames = [], []
    for i in range(seed, seed + count):
        rng = seeded("library", i)
        shape = scene_shape(rng)
        scene = sample_scene(rng, aspect=shape[0] / shape[1])
        phase = rng.random()
        times = np.arange(phase, scene.duration, 1.0)
        quality = rng.getstate()  # one compression level for the whole scene, as in a video
        for t in times:
            rng.setstate(quality)
            frames.append(render_frame(scene, t, shape, side, rng))
        shots.append((scene, phase, len(times)))
    return shots, np.stack(frames)


def render_library(folder: Path, scenes: int, seed: int, side: int, processes: int) -> None:
    """Render `scenes` scenes into `frames.npy` and `shots.pkl`; does nothing when both exist."""
    if (folder / "shots.pkl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    first = TRAIN_SEED * (seed + 1)
    jobs = [(first + i, min(100, scenes - i), side) for i in range(0, scenes, 100)]
    shots: list[Shot] = []
    total = 0
    with (
        multiprocessing.get_context("spawn").Pool(processes) as pool,
        open(folder / "frames.bin", "wb") as file,
    ):
        for part, frames in pool.imap(_render, jobs):
            file.write(frames.tobytes())
            for scene, phase, count in part:
                shots.append(Shot(scene, phase, total, count))
                total += count
    with open(folder / "shots.pkl", "wb") as file:
        pickle.dump(shots, file)


def encode_library(folder: Path, encoder: Path, side: int, processes: int) -> None:
    """Write `features.bin`: (frames, N, Dv) float16 encoder outputs; skipped when it exists."""
    target = folder / "features.bin"
    if target.exists():
        return
    total = (folder / "frames.bin").stat().st_size // (side * side * 3)
    jobs = [(folder, encoder, side, i, min(i + 512, total)) for i in range(0, total, 512)]
    with (
        multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool,
        open(folder / "features.part", "wb") as file,
    ):
        for features in pool.imap(_encode, jobs):
            file.write(features.tobytes())
    (folder / "features.part").rename(target)


@torch.inference_mode()
def _encode(args: tuple[Path, Path, int, int, int]) -> np.ndarray:
    folder, path, side, start, end = args
    encoder = _encoder(path)
    frames = np.memmap(folder / "frames.bin", np.uint8, "r").reshape(-1, side, side, 3)
    parts = []
    for first in range(start, end, 32):
        with torch.autocast("cpu", torch.bfloat16):
            pixels = normalise(np.array(frames[first : min(first + 32, end)]))
            features = encoder.encoder(inputs_embeds=encoder.embeddings(pixels))
        parts.append(features.last_hidden_state.to(torch.float16).numpy())
    return np.concatenate(parts)


@cache
def _encoder(path: Path) -> SiglipVisionModel:
    return SiglipVisionModel.from_pretrained(path, attn_implementation="eager").eval()


class SceneLibrary:
    """Rendered and encoded scenes on disk, and random videos made of them."""

    def __init__(self, folder: Path, tokens: int, width: int) -> None:
        with open(folder / "shots.pkl", "rb") as file:
            self.shots: list[Shot] = pickle.load(file)  # noqa: S301 (our own file)
        self.features = np.memmap(folder / "features.bin", np.float16, "r")
        self.features = self.features.reshape(-1, tokens, width)

    def video(self, rng: random.Random, frames: int, interval: float, start: float) -> Video:
        """A video of `frames` sampled frames, `interval` seconds apart, the first at `start`.

        No object's name is in two of its scenes, as in `make_world`.
        """
        placed: list[Placed] = []
        indices: list[int] = []
        names: set[str] = set()
        while len(indices) < frames:
            shot = rng.choice(self.shots)
            if names & set(shot.scene.nouns):
                continue
            # Which way something moves would otherwise be learnt by heart, scene by scene.
            alone = len(shot.scene.actors) == 1
            if alone and shot.scene.actors[0].moves and rng.random() < 0.5:
                shot = shot.backwards()
            names |= set(shot.scene.nouns)
            skip = 0 if indices else _skip(shot, frames, rng)
            count = min(shot.count - skip, frames - len(indices))
            offset = start + (len(indices) - shot.phase - skip) * interval
            placed.append(Placed(scaled(shot.scene, interval), offset))
            indices += shot.frames(skip, count)
        # A scene ends where the next one starts (phases differ, so by less than one frame).
        ends = [scene.start for scene in placed[1:]] + [start + (frames - 0.5) * interval]
        scenes = tuple(
            Placed(replace(p.scene, duration=end - p.start), p.start)
            for p, end in zip(placed, ends, strict=True)
        )
        times = start + interval * np.arange(frames)
        return Video(scenes, times, np.array(indices))


def _skip(shot: Shot, frames: int, rng: random.Random) -> int:
    """How many frames of its scene a video shorter than that leaves out at the beginning.

    Signs are shown late and briefly: most videos that can show the scene's sign do.
    """
    room = shot.count - frames
    if room <= 0:
        return 0
    sign = shot.scene.sign
    seen = [j for j in range(shot.count) if sign and sign.visible(shot.phase + j)]
    if not seen or rng.random() < 0.2:
        return rng.randint(0, room)
    return min(max(rng.choice(seen) - rng.randrange(frames), 0), room)


def reversed_scene(scene: Scene) -> Scene:
    """The same scene from its end to its beginning; backgrounds' pan is left as it is."""

    def span(part: Actor | Sign) -> dict[str, float]:
        return {"start": scene.duration - part.end, "end": scene.duration - part.start}

    return replace(
        scene,
        actors=tuple(
            replace(a, x0=a.x1, y0=a.y1, x1=a.x0, y1=a.y0, **span(a)) for a in scene.actors
        ),
        sign=scene.sign and replace(scene.sign, **span(scene.sign)),
    )


def scaled(scene: Scene, factor: float) -> Scene:
    """The same scene `factor` times as slow."""
    return replace(
        scene,
        duration=scene.duration * factor,
        actors=tuple(
            replace(actor, start=actor.start * factor, end=actor.end * factor)
            for actor in scene.actors
        ),
        sign=scene.sign
        and replace(scene.sign, start=scene.sign.start * factor, end=scene.sign.end * factor),
    )
