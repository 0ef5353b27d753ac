"""The panel "Where it looked": what is drawn, chosen, refused and written to files."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import time
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from app.looking import Choice, Look, Looking, words_of
from app.panels.attention import attention_panel
from app.panels.attention_files import maps_npz, maps_png
from app.panels.attention_frames import heat_overlay
from app.panels.attention_grid import COLUMNS, column_edges, levels, spread
from app.panels.draw import clock
from model.types import Answer, AskRequest, AttentionMap, AttentionSummary, InputError
from tests.fake_engine import INFO, LAYERS, FakeEngine
from tests.fake_maps import HEADS, LLM_LAYERS
from tests.test_app_panels import HOSTILE, parse

REQUEST = AskRequest("/video.mp4", "What is it?")


def answer_to(question: str = "What is it?", **options: object) -> Answer:
    *_, last = FakeEngine().ask(AskRequest("/video.mp4", question, **options), lambda: False)
    return last


@pytest.fixture(scope="module")
def looking() -> Looking:
    one = Looking()
    one.show(answer_to(), REQUEST)
    return one


def chosen(look: Look, **choice: object) -> Look:
    return dataclasses.replace(look, choice=Choice(**choice))


def drawn_rows(root: ElementTree.Element) -> list[np.ndarray]:
    """The opacity of each row's picture, 0..1."""
    rows = []
    for cells in root.iterfind(".//span[@class='cells']"):
        data = re.search(r"base64,([^)]+)\)", cells.get("style"))[1]
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            rows.append(np.asarray(picture.convert("LA"))[0, :, 1] / 255)
    return rows


def test_words_are_what_lies_between_spaces() -> None:
    tokens = ("It", " is", " at", " 0", ":", "07", ",", " after", "\n", "noon", ".", " ")
    words = words_of(tokens)
    assert [word.text for word in words] == ["It", "is", "at", "0:07,", "after", "noon."]
    assert [word.tokens for word in words][3] == slice(3, 7)
    assert words[3].bare == "0:07" and words[-1].bare == "noon"
    covered = [place for word in words for place in range(*word.tokens.indices(99))]
    assert covered == [place for place, token in enumerate(tokens) if token.strip()]
    assert words_of(()) == () and words_of((" ", ".")) == (
        words_of((".",))[0].__class__(".", slice(1, 2)),
    )


def test_one_row_for_each_layer_with_its_gates(looking: Looking) -> None:
    html = attention_panel(looking.look, INFO)
    root = parse(html)
    rows = root.findall(".//span[@class='cells']")
    assert len(rows) == len(LAYERS)
    values = looking.look.rows()
    for layer, row, value in zip(LAYERS, rows, values, strict=True):
        at = clock(looking.look.attention.times[value.argmax()])
        assert row.get("aria-label").startswith(f"Layer {layer}: most at {at}, ")
    for pair in INFO.gates:
        for value in pair:
            assert f"{value:+.2f}".replace("-", "−") in html


@pytest.mark.parametrize("choice", [{}, {"word": 1}, {"head": 1}, {"word": 1, "head": 1}], ids=str)
def test_cells_lie_at_their_time_and_tell_their_share(looking: Looking, choice: dict) -> None:
    look = chosen(looking.look, **choice)
    text = look.attention.map("t2v")
    tokens = look.words[1].tokens if "word" in choice else slice(None)
    heads = slice(1, 2) if "head" in choice else slice(None)
    expected = text.both.astype(float)[tokens][:, :, heads].mean((0, 2))
    edges = column_edges(look.attention.times, look.duration) / look.duration * COLUMNS
    for place, row in enumerate(drawn_rows(parse(attention_panel(look, INFO)))):
        for frame in range(len(look.attention.times)):
            middle = int((edges[frame] + edges[frame + 1]) / 2)
            share = expected[place, frame] / expected.max()
            assert row[middle] == pytest.approx(share, abs=0.01)


def test_a_logarithmic_scale_shows_what_a_linear_one_hides() -> None:
    rows = np.array([[1.0, 0.1, 0.01, 0.001, 0.0]])
    assert levels(rows, 1.0, log=False)[0].tolist() == pytest.approx([1, 0.1, 0.01, 0.001, 0])
    assert levels(rows, 1.0, log=True)[0].tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0, 0])


def test_of_more_frames_than_columns_the_peaks_stay() -> None:
    rows = np.zeros((2, 5000), np.float32)
    rows[0, 1234], rows[1, 4999] = 0.5, -0.25
    out = spread(rows, np.arange(5000) + 0.5, 5000.0)
    assert out.shape == (2, COLUMNS)
    assert out[0].max() == 0.5 and out[0].argmax() == round(1234 / 5000 * COLUMNS)
    assert out[1].min() == -0.25 and out[1].argmin() == COLUMNS - 1


