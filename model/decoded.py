"""A video's frames, read and resized without the model: for a GPU that is lent by the second.

The pixels lie in a file that another process maps; everything else is small and pickles.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from model.frame_reader import FrameChunk
from model.types import StopCheck, Stopped, VideoInfo


@dataclass(frozen=True)
class DecodedChunk:
    """Some frames beside their pixels."""

    times: tuple[float, ...]
    pictures: tuple[bytes, ...]
    seconds: float  # that decoding them took
    failed: int  # frames that could not be decoded, up to here


@dataclass(frozen=True)
class Decoded:
    """What `Engine.decode` leaves: delete `file` when it is needed no longer."""

    file: Path
    info: VideoInfo
    asked: int  # frames that were to be decoded
    chunks: tuple[DecodedChunk, ...]

    @classmethod
    def collect(
        cls,
        chunks: Iterable[FrameChunk],
        folder: Path,
        info: VideoInfo,
        asked: int,
        stop: StopCheck,
    ) -> Decoded:
        """Write what is read; raises what reading raises, and `Stopped`."""
        pixels, rest = [], []
        for chunk in chunks:
            pixels.append(chunk.pixels)
            times = tuple(chunk.times.tolist())
            rest.append(DecodedChunk(times, chunk.pictures, chunk.seconds, chunk.failed))
        if stop():
            raise Stopped("stopped while reading the video")
        file = folder / f"{secrets.token_hex(8)}.pt"
        torch.save(pixels, file)
        return cls(file, info, asked, tuple(rest))

    def read(self, stop: StopCheck) -> Iterator[FrameChunk]:
        """The chunks again, until `stop` turns true."""
        pixels = torch.load(self.file, mmap=True)
        for frames, chunk in zip(pixels, self.chunks, strict=True):
            if stop():
                return
            times = torch.tensor(chunk.times)
            yield FrameChunk(frames, times, chunk.pictures, chunk.seconds, chunk.failed)

    @property
    def frames(self) -> int:
        """Frames that were decoded."""
        return sum(len(chunk.times) for chunk in self.chunks)
