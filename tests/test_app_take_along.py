"""What can be taken along: run card, conversation, and the link that restores settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.choices import Choices
from app.conversation import EXPORTS, as_data_of, as_markdown
from app.links import query, restore, told
from app.run_card import as_text, run_card
from app.sessions import Session, Turn
from app.settings import Settings
from app.sources import Sample, Video, list_samples
from app.versions import versions
from model.types import Answer, AskRequest
from tests.fake_engine import INFO, FakeEngine

SAMPLES = list_samples()
HOSTILE = "# <script>alert(1)</script> **x** [a](javascript:b) | ``` \n- item"


@pytest.fixture(scope="module")
def answer() -> Answer:
    *_, last = FakeEngine().ask(AskRequest("/private name.mp4", "Secret question?"), lambda: False)
    return last


@pytest.fixture
def session(answer: Answer, tmp_path: Path) -> Session:
    video = Video(Path("/private name.mp4"), "private name.mp4", answer.video, (), False)
    turns = [
        Turn("Secret question?", answer.text, "answered", result=answer),
        Turn(HOSTILE, "cut", "stopped"),
        Turn("Again?", "", "failed", "It broke."),
    ]
    return Session("id", tmp_path, video=video, turns=turns)


def sample_video(sample: Sample, answer: Answer) -> Video:
    return Video(sample.path, sample.title, answer.video, (), True)


def test_the_card_says_what_ran_and_nothing_private(answer: Answer, session: Session) -> None:
    card = run_card(answer, INFO, session.video, Choices())
    text = as_text(card)
    assert json.loads(text) == card
    assert card["model"]["attention_kernel"] == INFO.attention
    assert card["model"]["quantization"] == INFO.quantization
    assert len(card["frame_times"]) == card["settings"]["frames"] == 48
    assert card["settings"]["seed"] is None and card["settings"]["decoding"] == "greedy"
    assert {"python", "torch", "transformers", "gradio"} <= set(versions())
    assert "private" not in text and "Secret" not in text
    frame_times = next(line for line in text.splitlines() if '"frame_times"' in line)
    assert frame_times.count(",") == 48  # one line, its own comma included


def test_a_link_restores_the_sample_and_the_settings(answer: Answer) -> None:
    for sample in SAMPLES:
        link = query(sample_video(sample, answer), Choices(48, 30, 4), "fake")
        params = dict(pair.split("=") for pair in link.removeprefix("?").split("&"))
        restored = restore(params, Settings(), SAMPLES, "fake")
        assert restored.sample is sample
        assert restored.choices == Choices(48, 30, 4)
        assert restored.notices == ()
        assert told(restored) == (
            f"Restored from the link: the sample “{sample.title}”, at most 48 frames, "
            "4 tokens per frame, answers of at most 30 tokens."
        )


def test_a_link_of_a_visitors_own_video_names_no_file(session: Session) -> None:
    link = query(session.video, Choices(48), "fake")
    assert link == "?model=fake&frames=48"


@pytest.mark.parametrize(
    ("params", "choices", "said"),
    [
        (
            {"frames": "9999999999"},
            Choices(64),
            "The number of frames became 64; 1 to 64 can be chosen here.",
        ),
        ({"frames": "0"}, Choices(1), "The number of frames became 1;"),
        ({"tokens": "8"}, Choices(), "form no square grid"),
        ({"tokens": "9", "frames": "2"}, Choices(2, None, 9), "9 tokens per frame"),
        ({"frames": "-5"}, Choices(), "The link's frames is not a number"),
        ({"answer": "1e9"}, Choices(), "The link's answer is not a number"),
        ({"frames": "٣"}, Choices(), "is not a number"),
        ({"sample": "../../etc/passwd", "frames": "5"}, Choices(5), "a sample that is not here"),
        ({"model": "other", "frames": "5"}, Choices(5), "made with another model"),
        ({"sample": "x" * 10_000}, Choices(), "a sample that is not here"),
    ],
)
def test_a_link_cannot_ask_for_more_than_is_allowed(
    params: dict[str, str], choices: Choices, said: str
) -> None:
    restored = restore(params, Settings(max_frames=64), SAMPLES, "fake")
    assert restored.sample is None
    assert restored.choices == choices
    assert said in told(restored)


def test_an_address_without_a_link_restores_nothing() -> None:
    for params in ({}, {"utm_source": "x"}, {"model": "fake"}, {"__theme": "dark"}):
        assert restore(params, Settings(), SAMPLES, "fake") is None


def test_markdown_shows_every_turn_as_it_was(session: Session) -> None:
    text = as_markdown(session, INFO)
    assert text.count("## Question") == 3
    assert "First word after" in text and "*Stopped.*" in text and "*It broke.*" in text
    markdown_it = pytest.importorskip("markdown_it")
    html = markdown_it.MarkdownIt("commonmark").enable("table").render(text)
    assert html.count("<h1>") == 1 and html.count("<h2>") == 3
    for markup in ("<script", "<a ", "<li>", "<code>", "<table>"):
        assert markup not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; **x**" in html


def test_json_holds_every_turn_and_its_cost(session: Session) -> None:
    data = json.loads(EXPORTS["conversation.json"][1](session, INFO))
    assert data == json.loads(json.dumps(as_data_of(session, INFO)))
    assert [turn["question"] for turn in data["turns"]] == [t.question for t in session.turns]
    first, stopped, failed = data["turns"]
    assert first["tokens"]["original"] == 48 * 196
    assert first["savings"]["systems"]["unpooled"]["measured"] is None
    assert (stopped["outcome"], failed["problem"]) == ("stopped", "It broke.")
    assert data["run_card"]["settings"]["frames"] == 48


def test_a_conversation_without_answers_can_be_taken_along(tmp_path: Path) -> None:
    empty = Session("id", tmp_path)
    for _, write in EXPORTS.values():
        assert write(empty, None)