def test_every_kind_has_its_rows_and_its_words(looking: Looking) -> None:
    for kind, rows in (("t2v", len(LAYERS)), ("v2v", len(LAYERS)), ("self", LLM_LAYERS)):
        root = parse(attention_panel(chosen(looking.look, kind=kind), INFO))
        assert len(root.findall(".//span[@class='cells']")) == rows
        pressed = root.findall(".//button[@aria-pressed='true']")
        assert [one for one in pressed if one.get("data-look") == f"kind:{kind}"]
        words = root.findall(".//div[@class='answer-words']/button")
        assert len(words) == (0 if kind == "v2v" else 1 + len(looking.look.words))
        assert len(root.findall(".//option")) == 1 + HEADS


def test_an_untrained_model_shows_its_own_attention_first_and_says_why() -> None:
    one = Looking()
    one.show(answer_to("untrained"), REQUEST)
    html = attention_panel(one.look, dataclasses.replace(INFO, trained=False))
    assert "has not been trained yet" in html
    assert 'data-look="kind:self" title' in html
    assert len(drawn_rows(parse(html))) == LLM_LAYERS
    assert "gates of this model are closed" in attention_panel(one.look, INFO)


def test_the_headline_needs_no_knowledge_of_attention(looking: Looking) -> None:
    def headline(look: Look) -> str:
        line = parse(attention_panel(look, INFO)).find(".//p[@class='headline']")
        return "".join(line.itertext())

    mass = looking.look.rows().mean(0)
    peak = clock(looking.look.attention.times[mass.argmax()])
    assert headline(looking.look).startswith(f"Most at {peak} for its answer: ")
    assert "“What”" in headline(chosen(looking.look, word=2))
    flat = np.full((3, 1, 48), 1 / 48, np.float16)
    even = AttentionMap("t2v", "share", LAYERS, flat.transpose(1, 0, 2), flat)
    attention = dataclasses.replace(looking.look.attention, maps=(even,))
    calm = dataclasses.replace(looking.look, attention=attention)
    assert headline(calm).startswith("No moment stands out")


def test_strongest_frames_can_be_clicked_and_keep_their_shape(looking: Looking) -> None:
    root = parse(attention_panel(looking.look, INFO, 4))
    frames = root.findall(".//button[@class='frame']")
    order = np.argsort(-looking.look.rows().mean(0), kind="stable")[:4]
    assert [float(frame.get("data-seek")) for frame in frames] == pytest.approx(
        looking.look.attention.times[order], abs=0.001
    )
    assert "aspect-ratio:320/180" in frames[0].find("span").get("style")
    assert frames[0].find(".//img").get("src") == f"{looking.look.address}/{order[0]}.jpg"


def test_heat_lies_where_the_weight_is() -> None:
    patches = np.zeros((14, 14), np.float32)
    patches[3, 11] = 1
    with Image.open(io.BytesIO(heat_overlay(patches, 640, 360))) as overlay:
        assert overlay.mode == "RGBA"
        assert overlay.width / overlay.height == pytest.approx(16 / 9, rel=0.02)
        alpha = np.asarray(overlay)[..., 3].astype(float)
    y, x = (np.indices(alpha.shape) * alpha).sum((1, 2)) / alpha.sum()
    assert x / alpha.shape[1] == pytest.approx(11.5 / 14, abs=0.02)
    assert y / alpha.shape[0] == pytest.approx(3.5 / 14, abs=0.02)
    assert not np.asarray(Image.open(io.BytesIO(heat_overlay(patches * 0, 9, 9))))[..., 3].any()


def test_controls_change_what_is_drawn_and_nonsense_is_refused() -> None:
    one = Looking()
    one.apply("kind:self")  # before there is an answer: nothing to do
    one.show(answer_to(), REQUEST)
    for told in ("word:2", "head:1", "scale:log", "cell:1:7.3"):
        one.apply(told)
    at = int(np.abs(one.look.attention.times - 7.3).argmin())
    assert one.look.choice == Choice(None, 2, 1, True, (1, at))
    figure = parse(attention_panel(one.look, INFO)).find(".//figure")
    assert f"Layer {LAYERS[1]} at" in "".join(figure.itertext())
    one.apply("kind:self")  # rows are other layers: the cell goes
    assert one.look.choice.cell is None and one.look.word.bare == "What"
    for wrong in ("", "word", "word:x", "word:99", "word:-1", "head:-1", "kind:all", "cell:9:1",
                  "cell:1", "cell:1:x", "cell:0:nan", "<b>"):  # fmt: skip
        with pytest.raises(InputError):
            one.apply(wrong)
    token = one.token
    one.show(answer_to("And now?"), REQUEST)
    assert one.look.choice == Choice(head=1, log=True, kind="self")  # how, but not which word
    assert one.token != token


