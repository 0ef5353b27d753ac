"""The panel "Where it looked" in real headless Chromium: each control, at both sizes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.app_server import App, fetch
from tests.browser.chat_page import ChatPage
from tests.browser.conftest import DESKTOP, PHONE
from tests.fake_engine import LAYERS
from tests.fake_maps import HEADS, LLM_LAYERS

pytestmark = pytest.mark.browser

Visit = Callable[..., ChatPage]
Gates = Callable[[str], None]
DURATION, FRAMES = 24.0, 48  # of the fake's video


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def chat(
    request: pytest.FixtureRequest, visit: Visit, fake_app: App, videos: dict[str, Path]
) -> ChatPage:
    """A page with an answer: "You asked: What is it? It is at 0:07, after 0 turns."."""
    page = visit(fake_app, size=request.param)
    page.add(videos["h264"])
    page.ask("What is it?")
    page.answered(1)
    return page


def labels(chat: ChatPage) -> list[str]:
    return [row.get_attribute("aria-label") for row in chat.rows.all()]


def test_a_word_of_the_answer_shows_where_it_looked(chat: ChatPage) -> None:
    every = labels(chat)
    expect(chat.words).to_have_text(
        ["You", "asked:", "What", "is", "it?", "It", "is", "at", "0:07,", "after", "0", "turns."]
    )
    chat.look("word:1")
    assert labels(chat) != every
    expect(chat.attention.locator(".headline")).to_contain_text("“asked”")
    chat.look("word:0")
    expect(chat.attention.locator(".headline")).to_contain_text("“You”")
    chat.look("word:all")
    assert labels(chat) == every


def test_kinds_heads_and_scales(chat: ChatPage) -> None:
    expect(chat.rows).to_have_count(len(LAYERS))
    expect(chat.attention.locator(".gate")).to_have_count(2 * len(LAYERS))
    chat.look("kind:self")
    expect(chat.rows).to_have_count(LLM_LAYERS)
    expect(chat.attention.locator(".headline")).to_contain_text("lay on text")
    chat.look("kind:v2v")
    expect(chat.rows).to_have_count(len(LAYERS))
    expect(chat.words).to_have_count(0)
    expect(chat.attention.locator(".legend")).to_contain_text("how narrow the look is")
    chat.look("kind:t2v")
    mean = labels(chat)
    heads = chat.attention.get_by_label("Heads")
    expect(heads.locator("option")).to_have_count(1 + HEADS)
    heads.select_option("1")
    expect(heads).to_have_value("1")
    expect(chat.rows.first).not_to_have_attribute("aria-label", mean[0])
    shift = [re.search(r"at (\S+),", label)[1] for label in labels(chat)]
    assert shift != [re.search(r"at (\S+),", label)[1] for label in mean]
    chat.look("scale:log")
    expect(chat.attention.locator(".legend")).to_contain_text("or less")
    expect(heads).to_have_value("1")
    chat.ask("And now?")  # how it is drawn stays
    expect(chat.answers).to_have_count(2)
    expect(chat.words.nth(2)).to_have_text("And")
    expect(chat.attention.locator('[data-look="scale:log"]')).to_have_attribute(
        "aria-pressed", "true"
    )
    assert not chat.has_sideways_scroll()


def test_a_cell_shows_that_layers_overlay_on_that_frame(chat: ChatPage) -> None:
    chat.click_cell(row=1, share=0.2)
    expect(chat.cell).to_contain_text(f"Layer {LAYERS[1]} at 0:04")
    chat.wait_for_player_time(0.2 * DURATION)
    picture, overlay = chat.cell.locator("img").all()
    box, heat = picture.bounding_box(), overlay.bounding_box()
    assert box == heat and box["width"] / box["height"] == pytest.approx(16 / 9, rel=0.02)
    assert picture.evaluate("img => img.complete && img.naturalWidth === 320")
    first = overlay.get_attribute("src")
    chat.click_cell(row=2, share=0.1)
    expect(chat.cell).to_contain_text(f"Layer {LAYERS[2]} at 0:02")
    expect(chat.cell.locator(".overlay")).not_to_have_attribute("src", first)
    off = chat.attention.locator(".chosen-cell").evaluate(
        """mark => {
          const row = document.querySelectorAll("#panel-attention .cells")[2];
          const [one, other] = [mark.getBoundingClientRect(), row.getBoundingClientRect()];
          return Math.abs(one.top - other.top) + Math.abs(one.bottom - other.bottom);
        }"""
    )
    assert off < 3
    expect(chat.cell).to_be_in_viewport()  # the player is sought, but the page stays here
    assert not chat.has_sideways_scroll()
    chat.cell.get_by_role("button", name="Close").click()
    expect(chat.cell).to_have_count(0)


def test_the_grid_by_keyboard(visit: Visit, fake_app: App, videos: dict[str, Path]) -> None:
    chat = visit(fake_app)
    chat.add(videos["h264"])
    chat.ask("What is it?")
    chat.answered(1)
    chat.plot.focus()
    for key in ("ArrowDown", "ArrowRight", "Shift+ArrowRight", "Enter"):
        chat.page.keyboard.press(key)
    expect(chat.cell).to_contain_text(f"Layer {LAYERS[1]} at 0:02")
    chat.words.nth(1).focus()
    chat.page.keyboard.press("Enter")
    expect(chat.words.nth(1)).to_have_attribute("aria-pressed", "true")
    expect(chat.words.nth(1)).to_be_focused()  # although the panel was drawn anew


def test_what_if_shows_both_answers_and_the_difference(chat: ChatPage) -> None:
    chat.what_if.locator("summary").click()
    chat.what_if.get_by_role("button", name="Ask again").click()
    expect(chat.versus).to_contain_text("at least one change")
    chat.what_if.get_by_label("from").fill("0:10")
    chat.what_if.get_by_label("to", exact=True).fill("0:05")
    chat.what_if.get_by_role("button", name="Ask again").click()
    expect(chat.versus).to_contain_text("must end after it begins")
    chat.what_if.get_by_label("to", exact=True).fill("0:14")
    chat.what_if.get_by_role("button", name="Ask again").click()
    expect(chat.versus).to_contain_text("The answer stays the same.")
    expect(chat.versus).to_contain_text("with 0:10 to 0:14 hidden")
    expect(chat.versus.locator(".versus-card")).to_have_count(2)
    expect(chat.versus.locator(".change")).to_have_count(len(LAYERS))
    expect(chat.versus.locator(".hidden-frame")).to_have_count(8)
    expect(chat.answers).to_have_count(1)  # the conversation stays as it is
    chat.what_if.get_by_label("to", exact=True).fill("")
    chat.what_if.get_by_label("from").fill("")
    chat.what_if.get_by_label("words' own look").check()
    chat.what_if.get_by_role("button", name="Ask again").click()
    expect(chat.versus).to_contain_text("without text to video")
    expect(chat.versus.locator(".change")).to_have_count(LLM_LAYERS)
    assert not chat.has_sideways_scroll()
    chat.ask("And now?")
    expect(chat.answers).to_have_count(2)
    expect(chat.versus).to_have_count(0)  # it was about the answer before


def test_a_what_if_can_be_stopped_and_fails_alone(
    visit: Visit, fake_app: App, videos: dict[str, Path], gates: Gates, gate_folder: Path
) -> None:
    chat = visit(fake_app)
    chat.add(videos["h264"])
    for gate in ("reading", "encoding", "answering", "end"):
        gates(gate)
    chat.ask("gated")
    chat.answered(1)
    (gate_folder / "answering").unlink()  # shut again
    chat.what_if.locator("summary").click()
    chat.what_if.get_by_label("words' own look").check()
    chat.what_if.get_by_role("button", name="Ask again").click()
    chat.versus.get_by_role("button", name="Stop").click()
    expect(chat.versus).to_contain_text("Stopped.")
    chat.ask("And now?")
    expect(chat.answers).to_have_count(2)
    expect(chat.answers.nth(1)).to_contain_text("And now?")


def test_an_untrained_model_says_why_its_own_attention_comes_first(
    visit: Visit, fake_app: App, videos: dict[str, Path]
) -> None:
    chat = visit(fake_app)
    chat.add(videos["h264"])
    chat.ask("untrained")
    chat.answered(1)
    expect(chat.rows).to_have_count(LLM_LAYERS)
    expect(chat.attention.locator(".remark")).to_contain_text("adds nothing to the answer")
    chat.look("kind:t2v")
    expect(chat.rows).to_have_count(len(LAYERS))


def test_maps_are_downloaded(visit: Visit, fake_app: App, videos: dict[str, Path]) -> None:
    chat = visit(fake_app)
    chat.add(videos["h264"])
    chat.ask("What is it?")
    chat.answered(1)
    chat.look("kind:self")
    with chat.page.expect_download() as figure:
        chat.attention.get_by_role("link", name="PNG").click()
    with Image.open(figure.value.path()) as opened:
        assert opened.format == "PNG" and opened.width == 1400
    with chat.page.expect_download() as numbers:
        chat.attention.get_by_role("link", name="NPZ").click()
    with np.load(numbers.value.path()) as file:
        assert str(file["question"]) == "What is it?"
        assert file["self_words"].shape[1:] == (LLM_LAYERS, FRAMES)


def test_nobody_gets_pictures_without_the_token(
    visit: Visit, fake_app: App, videos: dict[str, Path]
) -> None:
    chat = visit(fake_app)
    chat.add(videos["h264"])
    chat.ask("What is it?")
    chat.answered(1)
    address = chat.frames.first.locator("img").first.get_attribute("src")
    with Image.open(io.BytesIO(fetch(fake_app.url + address))) as opened:
        assert opened.format == "JPEG"
    folder = address.rsplit("/", 1)[0]
    for wrong in (
        f"{folder}/999.jpg", f"{folder}/-1.jpg", f"{folder}/maps.txt", "looked/x/0.jpg",
        f"{folder}/..%2f..%2fhealth", "looked/%C3%A9/maps.npz",
    ):  # fmt: skip
        status = chat.page.evaluate("async url => (await fetch(url)).status", wrong)
        assert status == 404, wrong


def test_an_earlier_video_comes_back_with_its_maps(
    visit: Visit, fake_app: App, videos: dict[str, Path]
) -> None:
    chat = visit(fake_app)
    chat.add(videos["h264"])
    chat.ask("What is it?")
    chat.answered(1)
    expect(chat.rows).to_have_count(len(LAYERS))
    chat.choose_another()
    chat.add(videos["av1"])
    expect(chat.answers).to_have_count(0)
    expect(chat.rows).to_have_count(0)
    chat.page.get_by_role("button", name=f"↩ {videos['h264'].name}").click()
    expect(chat.about).to_contain_text(videos["h264"].name)
    expect(chat.answers).to_have_count(1)
    expect(chat.rows).to_have_count(len(LAYERS))
    chat.look("kind:self")
    expect(chat.rows).to_have_count(LLM_LAYERS)
