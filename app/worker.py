"""The background worker: one child process with the model, one question at a time.

A single thread here, the supervisor, owns the child and decides everything: it takes commands
(submit, cancel, forget, close) and the child's messages from one inbox, hands out the next job,
and replaces a child that died, hangs or does not stop. Nothing else touches the child.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Literal

from app.jobs import Cancelled, Job, Queued
from app.logs import log
from app.plans import Plans
from app.settings import Settings
from app.worker_child import (
    AskMessage,
    Beat,
    Child,
    Ended,
    ForgetMessage,
    Idle,
    JobEventMessage,
    LoadFailed,
    PlanMessage,
    Planned,
    Ready,
)
from model.types import (
    Answer,
    AskRequest,
    Failure,
    InputError,
    ModelInfo,
    Piece,
    PlanRequest,
    Progress,
    VideoPlan,
)

State = Literal["loading", "ready", "busy", "restarting", "failed", "closed"]

LOST = "The model's process ended unexpectedly and is being restarted. Please ask again."
HUNG = "The model's process did not respond any more and is being restarted. Please ask again."
CLOSING = "The app is shutting down."
READ_TOO_LONG = "Reading the video took longer than {:.0f} s and was stopped; use a shorter video."
ANSWER_TOO_LONG = "The answer took longer than {:.0f} s and was ended."

_RETRY_SECONDS = 0.5  # doubled for every further try


@dataclass(frozen=True)
class Status:
    """What the page shows of the worker."""

    state: State
    model: ModelInfo | None
    waiting: int
    restarts: int
    error: str = ""


def busy(waiting: int) -> Failure:
    """What a question gets for which there is no room."""
    text = f"Busy: {waiting} questions are waiting already. Please try again in a minute."
    return Failure(text, user=False)


class Worker:
    """Starts on creation; `submit` from any thread, then read the job's events."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # guards what `submit` and `status` read
        self._waiting: deque[Job] = deque()
        self._state: State = "loading"
        self._model: ModelInfo | None = None
        self._error = ""
        self._restarts = 0
        # From here on: the supervisor's own.
        self._child: Child | None = None
        self._start_at: float | None = time.monotonic()
        self._running: Job | None = None
        self._running_since = 0.0
        self._running_pieces = 0
        self._reading = True  # until it answers
        self._stop_deadline: float | None = None
        self._stage_deadline: float | None = None
        self._too_long = ""  # what the visitor is told of a deadline that passed
        self._deaths_in_a_row = 0
        self._forget: list[str] = []
        self._plans = Plans()
        self._closing = False
        self._thread = threading.Thread(target=self._supervise, name="crosslmm-supervisor")
        self._thread.daemon = True
        self._thread.start()

    def status(self) -> Status:
        """The state now; `model` stays known while the worker restarts."""
        with self._lock:
            return Status(self._state, self._model, len(self._waiting), self._restarts, self._error)

    def worker_pid(self) -> int | None:
        """Process id of the child, for supervisors and tests."""
        child = self._child
        return child.pid if child is not None else None

    def submit(self, request: AskRequest) -> Job:
        """Queue a question. What speaks against it comes as the job's one event, a `Failure`."""
        with self._lock:
            job = Job(request, next(self._numbers), self._cancel_later)
            if self._state in ("failed", "closed"):
                job.put(Failure(self._error or CLOSING, user=False))
                return job
            if len(self._waiting) >= self._settings.queue_size:
                job.put(busy(len(self._waiting)))
                log("job_refused", job=job.id, waiting=len(self._waiting))
                return job
            self._waiting.append(job)
        log("job_queued", job=job.id)
        self._inbox.put(self._tell_positions)
        return job

    def plan(self, request: PlanRequest) -> Future[VideoPlan]:
        """What a turn on a video would take; does not wait for answers, only for the model.

        The future raises `InputError` with a sentence when there is no plan.
        """
        future: Future[VideoPlan] = Future()
        with self._lock:
            over = self._state in ("failed", "closed")
        if over:
            future.set_exception(InputError(self._error or CLOSING))
        else:
            self._inbox.put(lambda: self._plans.add(request, future))
        return future

    def forget(self, video: str) -> None:
        """Drop what the model keeps of a file, as soon as it is idle."""
        # Noted at once, and not by the inbox: a question asked after this must come after it.
        self._forget.append(video)
        self._inbox.put(lambda: None)

    def close(self, patience: float = 3.0) -> None:
        """End the child and fail what is left; returns when both have happened."""
        self._inbox.put(self._begin_closing)
        self._thread.join(patience + 3.0)

    # The supervisor.

    def _supervise(self) -> None:
        try:
            while not self._closing:
                with contextlib.suppress(queue.Empty):
                    self._inbox.get(timeout=self._patience())()
                self._check_deadlines()
                self._hand_out()
        finally:  # even after a bug here, nobody is left waiting
            self._shut_down()

    def _patience(self) -> float:
        """Seconds until a deadline could be due."""
        due = [self._settings.heartbeat_timeout_seconds / 4]
        due += [at - time.monotonic() for at in self._due() if at is not None]
        return max(0.0, min(due))

    def _due(self) -> tuple[float | None, ...]:
        stage = self._stage_deadline if self._stop_deadline is None else None
        return self._start_at, self._stop_deadline, stage

    def _check_deadlines(self) -> None:
        now, child = time.monotonic(), self._child
        if child is None:
            if self._start_at is not None and now >= self._start_at:
                self._start()
        elif self._stop_deadline is not None and now >= self._stop_deadline:
            late = self._too_long
            self._replace("not idle after stop", Failure(late, False) if late else Cancelled())
        elif self._stop_deadline is None and (self._stage_deadline or now + 1) <= now:
            self._end_stage()
        elif not child.ready and now - child.started > self._settings.load_timeout_seconds:
            self._fail(
                f"The model was not loaded within {self._settings.load_timeout_seconds:.0f} s. "
                "Raise --load-timeout-seconds or choose a smaller model."
            )
        elif child.ready and now - child.last_beat > self._settings.heartbeat_timeout_seconds:
            self._replace("no heartbeat", Failure(HUNG, user=False))

    def _end_stage(self) -> None:
        """Stop a job whose stage took too long; the child is replaced if it does not obey."""
        job, reading = self._running, self._reading
        assert job is not None
        most = self._settings.read_seconds if reading else self._settings.answer_seconds
        self._too_long = (READ_TOO_LONG if reading else ANSWER_TOO_LONG).format(most)
        log("job_too_long", job=job.id, stage="reading" if reading else "answering")
        self._cancel(job)

    def _start(self) -> None:
        self._start_at = None
        try:
            self._child = Child(self._settings, self._deliver)
        except OSError as error:
            self._fail(f"The model's process cannot be started: {error.strerror}.")
            return
        log("worker_started", pid=self._child.pid)

    def _deliver(self, child: Child, message: Any) -> None:
        """Take a message over from the child's reading thread."""
        self._inbox.put(lambda: self._receive(child, message))

    def _receive(self, child: Child, message: Any) -> None:
        if child is not self._child:
            return  # the last words of one that was replaced
        child.last_beat = time.monotonic()
        match message:
            case Beat():
                pass
            case Ready(model):
                self._deaths_in_a_row, child.ready = 0, True
                self._set_state("ready", model=model)
                seconds = time.monotonic() - child.started
                log(
                    "worker_ready",
                    seconds=seconds,
                    model=model.name,
                    revision=model.revision,
                    device=model.device,
                    quantization=model.quantization,
                    attention=model.attention,
                )
            case LoadFailed(text):
                self._fail(text)
            case JobEventMessage(number, event):
                if self._running is not None and self._running.number == number:
                    self._pass_on(self._running, event)
            case Idle(number):
                if self._running is not None and self._running.number == number:
                    self._finish(Failure(LOST, user=False))
                    self._set_state("ready")
            case Planned(number, plan):
                self._plans.arrived(number, plan)
            case Ended():
                self._replace("died", Failure(LOST, user=False))

    def _pass_on(self, job: Job, event: Any) -> None:
        if isinstance(event, Piece):
            self._running_pieces += 1
        if isinstance(event, Progress) and event.stage == "answering" and self._reading:
            self._reading = False
            self._stage_deadline = time.monotonic() + self._settings.answer_seconds
        if self._too_long and isinstance(event, Cancelled):
            event = Failure(self._too_long, user=False)
        elif self._too_long and isinstance(event, Answer):
            event = replace(event, notices=(*event.notices, self._too_long))
        job.put(event)

    def _finish(self, otherwise: Failure | Cancelled) -> None:
        """End the running job; `otherwise` is its last event unless it has had one."""
        job, self._running = self._running, None
        self._stop_deadline, self._stage_deadline, self._too_long = None, None, ""
        if job is None:
            return
        ended = "event" if job.done else type(otherwise).__name__.lower()
        job.put(otherwise)
        seconds = time.monotonic() - self._running_since
        log("job_done", job=job.id, seconds=seconds, pieces=self._running_pieces, ended=ended)

    def _replace(self, why: str, last: Failure | Cancelled) -> None:
        """End this child and plan the next; only the running job is lost."""
        child, self._child = self._child, None
        assert child is not None
        child.kill()
        log("worker_ended", why=why, pid=child.pid, exit_code=child.exit_code)
        self._finish(last)
        self._deaths_in_a_row = 0 if child.ready else self._deaths_in_a_row + 1
        if self._deaths_in_a_row > self._settings.max_restarts:
            self._fail(
                f"The model's process ended {self._deaths_in_a_row} times while loading "
                f"(exit code {child.exit_code}). There may be too little memory."
            )
            return
        wait = _RETRY_SECONDS * 2**self._deaths_in_a_row if self._deaths_in_a_row else 0.0
        self._start_at = time.monotonic() + wait
        self._forget.clear()  # a new child keeps nothing
        self._plans.begin_again()
        with self._lock:
            self._state, self._restarts = "restarting", self._restarts + 1
        self._tell_positions()

    def _fail(self, text: str) -> None:
        """Give up: every question from now on gets this sentence."""
        if self._child is not None:
            self._child.kill()
            self._child = None
        log("worker_failed")
        self._finish(Failure(text, user=False))
        self._set_state("failed", error=text)
        self._empty_queue(text)

    def _empty_queue(self, text: str) -> None:
        with self._lock:
            left = list(self._waiting)
            self._waiting.clear()
        for job in left:
            job.put(Failure(text, user=False))
        self._plans.fail(text)

    def _hand_out(self) -> None:
        """Give an idle child what it is to forget, and the next job; and plans to any."""
        child = self._child
        if child is None or not child.ready:
            return
        try:
            self._plans.hand_out(lambda n, request: child.send(PlanMessage(n, request)))
        except OSError:
            self._replace("died", Failure(LOST, user=False))
            return
        if self._running is not None:
            return
        with self._lock:
            job = self._waiting.popleft() if self._waiting else None
        try:
            while self._forget:
                child.send(ForgetMessage(self._forget.pop()))
            if job is None:
                return
            self._running, self._running_since = job, time.monotonic()
            self._running_pieces, self._reading = 0, True
            self._stage_deadline = self._running_since + self._settings.read_seconds
            child.send(AskMessage(job.number, job.request))
        except OSError:  # it died between two messages
            self._replace("died", Failure(LOST, user=False))
            return
        self._set_state("busy")
        log("job_started", job=job.id)
        self._tell_positions()

    def _tell_positions(self) -> None:
        with self._lock:
            waiting, state = list(self._waiting), self._state
        ahead = 1 if self._running is not None else 0
        for before, job in enumerate(waiting, start=ahead):
            if before:
                job.put(Queued(before))
            elif state in ("loading", "restarting"):
                job.put(Progress("loading", 0, 0))

    def _cancel_later(self, job: Job) -> None:
        self._inbox.put(lambda: self._cancel(job))

    def _cancel(self, job: Job) -> None:
        if job is self._running and self._child is not None:
            if self._stop_deadline is None:
                self._child.stop(job.number)
                self._stop_deadline = time.monotonic() + self._settings.stop_grace_seconds
                log("job_stopping", job=job.id)
            return
        with self._lock:
            waits = job in self._waiting
            if waits:
                self._waiting.remove(job)
        if waits:
            job.put(Cancelled())
            log("job_cancelled", job=job.id)
            self._tell_positions()

    def _begin_closing(self) -> None:
        self._closing = True

    def _shut_down(self) -> None:
        self._set_state("closed")
        child, self._child = self._child, None
        if child is not None:
            busy = self._running is not None or not child.ready
            if busy:
                child.kill()
            else:
                child.close(patience=0.5)  # it has nothing to put away
        self._finish(Failure(CLOSING, user=False))
        self._empty_queue(CLOSING)
        log("worker_closed")

    def _set_state(self, state: State, model: ModelInfo | None = None, error: str = "") -> None:
        with self._lock:
            self._state, self._error = state, error
            self._model = model or self._model
