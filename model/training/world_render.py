"""Pictures of the procedural world, with Pillow.

A frame is a cached background with cached sprites pasted on it, so that many hundred small frames a
second can be made on one core. Everything that belongs to an object or a sign, its shadow too, lies
inside its box.

Objects are drawn with Noto Color Emoji (SIL Open Font License 1.1), which Debian has in the package
fonts-noto-color-emoji. The lettering is the font that Pillow brings along.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from model.training.world_parts import (
    NOUNS,
    SIGN_COLOURS,
    Background,
    Box,
    Distractor,
    Scene,
    World,
)

EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_SIZE = 109  # the only size this bitmap font has
LIGHT_TEXT, DARK_TEXT = (252, 252, 250), (20, 20, 24)


def render(world: World, t: float, width: int, height: int) -> np.ndarray:
    """The picture of a world at second `t`, uint8 (height, width, 3)."""
    placed = world.at(t)
    return render_scene(placed.scene, t - placed.start, width, height)


def render_scene(scene: Scene, t: float, width: int, height: int) -> np.ndarray:
    """The picture of a scene at its local time `t`, uint8 (height, width, 3).

    Boxes are fractions of the picture, so another aspect ratio than the scene's own stretches it.
    """
    image = _backdrop(scene, t, width, height)
    for actor in scene.actors:
        if actor.visible(t):
            left, top, size = _pixels(actor.box(t), width, height)
            sprite = _actor_sprite(actor.noun, size)
            image.paste(sprite, (left, top), sprite)
    if scene.sign is not None and scene.sign.visible(t):
        left, top, size = _pixels(scene.sign.box, width, height)
        sprite = _sign_sprite(scene.sign.text, scene.sign.colour, size)
        image.paste(sprite, (left, top), sprite)
    return np.array(image)


def _pixels(box: Box, width: int, height: int) -> tuple[int, int, tuple[int, int]]:
    """Left, top and size in pixels; the size does not change while a box moves."""
    size = (
        max(round((box[2] - box[0]) * width), 1),
        max(round((box[3] - box[1]) * height), 1),
    )
    return round(box[0] * width), round(box[1] * height), size


# Backgrounds.


def _backdrop(scene: Scene, t: float, width: int, height: int) -> Image.Image:
    """A fresh copy of the background at local time `t`, distractors on it."""
    pan_x, pan_y = scene.background.pan
    canvas = _canvas(scene.background, scene.distractors, width, height)
    if not pan_x and not pan_y:
        return canvas.copy()
    share = min(max(t / scene.duration, 0.0), 1.0)
    left = round(abs(pan_x) * width * (share if pan_x > 0 else 1 - share))
    top = round(abs(pan_y) * height * (share if pan_y > 0 else 1 - share))
    image = canvas.crop((left, top, left + width, top + height))
    _draw_distractors(image, scene.distractors)
    return image


@lru_cache(maxsize=24)
def _canvas(
    background: Background, distractors: tuple[Distractor, ...], width: int, height: int
) -> Image.Image:
    """The background, larger than the picture where it slides."""
    pan_x, pan_y = background.pan
    full = (
        width + math.ceil(abs(pan_x) * width) + 1 if pan_x else width,
        height + math.ceil(abs(pan_y) * height) + 1 if pan_y else height,
    )
    image = Image.fromarray(_paint(background, *full, width, height))
    if not pan_x and not pan_y:
        _draw_distractors(image, distractors)
    return image


def _paint(
    background: Background, full_width: int, full_height: int, width: int, height: int
) -> np.ndarray:
    first, second, third = (np.array(c, np.float32) for c in background.colours)
    if background.kind == "plain":
        return np.broadcast_to(first.astype(np.uint8), (full_height, full_width, 3)).copy()
    if background.kind == "noise":
        return _noise(background, full_width, full_height)
    # Coordinates in picture heights of a 16:9 picture, whatever shape is rendered.
    x = (np.arange(full_width, dtype=np.float32) + 0.5) / width * (16 / 9)
    y = ((np.arange(full_height, dtype=np.float32) + 0.5) / height)[:, None]
    along = x * math.cos(background.angle) + y * math.sin(background.angle)
    size = background.scale
    if background.kind == "gradient":
        share = (along - along.min()) / max(float(np.ptp(along)), 1e-6)
        return _mix(second, third, share)
    # Edges one pixel soft: hard ones shimmer after scaling and cost a codec dearly.
    soft = size * height
    if background.kind == "stripes":
        wave = np.abs((along / size) % 2 - 1) - 0.5
        share = np.clip(wave * soft + 0.5, 0, 1)
    elif background.kind == "checks":
        wave = (np.abs((x / size) % 2 - 1) - 0.5, np.abs((y / size) % 2 - 1) - 0.5)
        in_x, in_y = (np.clip(part * soft + 0.5, 0, 1) for part in wave)
        share = in_x * (1 - in_y) + in_y * (1 - in_x)
    else:
        column = x / size - 0.5 * (np.floor(y / size) % 2)
        distance = np.hypot(column % 1 - 0.5, (y / size) % 1 - 0.5)
        share = np.clip((0.3 - distance) * soft + 0.5, 0, 1)
    return _mix(first, second, share)


def _mix(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    return (first + (second - first) * share[..., None] + 0.5).astype(np.uint8)


def _noise(background: Background, full_width: int, full_height: int) -> np.ndarray:
    """Clouds: three colours mixed by smooth noise of two sizes."""
    rng = np.random.default_rng(background.seed)
    shares = []
    for cells in (round(0.8 / background.scale), round(2.4 / background.scale)):
        grid = rng.integers(0, 256, (max(cells, 3), max(cells * 16 // 9, 3)), dtype=np.uint8)
        cloud = Image.fromarray(grid).resize((full_width, full_height), Image.Resampling.BICUBIC)
        shares.append(np.asarray(cloud, np.float32) / 255)
    coarse, fine = shares
    first, second, third = (np.array(c, np.float32) for c in background.colours)
    mixed = first + (second - first) * coarse[..., None]
    mixed += (third - mixed) * (0.6 * fine * fine)[..., None]
    return (mixed + 0.5).astype(np.uint8)


def _draw_distractors(image: Image.Image, distractors: tuple[Distractor, ...]) -> None:
    for distractor in distractors:
        left, top, size = _pixels(distractor.box, *image.size)
        mask = _shape_mask(distractor.shape, size)
        image.paste(distractor.colour, (left, top), mask)


@lru_cache(maxsize=128)
def _shape_mask(shape: str, size: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", (96, 96))
    draw = ImageDraw.Draw(mask)
    if shape == "disc":
        draw.ellipse((2, 2, 93, 93), fill=200)
    elif shape == "ring":
        draw.ellipse((2, 2, 93, 93), outline=210, width=16)
    elif shape == "triangle":
        draw.polygon(((48, 4), (92, 88), (4, 88)), fill=200)
    elif shape == "diamond":
        draw.polygon(((48, 2), (93, 48), (48, 93), (2, 48)), fill=200)
    else:
        draw.rounded_rectangle((2, 34, 93, 62), radius=14, fill=200)
    return mask.resize(size, Image.Resampling.BOX if min(size) < 96 else Image.Resampling.BICUBIC)


# Objects.


@lru_cache(maxsize=1)
def _emoji_font() -> ImageFont.FreeTypeFont:
    if not EMOJI_FONT.is_file():
        raise FileNotFoundError(
            f"the font Noto Color Emoji is needed at {EMOJI_FONT} and is not there; "
            "install Debian's package fonts-noto-color-emoji (apt-get install "
            "fonts-noto-color-emoji)"
        )
    return ImageFont.truetype(str(EMOJI_FONT), EMOJI_SIZE)


@lru_cache(maxsize=len(NOUNS))
def _emoji(noun: str) -> Image.Image:
    """The object and its soft shadow on a clear square of 136 pixels."""
    glyph = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(glyph).text((12, 12), NOUNS[noun], font=_emoji_font(), embedded_color=True)
    frame = glyph.getbbox()
    if frame is None:
        raise ValueError(f"the emoji font has no picture for {noun!r} ({NOUNS[noun]!r})")
    glyph = glyph.crop(frame)
    scale = min(132 / glyph.width, 126 / glyph.height)
    glyph = glyph.resize(
        (round(glyph.width * scale), round(glyph.height * scale)), Image.Resampling.LANCZOS
    )
    square = Image.new("RGBA", (136, 136))
    shade = Image.new("L", square.size)
    half = glyph.width * 0.42
    ImageDraw.Draw(shade).ellipse((68 - half, 116, 68 + half, 134), fill=110)
    shade = shade.filter(ImageFilter.GaussianBlur(3))
    square.putalpha(shade)
    square.alpha_composite(glyph, ((136 - glyph.width) // 2, 129 - glyph.height))
    return square


@lru_cache(maxsize=512)
def _actor_sprite(noun: str, size: tuple[int, int]) -> Image.Image:
    return _emoji(noun).resize(size, Image.Resampling.LANCZOS)


# Signs.


@lru_cache(maxsize=256)
def _lettering(text: str) -> Image.Image:
    """The text as a mask, cut to its ink."""
    font = ImageFont.load_default(120)
    mask = Image.new("L", (140 * len(text) + 40, 200))
    ImageDraw.Draw(mask).text((20, 20), text, font=font, fill=255, stroke_width=5)
    return mask.crop(mask.getbbox())


def paint_sign(text: str, colour: str, size: tuple[int, int]) -> Image.Image:
    """A plate with a thin rim, its text as large as it goes, and a shadow along its lower edge."""
    fill = SIGN_COLOURS[colour]
    ink = DARK_TEXT if colour in ("white", "yellow", "orange") else LIGHT_TEXT
    # Painted large and reduced, so that corners and letters are smooth at any size.
    zoom = 4 if size[0] < 200 else 2
    wide, high = size[0] * zoom, size[1] * zoom
    plate = Image.new("RGBA", (wide, high))
    draw = ImageDraw.Draw(plate)
    radius, drop = high * 0.16, max(high * 0.04, zoom)
    draw.rounded_rectangle((0, drop, wide - 1, high - 1), radius, fill=(0, 0, 0, 90))
    draw.rounded_rectangle((0, 0, wide - 1, high - 1 - drop), radius, fill=(*ink, 255))
    rim = max(high * 0.035, zoom * 0.75)
    inner = (rim, rim, wide - 1 - rim, high - 1 - drop - rim)
    draw.rounded_rectangle(inner, radius - rim, fill=(*fill, 255))
    letters = _lettering(text)
    room_x, room_y = wide * 0.86, (high - drop) * 0.7
    letters = letters.resize((round(room_x), round(room_y)), Image.Resampling.LANCZOS)
    place = ((wide - letters.width) // 2, round((high - drop - letters.height) / 2))
    plate.paste((*ink, 255), place, letters)
    return plate.resize(size, Image.Resampling.BOX)


_sign_sprite = lru_cache(maxsize=256)(paint_sign)
