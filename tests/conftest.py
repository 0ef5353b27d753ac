from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.logs import logger
from tests.app_server import BUNDLED, App, running_app
from tests.fake_engine import GATES
from tests.media import make_video, truncate

# Threads that spin while they wait stall each other where tests share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("browser"):
            # A busy machine can stall Chromium past any wait; a true fault fails twice.
            item.add_marker(pytest.mark.flaky(reruns=1))
    if BUNDLED.is_dir():
        return
    for item in items:
        if item.get_closest_marker("bundled"):
            item.add_marker(pytest.mark.skip(reason=f"there is no model in {BUNDLED}"))


@pytest.fixture(autouse=True)
def same_log() -> Iterator[None]:
    """Undoes `app.logs.setup`: threads of other tests would write into a stream that is closed."""
    handlers, propagate, level = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    made = {
        "h264": folder / "holiday.mp4",
        "av1": folder / "holiday.webm",
        "empty": folder / "empty.mp4",
        "text": folder / "notes.mp4",
        "truncated": folder / "cut.mp4",
    }
    make_video(made["h264"], codec="libx264", duration=6)
    make_video(made["av1"], codec="libsvtav1", duration=6)
    made["empty"].touch()
    made["text"].write_text("This is not a video.\n" * 50)
    truncate(made["h264"], made["truncated"], 0.6)
    return made


@pytest.fixture(scope="session")
def gate_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gates")


@pytest.fixture
def gates(gate_folder: Path) -> Iterator[Callable[[str], None]]:
    """Opens a gate at which a `gated` question halts; all are shut again at the end."""

    def open_gate(name: str) -> None:
        assert name in GATES
        (gate_folder / name).touch()

    yield open_gate
    for gate in gate_folder.iterdir():
        gate.unlink()


@pytest.fixture(scope="session")
def fake_app(gate_folder: Path) -> Iterator[App]:
    """The app with an engine that needs no weights and misbehaves when asked to."""
    # Patient with Stop: on a busy machine the worker should not be replaced for being slow.
    with running_app("--stop-grace-seconds", "20", FAKE_GATES=str(gate_folder)) as app:
        app.wait_for("ready")
        yield app


@pytest.fixture(scope="session")
def bundled_app() -> Iterator[App]:
    """The app as it is, with the bundled model."""
    with running_app(fake=False) as app:
        app.wait_for("ready")
        yield app


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random encoder, for the later parts of the bundled recipe."""
    from tests.small_recipe import write_encoder  # only here: tests of the page need no torch

    out = tmp_path_factory.mktemp("recipe")
    write_encoder(out / "encoder")
    return out
