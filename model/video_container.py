"""Open a video file safely and find out where its frames are, without decoding them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
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
                self._file,
                "r",
                buffer_size=READ_SIZE,
                io_open=_refuse,
                container_options=options,
                metadata_errors="replace",  # titles and the like; not read, and not always text
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
