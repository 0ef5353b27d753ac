"""The whole, with nothing replaced: the bundled model answers in the browser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import expect

from app.sources import SAMPLES
from tests.app_server import App
from tests.browser.chat_page import ChatPage
from tests.media import make_video

pytestmark = [pytest.mark.browser, pytest.mark.bundled]

Visit = Callable[..., ChatPage]


@pytest.fixture(scope="module")
def sample() -> dict:
    return json.loads((SAMPLES / "samples.json").read_text())[0]


def test_a_sample_is_answered_with_both_panels(
    visit: Visit, bundled_app: App, sample: dict
) -> None:
    chat = visit(bundled_app).when_ready()
    chat.pick_sample(0)
    chat.ask(sample["questions"][0]["question"])
    assert chat.answered(1).inner_text().strip()
    layers = chat.rows.count()
    assert layers >= 2
    expect(chat.attention.locator(".gate")).to_have_count(2 * layers)
    expect(chat.frames).to_have_count(6)
    expect(chat.savings).to_contain_text("fewer visual tokens")
    chat.ask(sample["questions"][1]["question"])
    assert chat.answered(2).inner_text().strip()
    expect(chat.line).to_contain_text("the video was not read again")


@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_an_upload_is_answered_stopped_and_asked_again(
    codec: str, visit: Visit, bundled_app: App, videos: dict[str, Path], tmp_path: Path
) -> None:
    long = tmp_path / "long.mp4"
    make_video(long, duration=240, fps=10, gop=50)
    chat = visit(bundled_app).when_ready()
    chat.add(videos[codec])
    chat.ask("What number is on the sign?")
    assert chat.answered(1).inner_text().strip()
    expect(chat.rows.first).to_be_visible()
    expect(chat.savings).to_contain_text("fewer visual tokens")

    chat.add(long)
    chat.ask("What number is on the sign?")
    chat.stop_button.click()
    expect(chat.line).to_contain_text("Stopped")
    chat.ask("How many cats are there?")
    expect(chat.answers).to_have_count(2)
    assert chat.answered(2).inner_text().strip()
