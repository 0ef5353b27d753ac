"""Fifty visitors with two different videos at once: `python -m tests.faults.load`.

Real clients (`gradio_client`) ask for ten minutes. Passes when every answer belongs to its asker
and to its video, and nothing else than "busy" is refused; reports how memory grows and how long
the page takes to answer. With `--bundled` the bundled model answers, else the engine of the tests.
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import threading
import time
from pathlib import Path

from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from tests.app_server import fetch
from tests.faults.conftest import Watched, watched_app
from tests.faults.summary import percentile, report, slope
from tests.media import make_video

SECONDS_OF = (6.0, 9.0)  # how long the two videos are: tells them apart
PAUSE = 1.0  # between a visitor's questions


class Crowd:
    """All visitors' findings."""

    def __init__(self) -> None:
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.waits: list[float] = []

    def visit(self, number: int, app: Watched, film: Path, until: float, bundled: bool) -> None:
        try:
            # Fifty clients in one program on a busy machine are slow themselves.
            client = Client(app.url, verbose=False, httpx_kwargs={"timeout": 120})
            added = self._patiently(client, handle_file(film), "/add_video", until)
            if added is None:
                return
            expected = SECONDS_OF[number % 2]
            if abs(added["duration"] - expected) > 0.2:
                self.wrong.append(f"visitor {number}: a video of {added['duration']} s")
            turn = 0
            while time.monotonic() < until:
                turn += 1
                question = f"visitor {number} turn {turn}?"
                started = time.monotonic()
                told = self._patiently(client, question, "/ask", until)
                if told is None:
                    return
                self.waits.append(time.monotonic() - started)
                self._judge(number, question, told, expected, bundled)
                time.sleep(PAUSE)
        except Exception as error:  # whatever it is, it is a finding
            self.wrong.append(f"visitor {number}: {type(error).__name__}: {error}")

    def _patiently(self, client: Client, value: object, name: str, until: float) -> dict | None:
        """Call again while the app is busy; None when the time is over."""
        while time.monotonic() < until:
            try:
                return client.predict(value, api_name=name)
            except AppError as error:
                if "Busy" not in str(error):
                    raise
                self.outcomes["busy"] += 1
                time.sleep(2 * PAUSE)
        return None

    def _judge(
        self, number: int, question: str, told: dict, expected: float, bundled: bool
    ) -> None:
        self.outcomes["answered"] += 1
        if not bundled and f"You asked: {question}" not in told["answer"]:
            self.wrong.append(f"visitor {number} asked {question!r}, got {told['answer']!r}")
        if bundled and max(told["frame_times"]) > expected:
            self.wrong.append(f"visitor {number} got an answer about another video")


def watch(app: Watched, until: float, every: float) -> dict:
    """Memory of both processes and the time to the page's first byte."""
    times: list[float] = []
    memory: dict[str, list[float]] = {"page": [], "worker": []}
    page: list[float] = []
    began = time.monotonic()
    while time.monotonic() < until:
        started = time.monotonic()
        fetch(app.url)
        page.append(time.monotonic() - started)
        usage = app.usage()
        times.append(started - began)
        for name, values in memory.items():
            values.append((usage[name] or {"memory_bytes": 0})["memory_bytes"] / 2**20)
        time.sleep(every)
    half = len(times) // 2  # after everybody has come in
    return {
        "page_seconds_p50": percentile(page, 0.5),
        "page_seconds_p95": percentile(page, 0.95),
        **{
            f"{name}_mib": [round(values[0]), round(max(values)), round(values[-1])]
            for name, values in memory.items()
            if values
        },
        **{
            f"{name}_mib_per_minute": round(60 * (slope(times[half:], values[half:]) or 0), 3)
            for name, values in memory.items()
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--visitors", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--bundled", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        films = []
        for seconds in SECONDS_OF:
            films.append(folder / f"film{seconds:.0f}.mp4")
            make_video(films[-1], duration=seconds, size=(160, 96))
        with watched_app(
            folder, films[0], "--max-history-turns", "0", fake=not args.bundled
        ) as app:
            crowd, until = Crowd(), time.monotonic() + 60 * args.minutes
            threads = [
                threading.Thread(
                    target=crowd.visit,
                    args=(number, app, films[number % 2], until, args.bundled),
                    daemon=True,
                )
                for number in range(args.visitors)
            ]
            for thread in threads:
                thread.start()
                time.sleep(0.1)
            seen = watch(app, until, every=1.0)
            for thread in threads:
                thread.join(120)
            alive = sum(thread.is_alive() for thread in threads)
            wrong = crowd.wrong + [f"{alive} visitors got no end"] * bool(alive)
            app.app.wait_for("ready")
            restarts = app.app.health()["restarts"]
    wrong += [f"the worker was replaced {restarts} times"] * bool(restarts)
    return report(
        "load",
        wrong,
        visitors=args.visitors,
        minutes=args.minutes,
        engine="bundled" if args.bundled else "fake",
        outcomes=dict(crowd.outcomes),
        answer_seconds_p50=percentile(crowd.waits, 0.5),
        answer_seconds_p95=percentile(crowd.waits, 0.95),
        **seen,
    )


if __name__ == "__main__":
    sys.exit(main())
