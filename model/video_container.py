"""Open a video file safely and find out where its frames are, without decoding them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from model.types import InputError, StopCheck, Stopped

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
# FFmpeg's name of each decoder we let run, and the name of its codec.
CODECS = {
    "h264": "h264",
    "hevc": "hevc",
    "vp8": "vp8",
    "libvpx": "vp8",
    "vp9": "vp9",
    "libvpx-vp9": "vp9",
    "av1": "av1",
    "libdav1d": "av1",
    "libaom-av1": "av1",
    "mpeg4": "mpeg4",
}
READ_SIZE = 1 << 18  # bytes between two looks at `stop`
MAX_PACKETS = 2_000_000
HEAD_PACKETS = 64  # more than any reordering of frames reaches
REORDER_FRAMES = 16  # the most frames by which an mp4 table's order may differ from display


class LocalFile(io.RawIOBase):
    """A local file for FFmpeg that ends when `stop` turns true, even inside one long seek.

    FFmpeg never learns the file's name, so nothing inside the file can be resolved against it.
    """

    def __init__(self, path: str | Path, stop: StopCheck) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self._stop = stop

    def readable(self) -> bool:
        """Whether it can be read: always."""
        return True

    def seekable(self) -> bool:
        """Whether it can be moved in: always."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; none once stopped."""
        return b"" if self._stop() else os.read(self._descriptor, size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; as `io.RawIOBase.seek`."""
        return os.lseek(self._descriptor, offset, whence)

    def tell(self) -> int:
        """Position in bytes."""
        return os.lseek(self._descriptor, 0, os.SEEK_CUR)

    def close(self) -> None:
        """Close the file; again is harmless."""
        if not self.closed:
            os.close(self._descriptor)
        super().close()


class OpenVideo:
    """A context that opens the first stream of moving pictures in a file, and closes the file.

    Only the allowed containers, only this one file, and only decoders named in `codecs`; with
    none, nothing is decoded while opening. `container` and `stream` are PyAV's own objects.
    """

    def __init__(
        self, path: str | Path, stop: StopCheck, codecs: Iterable[str] = tuple(CODECS)
    ) -> None:
        self._stop = stop
        self._file = LocalFile(path, stop)
        options = {
            "format_whitelist": FORMATS,
            "protocol_whitelist": "file",
            "codec_whitelist": ",".join(codecs) or "none",
        }
        try:
            self.container: InputContainer = av.open(
                self._file, "r", buffer_size=READ_SIZE, io_open=_refuse, container_options=options
            )
        except BaseException:
            self._file.close()
            if stop():
                raise Stopped from None
            raise
        self.size = os.fstat(self._file._descriptor).st_size

    def __enter__(self) -> OpenVideo:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()
        self._file.close()

    @property
    def stream(self) -> VideoStream:
        """The stream of moving pictures (cover art is none)."""
        for stream in self.container.streams.video:
            if not stream.disposition & Disposition.attached_pic:
                return stream
        raise InputError("The file has no moving pictures in it, only sound or other data.")


def _refuse(url: str, *_: object) -> None:
    raise PermissionError(f"The video asks for another file ({url[:80]}); none is ever opened.")


@dataclass(frozen=True)
class Orientation:
    """What stands a stored picture upright: transpose, then flip."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @classmethod
    def of(cls, frame: VideoFrame) -> Orientation:
        """Read a frame's display matrix, to the nearest quarter turn."""
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
    """When the frames are shown, in units of `time_base`, known without decoding any."""

    time_base: Fraction
    first: int  # presentation time of the first frame
    end: int  # when the last frame ends
    count: int  # frames
    keys: np.ndarray  # (keyframes,) presentation times, at most `slack` off
    seeks: np.ndarray  # (keyframes,) what to ask the container for
    slack: int  # 0 when the keys were read from the packets themselves

    @property
    def duration(self) -> float:
        """Seconds."""
        return float((self.end - self.first) * self.time_base)

    def seconds(self, time: int) -> float:
        """Seconds from the first frame."""
        return float((time - self.first) * self.time_base)


class _Packets:
    """Columns of what a run through the packets tells."""

    def __init__(self, stream: VideoStream) -> None:
        self._stream = stream
        self.times: list[int] = []
        self.ends: list[int] = []
        self.keys: list[int] = []
        self.seeks: list[int] = []
        rate = stream.average_rate or stream.guessed_rate or 25
        self.typical = max(1, round(1 / (rate * stream.time_base)))

    def read(self, video: OpenVideo, stop: StopCheck, limit: int) -> bool:
        """Read up to `limit` shown frames from where the file stands; False at its end."""
        for packet in video.container.demux(self._stream):
            if stop():
                raise Stopped
            time = packet.dts if packet.pts is None else packet.pts
            if time is None or packet.size == 0:
                continue
            if packet.is_keyframe:
                self.keys.append(time)
                self.seeks.append(time if packet.dts is None else packet.dts)
            if not packet.is_discard:
                self.times.append(time)
                self.ends.append(time + (packet.duration or self.typical))
                if len(self.times) >= limit:
                    return True
        return False


def build_index(video: OpenVideo, stop: StopCheck, max_packets: int = MAX_PACKETS) -> PacketIndex:
    """Find the frames: from the table of an mp4 where it is whole, else by reading all packets.

    Measured on one hour of 720p (90000 frames, 180 MB, in the page cache): 0.1 s by the table,
    0.4 s by the packets. Decoding the same takes a hundred times longer.
    """
    stream = video.stream
    table = stream.index_entries
    too_many = InputError(
        f"The video has more than {max_packets} frames, too many to be read; cut it shorter."
    )
    if max(len(table), stream.frames) > max_packets:
        raise too_many
    if video.container.format.name.startswith("mov") and 0 < stream.frames <= len(table):
        return _index_from_table(video, stop)
    packets = _Packets(stream)
    if packets.read(video, stop, max_packets):
        raise too_many
    if stop():
        raise Stopped
    if not packets.times:
        raise InputError("The video has no frames.")
    keys, seeks = packets.keys or packets.times[:1], packets.seeks or packets.times[:1]
    order = np.argsort(keys, kind="stable")
    return PacketIndex(
        stream.time_base,
        min(packets.times),
        max(packets.ends),
        len(packets.times),
        np.array(keys, np.int64)[order],
        np.array(seeks, np.int64)[order],
        0,
    )


def _index_from_table(video: OpenVideo, stop: StopCheck) -> PacketIndex:
    """The mp4 table gives decoding times; only the head and the tail of the file are read."""
    stream = video.stream
    decoded, shown = [], 0
    for entry in stream.index_entries:
        if entry.pos + entry.size > video.size:
            break  # cut off behind an intact table: what is there counts
        shown += not entry.is_discard
        if entry.is_keyframe:
            decoded.append(entry.timestamp)
    if not shown:
        raise InputError("The video has no frames in it; it seems to be cut off.")
    decoded = decoded or [stream.index_entries[0].timestamp]
    head, tail = _Packets(stream), _Packets(stream)
    head.read(video, stop, HEAD_PACKETS)
    video.container.seek(decoded[-1], stream=stream)
    tail.read(video, stop, MAX_PACKETS)
    if not head.times or not tail.times:
        raise Stopped if stop() else InputError("The video's frames cannot be read.")
    delay = head.keys[0] - head.seeks[0] if head.keys else 0
    return PacketIndex(
        stream.time_base,
        min(head.times),
        max(tail.ends),
        shown,
        np.array(decoded, np.int64) + delay,
        np.array(decoded, np.int64),
        REORDER_FRAMES * head.typical,
    )


def any_frame(video: OpenVideo, index: PacketIndex, stop: StopCheck) -> VideoFrame:
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
