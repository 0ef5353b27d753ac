"""axe-core finds nothing serious: light and dark, desktop and phone, before and after answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.app_server import App
from tests.browser.chat_page import ChatPage
from tests.browser.conftest import DESKTOP, PHONE

pytestmark = pytest.mark.browser

Visit = Callable[..., ChatPage]
SETTLED = """() => Promise.all(
  document.getAnimations()
    .filter(one => one.effect.getComputedTiming().iterations !== Infinity)
    .map(one => one.finished.catch(() => null)))"""
SERIOUS = {"serious", "critical"}


def serious(chat: ChatPage) -> list[str]:
    """What axe-core finds, one line for each element."""
    # Colours are judged as they are in the end, not halfway through a transition.
    chat.page.evaluate(SETTLED)
    found = Axe().run(chat.page, options={"resultTypes": ["violations"]}).response["violations"]
    return [
        f"{one['id']} ({one['impact']}): {node['target']} {node['html'][:160]} "
        f"{node.get('failureSummary', '')[:200]}"
        for one in found
        if one["impact"] in SERIOUS
        for node in one["nodes"]
    ]


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_is_found(
    scheme: str, size: dict[str, int], visit: Visit, fake_app: App
) -> None:
    chat = visit(fake_app, size=size, scheme=scheme).when_ready()
    assert serious(chat) == []
    chat.pick_sample(0)
    chat.ask("What is it, and when?")
    chat.answered(1)
    chat.ask("And then?")
    chat.answered(2)
    for summary in chat.savings.locator("summary").all():
        summary.click()
    assert serious(chat) == []
    chat.ask("wrong")
    expect(chat.line).to_contain_text("cannot be asked")
    assert serious(chat) == []
