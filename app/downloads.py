"""The downloads of all visitors: one at a time for each, a few at a time for all."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from app.fetch import Fetched, fetch
from app.settings import Settings
from model.types import InputError, Stopped


@dataclass(frozen=True)
class Downloaded:
    """How much of a video has arrived, in bytes; `total` is None while that is not known."""

    done: int = 0
    total: int | None = None


class Downloads:
    """Runs `fetch` in threads of its own. Its methods are called from the page's event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(settings.max_fetches, "crosslmm-fetch")
        self._running: dict[str, threading.Event] = {}

    async def run(
        self, visitor: str, url: str, folder: Path
    ) -> AsyncIterator[Downloaded | Fetched]:
        """Fetch, telling how far it has come; the last is the `Fetched`.

        Raises as `fetch` does, and `InputError` when the visitor or all visitors have enough
        downloads running. Closing this iterator early ends the download.
        """
        if visitor in self._running:
            raise InputError("A video is being fetched already; cancel that first.")
        if len(self._running) >= self._settings.max_fetches:
            raise InputError(
                f"Busy: {len(self._running)} videos are being fetched for others. "
                "Please try again in a minute."
            )
        cancelled = self._running[visitor] = threading.Event()
        loop, wake = asyncio.get_running_loop(), asyncio.Event()
        now, handed_over = Downloaded(), False

        def tell(action: Callable[[], object]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop closed: nobody waits any more
                loop.call_soon_threadsafe(action)

        def progress(done: int, total: int | None) -> None:
            nonlocal now
            now = Downloaded(done, total)
            tell(wake.set)

        job = self._threads.submit(
            fetch, url, folder, self._settings, progress=progress, stop=cancelled.is_set
        )
        job.add_done_callback(lambda _: tell(wake.set))
        try:
            while not job.done():
                yield now
                await wake.wait()
                wake.clear()
            handed_over = True
            yield job.result()
        finally:
            if not handed_over:
                cancelled.set()
                job.add_done_callback(_discard)
            if job.done():
                self._running.pop(visitor)
            else:
                job.add_done_callback(lambda _: tell(lambda: self._running.pop(visitor)))

    def cancel(self, visitor: str) -> bool:
        """End the visitor's download, if there is one."""
        running = self._running.get(visitor)
        if running is None or running.is_set():
            return False
        running.set()
        return True


def _discard(job: Future[Fetched]) -> None:
    """Delete a video that nobody waits for any more."""
    with contextlib.suppress(InputError, Stopped):
        job.result().path.unlink(missing_ok=True)
