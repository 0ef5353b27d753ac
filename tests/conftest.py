from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.app_server import BUNDLED, App, running_app
from tests.media import make_video, truncate

os.environ.setdefault("OMP_NUM_THREADS", "2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if BUNDLED.is_dir():
        return
    for item in items:
        if item.get_closest_marker("bundled"):
            item.add_marker(pytest.mark.skip(reason=f"there is no model in {BUNDLED}"))


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
def fake_app() -> Iterator[App]:
    """The app with an engine that needs no weights and misbehaves when asked to."""
    with running_app() as app:
        app.wait_for("ready")
        yield app


@pytest.fixture(scope="session")
def bundled_app() -> Iterator[App]:
    """The app as it is, with the bundled model."""
    with running_app(fake=False) as app:
        app.wait_for("ready")
        yield app
