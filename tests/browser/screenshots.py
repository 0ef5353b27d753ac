"""Take the README's screenshots:  python -m tests.browser.screenshots

With the app as it is, the bundled model and the first question of the long sample.
"""

from __future__ import annotations

import shutil

from playwright.sync_api import Browser, expect, sync_playwright

from tests.app_server import ROOT, App, running_app
from tests.browser.chat_page import ChatPage
from tests.browser.conftest import DESKTOP, PHONE, QUIET

FOLDER = ROOT / "assets" / "screenshots"
SAMPLE = 2  # the long one


def take(browser: Browser, app: App, name: str, size: dict[str, int], scheme: str) -> None:
    context = browser.new_context(viewport=size, color_scheme=scheme, device_scale_factor=1)
    chat = ChatPage(context.new_page(), app.url).open().when_ready()
    chat.pick_sample(SAMPLE)
    chat.chips.first.click()
    chat.answered(1)
    expect(chat.status).to_have_attribute("data-state", "ready")  # it is asked now and then
    chat.frames.first.click()
    chat.page.wait_for_function("!document.querySelector('.player video').seeking")
    chat.page.wait_for_timeout(1000)  # the player's wheel fades
    chat.page.evaluate("scrollTo(0, 0)")
    chat.page.mouse.move(0, 0)
    chat.page.screenshot(path=FOLDER / f"{name}.png", full_page=size is PHONE)
    context.close()


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with running_app(fake=False) as app, sync_playwright() as playwright:
        app.wait_for("ready")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=QUIET)
        take(browser, app, "desktop", DESKTOP, "light")
        take(browser, app, "dark", DESKTOP, "dark")
        take(browser, app, "phone", PHONE, "light")
        browser.close()


if __name__ == "__main__":
    main()
