"""How much of the disk visitors' files may take, and what is deleted first."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from pathlib import Path

from app.logs import log

UPLOADS = "uploads"  # the folder under the root that Gradio writes into
# What the system says when nothing more can be written.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})
NO_ROOM = "There is no room left on the disk for this video. Please try again later."

_SPARE_BYTES = 200 * 10**6  # stays free for everything else on this disk
_COUNT_SECONDS = 2.0
_SETTLED_SECONDS = 2.0  # between the end of an upload and its final name


class Disk:
    """All files under `root`; `most` bytes of them at the same time."""

    def __init__(self, root: Path, most: int, age_seconds: float) -> None:
        self._root, self._most, self._age_seconds = root, most, age_seconds
        self.uploads = root / UPLOADS
        self._counted_at, self._counted = -_COUNT_SECONDS, 0

    def used(self, fresh: bool = False) -> int:
        """Bytes of all files; one with several names counts once. Counted anew after a while."""
        now = time.monotonic()
        if fresh or now - self._counted_at > _COUNT_SECONDS:
            self._counted = sum(size for _, size, _ in self._files(self._root).values())
            self._counted_at = now
        return self._counted

    def over(self) -> int:
        """Bytes to be deleted; below 0, bytes that may still come."""
        return self.used(fresh=True) - self._most

    def has_room(self, more: int) -> bool:
        """Whether `more` bytes may be added now."""
        with contextlib.suppress(OSError):
            if shutil.disk_usage(self._root).free - more < _SPARE_BYTES:
                return False
        return self.used() + more <= self._most

    def tidy(self) -> None:
        """Delete uploads that nobody finished, old ones, and the oldest while there are too many.

        What a visitor uses has a second name in the visitor's own folder and stays there.
        """
        now, being_written = time.time(), _open_files()
        over = self.over()
        files = sorted(self._files(self.uploads).values(), key=lambda one: one[2])
        deleted = 0
        for path, size, changed in files:
            left_over = path.parent == self.uploads and now - changed > _SETTLED_SECONDS
            if str(path) in being_written:
                continue
            if left_over or now - changed > self._age_seconds or over > 0:
                with contextlib.suppress(OSError):
                    over -= size if path.stat().st_nlink == 1 else 0
                    path.unlink()
                    deleted += 1
                    if path.parent != self.uploads:
                        path.parent.rmdir()  # only when it is empty
        if deleted:
            log("uploads_deleted", files=deleted)

    def _files(self, folder: Path) -> dict[tuple[int, int], tuple[Path, int, float]]:
        """By (device, number): a path, the bytes and when it last changed."""
        found: dict[tuple[int, int], tuple[Path, int, float]] = {}
        for place, _, names in os.walk(folder):
            for name in names:
                path = Path(place, name)
                with contextlib.suppress(OSError):  # deleted meanwhile
                    stat = path.lstat()
                    size = stat.st_blocks * 512
                    found[stat.st_dev, stat.st_ino] = path, size, stat.st_mtime
        return found


def _open_files() -> set[str]:
    """Paths of the files that this process holds open."""
    held = set()
    for descriptor in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # closed meanwhile
            held.add(os.readlink(descriptor))
    return held
