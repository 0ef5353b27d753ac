"""A video file as input: check it, choose times, decode the frames of those times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.video.frame import VideoFrame

from model.types import InputError, StopCheck, Stopped, VideoInfo
from model.video_container import (
    CODECS,
    HEAD_PACKETS,
    MAX_PACKETS,
    OpenVideo,
    Orientation,
    PacketIndex,
    build_index,
)
from model.video_decoders import Frame, PyAVSource, fitted_size

__all__ = ["Frame", "FrameReader", "VideoLimits", "decode_frames", "probe", "sample_times"]

Decoder = Literal["auto", "pyav", "decord"]


def never() -> bool:
    """A stop check that lets everything run to its end."""
    return False


# How files of the allowed containers begin.
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
MATROSKA = b"\x1aE\xdf\xa3"


@dataclass(frozen=True)
class VideoLimits:
    """What is still accepted as a video."""

    max_duration: float = 4 * 3600.0  # seconds
    max_pixels: int = 8192 * 4320  # of one frame
    max_packets: int = MAX_PACKETS  # compressed frames in the video stream
    max_bytes: int = 16 << 30


def probe(
    path: str | Path, limits: VideoLimits = VideoLimits(), stop: StopCheck = never
) -> VideoInfo:
    """Check that the file is a video that can be used, and measure it by its packets.

    Raises `InputError` with one sentence for the user when it cannot be used.
    """
    path = Path(path)
    _check_file(path, limits)
    try:
        # Sizes are checked before anything is decoded.
        with OpenVideo(path, stop, codecs=()) as video:
            _check_stream(video, limits)
        with OpenVideo(path, stop) as video:
            codec = _check_stream(video, limits)
            index = build_index(video, stop, limits.max_packets)
            if index.duration > limits.max_duration:
                raise InputError(
                    f"The video lasts {index.duration / 60:.0f} minutes; at most "
                    f"{limits.max_duration / 60:.0f} minutes are accepted, so cut it shorter."
                )
            frame = _any_frame(video, index, stop)
            container, size = video.container.format.name, video.size
            aspect = video.stream.sample_aspect_ratio
    except (av.error.FFmpegError, OSError) as error:
        raise _unreadable(path, error) from error
    orientation = Orientation.of(frame)
    width, height = fitted_size(frame.width, frame.height, aspect, 1 << 30)
    return VideoInfo(
        path=str(path),
        container=container,
        codec=codec,
        width=height if orientation.transpose else width,
        height=width if orientation.transpose else height,
        duration=index.duration,
        frame_rate=index.count / index.duration,
        num_frames=index.count,
        rotation=orientation.degrees,
        size_bytes=size,
    )


def _check_file(path: Path, limits: VideoLimits) -> None:
    if not path.is_file():
        raise InputError("There is no such file; add the video again.")
    size = path.stat().st_size
    if size == 0:
        raise InputError("The file is empty (0 bytes); add the video again.")
    if size > limits.max_bytes:
        raise InputError(
            f"The file has {size / 2**20:.0f} MiB; at most {limits.max_bytes / 2**20:.0f} MiB "
            "are accepted."
        )
    with path.open("rb") as file:
        start = file.read(12)
    if not (start[4:8] in MP4_BOXES or start.startswith(MATROSKA) or _is_avi(start)):
        raise InputError("The file is not a video; mp4, mov, mkv, webm and avi can be read.")


def _is_avi(start: bytes) -> bool:
    return start.startswith(b"RIFF") and start[8:] == b"AVI "


def _check_stream(video: OpenVideo, limits: VideoLimits) -> str:
    stream = video.stream
    name = stream.codec_context.name
    if name not in CODECS:
        raise InputError(
            f"The video is coded as {name}; {', '.join(sorted(set(CODECS.values())))} can be read."
        )
    if stream.width * stream.height > limits.max_pixels:
        raise InputError(
            f"The video's frames have {stream.width}x{stream.height} pixels; at most "
            f"{limits.max_pixels} pixels in all are accepted."
        )
    return CODECS[name]


def _any_frame(video: OpenVideo, index: PacketIndex, stop: StopCheck) -> VideoFrame:
    """A frame that decodes, looked for at the start, in the middle and at the end."""
    keys = len(index.seeks)
    for key in dict.fromkeys((0, keys // 2, keys - 1)):
        video.container.seek(int(index.seeks[key]), stream=video.stream)
        for number, packet in enumerate(video.container.demux(video.stream)):
            if stop():
                raise Stopped
            try:
                for frame in packet.decode():
                    return frame
            except av.error.FFmpegError:
                continue
            if number > HEAD_PACKETS:
                break
    raise InputError("None of the video's frames can be decoded; the file is damaged.")


def _unreadable(path: Path, error: Exception) -> InputError:
    with path.open("rb") as file:
        is_mp4 = file.read(8)[4:] in MP4_BOXES
    if is_mp4 and isinstance(error, av.error.InvalidDataError):
        return InputError(
            "The file is cut off: its table of contents is missing; add the whole file again."
        )
    return InputError(f"The file cannot be read as a video ({type(error).__name__}).")


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
