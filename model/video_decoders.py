"""Reading a video file: open it safely, find its keyframes, decode the frames that are wanted."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from model.types import InputError, StopCheck

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
CODECS = {
    "h264": "h264",
    "hevc": "hevc",
    "vp8": "vp8",
    "vp9": "vp9",
    "av1": "av1",
    "libdav1d": "av1",
    "mpeg4": "mpeg4",
}
READ_SIZE = 1 << 18  # bytes between two looks at `stop`
NONREF_HALF_STEP = 4  # frames; windows this wide nearly always hold a reference frame


@dataclass(frozen=True)
class Frame:
    """One picture of the video."""

    index: int  # which of the desired times it stands for
    time: float  # seconds from the video's first frame to this very picture
    image: np.ndarray  # (height, width, 3) uint8 RGB, upright


class LocalFile(io.RawIOBase):
    """A local file for FFmpeg that stops being readable when `stop` turns true.

    FFmpeg never sees a file name, so nothing inside the file can be resolved against one.
    """

    def __init__(self, path: str | Path, stop: StopCheck) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  closed by close()
        self._stop = stop

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; nothing once stopped."""
        return b"" if self._stop() else self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; as `io.RawIOBase.seek`."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Position in bytes."""
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def _refuse(url: str, *_: object) -> None:
    raise PermissionError(f"The video asks for another file ({url[:80]}); that is never opened.")


def open_container(path: str | Path, stop: StopCheck, codecs: Iterable[str]) -> InputContainer:
    """Open a local video: allowed containers only, one file only, decoders of `codecs` only."""
    return av.open(
        LocalFile(path, stop),
        "r",
        buffer_size=READ_SIZE,
        io_open=_refuse,
        container_options={
            "format_whitelist": FORMATS,
            "protocol_whitelist": "file",
            "codec_whitelist": ",".join(codecs) or "none",
        },
    )


def video_stream(container: InputContainer) -> VideoStream | None:
    """The first stream of moving pictures (cover art is none)."""
    for stream in container.streams.video:
        if not stream.disposition & stream.disposition.__class__.attached_pic:
            return stream
    return None


