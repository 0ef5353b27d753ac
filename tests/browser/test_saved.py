"""The panel "What it saved", and what can be taken along, in real headless Chromium."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Download, expect

from app.sources import list_samples
from tests.app_server import App
from tests.browser.chat_page import ChatPage
from tests.browser.conftest import DESKTOP, PHONE

pytestmark = pytest.mark.browser

Visit = Callable[..., ChatPage]
SAMPLE = list_samples()[0]


def asked(chat: ChatPage, *questions: str) -> ChatPage:
    chat.pick_sample(0)
    for number, question in enumerate(questions, start=1):
        chat.ask(question)
        chat.answered(number)
    return chat


def text_of(download: Download) -> str:
    return Path(download.path()).read_text(encoding="utf-8")


def saved(chat: ChatPage, name: str) -> Download:
    with chat.page.expect_download() as waiting:
        chat.savings.get_by_role("link", name=name, exact=True).click()
    return waiting.value


def test_the_ledger_grows_with_the_conversation(visit: Visit, fake_app: App) -> None:
    chat = asked(visit(fake_app), "One?")
    costs = chat.savings.get_by_role("table", name="What it cost")
    expect(costs.get_by_role("row", name="CrossLMM, here")).to_have_count(1)
    chat.ask("Two?")
    chat.answered(2)
    expect(costs).to_contain_text("Conversation, 2 questions")
    expect(costs.get_by_role("row", name="CrossLMM, here")).to_have_count(2)
    expect(chat.savings).to_contain_text("cost only its own text")
    chat.savings.get_by_text("The curves as a table").click()
    expect(chat.savings.get_by_role("cell", name="LLaVA-OneVision's pooling").first).to_be_visible()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_curves_are_readable(
    scheme: str, size: dict[str, int], visit: Visit, fake_app: App
) -> None:
    chat = asked(visit(fake_app, size=size, scheme=scheme), "One?")
    plots = chat.savings.get_by_role("img", name=re.compile("over the length of the video"))
    expect(plots).to_have_count(2)
    for plot in plots.all():
        plot.scroll_into_view_if_needed()
        field = plot.locator(".field").bounding_box()
        assert field["width"] >= 180
        expect(plot.get_by_text("you are here")).to_be_visible()
        here = plot.locator(".here-line").bounding_box()["x"]
        dots = plot.locator(".dot")
        expect(dots).to_have_count(3)
        for dot in dots.all():
            box = dot.bounding_box()
            assert abs(box["x"] + box["width"] / 2 - here) < 2
            assert field["y"] - 6 <= box["y"] <= field["y"] + field["height"]
        ticks = [tick.bounding_box() for tick in plot.locator(".tick").all()]
        assert len(ticks) >= 2
        for before, after in zip(ticks, ticks[1:], strict=False):
            assert before["x"] + before["width"] < after["x"]  # no label on another
        for box in ticks + [level.bounding_box() for level in plot.locator(".level em").all()]:
            assert box["height"] >= 11
            assert box["x"] >= 0 and box["x"] + box["width"] <= size["width"]
    assert not chat.has_sideways_scroll()


def test_the_run_card_can_be_read_copied_and_saved(visit: Visit, fake_app: App) -> None:
    chat = visit(fake_app)
    chat.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    asked(chat, "What is it?")
    expect(chat.savings.locator(".facts")).to_contain_text("greedy, so no seed")
    card = json.loads(text_of(saved(chat, "Download JSON")))
    assert card["video"]["sample"] == SAMPLE.path.stem
    chat.savings.get_by_role("button", name="Copy", exact=True).click()
    expect(chat.savings.locator(".copied")).to_have_text("Copied")
    assert json.loads(chat.page.evaluate("navigator.clipboard.readText()")) == card
    chat.savings.get_by_text("The whole card").click()
    expect(chat.page.locator("#run-card-text")).to_contain_text('"frame_times": [')


def test_the_link_restores_sample_and_settings(visit: Visit, fake_app: App) -> None:
    chat = visit(fake_app)
    chat.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    asked(chat, "What is it?")
    chat.savings.get_by_role("link", name="Copy link").click()
    expect(chat.savings.locator(".copied")).to_have_text("Copied")
    link = chat.page.evaluate("navigator.clipboard.readText()")
    assert link.startswith(fake_app.url + "?sample=") and "What" not in link

    other = visit(fake_app)
    other.page.goto(link.replace("frames=48", "frames=7"))
    expect(other.about).to_contain_text(SAMPLE.title)
    expect(other.notice).to_have_text(
        f"Restored from the link: the sample “{SAMPLE.title}”, at most 7 frames."
    )
    other.ask("What is it?")
    other.answered(1)
    expect(other.savings.locator(".facts")).to_contain_text("7 × 1 tokens")


def test_a_link_from_elsewhere_does_no_harm(visit: Visit, fake_app: App) -> None:
    chat = visit(fake_app)
    chat.page.goto(fake_app.url + "?sample=..%2F..%2Fetc%2Fpasswd&frames=1e99&x=%3Cscript%3E")
    expect(chat.notice).to_contain_text("a sample that is not here")
    expect(chat.notice).to_contain_text("not a number")
    asked(chat, "Does it work?")


def test_the_conversation_can_be_saved(
    visit: Visit, fake_app: App, videos: dict[str, Path]
) -> None:
    chat = visit(fake_app)
    chat.add(videos["h264"])
    chat.ask("Is <b>this</b> *safe*?")
    chat.answered(1)
    chat.ask("Second?")
    chat.answered(2)
    markdown = saved(chat, "Markdown")
    assert markdown.suggested_filename == "conversation.md"
    text = text_of(markdown)
    assert "\\<b\\>this\\</b\\> \\*safe\\*" in text and text.count("## Question") == 2
    data = json.loads(text_of(saved(chat, "JSON")))
    assert [turn["question"] for turn in data["turns"]] == ["Is <b>this</b> *safe*?", "Second?"]
    assert data["savings"]["questions"] == 2

    link = chat.savings.get_by_role("link", name="Markdown").get_attribute("href")
    guessed = re.sub(r"export/[^/]+", "export/" + "A" * 24, link)
    assert chat.page.request.get(fake_app.url + guessed).status == 404
    assert chat.page.request.get(fake_app.url + link.replace(".md", ".py")).status == 404
