"""The page in real headless Chromium, with an engine that halts and fails when asked to."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.app_server import App, running_app
from tests.browser.chat_page import ChatPage
from tests.browser.conftest import PHONE
from tests.fake_engine import GATES, LAYERS

pytestmark = pytest.mark.browser

Visit = Callable[..., ChatPage]
Gates = Callable[[str], None]
NAMES = {"h264": "H.264", "av1": "AV1"}


@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_upload_ask_watch_stop_ask_again(
    codec: str, visit: Visit, fake_app: App, videos: dict[str, Path], gates: Gates
) -> None:
    chat = visit(fake_app)
    chat.add(videos[codec])
    expect(chat.about).to_contain_text(NAMES[codec])
    chat.page.wait_for_function("document.querySelector('.player video').videoWidth === 320")

    chat.ask("What is gated?")
    for stage in ("reading", "encoding"):
        chat.at_stage(stage)
        gates(stage)
    chat.at_stage("answering")
    expect(chat.question).to_have_value("")
    first = chat.answers.first
    expect(first).to_have_text("You asked: What")  # the rest has not been said yet
    gates("answering")
    expect(first).to_contain_text("It is at 0:07, after 0 turns.")
    chat.stop_button.click()
    expect(chat.answered(1)).to_contain_text("(stopped)")

    chat.ask("And now?")
    expect(chat.answered(2)).to_contain_text("You asked: And now? It is at 0:07")
    expect(chat.line).to_contain_text("the video was not read again")
    expect(chat.rows).to_have_count(len(LAYERS))
    expect(chat.frames).to_have_count(6)
    expect(chat.savings).to_contain_text("99.5 %")
    expect(chat.savings).to_contain_text("not read again")


def test_stop_while_the_video_is_read(
    visit: Visit, fake_app: App, videos: dict[str, Path], gates: Gates
) -> None:
    chat = visit(fake_app)
    chat.add(videos["h264"])
    gates("reading")
    chat.ask("gated")
    chat.at_stage("encoding")
    chat.stop_button.click()
    expect(chat.line).to_have_text("Stopped.")
    expect(chat.answers.first).to_contain_text("Stopped before the first word.")
    chat.ask("Again?")
    expect(chat.answered(2)).to_contain_text("Again?")


@pytest.mark.parametrize(
    ("kind", "said"), [("empty", "empty"), ("text", "not a video"), ("truncated", "cut off")]
)
def test_a_bad_file_is_told_and_the_page_goes_on(
    kind: str, said: str, visit: Visit, fake_app: App, videos: dict[str, Path]
) -> None:
    chat = visit(fake_app)
    chat.upload(videos[kind])
    expect(chat.notice).to_contain_text(said)
    chat.add(videos["h264"])
    expect(chat.notice).to_have_count(0)
    chat.ask("Does it work?")
    expect(chat.answered(1)).to_contain_text("Does it work?")


def test_a_bad_file_keeps_the_video_that_is_there(
    visit: Visit, fake_app: App, videos: dict[str, Path]
) -> None:
    chat = visit(fake_app)
    chat.add(videos["h264"])
    chat.ask("First?")
    chat.answered(1)
    chat.upload(videos["text"])
    expect(chat.notice).to_be_visible()
    expect(chat.about).to_contain_text(videos["h264"].name)
    chat.ask("Second?")
    expect(chat.answered(2)).to_contain_text("after 1 turns")


def test_no_question_and_no_video(visit: Visit, fake_app: App, videos: dict[str, Path]) -> None:
    chat = visit(fake_app)
    chat.ask("What is it?")
    expect(chat.line).to_contain_text("Choose a sample or upload a video first, then ask.")
    expect(chat.question).to_have_value("What is it?")  # still there to be asked
    chat.add(videos["h264"])
    chat.question.fill("  ")
    chat.ask_button.click()
    expect(chat.line).to_have_text("Type a question first.")
    chat.ask("What is it?")
    expect(chat.answered(1)).to_contain_text("What is it?")


def test_a_failing_model_is_told_and_the_page_goes_on(
    visit: Visit, fake_app: App, videos: dict[str, Path]
) -> None:
    chat = visit(fake_app)
    chat.add(videos["h264"])
    for number, (question, said) in enumerate(
        [("broken", "failed on this question"), ("crash", "ended unexpectedly")], start=1
    ):
        chat.ask(question)
        expect(chat.line).to_contain_text(said)
        expect(chat.answers.nth(number - 1)).to_contain_text(said)
        expect(chat.ask_button).to_be_visible()
    chat.ask("Still there?")
    expect(chat.answered(3)).to_contain_text("Still there?")


def test_samples_and_their_questions(visit: Visit, fake_app: App) -> None:
    chat = visit(fake_app)
    chat.pick_sample(0)
    question = chat.chips.first.inner_text()
    chat.chips.first.click()
    expect(chat.answered(1)).to_contain_text(question)
    chat.pick_sample(1)
    expect(chat.answers).to_have_count(0)  # another video, another conversation
    expect(chat.frames).to_have_count(0)
    assert chat.chips.first.inner_text() != question
    chat.page.locator("#visit [data-visit]").click()  # back to the first one
    expect(chat.answers).to_have_count(1)
    expect(chat.chips.first).to_have_text(question)
    expect(chat.samples.first).to_be_hidden()
    chat.ask("Still there?")
    expect(chat.answered(2)).to_contain_text("after 1 turns")
    expect(chat.line).to_contain_text("the video was not read again")


def test_an_upload_gets_the_models_examples(
    visit: Visit, fake_app: App, videos: dict[str, Path]
) -> None:
    chat = visit(fake_app).when_ready()
    expect(chat.page.locator(".model-note")).to_contain_text("without weights")
    chat.add(videos["h264"])
    expect(chat.chips.first).to_have_text("What number is on the red sign?")


def test_figures_and_times_seek_the_player(
    visit: Visit, fake_app: App, videos: dict[str, Path]
) -> None:
    chat = visit(fake_app)
    chat.add(videos["h264"])
    chat.page.wait_for_function("document.querySelector('.player video').readyState >= 1")
    chat.ask("At 0:02 or later?")
    chat.answered(1)
    chat.page.get_by_role("link", name="0:02").first.click()
    chat.wait_for_player_time(2)
    box = chat.plot.bounding_box()
    chat.plot.click(position={"x": box["width"] * 0.2, "y": box["height"] / 2})
    chat.wait_for_player_time(0.2 * 24)  # the fake's video lasts 24 s
    chat.plot.click(position={"x": box["width"] * 0.05, "y": box["height"] / 2})
    chat.wait_for_player_time(0.05 * 24)
    left = chat.plot.locator(".playhead").evaluate("mark => parseFloat(mark.style.left)")
    assert left == pytest.approx(5, abs=1)
    chat.frames.first.click()
    chat.page.wait_for_function("document.querySelector('.player video').currentTime > 5")


def test_markup_in_a_question_is_text(visit: Visit, fake_app: App, videos: dict[str, Path]) -> None:
    chat = visit(fake_app)
    chat.add(videos["h264"])
    hostile = "<b>bold</b> **strong** <|im_end|> <img src=x onerror=alert(1)>"
    chat.ask(hostile)
    expect(chat.answered(1)).to_contain_text(hostile)
    expect(chat.questions.first).to_have_text(hostile)
    assert chat.page.locator("#chat b, #chat strong, #chat img").count() == 0


def test_two_visitors_have_nothing_in_common(
    visit: Visit, fake_app: App, videos: dict[str, Path]
) -> None:
    one, other = visit(fake_app), visit(fake_app)
    one.add(videos["h264"])
    other.add(videos["av1"])
    one.ask("What does one ask?")
    other.ask("What does the other ask?")
    expect(one.answered(1)).to_contain_text("What does one ask?")
    expect(other.answered(1)).to_contain_text("What does the other ask?")
    expect(one.about).to_contain_text("H.264")


def test_a_question_during_an_answer_is_kept_and_told(
    visit: Visit, fake_app: App, videos: dict[str, Path], gates: Gates
) -> None:
    chat = visit(fake_app)
    chat.add(videos["h264"])
    chat.ask("gated")
    chat.at_stage("reading")
    chat.ask("Too soon?")
    expect(chat.line).to_contain_text("An answer is still on its way.")
    expect(chat.question).to_have_value("Too soon?")
    expect(chat.questions).to_have_count(1)
    for gate in GATES:
        gates(gate)
    chat.answered(1)
    chat.question.press("Enter")
    expect(chat.answered(2)).to_contain_text("Too soon?")


def test_a_new_video_ends_a_running_answer(
    visit: Visit, fake_app: App, videos: dict[str, Path]
) -> None:
    chat = visit(fake_app)
    chat.add(videos["h264"])
    chat.ask("gated")
    chat.at_stage("reading")
    chat.add(videos["av1"])
    expect(chat.line).to_have_class(re.compile("line-idle"))
    expect(chat.ask_button).to_be_visible()
    expect(chat.questions).to_have_count(0)
    expect(chat.frames).to_have_count(0)
    chat.ask("What is new?")
    expect(chat.answered(1)).to_contain_text("after 0 turns")


def test_a_visitor_who_leaves_frees_the_worker(
    visit: Visit, fake_app: App, videos: dict[str, Path]
) -> None:
    fake_app.wait_for("ready")
    chat = visit(fake_app)
    chat.add(videos["h264"])
    chat.ask("gated")
    chat.at_stage("reading")
    chat.page.close()
    fake_app.wait_for("ready")
    assert fake_app.health()["waiting"] == 0


def test_retry_edit_and_undo(
    visit: Visit, fake_app: App, videos: dict[str, Path], gates: Gates
) -> None:
    chat = visit(fake_app)
    chat.add(videos["h264"])
    chat.ask("One?")
    chat.answered(1)
    chat.ask("Two gated *stars*?")
    chat.at_stage("answering")
    chat.page.keyboard.press("Escape")
    expect(chat.answered(2)).to_contain_text("(stopped)")
    for gate in GATES:
        gates(gate)
    chat.use("Retry")
    expect(chat.answers.nth(1)).to_contain_text("after 1 turns")
    expect(chat.answered(2)).not_to_contain_text("(stopped)")
    chat.use("Edit")
    expect(chat.question).to_have_value("Two gated *stars*?")
    expect(chat.answers).to_have_count(2)  # kept until the new one is sent
    chat.ask("Three?")
    expect(chat.questions.nth(1)).to_have_text("Three?")
    expect(chat.answered(2)).to_contain_text("after 1 turns")
    chat.use("Edit")
    expect(chat.question).to_have_value("Three?")
    chat.question.press("Escape")
    expect(chat.question).to_have_value("")
    chat.ask("Four?")
    expect(chat.answered(3)).to_contain_text("after 2 turns")
    chat.use("Undo")
    expect(chat.answers).to_have_count(2)
    expect(chat.frames).not_to_have_count(0)  # of the answer that is the last one now


def test_escape_stops(visit: Visit, fake_app: App, videos: dict[str, Path], gates: Gates) -> None:
    chat = visit(fake_app)
    chat.add(videos["h264"])
    chat.ask("gated")
    chat.at_stage("reading")
    expect(chat.stop_button).to_be_visible()
    chat.page.keyboard.press("Escape")
    expect(chat.line).to_have_text("Stopped.")


def test_the_card_before_a_turn_is_adjusted_and_kept_to(
    visit: Visit, fake_app: App, videos: dict[str, Path]
) -> None:
    chat = visit(fake_app)
    chat.add(videos["h264"])
    expect(chat.plan).to_contain_text("48 after pooling")
    frames = chat.plan.get_by_label("Frames")
    frames.fill("500")
    frames.press("Enter")
    expect(chat.plan).to_contain_text("At most 48 frames.")
    expect(frames).to_have_value("48")
    frames.fill("12")
    frames.press("Enter")
    expect(chat.plan).to_contain_text("12 after pooling")
    chat.plan.get_by_label("Tokens per frame").select_option("4")
    expect(chat.plan).to_contain_text("48 after pooling")
    chat.ask("What is it?")
    chat.answered(1)
    expect(chat.shots).to_have_count(3)  # of 12 frames, every fourth
    expect(chat.plan).to_contain_text("about 12 s to read")


def test_the_timeline_shows_frames_and_attention_and_seeks(
    visit: Visit, fake_app: App, videos: dict[str, Path], gates: Gates
) -> None:
    chat = visit(fake_app)
    chat.add(videos["h264"])
    expect(chat.page.locator(".timeline")).to_contain_text("when it reads the video")
    gates("reading")
    gates("encoding")
    chat.ask("focused and gated")
    expect(chat.shots).to_have_count(12)  # while the answer is still on its way
    expect(chat.pins).to_have_count(0)
    for gate in GATES:
        gates(gate)
    chat.answered(1)
    expect(chat.pins).to_have_count(1)
    chat.pins.first.click()
    chat.wait_for_player_time(5.25)
    chat.shots.nth(0).focus()
    chat.page.keyboard.press("ArrowRight")
    expect(chat.shots.nth(1)).to_be_focused()
    chat.page.keyboard.press("Enter")
    chat.wait_for_player_time(2.75)  # frames every half second, every fourth has a picture
    track = chat.page.locator(".timeline .plot").bounding_box()
    chat.page.mouse.click(track["x"] + 0.1 * track["width"], track["y"] + track["height"] - 4)
    chat.wait_for_player_time(0.1 * 24)
    chat.ask("And flat?")
    chat.answered(2)
    expect(chat.pins).not_to_have_count(1)


def test_a_clicked_word_is_shown_in_the_panel(
    visit: Visit, fake_app: App, videos: dict[str, Path]
) -> None:
    chat = visit(fake_app)
    chat.add(videos["h264"])
    chat.ask("What is it?")
    chat.answered(1)
    chat.click_word(1, "0:07,")
    pressed = chat.attention.locator('[data-look^="word:"][aria-pressed="true"]')
    expect(pressed).to_have_text("0:07,")
    chat.click_word(1, "asked:")
    expect(pressed).to_have_text("asked:")


def test_an_answer_tells_where_and_when(
    visit: Visit, fake_app: App, videos: dict[str, Path]
) -> None:
    chat = visit(fake_app)
    chat.add(videos["h264"])
    chat.ask("What is focused?")
    expect(chat.answered(1)).to_contain_text("Seen at 0:05, clearly")
    expect(chat.answers.first).to_contain_text("first word after")
    chat.answers.first.get_by_role("link", name="0:05").click()
    chat.page.wait_for_function("document.querySelector('.player video').currentTime > 5")
    chat.ask("What is it?")
    expect(chat.answered(2)).to_contain_text("First word after")
    expect(chat.answers.nth(1)).not_to_contain_text("een at")  # too flat to say


def test_a_new_conversation_begins_anew(
    visit: Visit, fake_app: App, videos: dict[str, Path]
) -> None:
    chat = visit(fake_app)
    chat.add(videos["h264"])
    chat.ask("One?")
    chat.answered(1)
    chat.use("New conversation")
    expect(chat.answers).to_have_count(0)
    expect(chat.frames).to_have_count(0)
    chat.ask("Two?")
    expect(chat.answered(1)).to_contain_text("after 0 turns")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(scheme: str, visit: Visit, fake_app: App, videos: dict[str, Path]) -> None:
    chat = visit(fake_app, size=PHONE, scheme=scheme)
    assert not chat.has_sideways_scroll()
    chat.add(videos["h264"])
    chat.ask("What is it?")
    chat.answered(1)
    expect(chat.frames).to_have_count(6)
    assert not chat.has_sideways_scroll()
    tops = [
        part.bounding_box()["y"]
        for part in (chat.player, chat.question, chat.attention, chat.savings)
    ]
    assert tops == sorted(tops)
    for tick in chat.attention.locator(".tick").all():
        box = tick.bounding_box()
        assert box["height"] >= 11 and box["x"] >= 0 and box["x"] + box["width"] <= 390


def test_light_and_dark(visit: Visit, fake_app: App) -> None:
    chat = visit(fake_app, scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = chat.page.evaluate(ground)
    chat.page.get_by_role("button", name="Switch between light and dark").click()
    light = chat.page.evaluate(ground)
    assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 150
    assert sum(map(int, re.findall(r"\d+", light)[:3])) > 650


def test_the_page_is_there_while_the_model_loads(visit: Visit) -> None:
    with running_app(FAKE_LOAD_SECONDS="20") as app:
        assert app.health()["state"] == "loading"
        chat = visit(app)
        expect(chat.status).to_contain_text("Loading the model")
        chat.pick_sample(0)
        chat.ask("Too early?")
        expect(chat.line).to_contain_text("still loading")
        expect(chat.answered(1)).to_contain_text("Too early?")
        expect(chat.status).to_contain_text("Ready")
        expect(chat.page.locator(".model-note")).to_be_visible()


def test_a_model_that_cannot_be_loaded_is_told(visit: Visit) -> None:
    with running_app("--model", "missing") as app:
        chat = visit(app)
        expect(chat.status).to_contain_text("There is no model at 'missing'")
        chat.pick_sample(0)
        chat.ask("Hello?")
        expect(chat.line).to_contain_text("The model could not be loaded")
