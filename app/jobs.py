"""One question on its way through the worker: its events, and how to stop it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from model.types import Answer, AskRequest, Event, Failure


@dataclass(frozen=True)
class Queued:
    """The job waits; `before` others come first."""

    before: int


@dataclass(frozen=True)
class Cancelled:
    """The job was stopped before it had an answer to give."""


@dataclass(frozen=True)
class Stopping:
    """Stop was pressed; the last event follows."""


JobEvent = Event | Queued | Stopping | Cancelled

_LAST = (Answer, Failure, Cancelled)


class Job:
    """A submitted question. Its events end with one `Answer`, `Failure` or `Cancelled`.

    The worker's thread puts events in; one reader takes them out, from another thread (`events`)
    or from an event loop (`batches`).
    """

    def __init__(self, request: AskRequest, number: int, cancel: Callable[[Job], None]) -> None:
        self.id = secrets.token_hex(4)
        self.number = number
        self.request = request
        self._cancel = cancel
        self._pending: deque[JobEvent] = deque()
        self._changed = threading.Condition()
        self._listener: Callable[[], None] | None = None
        self._done = False

    @property
    def done(self) -> bool:
        """Whether the last event has been put in."""
        return self._done

    def cancel(self) -> None:
        """Ask the worker to stop this job; its last event says how it ended."""
        self.put(Stopping())
        self._cancel(self)

    def put(self, event: JobEvent) -> None:
        """Add an event; whatever comes after the last one is dropped."""
        with self._changed:
            if self._done:
                return
            self._done = isinstance(event, _LAST)
            self._pending.append(event)
            self._changed.notify_all()
            if self._listener is not None:
                self._listener()

    def events(self, timeout: float | None = None) -> Iterator[JobEvent]:
        """Yield events as they come; raises TimeoutError after `timeout` seconds without one."""
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: bool(self._pending), timeout):
                    raise TimeoutError(f"job {self.id} has been silent for {timeout} s")
                event = self._pending.popleft()
            yield event
            if isinstance(event, _LAST):
                return

    async def batches(self) -> AsyncIterator[list[JobEvent]]:
        """Yield all events that have come since the last batch, without blocking the loop."""
        loop, wake = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the loop closed: nobody reads any more
                loop.call_soon_threadsafe(wake.set)

        with self._changed:
            self._listener = notify
        while True:
            wake.clear()
            with self._changed:
                batch = list(self._pending)
                self._pending.clear()
            if batch:
                yield batch
                if isinstance(batch[-1], _LAST):
                    return
            else:
                await wake.wait()
