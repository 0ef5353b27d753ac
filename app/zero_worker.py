"""The worker where no process may keep a GPU: each turn runs inside a `spaces.GPU` call.

On ZeroGPU the `spaces` package lends a GPU for some seconds to a fork of this process. The model
is loaded here, before the page is served; a video is decoded here too, so that the GPU is lent for
the model's work only. What a fork keeps of a video is gone with it, so a later question encodes
again, but does not decode. Elsewhere `spaces.GPU` changes nothing, and the turn runs right here.

This is the one place where the page process imports torch.
"""

from __future__ import annotations

import contextvars
import ctypes
import itertools
import multiprocessing
import os
import queue
import re
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from app.jobs import Cancelled, Job, Queued
from app.logs import log
from app.settings import Settings
from app.worker import CLOSING, State, Status, busy
from app.worker_child import last_event, load_engine, plan_or_sentence
from model.types import (
    AskRequest,
    Failure,
    InputError,
    ModelInfo,
    PlanRequest,
    Progress,
    Stopped,
    VideoPlan,
)

NEEDS_SPACES = "--worker zerogpu needs the spaces package; install it with: pip install spaces"
CUT_OFF = "The GPU was taken back before the answer was there. Ask with fewer frames, or try again."

_KEPT_VIDEOS = 4  # decoded frames of so many stay on the disk
_SAID_BY_SPACES = re.compile(r"<[^>]+>")


def wanted(settings: Settings) -> bool:
    """Whether turns have to run inside `spaces.GPU` calls."""
    if settings.worker != "auto":
        return settings.worker == "zerogpu"
    zero = os.environ.get("SPACES_ZERO_GPU", "").lower() in {"1", "t", "true"}  # as spaces reads it
    return zero and find_spec("spaces") is not None


