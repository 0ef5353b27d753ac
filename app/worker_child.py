"""The child process that owns the model, and the page process's handle on it.

Only `serve` runs in the child; it is the one place of `app/` from which torch gets imported.

Pipes and one shared number connect the two, and no locks: a process that is killed while it holds
a shared lock would leave the other one waiting for ever.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import queue
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from app.jobs import Cancelled
from app.logs import log, setup
from app.settings import Settings
from model.types import (
    AskRequest,
    Failure,
    InputError,
    ModelFault,
    ModelInfo,
    PlanRequest,
    Stopped,
    VideoPlan,
)

BROKEN = "The model's process failed and is being restarted. Please ask again."
_BROKEN_CODE = 70
_KILL_SECONDS = 10.0  # a process held up in a driver may stay longer; nobody waits for it


@dataclass(frozen=True)
class Beat:
    """The child is alive."""


@dataclass(frozen=True)
class Ready:
    """The model is loaded."""

    model: ModelInfo


@dataclass(frozen=True)
class LoadFailed:
    """The model cannot be loaded, and trying again would not help."""

    message: str


@dataclass(frozen=True)
class JobEventMessage:
    """An event of job `number`."""

    number: int
    event: Any


@dataclass(frozen=True)
class Idle:
    """Job `number` is over and the child waits for the next."""

    number: int


@dataclass(frozen=True)
class Ended:
    """The pipe closed: the child is gone."""


@dataclass(frozen=True)
class AskMessage:
    """Answer this."""

    number: int
    request: AskRequest


@dataclass(frozen=True)
class PlanMessage:
    """Tell what a turn on a video would take; answered beside whatever else is done."""

    number: int
    request: PlanRequest


@dataclass(frozen=True)
class Planned:
    """The plan, or one sentence why there is none."""

    number: int
    plan: VideoPlan | str


@dataclass(frozen=True)
class ForgetMessage:
    """Drop what is kept of a video."""

    video: str


class Child:
    """A running child, seen from the page process."""

    def __init__(self, settings: Settings, deliver: Callable[[Child, Any], None]) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        child_requests, self._requests = context.Pipe(duplex=False)
        self._events, child_events = context.Pipe(duplex=False)
        self._stop = context.RawValue(ctypes.c_long, 0)
        self._deliver = deliver
        self.started = self.last_beat = time.monotonic()
        self.ready = False
        self._process = context.Process(
            target=serve,
            args=(settings, child_requests, child_events, self._stop, os.getpid()),
            name="crosslmm-worker",
            daemon=True,
        )
        self._process.start()
        # Our copies must go, or the pipe would not end when the child does.
        child_requests.close()
        child_events.close()
        threading.Thread(target=self._read, name="crosslmm-events", daemon=True).start()

    @property
    def pid(self) -> int | None:
        """Process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """How it ended; minus the signal's number when a signal ended it."""
        return self._process.exitcode

    def _read(self) -> None:
        # A thread of its own: a child that stops halfway through a message blocks only this.
        try:
            while True:
                self._deliver(self, self._events.recv())
        except (EOFError, OSError):
            self._deliver(self, Ended())

    def send(self, message: AskMessage | ForgetMessage | PlanMessage) -> None:
        """Hand a message over: to an idle child, or a few plans, so that the pipe has room."""
        self._requests.send(message)

    def stop(self, number: int) -> None:
        """Tell the child that job `number` is to end; numbers never come twice."""
        self._stop.value = number

    def close(self, patience: float) -> None:
        """Let an idle child end by itself; kill it after `patience` seconds."""
        self._requests.close()
        self._process.join(patience)
        self.kill()

    def kill(self) -> None:
        """End it now, whatever it does."""
        self._process.kill()
        self._process.join(_KILL_SECONDS)
        self._requests.close()


