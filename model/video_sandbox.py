"""Check and decode videos in a process that can be killed: what a damaged or hostile file does
to a decoder (hang, crash, take all memory) becomes a sentence.

`probe` and `decode_frames` are as in `model.video`. Imports neither PyAV nor torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from model.types import (
    Frame,
    InputError,
    ReadBounds,
    StopCheck,
    Stopped,
    VideoInfo,
    VideoLimits,
)

_LIMITS, _BOUNDS = VideoLimits(), ReadBounds()
_ROOT = Path(__file__).resolve().parent.parent
_PROGRAM = ("-m", "model.video_child")
_KEPT_VARIABLES = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH")
_LOOK_SECONDS = 0.1  # how often `stop` is looked at
_HEADER_BYTES = 1 << 16
_PIPE_BYTES = 1 << 20
_SPARE_SECONDS = 5.0  # by which the child's own clock runs longer than ours
_SENTENCE_CHARS = 500

_SLOW = "Reading the video took longer than {:.0f} s and was given up; {}"
_CRASHED = "The decoder crashed on this video, so the file is damaged; {}"
_HUNGRY = "Reading the video takes more memory than is allowed; {}"
_INSTEAD = "convert it to H.264 in mp4, or try another file."


def never() -> bool:
    """A stop check that lets everything run to its end."""
    return False


def probe(
    path: str | Path,
    limits: VideoLimits = _LIMITS,
    stop: StopCheck = never,
    bounds: ReadBounds = _BOUNDS,
) -> VideoInfo:
    """Check that the file is a video that can be used, and measure it.

    Raises `InputError` with one sentence when it cannot be used, `Stopped` after `stop()`.
    """
    order = {"task": "check", "path": str(path), "limits": asdict(limits)}
    with _Child(order, bounds, bounds.check_seconds, stop) as child:
        header = child.receive(bounds.check_seconds)
    return _info(header, str(path), limits)


def _info(header: dict[str, Any], path: str, limits: VideoLimits) -> VideoInfo:
    """Take the child's word, as far as it can be true."""
    told = header.get("info")
    if not isinstance(told, dict) or set(told) != {one.name for one in fields(VideoInfo)}:
        raise InputError(_CRASHED.format(_INSTEAD))
    numbers = [told[one.name] for one in fields(VideoInfo) if one.type in ("int", "float")]
    words = [str(told[name]) for name in ("container", "codec")]
    if (
        not all(isinstance(one, int | float) and math.isfinite(one) for one in numbers)
        or not 0 < told["duration"] <= limits.max_duration
        or min(told["width"], told["height"], told["num_frames"]) < 1
        or not all(word.isprintable() and len(word) < 100 for word in words)
    ):
        raise InputError(_CRASHED.format(_INSTEAD))
    return VideoInfo(**{**told, "path": path})


def decode_frames(
    path: str | Path,
    times: Sequence[float] | np.ndarray,
    *,
    info: VideoInfo,
    max_side: int = 640,
    stop: StopCheck = never,
    bounds: ReadBounds = _BOUNDS,
) -> FrameStream:
    """Decode one frame for each of `times`, in order; as `model.video.decode_frames`."""
    order = {
        "task": "decode",
        "info": asdict(info) | {"path": str(path)},
        "times": [float(time) for time in times],
        "max_side": max_side,
    }
    return FrameStream(order, bounds, stop)


class FrameStream(Iterator[Frame]):
    """Frames as they arrive. Close it (or use it in a `with` statement) when leaving early."""

    def __init__(self, order: dict[str, Any], bounds: ReadBounds, stop: StopCheck) -> None:
        self.failed = 0  # desired times without a picture so far, because theirs did not decode
        self.strategy = ""  # how the file was read, for people; known at the end
        self._bounds, self._order = bounds, order
        self._child = _Child(order, bounds, bounds.read_seconds, stop)

    def __next__(self) -> Frame:
        try:
            header = self._child.receive(self._bounds.frame_seconds)
            self.failed = int(header["failed"])
            if header.get("end"):
                self.strategy = str(header["strategy"])
                raise StopIteration
            height, width = (int(side) for side in header["shape"])
            most, index = self._order["max_side"], int(header["index"])
            if not (0 < height <= most and 0 < width <= most):
                raise ValueError(f"a picture of {width}x{height}, at most {most}")
            self._order["times"][index]
            data = self._child.read(height * width * 3, self._bounds.frame_seconds)
            image = np.frombuffer(data, np.uint8).reshape(height, width, 3)
            return Frame(index, float(header["time"]), image)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            self.close()
            if isinstance(error, InputError):
                raise
            raise InputError(_CRASHED.format(_INSTEAD)) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the process; no more frames come."""
        self._child.close()

    def __enter__(self) -> FrameStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Child:
    """The process with one order, and the pipe to it. What comes from it is not trusted."""

    def __init__(
        self, order: dict[str, Any], bounds: ReadBounds, seconds: float, stop: StopCheck
    ) -> None:
        self._stop, self._seconds = stop, seconds
        self._ends_at = time.monotonic() + seconds
        environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, *_PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=_ROOT,
            env=environment | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C in a terminal is for whoever reads
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._out = self._process.stdout.fileno()
        self._ready = select.poll()
        self._ready.register(self._out, select.POLLIN)
        order = order | {"memory": bounds.memory, "seconds": seconds + _SPARE_SECONDS}
        try:
            with contextlib.suppress(OSError, AttributeError):  # a larger pipe is only quicker
                fcntl.fcntl(self._out, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            with contextlib.suppress(BrokenPipeError):  # it died; told by what it does not say
                self._process.stdin.write(json.dumps(order).encode() + b"\n")
                self._process.stdin.flush()
        except BaseException:
            self.close()
            raise

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next message's header, within `seconds`; raises what it tells."""
        length = int.from_bytes(self.read(4, seconds), "big")
        if length > _HEADER_BYTES:
            raise InputError(_CRASHED.format(_INSTEAD))
        try:
            header = json.loads(self.read(length, seconds))
        except ValueError as error:
            raise InputError(_CRASHED.format(_INSTEAD)) from error
        if not isinstance(header, dict):
            raise InputError(_CRASHED.format(_INSTEAD))
        if "refused" in header:
            text = "".join(char for char in str(header["refused"]) if char.isprintable())
            raise InputError(text[:_SENTENCE_CHARS])
        if "memory" in header:
            raise InputError(_HUNGRY.format(_INSTEAD))
        return header

    def read(self, count: int, seconds: float) -> bytes:
        """Take exactly `count` bytes of what it says."""
        data = bytearray()
        until = min(time.monotonic() + seconds, self._ends_at)
        while len(data) < count:
            if self._stop():
                raise Stopped("stopped while reading the video")
            if time.monotonic() > until:
                raise InputError(_SLOW.format(min(seconds, self._seconds), _INSTEAD))
            if not self._ready.poll(_LOOK_SECONDS * 1000):
                continue
            block = os.read(self._out, min(count - len(data), _PIPE_BYTES))
            if not block:
                raise self._ended()
            data += block
        return bytes(data)

    def _ended(self) -> InputError:
        """What it means that it ended before it was done."""
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:  # it closed its mouth and lives on
            code = 0
        if -code in (signal.SIGXCPU, signal.SIGALRM):
            return InputError(_SLOW.format(self._seconds, _INSTEAD))
        if -code == signal.SIGKILL:  # by the system, when its memory runs out
            return InputError(_HUNGRY.format(_INSTEAD))
        return InputError(_CRASHED.format(_INSTEAD))

    def close(self) -> None:
        """End it now, whatever it does."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        self._process.wait()

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
