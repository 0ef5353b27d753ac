"""Small real videos for the tests. Every picture shows its own number, so its time can be checked.

The upper quarter of each picture is a code of 16 black or white blocks, and below them the same
blocks inverted. `read_number` reads it back from any upright, possibly scaled picture.
"""

from __future__ import annotations

import os
import struct
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Literal

import av
import numpy as np

from model.training.world_video import ordinary_priority

os.environ.setdefault("SVT_LOG", "1")  # errors only, from the AV1 encoder
BITS = 16
TIME_BASE = Fraction(1, 12800)
Pattern = Literal["plain", "moving", "texture"]

# The quickest useful settings of each encoder.
OPTIONS = {
    "libx264": {"preset": "veryfast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:bframes=3:b-adapt=0"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"preset": "12"},
    "mpeg4": {},
}


def draw(number: int, size: tuple[int, int], pattern: Pattern = "moving") -> np.ndarray:
    """(height, width, 3) uint8: picture `number` of a test video."""
    width, height = size
    if pattern == "texture":
        texture, mask = _texture(size)
        image = np.roll(texture, (number, number * 2), (0, 1))
        front = np.roll(texture[::-1], (number, -number), (0, 1))
        cover = np.roll(mask, number, 1)[..., None]
        image = np.where(cover, front, image)
    else:
        image = np.empty((height, width, 3), np.uint8)
        image[:] = (200, 60, 40)
        if pattern == "moving":
            image[..., 2] = np.linspace(0, 255, width).astype(np.uint8)
            left = (number * 4) % width
            image[height * 5 // 8 : height * 7 // 8, left : left + width // 8] = (20, 230, 90)
    row = height // 8
    bits = (number >> np.arange(BITS)) & 1
    columns = np.arange(width) * BITS // width
    image[:row] = (bits * 255)[columns][None, :, None]
    image[row : 2 * row] = (255 - bits * 255)[columns][None, :, None]
    return image


def read_number(image: np.ndarray) -> int:
    """The number that `draw` wrote into an upright picture; AssertionError if it is unreadable."""
    height, width = image.shape[:2]
    row = height // 8
    centres = ((np.arange(BITS) + 0.5) * width / BITS).astype(int)
    grey = image.astype(float).mean(2)
    upper, lower = grey[row // 2, centres], grey[row + row // 2, centres]
    assert np.all(np.abs(upper - lower) > 90), f"no readable number: {upper} over {lower}"
    return int(((upper > lower).astype(int) << np.arange(BITS)).sum())


@cache
def _texture(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Blobs of several sizes and a mask of big ones, for the bit rate of filmed video."""
    width, height = size
    random = np.random.default_rng(0)
    total = np.zeros((height, width, 3))
    for cell in (8, 16, 64):
        coarse = random.uniform(-1, 1, (-(-height // cell), -(-width // cell), 3))
        layer = np.kron(coarse, np.ones((cell, cell, 1)))[:height, :width]
        total += layer * cell**0.5
    total = (total - total.min()) / (total.max() - total.min())
    return (total * 255).astype(np.uint8), layer[..., 0] > 0.5


def frame_times(duration: float, fps: float, vfr: bool) -> np.ndarray:
    """Presentation times in seconds. Variable: gaps of 0.5 to 3 frames, and one of a second."""
    count = round(duration * fps)
    if not vfr:
        return np.arange(count) / fps
    gaps = np.random.default_rng(1).choice([0.5, 1.0, 1.0, 3.0], count) / fps
    gaps[count // 2] = 1.0
    return np.concatenate([[0.0], np.cumsum(gaps)[:-1]])


def make_video(
    path: str | Path,
    *,
    codec: str = "libx264",
    duration: float = 4.0,
    fps: float = 25,
    size: tuple[int, int] = (320, 180),
    pattern: Pattern = "moving",
    rotation: int = 0,
    vfr: bool = False,
    gop: int = 250,
    crf: int | None = None,
    start: float = 0.0,
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> np.ndarray:
    """Encode a video; the suffix of `path` chooses the container.

    `size` is that of the upright picture; with `rotation` (degrees clockwise) it is stored turned
    and marked to be turned back. Returns the time of each frame, relative to the first: picture
    number n is to be shown at time n of this array. `start` shifts all of them in the file.
    """
    times = frame_times(duration, fps, vfr)
    stored = size[::-1] if rotation % 180 else size
    settings = {**OPTIONS[codec], **({"crf": str(crf)} if crf is not None else {})}
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream = container.add_stream(
            codec, rate=Fraction(fps).limit_denominator(1001), options=settings | (options or {})
        )
        stream.width, stream.height, stream.pix_fmt = *stored, "yuv420p"
        stream.gop_size = gop
        stream.codec_context.time_base = TIME_BASE
        stream.codec_context.thread_type = "FRAME"  # else x264 cuts each picture into slices
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(-rotation)
        for number, time in enumerate(times):
            image = np.rot90(draw(number, size, pattern), rotation // 90)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = round((time + start) / TIME_BASE), TIME_BASE
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    ordinary_priority()
    return times


def loop_video(source: str | Path, path: str | Path, repeats: int) -> float:
    """Copy the compressed frames of `source` `repeats` times into `path`; returns seconds."""
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream, opaque=True)
        packets = [p for p in reader.demux(stream) if p.size]
        span = max(p.pts + p.duration for p in packets) - min(p.pts for p in packets)
        lead = packets[0].pts - (packets[0].dts if packets[0].dts is not None else packets[0].pts)
        for repeat in range(repeats):
            for packet in packets:
                again = av.Packet(bytes(packet))
                again.pts = packet.pts + repeat * span
                dts = packet.dts if packet.dts is not None else packet.pts - lead
                again.dts = dts + repeat * span
                again.duration, again.time_base = packet.duration, packet.time_base
                again.is_keyframe, again.stream = packet.is_keyframe, copy
                writer.mux(again)
        return float(repeats * span * stream.time_base)


def make_sound(path: str | Path, *, duration: float = 1.0) -> None:
    """A file with a sound stream only."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for start in range(0, round(duration * 16000), 1024):
            wave = np.sin(np.arange(start, start + 1024) * 0.17).astype(np.float32)[None]
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def truncate(source: str | Path, path: str | Path, share: float) -> None:
    """Keep the first `share` of the bytes."""
    data = Path(source).read_bytes()
    Path(path).write_bytes(data[: int(len(data) * share)])


def flip_bits(source: str | Path, path: str | Path, flips: int, seed: int = 0) -> None:
    """Flip single bits in an mp4's media data, leaving its tables whole."""
    data = bytearray(Path(source).read_bytes())
    at = data.index(b"mdat")
    length = struct.unpack(">I", data[at - 4 : at])[0]
    for place in np.random.default_rng(seed).integers(at + 64, at + length - 8, flips):
        data[place] ^= 1 << int(place % 8)
    Path(path).write_bytes(bytes(data))
