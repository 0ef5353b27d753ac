"""The background worker with an engine that misbehaves on demand."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from app.jobs import Cancelled, Job, JobEvent, Queued
from app.settings import Settings
from app.worker import Worker
from model.types import Answer, AskRequest, Failure, Piece, Progress
from tests.app_server import FAKE, PATIENCE, ROOT

VIDEO = "/nowhere/video.mp4"


@contextlib.contextmanager
def running(**options: object) -> Iterator[Worker]:
    worker = Worker(Settings(engine=FAKE, **options))
    try:
        yield worker
    finally:
        worker.close()


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with running(heartbeat_seconds=0.2, heartbeat_timeout_seconds=6.0) as worker:
        yield worker


def ask(worker: Worker, question: str, video: str = VIDEO) -> Job:
    return worker.submit(AskRequest(video, question))


def events(job: Job) -> list[JobEvent]:
    return list(job.events(PATIENCE))


def until(job: Job, kind: type) -> Iterator[JobEvent]:
    """Events until one of `kind` has come; the rest can still be read."""
    for event in job.events(PATIENCE):
        yield event
        if isinstance(event, kind):
            return


def state(worker: Worker, *wanted: str) -> str:
    deadline = time.monotonic() + PATIENCE
    while worker.status().state not in wanted:
        assert time.monotonic() < deadline, worker.status()
        time.sleep(0.02)
    return worker.status().state


def usable(worker: Worker) -> bool:
    """A fixed question gets its fixed answer."""
    return events(ask(worker, "fixed", "/other"))[-1].text.startswith("You asked: fixed")


def test_a_turn_is_progress_then_pieces_then_one_answer(worker: Worker) -> None:
    got = events(ask(worker, "What is it?", "/first"))
    kinds = [type(event) for event in got]
    assert kinds[-1] is Answer
    assert kinds.count(Answer) == 1
    assert kinds.index(Piece) > kinds.index(Progress)
    stages = [event.stage for event in got if isinstance(event, Progress)]
    assert list(dict.fromkeys(stages)) in (
        ["reading", "encoding", "answering"],
        ["loading", "reading", "encoding", "answering"],
    )
    text = "".join(event.text for event in got if isinstance(event, Piece))
    assert text == got[-1].text
    assert worker.status().model.name == "fake"


def test_a_second_question_does_not_read_the_video_again(worker: Worker) -> None:
    first, second = (events(ask(worker, "What?", "/kept")) for _ in range(2))
    assert not first[-1].memory_reused
    assert second[-1].memory_reused
    assert {event.stage for event in second if isinstance(event, Progress)} == {"answering"}


def test_forget_drops_what_is_kept(worker: Worker) -> None:
    events(ask(worker, "What?", "/dropped"))
    worker.forget("/dropped")
    assert not events(ask(worker, "What?", "/dropped"))[-1].memory_reused


def test_waiting_jobs_know_how_many_come_first(worker: Worker) -> None:
    state(worker, "ready")
    first, *others = [ask(worker, "slow"), *(ask(worker, f"number {n}") for n in range(3))]
    places = [next(until(job, Queued)).before for job in others]
    assert places == [1, 2, 3]
    first.cancel()
    rest = [events(job) for job in others]
    assert Queued(1) in rest[2]  # told again when the queue moves
    assert all(f"number {n}" in rest[n][-1].text for n in range(3))


@pytest.mark.parametrize("stage", ["reading", "encoding", "answering"])
def test_stop_ends_the_turn_within_a_second_and_keeps_the_worker(
    worker: Worker, stage: str
) -> None:
    state(worker, "ready")
    pid = worker.worker_pid()
    job = ask(worker, "slow", f"/stopped-{stage}")
    for event in job.events(PATIENCE):
        if isinstance(event, Progress) and event.stage == stage:
            break
    stopped = time.monotonic()
    job.cancel()
    last = events(job)[-1]
    assert time.monotonic() - stopped < 1.5  # a second, and time for a busy machine
    assert isinstance(last, Cancelled) or last.stopped
    state(worker, "ready")
    assert worker.worker_pid() == pid
    assert usable(worker)


def test_a_stopped_answer_keeps_its_text(worker: Worker) -> None:
    job = ask(worker, "slow")
    said = [event.text for event in until(job, Piece) if isinstance(event, Piece)]
    job.cancel()
    rest = events(job)
    said += [event.text for event in rest if isinstance(event, Piece)]
    assert rest[-1].stopped
    assert rest[-1].text == "".join(said)


def test_a_waiting_job_can_be_stopped(worker: Worker) -> None:
    first, second = ask(worker, "slow"), ask(worker, "never")
    second.cancel()
    assert events(second)[-1] == Cancelled()
    first.cancel()
    assert isinstance(events(first)[-1], Answer | Cancelled)


def test_stopping_twice_or_too_late_does_nothing(worker: Worker) -> None:
    job = ask(worker, "What?")
    got = events(job)
    job.cancel()
    job.cancel()
    assert isinstance(got[-1], Answer)
    assert usable(worker)


def test_errors_of_the_user_and_of_ours_keep_the_worker(worker: Worker) -> None:
    state(worker, "ready")
    pid = worker.worker_pid()
    assert events(ask(worker, "wrong"))[-1] == Failure("This question cannot be asked.", True)
    ours = events(ask(worker, "broken"))[-1]
    assert isinstance(ours, Failure) and not ours.user
    assert "broken" not in ours.message
    assert worker.worker_pid() == pid
    assert usable(worker)


@pytest.mark.parametrize("how", ["crash", "hang", "freeze"])
def test_a_worker_that_dies_hangs_or_freezes_is_replaced(worker: Worker, how: str) -> None:
    state(worker, "ready")
    before, pid = worker.status().restarts, worker.worker_pid()
    job, queued = ask(worker, how), ask(worker, "next in the queue")
    if how == "hang":
        list(until(job, Progress))
        job.cancel()
    last = events(job)[-1]
    assert last == Cancelled() if how == "hang" else isinstance(last, Failure)
    assert "next in the queue" in events(queued)[-1].text
    assert worker.status().restarts == before + 1
    assert worker.worker_pid() != pid
    assert not psutil.pid_exists(pid)


def test_a_worker_killed_from_outside_fails_only_the_running_job(worker: Worker) -> None:
    job, queued = ask(worker, "slow"), ask(worker, "survivor")
    said = [event.text for event in until(job, Piece) if isinstance(event, Piece)]
    os.kill(worker.worker_pid(), signal.SIGKILL)
    last = events(job)[-1]
    assert said and isinstance(last, Failure) and not last.user
    assert "survivor" in events(queued)[-1].text


def test_an_idle_worker_that_dies_is_replaced(worker: Worker) -> None:
    state(worker, "ready")
    os.kill(worker.worker_pid(), signal.SIGKILL)
    state(worker, "restarting", "loading")
    assert usable(worker)


def test_the_queue_is_bounded() -> None:
    with running(queue_size=2) as worker:
        jobs = [ask(worker, "slow") for _ in range(2)]
        refused = events(ask(worker, "too many"))
        assert len(refused) == 1
        assert refused[0].message.startswith("Busy")
        for job in jobs:
            job.cancel()
            events(job)
        assert usable(worker)


def test_jobs_wait_for_the_model_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LOAD_SECONDS", "1")
    with running() as worker:
        assert worker.status().state == "loading"
        got = events(ask(worker, "early"))
        assert Progress("loading", 0, 0) in got
        assert isinstance(got[-1], Answer)


def test_a_model_that_cannot_be_loaded_is_told_to_everybody() -> None:
    with running(model="missing") as worker:
        early = ask(worker, "What?")
        state(worker, "failed")
        for job in (early, ask(worker, "Again?")):
            assert "There is no model at 'missing'" in events(job)[-1].message


def test_a_load_that_keeps_dying_is_given_up() -> None:
    with running(model="crash", max_restarts=1) as worker:
        state(worker, "failed")
        assert "ended 2 times while loading" in worker.status().error


def test_a_load_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LOAD_SECONDS", "60")
    with running(load_timeout_seconds=1.0, heartbeat_timeout_seconds=1.0) as worker:
        state(worker, "failed")
        assert "--load-timeout-seconds" in worker.status().error


def test_a_process_that_cannot_be_started_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("app.worker.Child", refuse)
    with running() as worker:
        state(worker, "failed")
        assert "Resource temporarily unavailable" in worker.status().error


def test_close_ends_the_child_and_fails_what_is_left() -> None:
    with running() as worker:
        state(worker, "ready")
        pid = worker.worker_pid()
        running_job, waiting = ask(worker, "slow"), ask(worker, "What?")
        list(until(running_job, Piece))
    assert isinstance(events(waiting)[-1], Failure)
    assert isinstance(events(running_job)[-1], Failure)
    assert not psutil.pid_exists(pid)
    assert isinstance(events(ask(worker, "after"))[-1], Failure)


def test_no_child_outlives_a_killed_page() -> None:
    script = (
        "import sys, time\n"
        "from app.settings import Settings\n"
        "from app.worker import Worker\n"
        "if __name__ == '__main__':\n"
        f"    worker = Worker(Settings(engine={FAKE!r}))\n"
        "    while worker.status().state != 'ready': time.sleep(0.05)\n"
        "    print(worker.worker_pid(), flush=True)\n"
        "    time.sleep(600)\n"
    )
    page = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    child = psutil.Process(int(page.stdout.readline()))
    page.kill()
    page.wait()
    child.wait(PATIENCE)
