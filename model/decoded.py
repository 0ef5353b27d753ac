"""A video's frames, read and resized without the model: for a GPU that is lent by the second.

The pixels lie in a file that another process maps; everything else is small and pickles.
"""

from __future__ import annotations

import queue
import secrets
from dataclasses import dataclass
from pathlib import Path

import torch

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
        cls, chunks: queue.Queue, folder: Path, info: VideoInfo, asked: int, stop: StopCheck
    ) -> Decoded:
        """Write what the engine's reader put into `chunks`; raises what it raised, or `Stopped`."""
        pixels, rest = [], []
        while (item := chunks.get_nowait()) is not None:
            if isinstance(item, BaseException):
                raise item
            frames, times, pictures, seconds, failed = item
            pixels.append(frames)
            rest.append(DecodedChunk(tuple(times.tolist()), tuple(pictures), seconds, failed))
        if stop():
            raise Stopped("stopped while reading the video")
        file = folder / f"{secrets.token_hex(8)}.pt"
        torch.save(pixels, file)
        return cls(file, info, asked, tuple(rest))

    def feed(self, chunks: queue.Queue, stop: StopCheck) -> None:
        """Put the chunks into a queue, as the engine's reader does; runs in its thread."""
        try:
            pixels = torch.load(self.file, mmap=True)
            for frames, chunk in zip(pixels, self.chunks, strict=True):
                if stop():
                    break
                times = torch.tensor(chunk.times)
                chunks.put((frames, times, list(chunk.pictures), chunk.seconds, chunk.failed))
            chunks.put(None)
        except BaseException as error:  # handed to the thread that reads the queue
            chunks.put(error)

    @property
    def frames(self) -> int:
        """Frames that were decoded."""
        return sum(len(chunk.times) for chunk in self.chunks)
