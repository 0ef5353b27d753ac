from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.app_server import App
from tests.browser.chat_page import ChatPage

DESKTOP = {"width": 1440, "height": 900}
PHONE = {"width": 390, "height": 844}

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium")
    assert path is not None, "chromium is not installed; bash tests/run.sh installs it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., ChatPage]]:
    """Open the page as a new visitor; at the end nothing may have gone wrong inside of it."""
    contexts, problems = [], []

    def watch(page: Page, url: str) -> None:
        page.on("pageerror", lambda error: problems.append(f"script error: {error}"))
        page.on(
            "response",
            lambda reply: reply.status < 500 or problems.append(f"{reply.status} of {reply.url}"),
        )
        page.on(
            "request",
            lambda request: (
                request.url.startswith((url, "data:", "blob:"))
                or problems.append(f"asked another server: {request.url}")
            ),
        )

    def open_page(app: App, size: dict[str, int] = DESKTOP, scheme: str = "light") -> ChatPage:
        context = chromium.new_context(viewport=size, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        watch(page, app.url)
        return ChatPage(page, app.url).open()

    yield open_page
    for context in contexts:
        context.close()
    assert not problems, problems
