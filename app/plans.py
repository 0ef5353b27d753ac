"""Questions what a video will take, on their way to the worker's child and back."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from model.types import InputError, PlanRequest, VideoPlan

MOST_SENT = 8  # a child that does not read would otherwise fill the pipe and stop its sender
MOST_WAITING = 100


class Plans:
    """Belongs to the worker's supervisor, as the child does."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._waiting: deque[tuple[PlanRequest, Future[VideoPlan]]] = deque()
        self._sent: dict[int, tuple[PlanRequest, Future[VideoPlan]]] = {}

    def add(self, request: PlanRequest, future: Future[VideoPlan]) -> None:
        """Take a request in; the oldest one gives way when there are too many."""
        self._waiting.append((request, future))
        if len(self._waiting) > MOST_WAITING:
            _, oldest = self._waiting.popleft()
            _end(oldest, "Too many videos are being added; the plan was left out.")

    def hand_out(self, send: Callable[[int, PlanRequest], None]) -> None:
        """Send as many as may be under way at once; `send` may raise, then nothing is lost."""
        while self._waiting and len(self._sent) < MOST_SENT:
            request, future = self._waiting.popleft()
            if future.cancelled():
                continue
            number = next(self._numbers)
            self._sent[number] = request, future
            send(number, request)

    def arrived(self, number: int, plan: VideoPlan | str) -> None:
        """Pass an answer on."""
        _, future = self._sent.pop(number, (None, None))
        if future is None:
            return
        if isinstance(plan, str):
            _end(future, plan)
        elif future.set_running_or_notify_cancel():
            future.set_result(plan)

    def begin_again(self) -> None:
        """The child is gone: the next one gets what this one had."""
        self._waiting.extendleft(reversed(self._sent.values()))
        self._sent.clear()

    def fail(self, text: str) -> None:
        """End all with a sentence."""
        self.begin_again()
        while self._waiting:
            _end(self._waiting.popleft()[1], text)


def _end(future: Future[VideoPlan], text: str) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(InputError(text))
