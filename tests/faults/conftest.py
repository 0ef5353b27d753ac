from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.app_server import App, running_app
from tests.faults.visitor import Visitor

# What may remain after any fault, above what there was before it.
MORE_MEMORY = 60 << 20
MORE_THREADS = 46  # of two pools that grow with many visitors and have an end: 40 and CPUs + 4
MORE_DESCRIPTORS = 12
PATIENCE = 60.0
QUESTION = "Is this the fixed question?"
UPLOAD_LIMIT = 2_000_000


@dataclass
class Watched:
    """The app, and what it was like when all was well."""

    app: App
    folder: Path
    told: Path
    fixed: Visitor
    answer: str = ""
    baseline: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.app.url

    def visitor(self) -> Visitor:
        return Visitor(self.app.url)

    def usage(self) -> dict[str, dict[str, int]]:
        health = self.app.health()
        return {name: health[name] for name in ("page", "worker")}

    def check(self) -> None:
        """After every row: green, no more than before, the fixed question's fixed answer."""
        self.app.wait_for("ready")
        assert self.fixed.ask(QUESTION)["answer"] == self.answer
        self.app.wait_for("ready")
        until(lambda: not self._too_much(), self._too_much)
        assert self.app.process.poll() is None

    def _too_much(self) -> list[str]:
        found = [
            f"{process}: {name} {before[name]} -> {now[process][name]}"
            for now in (self.usage(),)
            for process, before in self.baseline.items()
            for name, more in (
                ("memory_bytes", MORE_MEMORY),
                ("threads", MORE_THREADS),
                ("descriptors", MORE_DESCRIPTORS),
            )
            if now[process][name] > before[name] + more
        ]
        return found + [f"left over: {name}" for name in self.helpers()]

    def helpers(self) -> list[str]:
        """Processes that read or fetch one video."""
        names = []
        for child in psutil.Process(self.app.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                line = " ".join(child.cmdline())
                if "tests.faults.decoder" in line or "video_child" in line:
                    names.append(line)
        return names

    def files(self) -> list[Path]:
        """Visitors' files, those of uploads included."""
        return [path for path in self.folder.rglob("*") if path.is_file()]


def until(condition: Callable[[], bool], told: Callable[[], object] = str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.05)


@contextlib.contextmanager
def watched_app(
    folder: Path, video: Path, *options: str, fake: bool = True, **environment: str
) -> Iterator[Watched]:
    told = folder / "told.log"
    with running_app(
        "--data-dir",
        str(folder / "data"),
        *options,
        fake=fake,
        program=("-m", "tests.faults.launch"),
        told=told,
        **environment,
    ) as app:
        app.wait_for("ready")
        watched = Watched(app, folder / "data", told, Visitor(app.url))
        watched.fixed.add(video)
        for _ in range(3):  # pools and caches fill
            watched.answer = watched.fixed.ask(QUESTION)["answer"]
        app.wait_for("ready")
        watched.baseline = watched.usage()
        yield watched


@pytest.fixture(scope="session")
def the_app(
    tmp_path_factory: pytest.TempPathFactory, videos: dict[str, Path], gate_folder: Path
) -> Iterator[Watched]:
    """One app for all rows in which the model is not the point."""
    options = {
        "--max-upload-bytes": str(UPLOAD_LIMIT),
        "--queue-size": "6",
        "--max-history-turns": "0",  # the fixed answer must not count turns
        "--all-map-bytes": "8MB",  # these visitors never say goodbye
        "--stop-grace-seconds": "20",
        "--heartbeat-seconds": "0.2",
        "--heartbeat-timeout-seconds": "6",
        "--check-seconds": "6",
    }
    arguments = [word for pair in options.items() for word in pair]
    folder = tmp_path_factory.mktemp("faults")
    with watched_app(folder, videos["h264"], *arguments, FAKE_GATES=str(gate_folder)) as watched:
        yield watched


@pytest.fixture
def app(the_app: Watched) -> Iterator[Watched]:
    """The app, looked at again after the test."""
    yield the_app
    the_app.check()