def serve(
    settings: Settings, requests: Connection, events: Connection, stop: Any, parent: int
) -> None:
    """Run in the child: load the engine, then answer one request after the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the page, which ends us
    setup(settings.log_level)
    _die_with_parent(parent)
    sending = threading.Lock()

    def send(message: Any) -> None:
        with sending:
            events.send(message)

    beats = threading.Thread(
        target=_beat, args=(send, settings.heartbeat_seconds, parent), daemon=True
    )
    beats.start()
    try:
        engine = load_engine(settings)
    except Exception as error:  # any failure to load is told on the page
        log("load_failed", error=type(error).__name__, where=_where(error))
        send(LoadFailed(f"The model could not be loaded: {error}"))
        return
    send(Ready(engine.info))
    work: queue.SimpleQueue[AskMessage | ForgetMessage | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(requests, engine, work, send), daemon=True).start()
    while True:
        message = work.get()
        if message is None:
            return
        if isinstance(message, ForgetMessage):
            engine.forget(message.video)
        else:
            _answer(engine, message, lambda n=message.number: stop.value == n, send)
            send(Idle(message.number))


def _receive(
    requests: Connection,
    engine: Any,
    work: queue.SimpleQueue[AskMessage | ForgetMessage | None],
    send: Callable[[Any], None],
) -> None:
    """Pass messages on as they come. Plans do not wait for a running answer."""
    while True:
        try:
            message = requests.recv()
        except (EOFError, OSError):
            work.put(None)
            return
        if isinstance(message, PlanMessage):
            send(Planned(message.number, plan_or_sentence(engine, message.request)))
        else:
            work.put(message)


def plan_or_sentence(engine: Any, request: PlanRequest) -> VideoPlan | str:
    """Plan a video; whatever speaks against it becomes a sentence."""
    try:
        return engine.plan(request)
    except InputError as error:
        return str(error)
    except Exception as error:  # a bug here must not end the thread that receives questions
        log("plan_failed", error=type(error).__name__, where=_where(error))
        return "What this video takes could not be foretold; it can be asked about all the same."


def load_engine(settings: Settings, **instead: Any) -> Any:
    """Load what answers, as the settings say, but for `instead`."""
    # Before torch is there: its threads must sleep while they wait. Spinning ones stall each other
    # as soon as decoding, generating and other processes share a few cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    module, name = settings.engine.split(":", 1)
    factory = getattr(importlib.import_module(module), name)
    given = {
        "quantization": settings.quantization,
        "device": settings.device,
        "memory_budget": settings.memory_budget,
        "pooled_grid": settings.pooled_grid,
        "kv_precision": settings.kv_precision,
        "repeat_threshold": settings.repeat_threshold,
        "compile_encoder": settings.compile_encoder,
    }
    return factory.load(settings.model, **given | instead)


def _answer(
    engine: Any, message: AskMessage, stopped: Callable[[], bool], send: Callable[[Any], None]
) -> None:
    try:
        for event in engine.ask(message.request, stopped):
            send(JobEventMessage(message.number, event))
        return
    except BrokenPipeError:
        os._exit(0)  # the page process is gone
    except Exception as error:  # a bug costs one question, not the worker
        if _is_fatal(error):
            log("ask_failed", error=type(error).__name__, where=_where(error), fatal=True)
            send(JobEventMessage(message.number, Failure(BROKEN, user=False)))
            os._exit(_BROKEN_CODE)
        send(JobEventMessage(message.number, last_event(error)))


def last_event(error: Exception) -> Failure | Cancelled:
    """What a job ends with when its turn raised this."""
    if isinstance(error, Stopped):
        return Cancelled()
    if isinstance(error, InputError):
        return Failure(str(error), user=True)
    if isinstance(error, MemoryError):
        return Failure("There is not enough memory for this video. Use fewer frames.", user=False)
    if isinstance(error, ModelFault):
        return Failure(str(error), user=False)
    log("ask_failed", error=type(error).__name__, where=_where(error), fatal=False)
    return Failure("The model failed on this question. It is ready for the next one.", user=False)


def _is_fatal(error: Exception) -> bool:
    """Whether the accelerator is lost to this process: no later kernel would run."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if "OutOfMemoryError" in names:
        return False
    return "AcceleratorError" in names or bool(re.search(r"\b(CUDA|HIP|XPU) error", str(error)))


def _where(error: BaseException) -> str:
    """File and line, without the message: that could quote a visitor."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "unknown"
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"


def _beat(send: Callable[[Any], None], seconds: float, parent: int) -> None:
    while os.getppid() == parent:
        try:
            send(Beat())
        except OSError:
            break
        time.sleep(seconds)
    os._exit(0)  # the page process is gone, whatever the main thread is doing


def _die_with_parent(parent: int) -> None:
    """Let the kernel end us with the page process, even while Python cannot run a thread."""
    set_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
