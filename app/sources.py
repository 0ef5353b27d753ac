"""A video comes in, as a sample, an upload or a fetched file, and is checked before use."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.fetch import Fetched
from app.logs import log
from app.settings import Settings, show_bytes
from model.types import InputError, VideoInfo, VideoLimits
from model.video_sandbox import probe as probe_file

SAMPLES = Path(__file__).parent.parent / "assets" / "samples"

# What is served, by the suffix of a file that we named.
MEDIA_TYPES = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/mp4",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
    ".avi": "video/x-msvideo",
    ".jpg": "image/jpeg",
}
_VIDEO_SUFFIXES = frozenset(MEDIA_TYPES) - {".jpg"}
_TITLE_CHARS = 80
_CHECKS = threading.BoundedSemaphore(4)  # at the same time: each may take a decoder's memory


@dataclass(frozen=True)
class Sample:
    """A video that comes with the repository."""

    path: Path
    title: str
    duration: float
    questions: tuple[str, ...]
    poster: Path | None  # a picture of it


@dataclass(frozen=True)
class Video:
    """A checked video, ready for the player and the model."""

    path: Path
    title: str
    info: VideoInfo
    questions: tuple[str, ...]
    shared: bool  # a sample: belongs to everybody and is never deleted


def list_samples(folder: Path = SAMPLES) -> tuple[Sample, ...]:
    """Read `samples.json`; entries without their file are left out, no list means no samples."""
    listing = folder / "samples.json"
    if not listing.is_file():
        return ()
    entries = json.loads(listing.read_text(encoding="utf-8"))
    samples = [_sample(folder, entry) for entry in entries]
    return tuple(sample for sample in samples if sample.path.is_file())


def _sample(folder: Path, entry: Mapping[str, Any]) -> Sample:
    poster = folder / Path(entry.get("poster") or "none.jpg").name
    return Sample(
        path=folder / Path(entry["file"]).name,
        title=str(entry.get("title") or Path(entry["file"]).stem),
        duration=float(entry.get("duration", 0.0)),
        questions=tuple(str(asked["question"]) for asked in entry.get("questions", ())),
        poster=poster if poster.is_file() else None,
    )


def take_sample(sample: Sample, settings: Settings) -> Video:
    """Use a sample where it lies: what the model keeps of it then serves every visitor."""
    return Video(sample.path, sample.title, probe(sample.path, settings), sample.questions, True)


def take_fetched(fetched: Fetched, folder: Path, settings: Settings) -> Video:
    """Check a file from the web just as an uploaded one; the file itself is used up."""
    try:
        return take_upload(fetched.path, folder, settings, fetched.title)
    finally:
        fetched.path.unlink(missing_ok=True)


def take_upload(upload: Path, folder: Path, settings: Settings, title: str | None = None) -> Video:
    """Check an uploaded file and give it a name of ours in the visitor's folder.

    It is shown as `title`, or under its own name. Raises `InputError` with one sentence when it
    is not a video that can be used.
    """
    title = clean_title(upload.name if title is None else title)
    if not upload.is_file():
        raise InputError("The file did not arrive; please upload it again.")
    size = upload.stat().st_size
    if size == 0:
        raise InputError("The file is empty (0 bytes); please choose a video.")
    if size > settings.max_upload_bytes:
        raise InputError(
            f"The file has {show_bytes(size)}; "
            f"at most {show_bytes(settings.max_upload_bytes)} are taken."
        )
    info = probe(upload, settings)
    suffix = upload.suffix.lower()
    kept = folder / f"{secrets.token_hex(8)}{suffix if suffix in _VIDEO_SUFFIXES else '.mp4'}"
    _link_or_copy(upload, kept)
    log("video_added", codec=info.codec, seconds=info.duration, bytes=size)
    return Video(kept, title, info, (), False)


def probe(path: Path, settings: Settings) -> VideoInfo:
    """Measure a file, in a process of its own: the page's never parses what visitors bring."""
    limits = VideoLimits(
        max_duration=settings.max_video_seconds,
        max_pixels=settings.max_video_pixels,
        max_packets=settings.max_video_frames,
        max_bytes=settings.max_upload_bytes,
    )
    if not _CHECKS.acquire(timeout=settings.check_seconds):
        raise InputError("Busy: many videos are being checked. Please try again in a minute.")
    try:
        return probe_file(path, limits, bounds=settings.read_bounds)
    finally:
        _CHECKS.release()


def clean_title(name: str) -> str:
    """Keep what can be shown of a visitor's file name; it is never used as a path."""
    shown = "".join(char for char in name if char.isprintable()).strip()
    if len(shown) > _TITLE_CHARS:
        shown = shown[: _TITLE_CHARS - 1] + "…"
    return shown or "video"


def _link_or_copy(source: Path, target: Path) -> None:
    # A link costs no disk; the upload itself is shared by all who upload the same bytes.
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        try:
            shutil.copyfile(source, target, follow_symlinks=False)
        except OSError as error:
            target.unlink(missing_ok=True)
            raise InputError("There is no room left on the disk for this video.") from error
