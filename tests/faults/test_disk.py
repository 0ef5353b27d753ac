"""Rows 1, 23 and 24: a disk that is full or read-only, or too much in use; damaged weights."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.disk import Disk
from app.gate import Gate
from app.sessions import Sessions
from app.settings import Settings
from app.sources import take_upload
from app.worker import Worker
from model.conversion import convert
from model.loading import load
from model.types import InputError
from tests.app_server import BUNDLED, PATIENCE
from tests.published import save_llava_onevision

SIZE = 100_000


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path, most=5 * SIZE, age_seconds=1000)


def put(path: Path, age: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(SIZE))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_uploads_go_by_age_and_what_a_visitor_uses_stays(disk: Disk, tmp_path: Path) -> None:
    """Row 23."""
    old, new = put(disk.uploads / "a" / "old.mp4", 2000), put(disk.uploads / "b" / "new.mp4", 10)
    kept = tmp_path / "visitor" / "kept.mp4"
    kept.parent.mkdir()
    os.link(old, kept)
    disk.tidy()
    assert (old.exists(), old.parent.exists(), new.exists(), kept.exists()) == (
        False, False, True, True,
    )  # fmt: skip


def test_the_oldest_uploads_go_when_there_are_too_many(disk: Disk) -> None:
    """Row 23."""
    files = [put(disk.uploads / str(n) / "video.mp4", 100 - n) for n in range(7)]
    assert not disk.has_room(0)
    disk.tidy()
    assert [file.exists() for file in files][:2] == [False, False]
    assert files[-1].exists() and disk.over() <= 0


def test_half_uploads_go_unless_they_are_being_written(disk: Disk) -> None:
    """Row 1."""
    left, coming = put(disk.uploads / "tmpleft", 60), put(disk.uploads / "tmpcoming", 60)
    with coming.open("ab"):
        disk.tidy()
        assert (left.exists(), coming.exists()) == (False, True)


def test_silent_visitors_make_room(tmp_path: Path, videos: dict[str, Path]) -> None:
    """Row 23: the most silent one's video goes first."""
    size = videos["h264"].stat().st_size
    settings = Settings(data_dir=str(tmp_path), max_disk_bytes=int(2.5 * size))
    gone: list[str] = []
    sessions = Sessions(settings, gone.append)
    try:
        taken = []
        for name in ("first", "second", "third"):
            session = sessions.get(name)
            copy = shutil.copy(videos["h264"], tmp_path / f"{name}.mp4")  # no shared bytes
            sessions.set_video(session, take_upload(Path(copy), session.folder, settings))
            Path(copy).unlink()
            taken.append(str(session.video.path))
        sessions.make_room()
        assert gone == taken[:1]
        assert sessions.disk.over() <= 0
    finally:
        sessions.close()


def test_too_many_visitors_push_out_the_most_silent(tmp_path: Path) -> None:
    """Row 18: sessions are bounded too."""
    sessions = Sessions(Settings(data_dir=str(tmp_path), max_visitors=3), lambda _: None)
    try:
        for name in "abcde":
            sessions.get(name)
        assert sessions.count() == 3
        assert len([one for one in sessions.root.iterdir() if one.is_dir()]) == 3
    finally:
        sessions.close()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_takes_nothing_is_a_sentence(
    error: int, tmp_path: Path, videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 23: on the way into the visitor's folder."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "copyfile", refuse)
    with pytest.raises(InputError, match="no room left on the disk"):
        take_upload(videos["h264"], tmp_path, Settings())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["fails while it is written", "is full before it begins"])
def test_an_upload_onto_a_full_disk_is_a_sentence(how: str, tmp_path: Path) -> None:
    """Row 23: on the way in over HTTP."""
    most = 10**9 if "fails" in how else 1
    put(tmp_path / "something")

    async def app(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    gate = Gate(app, Settings(), Disk(tmp_path, most, 1000))
    assert asked(gate, "/gradio_api/upload") == (507, b"There is no room left on the disk for this "
        b"video. Please try again later.")  # fmt: skip


def test_other_errors_are_not_swallowed(tmp_path: Path) -> None:
    async def app(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        asked(Gate(app, Settings(), Disk(tmp_path, 10**9, 1000)), "/gradio_api/upload")


def asked(app: Callable, path: str) -> tuple[int, bytes]:
    """POST to an app; returns status and body."""
    told: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict) -> None:
        told.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    asyncio.run(app(scope, receive, send))
    return told[0]["status"], told[1]["body"]


def test_a_conversion_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 23: the cache of converted models."""
    source, target = tmp_path / "source", tmp_path / "cache" / "converted"
    save_llava_onevision(source)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("model.conversion._write_weights", refuse)
    with pytest.raises(InputError, match="could not be written"):
        convert(source, target)
    assert not target.exists()
    assert not list(target.parent.glob("*"))


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    folder = tmp_path / "crosslmm-tiny"
    shutil.copytree(BUNDLED, folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(bytes(content))
    return folder


@pytest.mark.bundled
def test_damaged_weights_fail_loudly(damaged: Path) -> None:
    """Row 24: one bit."""
    with pytest.raises(InputError, match="model.safetensors is missing or damaged"):
        load(damaged)


@pytest.mark.bundled
def test_damaged_weights_are_told_to_whoever_asks(damaged: Path) -> None:
    """Row 24: in the app."""
    worker = Worker(Settings(model=str(damaged)))
    try:
        deadline = time.monotonic() + PATIENCE
        while worker.status().state != "failed":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "damaged" in worker.status().error
        assert worker.status().restarts == 0
    finally:
        worker.close()