def test_what_was_not_kept_is_said(looking: Looking) -> None:
    text = looking.look.attention.map("t2v")
    small = dataclasses.replace(
        text, both=None, patches=text.patches[:1, :, :1, :2], patch_frames=(3, 9)
    )
    attention = dataclasses.replace(looking.look.attention, maps=(small,))
    look = dataclasses.replace(looking.look, attention=attention)
    html = attention_panel(chosen(look, word=1, head=1, cell=(0, 9)), INFO)
    assert "this head for all words together" in html
    assert "mean of all heads, all words together" in html
    html = attention_panel(chosen(look, cell=(0, 5)), INFO)
    assert "kept for the strongest frames only" in html
    words = dataclasses.replace(small, words=small.words[:1])
    attention = dataclasses.replace(attention, maps=(words,))
    assert "all words are shown together" in attention_panel(
        dataclasses.replace(look, attention=attention), INFO
    )


def test_no_word_of_an_answer_becomes_markup() -> None:
    one = Looking()
    one.show(answer_to(HOSTILE), REQUEST)
    html = attention_panel(dataclasses.replace(one.look, choice=Choice(word=3, cell=(0, 1))), INFO)
    assert "onerror" in html and "<img src=x" not in html
    parse(html)


def long_answer(tokens: int = 40, layers: int = 28, frames: int = 1800) -> Look:
    generator = np.random.default_rng(0)
    words = generator.dirichlet(np.full(frames, 0.1), size=(tokens, layers)).astype(np.float16)
    heads = np.repeat(words.mean(0)[:, None], 8, 1)
    one = AttentionMap("t2v", "share", tuple(range(layers)), words, heads)
    times = np.arange(frames) + 0.5
    jpeg = answer_to().attention.pictures[0]
    summary = AttentionSummary(
        times, one.layers, (" word",) * tokens, words.astype(np.float32), (), 0.0,
        maps=(one,), pictures=(jpeg,) * frames,
    )  # fmt: skip
    video = dataclasses.replace(answer_to().video, duration=float(frames))
    return Look(dataclasses.replace(answer_to(), video=video), summary, Choice(), "looked/x")


def test_the_panel_of_a_thirty_minute_video_is_small() -> None:
    look = long_answer()
    began = time.perf_counter()
    html = attention_panel(look, None)
    print(f"drawn in {time.perf_counter() - began:.3f} s, {len(html)} characters")
    assert len(html) < 400_000
    assert html.count("<") < 1000  # a browser has little to do


# Files.


def test_the_npz_holds_every_map_with_names_and_units(looking: Looking) -> None:
    with np.load(io.BytesIO(maps_npz(looking.look, REQUEST, INFO)), allow_pickle=False) as file:
        assert str(file["question"]) == REQUEST.question
        assert str(file["answer"]) == looking.look.answer.text
        np.testing.assert_array_equal(file["times"], looking.look.attention.times)
        assert "".join(file["tokens"].tolist()) == looking.look.answer.text
        assert file["word_of_token"].tolist() == list(range(len(looking.look.words)))
        np.testing.assert_allclose(file["gates"], INFO.gates, atol=1e-6)
        assert file["gate_layers"].tolist() == list(LAYERS)
        assert set(file["kinds"].tolist()) == {"t2v", "v2v", "self"}
        for one in looking.look.maps:
            assert file[f"{one.kind}_layers"].tolist() == list(one.layers)
            np.testing.assert_array_equal(file[f"{one.kind}_words"], one.words)
            np.testing.assert_array_equal(file[f"{one.kind}_heads"], one.heads)
            assert "attention" in str(file[f"{one.kind}_unit"])
        np.testing.assert_array_equal(file["t2v_both"], looking.look.attention.map("t2v").both)
        assert file["t2v_patches"].shape[3] == len(file["t2v_patch_frames"])
        assert "self_patches" not in file


def test_the_readme_names_the_keys_of_the_npz(looking: Looking) -> None:
    from tests.test_readme import README

    with np.load(io.BytesIO(maps_npz(looking.look, REQUEST, INFO))) as file:
        names = {re.sub(r"^(t2v|v2v|self)_", "<kind>_", name) for name in file.files}
    missing = {name for name in names if f"`{name}`" not in README}
    assert not missing


def test_the_png_is_a_figure_with_heat_where_the_map_has_it(looking: Looking) -> None:
    look = chosen(looking.look, head=1)
    with Image.open(io.BytesIO(maps_png(look, REQUEST, INFO))) as opened:
        pixels = np.asarray(opened.convert("RGB")).astype(int)
    orange = (np.abs(pixels - [224, 89, 11]).sum(-1) < 12).any(0).nonzero()[0]
    values = look.rows()
    frame = int(values.max(0).argmax())
    left, plot = 110, 1400 - 110 - 190
    at = left + plot * look.attention.times[frame] / look.duration
    assert np.abs(orange - at).min() < 3
    assert len(orange) < plot / 4
    assert len(maps_png(long_answer(), None, None)) < 10**6