@dataclass(frozen=True)
class Orientation:
    """What stands a stored picture upright: transpose first, then flips; from a display matrix."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @classmethod
    def of(cls, frame: VideoFrame) -> Orientation:
        """Read the frame's display matrix, to the nearest quarter turn."""
        data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
        if data is None:
            return cls()
        a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].astype(float)
        if abs(b) > abs(a):  # x' = c y, y' = b x
            return cls(True, c < 0, b < 0)
        return cls(False, a < 0, d < 0)

    @property
    def degrees(self) -> int:
        """Degrees clockwise, mirroring aside."""
        if self.transpose:
            return 90 if self.flip_x else 270
        return 180 if self.flip_y else 0

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Turn (height, width, 3) upright."""
        if self.transpose:
            image = image.swapaxes(0, 1)
        if self.flip_x:
            image = image[:, ::-1]
        if self.flip_y:
            image = image[::-1]
        return np.ascontiguousarray(image)


@dataclass(frozen=True)
class PacketIndex:
    """Where the keyframes are, in units of `time_base`."""

    time_base: Fraction
    first: int  # presentation time of the first frame
    end: int  # presentation time at which the last frame ends
    count: int  # frames
    keys: np.ndarray  # (keyframes,) presentation times; a few frames off when from an mp4 index
    seeks: np.ndarray  # (keyframes,) what to ask the container for

    @property
    def duration(self) -> float:
        """Seconds."""
        return float((self.end - self.first) * self.time_base)


def build_index(
    container: InputContainer, stream: VideoStream, stop: StopCheck, max_packets: int
) -> PacketIndex:
    """Take the container's own table of frames where it has one, else read all packets.

    Reading packets (0.3 s for an hour of 180 MB in the page cache) is far cheaper than decoding.
    """
    del stop
    times, durations, keys, seeks = [], [], [], []
    for packet in container.demux(stream):
        if packet.dts is None and packet.pts is None:
            continue
        time = packet.pts if packet.pts is not None else packet.dts
        if packet.is_keyframe:
            keys.append(time)
            seeks.append(packet.dts if packet.dts is not None else time)
        if not packet.is_discard:
            times.append(time)
            durations.append(packet.duration or 0)
        if len(times) > max_packets:
            raise InputError(f"The video has more than {max_packets} frames; cut it shorter.")
    if not times:
        raise InputError("The video has no frames.")
    order = np.argsort(times)
    first, last = times[order[0]], times[order[-1]]
    typical = (last - first) // max(1, len(times) - 1)
    end = last + (durations[order[-1]] or typical or 1)
    return PacketIndex(
        stream.time_base,
        first,
        end,
        len(times),
        np.array(keys or [first], np.int64),
        np.array(seeks or [first], np.int64),
    )


@dataclass(frozen=True)
class Segment:
    """Wanted frames that are reached from one keyframe."""

    key: int  # which keyframe
    targets: tuple[int, ...]  # which desired times
    key_only: bool  # the keyframe itself is near enough to the only desired time


def windows(times: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """How early and how late a frame may be for each desired time: half way to its neighbours."""
    times = np.asarray(times, float)
    middle = (times[1:] + times[:-1]) / 2
    step = times[1] - times[0] if len(times) > 1 else 1.0
    tail = times[-1] - times[-2] if len(times) > 1 else 1.0
    low = np.concatenate([[times[0] - step / 2], middle])
    high = np.concatenate([middle, [times[-1] + tail / 2]])
    return low, high


def plan(times: Sequence[float], keys: np.ndarray) -> list[Segment]:
    """Choose for each desired time the keyframe that gives it most cheaply.

    A keyframe within the window is taken itself. Other frames are decoded forward from the last
    keyframe before them, all that share one keyframe in a single pass.
    """
    low, high = windows(times)
    segments: list[Segment] = []
    for i, time in enumerate(times):
        near = int(np.argmin(np.abs(keys - time)))
        inside = low[i] <= keys[near] < high[i]
        key = near if inside else max(0, int(np.searchsorted(keys, time, "right")) - 1)
        if segments and segments[-1].key == key:
            last = segments[-1]
            segments[-1] = Segment(key, (*last.targets, i), False)
        else:
            segments.append(Segment(key, (i,), inside))
    return segments


def fitted_size(width: int, height: int, aspect: Fraction | None, max_side: int) -> tuple[int, int]:
    """Width and height on display (square pixels), the longer side at most `max_side`."""
    shown = width * float(aspect or 1)
    scale = min(1.0, max_side / max(shown, height))
    return max(1, round(shown * scale)), max(1, round(height * scale))


def to_rgb(frame: VideoFrame, aspect: Fraction | None, max_side: int) -> np.ndarray:
    """(height, width, 3) uint8, as stored (not yet upright)."""
    width, height = fitted_size(frame.width, frame.height, aspect, max_side)
    return frame.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()


class PyAVSource:
    """Frames of one file by way of PyAV, as `decode_frames` describes them."""

    def __init__(
        self, path: str | Path, times: Sequence[float], max_side: int, stop: StopCheck
    ) -> None:
        self.path, self.times, self.max_side, self.stop = path, list(times), max_side, stop
        self.failed = 0

    def __iter__(self) -> Iterator[Frame]:
        with open_container(self.path, self.stop, CODECS) as container:
            stream = video_stream(container)
            if stream is None:
                raise InputError("The file has no video stream.")
            index = build_index(container, stream, self.stop, 1 << 22)
            keys = (index.keys - index.first) * float(index.time_base)
            low, high = windows(self.times)
            orientation = None
            used = None
            stream.thread_type = "AUTO"
            for segment in plan(self.times, keys):
                container.seek(int(index.seeks[segment.key]), stream=stream)
                for i, frame in self._segment(container, stream, index, segment, low, high):
                    if frame is None:
                        self.failed += 1
                        continue
                    if frame.pts == used:
                        continue
                    used = frame.pts
                    orientation = orientation or Orientation.of(frame)
                    image = to_rgb(frame, stream.sample_aspect_ratio, self.max_side)
                    time = float((frame.pts - index.first) * index.time_base)
                    yield Frame(i, time, orientation.apply(image))

    def _segment(
        self,
        container: InputContainer,
        stream: VideoStream,
        index: PacketIndex,
        segment: Segment,
        low: np.ndarray,
        high: np.ndarray,
    ) -> Iterator[tuple[int, VideoFrame | None]]:
        waiting = list(segment.targets)
        last: VideoFrame | None = None
        last_time = 0.0
        for frame in self._decode(container, stream, segment.key_only):
            time = float((frame.pts - index.first) * index.time_base)
            while waiting and time >= self.times[waiting[0]]:
                wanted = self.times[waiting[0]]
                take_last = last is not None and wanted - last_time < time - wanted
                yield waiting.pop(0), last if take_last else frame
            last, last_time = frame, time
            if not waiting:
                return
        while waiting:
            yield waiting.pop(0), last

    def _decode(
        self, container: InputContainer, stream: VideoStream, key_only: bool
    ) -> Iterator[VideoFrame]:
        for packet in container.demux(stream):
            if self.stop():
                return
            try:
                yield from packet.decode()
                if key_only:
                    yield from stream.codec_context.decode(None)
                    return
            except av.error.InvalidDataError:
                continue
