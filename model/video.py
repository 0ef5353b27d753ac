"""A video file as input: check it, choose times, decode the frames of those times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import numpy as np

from model.types import InputError, Stopped, StopCheck, VideoInfo
from model.video_decoders import (
    CODECS,
    Frame,
    Orientation,
    PyAVSource,
    build_index,
    fitted_size,
    open_container,
    video_stream,
)

__all__ = ["Frame", "FrameReader", "VideoLimits", "decode_frames", "probe", "sample_times"]

Decoder = Literal["auto", "pyav", "decord"]


def never() -> bool:
    """A stop check that lets everything run to its end."""
    return False


@dataclass(frozen=True)
class VideoLimits:
    """What is still accepted as a video."""

    max_duration: float = 4 * 3600.0  # seconds
    max_pixels: int = 8192 * 4320  # of one frame
    max_packets: int = 2_000_000  # compressed frames in the video stream
    max_bytes: int = 16 << 30


def probe(path: str | Path, limits: VideoLimits = VideoLimits()) -> VideoInfo:  # noqa: B008
    """Check that `path` is a video that can be used, and measure it by its packets.

    Raises `InputError` with one sentence for the user when it cannot.
    """
    path = Path(path)
    name = path.name
    if not path.is_file():
        raise InputError(f"There is no file {name}.")
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{name} is empty (0 bytes).")
    if size > limits.max_bytes:
        raise InputError(f"{name} is larger than {limits.max_bytes >> 20} MiB.")
    try:
        with open_container(path, never, CODECS) as container:
            stream = video_stream(container)
            if stream is None:
                raise InputError(f"{name} has no pictures in it, only sound or other data.")
            codec = CODECS.get(stream.codec_context.name)
            if codec is None:
                raise InputError(f"{name} is coded as {stream.codec_context.name}.")
            if stream.width * stream.height > limits.max_pixels:
                raise InputError(f"{name} has frames of {stream.width}x{stream.height} pixels.")
            index = build_index(container, stream, never, limits.max_packets)
            if index.duration > limits.max_duration:
                raise InputError(
                    f"{name} lasts {index.duration / 60:.0f} minutes; at most "
                    f"{limits.max_duration / 60:.0f} are accepted."
                )
            container.seek(int(index.seeks[0]), stream=stream)
            frame = next(iter(container.decode(stream)), None)
            if frame is None:
                raise InputError(f"No frame of {name} can be decoded.")
            orientation = Orientation.of(frame)
            width, height = fitted_size(
                frame.width, frame.height, stream.sample_aspect_ratio, 1 << 20
            )
            if orientation.transpose:
                width, height = height, width
            return VideoInfo(
                path=str(path),
                container=container.format.name,
                codec=codec,
                width=width,
                height=height,
                duration=index.duration,
                frame_rate=index.count / index.duration,
                num_frames=index.count,
                rotation=orientation.degrees,
                size_bytes=size,
            )
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(f"{name} is not a video that can be read ({error}).") from error


def sample_times(duration: float, *, max_frames: int, frame_rate: float = 1.0) -> np.ndarray:
    """Desired times in seconds: every 1 / `frame_rate` s from 0.

    When that would be more than `max_frames`, `max_frames` times spread evenly over the video.
    """
    if duration <= 0 or max_frames < 1 or frame_rate <= 0:
        raise ValueError(
            "Expected duration, max_frames and frame_rate above 0, got "
            f"{duration}, {max_frames} and {frame_rate}."
        )
    count = max(1, int(np.ceil(duration * frame_rate - 1e-9)))
    if count <= max_frames:
        return np.arange(count) / frame_rate
    return np.arange(max_frames) * (duration / max_frames)


class FrameReader(Iterator[Frame]):
    """Iterates over the decoded frames in order of time."""

    def __init__(self, source: PyAVSource, stop: Callable[[], bool]) -> None:
        self._source, self._stop = source, stop
        self._frames = iter(source)
        self._count = 0

    @property
    def failed(self) -> int:
        """How many desired times have no picture because theirs did not decode."""
        return self._source.failed

    def __next__(self) -> Frame:
        try:
            if self._stop():
                raise Stopped
            frame = next(self._frames)
            self._count += 1
            return frame
        except StopIteration:
            if self._stop():
                raise Stopped from None
            if self._count == 0:
                raise InputError("No frame of the video could be decoded.") from None
            raise
        except av.error.FFmpegError as error:
            if self._stop():
                raise Stopped from None
            raise InputError(f"The video could not be decoded ({error}).") from error

    def close(self) -> None:
        """Close the file; no more frames come."""
        self._frames.close()


def decode_frames(
    path: str | Path,
    times: Sequence[float] | np.ndarray,
    *,
    max_side: int = 640,
    stop: StopCheck = never,
    decoder: Decoder = "auto",
    info: VideoInfo | None = None,
) -> FrameReader:
    """Decode one frame for each of `times` (seconds from the first frame, increasing).

    Frames come upright, square pixels, longer side at most `max_side`. A frame may be up to half
    a sampling step from its desired time; its own time is reported. Raises `Stopped` soon after
    `stop()` turns true, `InputError` when nothing decodes.
    """
    del decoder, info
    return FrameReader(PyAVSource(path, list(map(float, times)), max_side, stop), stop)
