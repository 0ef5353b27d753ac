"""The field for a web address. A local server cannot be allowed, so nothing is fetched here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.app_server import App
from tests.browser.chat_page import ChatPage
from tests.browser.conftest import DESKTOP, PHONE

pytestmark = pytest.mark.browser

Visit = Callable[..., ChatPage]


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_forbidden_address_is_told_and_the_page_goes_on(
    size: dict[str, int], visit: Visit, fake_app: App, videos: dict[str, Path]
) -> None:
    chat = visit(fake_app, size)
    chat.web_address.fill(fake_app.url + "health")
    chat.web_address.press("Enter")
    expect(chat.notice).to_contain_text("does not lead to a public website")
    expect(chat.notice).to_contain_text("please upload the file instead")
    expect(chat.fetch_button).to_be_visible()
    expect(chat.cancel_button).to_have_count(0)
    chat.web_address.fill("file:///etc/passwd")
    chat.fetch_button.click()
    expect(chat.notice).to_contain_text("begins with http:// or https://")
    assert not chat.has_sideways_scroll()
    chat.add(videos["h264"])
    expect(chat.notice).to_have_count(0)
    chat.ask("Does it work?")
    expect(chat.answered(1)).to_contain_text("Does it work?")
