"""Worlds as real video files, written frame by frame with PyAV."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from model.training.world_parts import Placed, World
from model.training.world_render import render_scene

MOTION_RATE = 12.5  # how many times a second moving things are drawn anew
AUDIO_RATE = 48_000
DEFAULT_OPTIONS: dict[str, dict[str, str]] = {
    "libx264": {"preset": "veryfast", "crf": "25"},
    "libx265": {"preset": "ultrafast", "crf": "27", "x265-params": "log-level=error"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "34", "b": "0"},
    "libsvtav1": {"preset": "10", "crf": "36"},
    "libaom-av1": {"cpu-used": "8", "usage": "realtime", "crf": "34"},
}
# SMPTE 170M: what decoders take for granted when they ignore the tag.
_SMPTE_170M = 6


def write_video(
    world: World,
    path: str | Path,
    *,
    width: int = 1280,
    height: int = 720,
    frame_rate: float = 25,
    codec: str = "libx264",
    crf: int | None = None,
    gop: int | None = None,
    options: Mapping[str, str] | None = None,
    audio: bool = False,
) -> None:
    """Write a world as a video file; the container follows from the path's ending.

    Frame k shows the world at exactly k / `frame_rate` seconds. `crf` is the codec's quality scale,
    `gop` the most frames between two key frames, `options` go to the encoder, and `audio` adds a
    quiet tone. Memory use does not depend on the duration.
    """
    if width % 2 or height % 2:
        raise ValueError(f"width and height must be even for 4:2:0 video, not {width}x{height}")
    rate = Fraction(frame_rate).limit_denominator(1001)
    settings = {**DEFAULT_OPTIONS.get(codec, {}), **(options or {})}
    if crf is not None:
        settings["crf"] = str(crf)
    path = Path(path)
    flags = {"movflags": "+faststart"} if path.suffix in (".mp4", ".mov") else {}
    with av.open(str(path), "w", options=flags) as container:
        stream = container.add_stream(codec, rate=rate, options=settings)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _SMPTE_170M
        context.color_range = ColorRange.MPEG
        if gop is not None:
            context.gop_size = gop
        tone, sound = iter(()), None
        if audio:
            sound = container.add_stream(_sound_codec(path), rate=AUDIO_RATE)
            tone = _tone(world.duration)
        number = max(round(world.duration * rate), 1)
        for index, frame in enumerate(_frames(world, number, rate, width, height)):
            frame.pts = index
            frame.time_base = 1 / rate
            container.mux(stream.encode(frame))
            # A second of sound with each second of pictures, so that a player can read in order.
            if sound is not None and index % math.ceil(rate) == 0:
                for piece in itertools.islice(tone, 1):
                    container.mux(sound.encode(piece))
        container.mux(stream.encode(None))
        if sound is not None:
            for piece in itertools.chain(tone, (None,)):
                container.mux(sound.encode(piece))
    ordinary_priority()


def ordinary_priority() -> None:
    """Undo what SVT-AV1 does as root: it makes the whole process a real-time one.

    All its later threads and children would be too, and would starve everything else.
    """
    if hasattr(os, "sched_setscheduler"):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _frames(
    world: World, number: int, rate: Fraction, width: int, height: int
) -> Iterator[av.VideoFrame]:
    """The frames in order; the same object again while nothing in the picture changes."""
    key, frame = None, None
    for index in range(number):
        t = float(index / rate)
        placed = world.at(t)
        now = _moment(placed, t)
        if frame is None or now != key:
            key = now
            picture = render_scene(placed.scene, t - placed.start, width, height)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU601,
                dst_color_range=ColorRange.MPEG,
            )
        yield frame


def _moment(placed: Placed, t: float) -> tuple[object, ...]:
    """What the picture depends on: equal at two times when the pictures may be the same."""
    scene, local = placed.scene, t - placed.start
    visible = tuple(actor.visible(local) for actor in scene.actors)
    sign = scene.sign is not None and scene.sign.visible(local)
    moving = any(scene.background.pan) or any(
        actor.moves and shown for actor, shown in zip(scene.actors, visible, strict=True)
    )
    return placed.start, visible, sign, int(local * MOTION_RATE) if moving else 0


def _sound_codec(path: Path) -> str:
    return "libopus" if path.suffix == ".webm" else "aac"


def _tone(duration: float) -> Iterator[av.AudioFrame]:
    """A quiet 220 Hz tone as long as the video, a second at a time."""
    total = round(duration * AUDIO_RATE)
    for start in range(0, total, AUDIO_RATE):
        moments = np.arange(start, min(start + AUDIO_RATE, total)) / AUDIO_RATE
        samples = (0.02 * np.sin(2 * np.pi * 220 * moments)).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="flt", layout="mono")
        frame.sample_rate, frame.pts = AUDIO_RATE, start
        frame.time_base = Fraction(1, AUDIO_RATE)
        yield frame
