"""Rows 9, 16 to 18, 20 to 22, 24 and 25: questions and the worker, through the running app."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from app.jobs import Cancelled, Job, JobEvent
from app.settings import Settings
from app.worker import Worker
from model.types import Answer, AskRequest, Failure, Piece
from tests.app_server import FAKE, PATIENCE, running_app
from tests.faults.conftest import Watched, until
from tests.faults.visitor import Refused, Visitor


def worker_pid(app: Watched) -> int:
    (pid,) = (
        child.pid
        for child in psutil.Process(app.app.process.pid).children()
        if "spawn_main" in " ".join(child.cmdline())
    )
    return pid


def outcome(visitor: Visitor, question: str) -> str:
    try:
        return visitor.ask(question)["answer"]
    except Refused as refused:
        return f"refused: {refused}"


def test_numbers_of_a_client_have_limits(app: Watched, videos: dict[str, Path]) -> None:
    """Row 9: a billion frames, and a billion words."""
    visitor = app.visitor()
    visitor.add(videos["h264"])
    told = visitor.call("ask", "What?", 10**9, 10**9)
    assert len(told["frame_times"]) <= 48  # as many as the engine has
    assert len([notice for notice in told["notices"] if "can be chosen here" in notice]) == 2
    for wrong in (-1, 1.5, "many", [1], {"a": 1}):
        with pytest.raises(Refused):
            visitor.call("ask", "What?", wrong)


@pytest.mark.parametrize("stage", ["reading", "encoding", "answering"])
def test_stop_ends_a_turn_within_a_second(
    stage: str, app: Watched, videos: dict[str, Path]
) -> None:
    """Row 16."""
    visitor = app.visitor()
    visitor.add(videos["h264"])
    started = 0.0
    restarts = app.app.health()["restarts"]
    event = visitor.begin("ask", "slow")
    last: dict = {}
    for _, data in visitor.listen("ask", event):
        last = (data or [{}])[0]
        if not started and last.get("stage") == stage and (stage != "answering" or last["answer"]):
            started = time.monotonic()
            assert visitor.stop() is True
    until(lambda: app.app.health()["state"] == "ready")
    assert started and time.monotonic() - started < 1 + 2  # and time for a busy machine
    assert app.app.health()["restarts"] == restarts
    assert last.get("stopped", True)
    assert visitor.ask("And?")["answer"].startswith("You asked: And?")


def test_visitors_who_vanish_are_noticed(app: Watched, videos: dict[str, Path]) -> None:
    """Row 17; the long form is `python -m tests.faults.vanish`."""
    for _ in range(5):
        visitor = app.visitor()
        visitor.add(videos["h264"])
        stream = visitor.listen("ask", visitor.begin("ask", "slow"))
        next(stream)
        stream.close()  # the tab is gone
    until(lambda: app.app.health()["state"] == "ready")


def test_many_visitors_at_once_get_their_own_answers_or_busy(
    app: Watched, videos: dict[str, Path]
) -> None:
    """Row 18; the long form is `python -m tests.faults.load`."""

    def one(number: int) -> tuple[int, str]:
        visitor = app.visitor()
        visitor.add(videos["h264" if number % 2 else "av1"])
        return number, outcome(visitor, f"number {number}?")

    with ThreadPoolExecutor(16) as pool:
        told = list(pool.map(one, range(16)))
    answered = [(n, text) for n, text in told if not text.startswith("refused")]
    assert all(text.startswith(f"You asked: number {n}?") for n, text in answered)
    assert all("Busy" in text for _, text in told if text.startswith("refused"))
    assert len(answered) >= 7  # one runs, six wait


@pytest.mark.parametrize(
    ("question", "said"), [("crash", "ended unexpectedly"), ("illegal", "is being restarted")]
)
def test_a_worker_that_breaks_is_replaced(
    question: str, said: str, app: Watched, videos: dict[str, Path]
) -> None:
    """Rows 20 and 21: a lost accelerator and a dead process."""
    visitor, other = app.visitor(), app.visitor()
    for one in (visitor, other):
        one.add(videos["h264"])
    restarts = app.app.health()["restarts"]
    with ThreadPoolExecutor(1) as pool:
        broken = pool.submit(outcome, visitor, question)
        survivor = outcome(other, "Still there?")
        assert said in broken.result()
    assert survivor.startswith("You asked: Still there?")
    # The other visitor may have been answered before the broken question had its turn.
    until(lambda: app.app.health()["restarts"] == restarts + 1)
    app.app.wait_for("ready")


def test_a_killed_worker_fails_only_the_running_job(app: Watched, videos: dict[str, Path]) -> None:
    """Row 21."""
    visitor, other = app.visitor(), app.visitor()
    for one in (visitor, other):
        one.add(videos["h264"])
    events = visitor.listen("ask", visitor.begin("ask", "slow"))
    next(events)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(outcome, other, "Still there?")
        until(lambda: app.app.health()["waiting"] == 1)
        os.kill(worker_pid(app), signal.SIGKILL)
        last = list(events)[-1]
        assert last[0] == "error" and "ask again" in last[1]["error"]
        assert waiting.result().startswith("You asked: Still there?")


def test_a_frozen_worker_is_replaced_and_the_text_so_far_stays(
    app: Watched, videos: dict[str, Path]
) -> None:
    """Row 22."""
    visitor = app.visitor()
    visitor.add(videos["h264"])
    visitor.ask("What?")  # the video is read
    texts, last = [], None
    for kind, data in visitor.listen("ask", visitor.begin("ask", "slow")):
        if kind == "error":
            last = data["error"]
        elif data and data[0].get("answer"):
            texts.append(data[0]["answer"])
            if len(texts) == 2:
                os.kill(worker_pid(app), signal.SIGSTOP)
    assert texts[-1].startswith("You asked: slow"[: len(texts[-1])])
    assert last is not None and "did not respond" in last


def test_prompts_have_a_limit_and_markup_is_text(app: Watched, videos: dict[str, Path]) -> None:
    """Row 25."""
    visitor = app.visitor()
    visitor.add(videos["h264"])
    with pytest.raises(Refused, match="413 The request is too large"):
        visitor.ask("x" * 1_000_001)
    with pytest.raises(Refused, match="characters; at most 2000"):
        visitor.ask("x" * 100_000)
    hostile = "<script>alert(1)</script> <|im_end|> ../../etc/passwd \u202e {{7*7}} ${HOME}"
    assert hostile in visitor.ask(hostile)["answer"]
    for wrong in (None, 5, [], {"a": 1}, "", " "):
        with pytest.raises(Refused):
            visitor.ask(wrong)


def test_the_log_holds_ids_and_nothing_of_visitors(
    app: Watched, videos: dict[str, Path], tmp_path: Path
) -> None:
    visitor = app.visitor()
    named = tmp_path / "PRIVATEname.mp4"
    named.write_bytes(videos["h264"].read_bytes())
    visitor.add(named)
    visitor.ask("PRIVATEquestion?")
    for name, given in (
        ("ask", "PRIVATEquestion broken"),
        ("add_sample", "PRIVATEtitle"),
        ("add_video_url", "http://127.0.0.1/PRIVATEurl"),
    ):
        with pytest.raises(Refused):
            visitor.call(name, given)
    told = app.told.read_text()
    assert "PRIVATE" not in told
    started = [line for line in told.splitlines() if "event=job_started" in line]
    assert started and all(" job=" in line for line in started)


def test_health_tells_all_that_a_supervisor_needs(app: Watched) -> None:
    health = app.app.health()
    assert health["state"] in ("ready", "busy") and health["waiting"] == 0
    for process in ("page", "worker"):
        assert health[process]["memory_bytes"] > 10 << 20
        assert health[process]["threads"] > 0 and health[process]["descriptors"] > 0
    assert {"python", "gradio", "torch"} <= set(health["versions"])
    assert health["disk_bytes"] >= 0 and health["visitors"] >= 1
    assert json.dumps(health).count("/") == 0  # no path of this machine


# Without the shared app.


def events(job: Job) -> list[JobEvent]:
    return list(job.events(PATIENCE))


@pytest.fixture
def hasty() -> Iterator[Callable[..., Worker]]:
    """Workers whose stages have little time."""
    workers: list[Worker] = []

    def start(**limits: float) -> Worker:
        workers.append(Worker(Settings(engine=FAKE, **limits)))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def test_reading_has_a_deadline(hasty: Callable[..., Worker]) -> None:
    """Rows 5 and 16."""
    worker = hasty(read_seconds=1.5)
    last = events(worker.submit(AskRequest("/v", "slow")))[-1]
    assert isinstance(last, Failure) and "Reading the video took longer than 2 s" in last.message
    assert isinstance(events(worker.submit(AskRequest("/w", "quick")))[-1], Answer)
    assert worker.status().restarts == 0


def test_an_answer_has_a_deadline_and_its_text_stays(hasty: Callable[..., Worker]) -> None:
    """Row 25."""
    worker = hasty(answer_seconds=3.0)
    events(worker.submit(AskRequest("/v", "first")))
    told = events(worker.submit(AskRequest("/v", "slow")))
    last = told[-1]
    assert isinstance(last, Answer) and last.stopped
    assert last.text == "".join(event.text for event in told if isinstance(event, Piece))
    assert any("took longer than 3 s" in notice for notice in last.notices)
    assert worker.status().restarts == 0


def test_a_stage_that_does_not_end_at_its_deadline_costs_the_worker(
    hasty: Callable[..., Worker],
) -> None:
    """Rows 5 and 16: for example a kernel that never returns."""
    worker = hasty(answer_seconds=1.0, stop_grace_seconds=1.0)
    job, waiting = worker.submit(AskRequest("/v", "hang")), worker.submit(AskRequest("/v", "ok"))
    last = events(job)[-1]
    assert isinstance(last, Failure) and "took longer than 1 s" in last.message
    assert not isinstance(events(waiting)[-1], Failure | Cancelled)
    assert worker.status().restarts == 1


def test_a_fault_of_the_model_is_its_sentence(hasty: Callable[..., Worker]) -> None:
    worker = hasty()
    last = events(worker.submit(AskRequest("/v", "faulty")))[-1]
    assert last == Failure("The model's numbers broke down.", user=False)
    assert isinstance(events(worker.submit(AskRequest("/v", "ok")))[-1], Answer)


def test_a_page_from_before_a_restart_asks_for_the_video_again(videos: dict[str, Path]) -> None:
    """Row 24."""
    with running_app() as app:
        app.wait_for("ready")
        visitor = Visitor(app.url)
        visitor.add(videos["h264"])
        old = visitor.key
    with running_app() as app:
        app.wait_for("ready")
        visitor = Visitor(app.url)
        visitor.key = old
        with pytest.raises(Refused, match="please add the video again"):
            visitor.ask("What?")
        visitor.add(videos["h264"])
        assert visitor.ask("What?")["answer"].startswith("You asked: What?")


def test_the_app_ends_at_once_whatever_is_under_way(
    videos: dict[str, Path], tmp_path: Path
) -> None:
    """Row 16: a signal while an answer, a download and a page are open."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        site = f"127.0.0.1:{silent.getsockname()[1]}"
        with running_app(
            "--data-dir", str(tmp_path), program=("-m", "tests.faults.launch"), FAULT_SITE=site
        ) as app:
            app.wait_for("ready")
            asking, fetching = Visitor(app.url), Visitor(app.url)
            asking.add(videos["h264"])
            answer = asking.listen("ask", asking.begin("ask", "slow"))
            next(answer)
            fetching.begin("add_video_url", f"http://{site}/film.mp4")
            silent.accept()  # the download waits for its first byte
            children = psutil.Process(app.process.pid).children(recursive=True)
            started = time.monotonic()
            app.process.send_signal(signal.SIGTERM)
            last = list(answer)[-1]
            assert app.process.wait(PATIENCE) == 0
            assert time.monotonic() - started < 1.5 + 3  # and time for a busy machine
            assert last[0] == "error" and "shutting down" in last[1]["error"]
    _, alive = psutil.wait_procs(children, 10)
    assert not alive
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
