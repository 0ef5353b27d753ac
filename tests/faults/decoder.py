"""`model.video_child`, but it goes wrong in the way that the video file itself asks for.

`mark(video, copy, "check", "hang")` makes such a file: it plays as before, and whoever checks it
with this program hangs. The other side takes this program when told to by `use`.
"""

from __future__ import annotations

import os
import shutil
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Literal

from model import video_child, video_sandbox

HOW = ("hang", "segfault", "abort", "greedy", "spin", "lie", "babble")
_MARK = b"crosslmm test fault: "


def use() -> None:
    """From here on this process has videos read by this program."""
    video_sandbox._PROGRAM = ("-m", "tests.faults.decoder")


def mark(video: Path, copy: Path, task: Literal["check", "decode"], how: str) -> Path:
    """Copy an mp4 with a box at its end that says when and how to go wrong."""
    assert how in HOW
    shutil.copyfile(video, copy)
    note = _MARK + f"{task} {how}".encode()
    with copy.open("ab") as file:
        file.write(struct.pack(">I", len(note) + 8) + b"free" + note)
    return copy


def _asked_for(path: str, task: str) -> str:
    with open(path, "rb") as file:
        _, found, note = file.read()[-200:].rpartition(_MARK)
    when, _, how = note.decode().partition(" ") if found else ("", "", "")
    return how if when == task else ""


def _go_wrong(how: str, told: video_child._Told) -> None:
    if how == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif how == "abort":
        os.abort()
    elif how == "greedy":
        raise MemoryError(len([bytearray(1 << 26) for _ in range(1 << 10)]))
    elif how == "lie":
        told.send(info={"duration": float("nan")}, index=10**9, shape=[1 << 30, 1 << 30], failed=0)
    elif how == "babble":
        told._write(os.urandom(1 << 20))
    while how == "spin":
        pass
    time.sleep(600)


def main() -> int:
    real = {"check": video_child._check, "decode": video_child._decode}

    def follow(order: dict, told: video_child._Told) -> None:
        path = order.get("path") or order["info"]["path"]
        if how := _asked_for(path, order["task"]):
            _go_wrong(how, told)
        real[order["task"]](order, told)

    video_child._check = video_child._decode = follow
    return video_child.main()


if __name__ == "__main__":
    sys.exit(main())