class _Turns:
    """What the lent process needs: all of it is there when that process is forked."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        # Shared with every fork, so that Stop reaches it.
        self.stopped = multiprocessing.get_context("fork").RawValue(ctypes.c_long, 0)

    def run(self, number: int, request: AskRequest, decoded: Any, seconds: int) -> Iterator[Any]:
        """Answer; failures come as the last event, for errors do not cross with their words."""
        del seconds  # is for `spaces`, which is given the same arguments
        try:
            yield from self.engine.ask(
                request, lambda: self.stopped.value == number, decoded=decoded
            )
        except Exception as error:  # a bug costs one question
            yield last_event(error)


class ZeroWorker:
    """Does what `app.worker.Worker` does, one question at a time, without a process of its own."""

    def __init__(self, settings: Settings) -> None:
        spaces = import_module("spaces")  # before torch: it stands in for CUDA in this process
        self._settings = settings
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[tuple[Job, contextvars.Context] | None] = queue.SimpleQueue()
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._state: State = "loading"
        self._model: ModelInfo | None = None
        self._error = ""
        self._decoded: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._folder = Path(tempfile.mkdtemp(prefix="crosslmm-frames-", dir=settings.data_dir))
        self._turns = _Turns(None)
        self._call = spaces.GPU(_call(self._turns), duration=lambda *arguments: arguments[-1])
        self._load()
        threading.Thread(target=self._serve, name="crosslmm-zero", daemon=True).start()

    def _load(self) -> None:
        started = time.monotonic()
        # Lent GPUs are large, and weights that are not quantised move to them without conversion.
        plain = "none" if self._settings.quantization == "auto" else self._settings.quantization
        try:
            self._turns.engine = load_engine(self._settings, quantization=plain)
        except Exception as error:  # any failure to load is told on the page
            log("load_failed", error=type(error).__name__)
            self._state, self._error = "failed", f"The model could not be loaded: {error}"
            return
        self._model, self._state = self._turns.engine.info, "ready"
        log(
            "worker_ready",
            seconds=time.monotonic() - started,
            model=self._model.name,
            device=self._model.device,
            quantization=self._model.quantization,
            attention=self._model.attention,
            zero_gpu=True,
        )

    def status(self) -> Status:
        """The state now."""
        with self._lock:
            return Status(self._state, self._model, len(self._waiting), 0, self._error)

    def worker_pid(self) -> None:
        """There is no process that stays."""
        return None

    def submit(self, request: AskRequest) -> Job:
        """Queue a question. What speaks against it comes as the job's one event, a `Failure`."""
        with self._lock:
            job = Job(request, next(self._numbers), self._cancel)
            if self._state in ("failed", "closed"):
                job.put(Failure(self._error or CLOSING, user=False))
                return job
            if len(self._waiting) >= self._settings.queue_size:
                job.put(busy(len(self._waiting)))
                return job
            self._waiting.append(job)
            self._tell_positions()
        # The visitor's own request, from which `spaces` takes whose share of GPU time this is.
        self._jobs.put((job, contextvars.copy_context()))
        log("job_queued", job=job.id)
        return job

    def plan(self, request: PlanRequest) -> Future[VideoPlan]:
        """What a turn on a video would take; see `app.worker.Worker.plan`."""
        future: Future[VideoPlan] = Future()
        planned = plan_or_sentence(self._turns.engine, request) if self._model else self._error
        if isinstance(planned, str):
            future.set_exception(InputError(planned))
        else:
            future.set_result(planned)
        return future

    def forget(self, video: str) -> None:
        """Drop what is kept of a file."""
        with self._lock:
            gone = [self._decoded.pop(key) for key in list(self._decoded) if key[0] == video]
        for decoded in gone:
            Path(decoded.file).unlink(missing_ok=True)
        if self._turns.engine is not None:
            self._turns.engine.forget(video)

    def close(self, patience: float = 3.0) -> None:
        """Fail what is left."""
        del patience
        with self._lock:
            self._state, left = "closed", [*self._waiting, self._running]
            self._waiting.clear()
        for job in left:
            if job is not None:
                self._turns.stopped.value = job.number
                job.put(Failure(CLOSING, user=False))
        self._jobs.put(None)
        shutil.rmtree(self._folder, ignore_errors=True)

    # The one thread that answers.

    def _serve(self) -> None:
        while (taken := self._jobs.get()) is not None:
            job, context = taken
            with self._lock:
                if job not in self._waiting:  # cancelled meanwhile
                    continue
                self._waiting.remove(job)
                self._running, self._state = job, "busy"
                self._tell_positions()
            started = time.monotonic()
            try:
                context.run(self._answer, job)
            except Exception as error:  # `spaces` has errors of its own kind
                log("turn_cut_off", job=job.id, error=type(error).__name__)
                job.put(Failure(_words(error), user=False))
            with self._lock:
                self._running = None
                self._state = "ready" if self._state == "busy" else self._state
            log("job_done", job=job.id, seconds=time.monotonic() - started)

    def _answer(self, job: Job) -> None:
        job.put(Progress("reading", 0, 0))
        try:
            decoded = self._frames(job)
        except Exception as error:  # what is wrong with the video, or a bug
            job.put(last_event(error))
            return
        seconds = self._seconds(job.request, decoded.frames)
        log("gpu_asked_for", job=job.id, seconds=seconds, frames=decoded.frames)
        for event in self._call(job.number, job.request, decoded, seconds):
            job.put(event)
        job.put(Failure(CUT_OFF, user=False))  # dropped where the turn came to its end

    def _frames(self, job: Job) -> Any:
        request = job.request
        stat = os.stat(request.video) if os.path.exists(request.video) else None
        key = request.video, stat and (stat.st_mtime_ns, stat.st_size), request.max_frames
        with self._lock:
            if key in self._decoded:
                self._decoded.move_to_end(key)
                return self._decoded[key]

        def stopped() -> bool:
            return self._turns.stopped.value == job.number

        decoded = self._turns.engine.decode(request, self._folder, stopped)
        if stopped():
            Path(decoded.file).unlink(missing_ok=True)
            raise Stopped
        with self._lock:
            self._decoded[key] = decoded
            oldest = self._decoded.popitem(last=False)[1] if self._too_many() else None
        if oldest is not None:
            Path(oldest.file).unlink(missing_ok=True)
        return decoded

    def _too_many(self) -> bool:
        return len(self._decoded) > _KEPT_VIDEOS

    def _seconds(self, request: AskRequest, frames: int) -> int:
        """How long to ask for a GPU: what the model is foretold to need, and the way there."""
        speed = self._settings.gpu_operations_per_second
        needed = self._turns.engine.model_seconds(request, frames, speed)
        whole = self._settings.gpu_start_seconds + needed
        return round(min(max(whole, 1), self._settings.gpu_most_seconds))

    def _cancel(self, job: Job) -> None:
        with self._lock:
            waits = job in self._waiting
            if waits:
                self._waiting.remove(job)
                self._tell_positions()
            elif job is self._running:
                self._turns.stopped.value = job.number
        if waits:
            job.put(Cancelled())

    def _tell_positions(self) -> None:
        for before, job in enumerate(self._waiting, start=int(self._running is not None)):
            if before:
                job.put(Queued(before))


def _call(turns: _Turns) -> Callable[..., Iterator[Any]]:
    """A plain generator function, which is what `spaces.GPU` takes."""

    def answer(number: int, request: AskRequest, decoded: Any, seconds: int) -> Iterator[Any]:
        yield from turns.run(number, request, decoded, seconds)

    return answer


def _words(error: Exception) -> str:
    """What `spaces` says to the visitor (no GPU free, share used up), else that it was cut off."""
    said = _SAID_BY_SPACES.sub("", str(getattr(error, "message", ""))).strip()
    if not said or "aborted" in said:
        return CUT_OFF
    return f"The GPU could not be had: {said}"
