"""Vanishing visitors, killed workers, stops at any moment: `python -m tests.faults.vanish`.

Passes when every later answer is right and, at the end, memory, threads, descriptors and files
are what they were.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.faults.conftest import QUESTION, Watched, watched_app
from tests.faults.summary import percentile, report
from tests.faults.visitor import Refused, Visitor
from tests.media import make_video


def right(app: Watched, wrong: list[str], when: str) -> None:
    """The fixed question has its answer still."""
    try:
        app.app.wait_for("ready")
        told = app.fixed.ask(QUESTION)["answer"]
    except (Refused, TimeoutError) as error:
        wrong.append(f"{when}: {error}")
        return
    if told != app.answer:
        wrong.append(f"{when}: {told!r} instead of {app.answer!r}")


def vanish(count: int, rng: random.Random, app: Watched, film: Path, wrong: list[str]) -> None:
    """Each hangs up in the middle of a stream, at a random event."""
    for number in range(count):
        visitor = Visitor(app.url)
        visitor.add(film)
        events = visitor.listen("ask", visitor.begin("ask", "slow"))
        for _ in range(rng.randrange(1, 12)):
            if next(events, None) is None:
                break
        events.close()
        if number % 10 == 9:
            right(app, wrong, f"after {number + 1} vanished")


def worker(app: Watched) -> int:
    """Process id of the child with the model."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in psutil.Process(app.app.process.pid).children():
            with contextlib.suppress(psutil.Error):
                if "spawn_main" in " ".join(child.cmdline()):
                    return child.pid
        time.sleep(0.02)
    raise TimeoutError("there is no worker")


def kill(count: int, rng: random.Random, app: Watched, film: Path, wrong: list[str]) -> None:
    """The worker dies at a random moment of a turn: an error, then all is as before."""
    for number in range(count):
        visitor = Visitor(app.url)
        visitor.add(film)
        app.app.wait_for("ready")
        events = visitor.listen("ask", visitor.begin("ask", "slow"))
        for _ in range(rng.randrange(1, 6)):
            next(events, None)
        time.sleep(rng.random() * 0.3)
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker(app), signal.SIGKILL)
        kinds = [kind for kind, _ in events]
        if not kinds or kinds[-1] not in ("error", "complete"):
            wrong.append(f"kill {number}: the turn had no end: {kinds[-3:]}")
        right(app, wrong, f"after kill {number}")


def stop(count: int, rng: random.Random, app: Watched, film: Path, wrong: list[str]) -> list[float]:
    """Stop at a random moment; returns how long the app then took to be idle."""
    took = []
    visitor = Visitor(app.url)
    for number in range(count):
        if number % 3 == 0:  # with reading the video, and without
            visitor = Visitor(app.url)
            visitor.add(film)
        events = visitor.listen("ask", visitor.begin("ask", "slow"))
        next(events, None)
        time.sleep(rng.random() * rng.choice((0.2, 2.0, 9.0)))
        started = time.monotonic()
        visitor.stop()
        for _ in events:
            pass
        took.append(time.monotonic() - started)
        if number % 10 == 9:
            right(app, wrong, f"after {number + 1} stops")
    return took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vanish", type=int, default=100)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--stops", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        film = folder / "film.mp4"
        make_video(film, duration=4, size=(160, 96))
        options = (
            "--max-history-turns",
            "0",
            "--stop-grace-seconds",
            "20",
            "--session-idle-seconds",
            "180",
        )
        with watched_app(folder, film, *options) as app:
            before = app.baseline
            vanish(args.vanish, rng, app, film, wrong)
            took = stop(args.stops, rng, app, film, wrong)
            restarts = app.app.health()["restarts"]
            if restarts:
                wrong.append(f"the worker was replaced {restarts} times without being killed")
            kill(args.kills, rng, app, film, wrong)
            try:
                app.check()
            except AssertionError as error:
                wrong.append(f"at the end: {error}")
            after, files = app.usage(), len(app.files())
    return report(
        "vanish",
        wrong,
        vanished=args.vanish,
        kills=args.kills,
        stops=args.stops,
        idle_after_stop_seconds_p50=percentile(took, 0.5),
        idle_after_stop_seconds_p95=percentile(took, 0.95),
        idle_after_stop_seconds_most=percentile(took, 1.0),
        before=before,
        after=after,
        files_at_the_end=files,
    )


if __name__ == "__main__":
    sys.exit(main())
