"""Sampled frames of a video in chunks, decoded and resized ahead of the model."""

from __future__ import annotations

import io
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from model.processing_crosslmm import CrossLMMProcessor
from model.types import ReadBounds, StopCheck, Stopped, VideoInfo
from model.video_sandbox import decode_frames

CHUNK_FRAMES = 16  # frames encoded and prefilled together
CHUNKS_AHEAD = 2  # decoded chunks that may wait for the model
THUMBNAIL_SIDE = 320  # pixels, longer side of the pictures kept for the page
MANY_FRAMES, SMALL_SIDE = 512, 192  # above so many frames, pictures are smaller


@dataclass(frozen=True)
class FrameChunk:
    """Some frames that follow each other."""

    pixels: torch.Tensor  # (F, 3, S, S)
    times: torch.Tensor  # (F,) seconds
    pictures: tuple[bytes, ...]  # JPEG
    seconds: float  # that decoding them took
    failed: int  # frames that could not be decoded, up to here


def read_chunks(
    processor: CrossLMMProcessor,
    info: VideoInfo,
    times: np.ndarray,
    bounds: ReadBounds,
    stop: StopCheck,
) -> Iterator[FrameChunk]:
    """Decode and resize the frames at `times`, `CHUNK_FRAMES` at a time.

    Raises:
        InputError: the video cannot be decoded.
        Stopped: `stop` turned true.

    """
    side = THUMBNAIL_SIDE if len(times) <= MANY_FRAMES else SMALL_SIDE
    with decode_frames(info.path, times, info=info, stop=stop, bounds=bounds) as frames:
        done = False
        while not done:
            clock = time.perf_counter()
            images, seconds = [], []
            while len(images) < CHUNK_FRAMES:
                frame = next(frames, None)
                if frame is None:
                    done = True
                    break
                images.append(frame.image)
                seconds.append(frame.time)
            if images:
                pixels = processor.preprocess_frames(images)
                pictures = tuple(_jpeg(image, side) for image in images)
                spent = time.perf_counter() - clock
                yield FrameChunk(pixels, torch.tensor(seconds), pictures, spent, frames.failed)


def read_ahead(
    read: Callable[[StopCheck], Iterator[FrameChunk]], stop: StopCheck
) -> Iterator[FrameChunk]:
    """Run `read` in a thread that stays `CHUNKS_AHEAD` chunks ahead; close it to end the thread.

    Raises what `read` raises, and `Stopped` when nothing comes and `stop` is true.
    """
    chunks: queue.Queue = queue.Queue(CHUNKS_AHEAD)
    quitting = threading.Event()

    def work() -> None:
        try:
            for chunk in read(lambda: quitting.is_set() or stop()):
                chunks.put(chunk)
            chunks.put(None)
        except BaseException as error:  # raised again below, in the caller's thread
            chunks.put(error)

    reader = threading.Thread(target=work, daemon=True)
    reader.start()
    try:
        while True:
            try:
                item = chunks.get(timeout=0.1)
            except queue.Empty:
                if stop():
                    raise Stopped("stopped while reading the video") from None
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        quitting.set()
        while reader.is_alive():  # unblock a reader that waits for room in the queue
            try:
                chunks.get_nowait()
            except queue.Empty:
                reader.join(0.05)


def _jpeg(image: np.ndarray, side: int) -> bytes:
    picture = Image.fromarray(image)
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
