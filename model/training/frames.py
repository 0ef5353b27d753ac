"""Frames for training: scenes rendered as a model will see them after a real codec and a resize.

Rendering and a JPEG round trip at a random quality stand in for the video codec here, because they
are quick; evaluation reads real video files.
"""

from __future__ import annotations

import io
import random

import numpy as np
from PIL import Image

from model.training.world_parts import Scene
from model.training.world_render import render_scene

# Picture shapes (width, height) at which scenes are drawn, most of them 16:9 as videos are.
SHAPES = ((256, 144), (256, 144), (256, 144), (320, 180), (224, 126), (208, 156), (160, 160))


def scene_shape(rng: random.Random) -> tuple[int, int]:
    """Width and height in pixels for one scene's frames."""
    return rng.choice(SHAPES)


def render_frame(
    scene: Scene, t: float, shape: tuple[int, int], side: int, rng: random.Random
) -> np.ndarray:
    """One frame, squashed to (side, side, 3) uint8, usually with compression noise."""
    image = Image.fromarray(render_scene(scene, t, *shape))
    if rng.random() < 0.8:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(25, 90))
        image = Image.open(buffer)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
