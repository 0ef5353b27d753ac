"""The process that reads one hostile video file: `python -m model.video_child`.

Its one order comes as a line of JSON on stdin; what it has to say goes to stdout as messages: the
header's length in four bytes, the header in JSON, and for a frame the picture's bytes. Stdin stays
open as long as somebody waits for it. `model.video_sandbox` is the other side.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
from dataclasses import asdict
from typing import Any

import numpy as np

from model.process_limits import close_doors, limit
from model.types import InputError, VideoInfo, VideoLimits
from model.video import decode_frames, probe
from model.video_decoders import available_cores

HEADER = struct.Struct(">I")


class _Told:
    """Where messages go; nothing else this process prints can get among them."""

    def __init__(self) -> None:
        self._out = os.dup(1)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)

    def send(self, picture: np.ndarray | None = None, **header: Any) -> None:
        text = json.dumps(header).encode()
        self._write(HEADER.pack(len(text)) + text)
        if picture is not None:
            self._write(np.ascontiguousarray(picture).data.cast("B"))

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._out, view) :]


def _leave_when_alone() -> None:
    """End with whoever gave the order, whatever the decoder is doing."""
    while os.read(0, 1 << 12):
        pass
    os._exit(0)


def _read_order() -> dict[str, Any]:
    line = bytearray()
    while not line.endswith(b"\n"):
        block = os.read(0, 1 << 16)
        if not block:
            os._exit(0)
        line += block
    return json.loads(line)


def _check(order: dict[str, Any], told: _Told) -> None:
    info = probe(order["path"], VideoLimits(**order["limits"]))
    told.send(info=asdict(info))


def _decode(order: dict[str, Any], told: _Told) -> None:
    info = VideoInfo(**order["info"])
    with decode_frames(info.path, order["times"], max_side=order["max_side"], info=info) as frames:
        for frame in frames:
            told.send(
                frame.image,
                index=frame.index,
                time=frame.time,
                shape=frame.image.shape[:2],
                failed=frames.failed,
            )
        told.send(end=True, failed=frames.failed, strategy=frames.strategy)


def main() -> int:
    """Follow one order; returns the exit code."""
    told, order = _Told(), _read_order()
    threading.Thread(target=_leave_when_alone, daemon=True).start()
    limit(order["memory"], order["seconds"] * available_cores(), order["seconds"])
    close_doors()
    try:
        {"check": _check, "decode": _decode}[order["task"]](order, told)
    except InputError as error:
        told.send(refused=str(error))
    except MemoryError:
        told.send(memory=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
