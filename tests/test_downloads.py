from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from app import downloads
from app.downloads import Downloaded, Downloads
from app.fetch import Fetched
from app.settings import Settings
from model.types import InputError, Stopped


@pytest.fixture(autouse=True)
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads of two bytes; `slow` ones go on until they are stopped, `late` ones ignore that."""

    def fetch(url: str, folder: Path, settings: Settings, *, progress: Any, stop: Any) -> Fetched:
        progress(1, 2)
        deadline = time.monotonic() + 30
        while url != "quick" and not stop():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if url == "slow":
            raise Stopped
        if url == "bad":
            raise InputError("No.")
        path = folder / url
        path.write_bytes(b"ab")
        return Fetched(path, "Title")

    monkeypatch.setattr(downloads, "fetch", fetch)


def run(test: Callable[[Downloads], Awaitable[None]], most: int = 2) -> None:
    async def within_time() -> None:
        await asyncio.wait_for(test(Downloads(Settings(max_fetches=most))), 30)

    asyncio.run(within_time())


def test_progress_comes_first_and_the_video_last(tmp_path: Path) -> None:
    async def test(all_downloads: Downloads) -> None:
        got = [one async for one in all_downloads.run("a", "quick", tmp_path)]
        assert got[-1] == Fetched(tmp_path / "quick", "Title")
        assert all(isinstance(one, Downloaded) for one in got[:-1])
        assert not all_downloads.cancel("a")

    run(test)


def test_cancel_ends_the_visitors_own_download(tmp_path: Path) -> None:
    async def test(all_downloads: Downloads) -> None:
        running = all_downloads.run("a", "slow", tmp_path)
        await anext(running)
        assert not all_downloads.cancel("b")
        assert all_downloads.cancel("a")
        with pytest.raises(Stopped):
            async for _ in running:
                pass
        assert [one async for one in all_downloads.run("a", "quick", tmp_path)]

    run(test)


def test_one_for_each_visitor_and_a_few_for_all(tmp_path: Path) -> None:
    async def test(all_downloads: Downloads) -> None:
        first, second = (all_downloads.run(one, "slow", tmp_path) for one in "ab")
        await anext(first)
        with pytest.raises(InputError, match="being fetched already"):
            await anext(all_downloads.run("a", "quick", tmp_path))
        await anext(second)
        with pytest.raises(InputError, match="Busy: 2 videos"):
            await anext(all_downloads.run("c", "quick", tmp_path))
        await first.aclose()
        await second.aclose()

    run(test)


def test_a_download_that_nobody_waits_for_leaves_nothing(tmp_path: Path) -> None:
    async def test(all_downloads: Downloads) -> None:
        running = all_downloads.run("a", "late", tmp_path)
        await anext(running)
        await running.aclose()
        got: list[Downloaded | Fetched] = []
        while not got:  # until the first one's thread has ended
            await asyncio.sleep(0.01)
            with contextlib.suppress(InputError):
                got = [one async for one in all_downloads.run("a", "quick", tmp_path)]

    run(test, most=1)
    assert [path.name for path in tmp_path.iterdir()] == ["quick"]
