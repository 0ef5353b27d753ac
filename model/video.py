"""A video file as input: check it, choose times, decode the frames of those times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import av
import numpy as np

from model.types import Frame, InputError, StopCheck, Stopped, VideoInfo, VideoLimits
from model.video_container import CODECS, OpenVideo, Orientation
from model.video_decoders import PyAVSource, fitted_size
from model.video_decord import DecordSource
from model.video_index import any_frame, build_index

__all__ = ["Frame", "FrameReader", "VideoLimits", "decode_frames", "probe", "sample_times"]

Decoder = Literal["auto", "pyav", "decord"]
_LIMITS = VideoLimits()


def never() -> bool:
    """A stop check that lets everything run to its end."""
    return False


# How files of the allowed containers begin.
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
MATROSKA = b"\x1aE\xdf\xa3"


def probe(path: str | Path, limits: VideoLimits = _LIMITS, stop: StopCheck = never) -> VideoInfo:
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
            frame = any_frame(video, index, stop)
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
    # A damaged file can name a codec that FFmpeg does not know; PyAV has no context for it.
    name = stream.codec_context.name if stream.codec_context is not None else "an unknown format"
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


def _unreadable(path: Path, error: Exception) -> InputError:
    with path.open("rb") as file:
        is_mp4 = file.read(8)[4:] in MP4_BOXES
    if is_mp4 and isinstance(error, (av.error.InvalidDataError, av.error.EOFError)):
        return InputError(
            "The file is cut off: its table of contents is missing; add the whole file again."
        )
    return InputError("The file is cut off or damaged; add the whole file again.")


def sample_times(duration: float, *, max_frames: int, frame_rate: float = 1.0) -> np.ndarray:
    """Desired times in seconds: every 1 / `frame_rate` s from 0.

    When that would be more than `max_frames`, `max_frames` times spread evenly over the video.
    """
    if not (0 < duration < float("inf") and max_frames >= 1 and frame_rate > 0):
        raise ValueError(
            "Expected duration, max_frames and frame_rate above 0, got "
            f"{duration}, {max_frames} and {frame_rate}."
        )
    count = max(1, int(np.ceil(duration * frame_rate - 1e-9)))
    if count <= max_frames:
        return np.arange(count) / frame_rate
    return np.arange(max_frames) * (duration / max_frames)


class FrameReader(Iterator[Frame]):
    """Iterates over decoded frames in order of time.

    Close it (or use it in a `with` statement) when leaving early; its threads end then.
    """

    def __init__(self, source: PyAVSource | DecordSource) -> None:
        self._source = source
        self._frames = iter(source)
        self._count = 0

    @property
    def failed(self) -> int:
        """How many desired times have had no picture so far because theirs did not decode."""
        return self._source.failed

    @property
    def strategy(self) -> str:
        """How the file is read, for people; known once the first frame is there."""
        return self._source.strategy

    def __next__(self) -> Frame:
        try:
            if self._source.stop():
                raise Stopped
            frame = next(self._frames)
        except StopIteration:
            if self._source.stop():
                raise Stopped from None
            if self._count == 0:
                raise InputError(
                    "None of the video's frames can be decoded; the file is damaged."
                ) from None
            raise
        except (av.error.FFmpegError, OSError) as error:
            if self._source.stop():
                raise Stopped from None
            raise _unreadable(Path(self._source.path), error) from error
        self._count += 1
        return frame

    def close(self) -> None:
        """Close the file and end the threads; no more frames come."""
        self._frames.close()

    def __enter__(self) -> FrameReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def decode_frames(
    path: str | Path,
    times: Sequence[float] | np.ndarray,
    *,
    max_side: int = 640,
    stop: StopCheck = never,
    decoder: Decoder = "auto",
    info: VideoInfo | None = None,
) -> FrameReader:
    """Decode one frame for each of `times`: seconds from the first frame, increasing.

    Frames come in order, upright, with square pixels, the longer side at most `max_side`. Each
    tells its own true time, which is at most half a sampling step from the desired one (a single
    time counts as a step of a second). Where no frame is that near, the one on screen at that
    time stands in; no frame comes twice, so there can be fewer frames than times. `info` is what
    `probe` said; without it the file is probed first.

    `auto` is `pyav`: in no file measured was decord faster, and it cannot read AV1. Seconds on
    two cores for PyAV here, decord, and decoding every frame (`tests/bench/decoding.py`, 720p):

        5 min H.264, 300 frames     4.7    8.2    7.7      1 min HEVC, 60    0.9    1.2    1.3
        5 min H.264, 128 frames     3.9    7.6    7.6      1 min VP9, 60     2.1    2.2    2.3
        1 h H.264, 64 frames        0.5   12.6   54        1 min AV1, 60     0.8     -     1.3
        1 h H.264, 256 frames       1.6                    30 s, 1 keyframe  0.6    0.7    0.7

    Not decoding what no other frame refers to is where the gain on dense samples comes from.
    Leaving out the deblocking filter would save another tenth, but the error grows until the
    next keyframe: 36 dB after 10 s, so it stays on.

    Raises `Stopped` within a second of `stop()` turning true, and `InputError` when the file
    cannot be read or nothing in it decodes.
    """
    times = np.asarray(times, float)
    if times.ndim != 1 or not len(times) or not times[0] >= 0 or not np.all(np.diff(times) > 0):
        raise ValueError("Expected a list of increasing times from 0 on, in seconds.")
    if max_side < 1:
        raise ValueError(f"Expected max_side above 0, got {max_side}.")
    info = info or probe(path, stop=stop)
    try:
        changed = Path(path).stat().st_size != info.size_bytes
    except OSError:
        changed = True
    if changed:
        raise InputError("The file has changed since it was checked; add the video again.")
    source = DecordSource if decoder == "decord" else PyAVSource
    return FrameReader(source(path, times, max_side, stop))
