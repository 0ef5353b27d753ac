"""The procedural world: determinism, true boxes, true answers, real files."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from pathlib import Path

import av
import numpy as np
import pytest

from model.training import make_samples
from model.training.world import (
    NOUNS,
    SIGN_COLOURS,
    SIGN_WORDS,
    Actor,
    Background,
    Placed,
    Scene,
    Sign,
    World,
    make_world,
    sample_scene,
    seeded,
)
from model.training.world_facts import (
    COLOUR_IDS,
    NOUN_IDS,
    SIGN_CHARACTERS,
    make_timeline,
    patch_labels,
    scene_facts,
)
from model.training.world_phrases import OUTSIDE_ANSWER, STRANGERS, plural, with_article
from model.training.world_questions import CHANCE, KINDS, QA, all_texts, clock, questions
from model.training.world_render import EMOJI_FONT, render, render_scene
from model.training.world_video import write_video

needs_font = pytest.mark.skipif(
    not EMOJI_FONT.is_file(), reason="needs Debian's package fonts-noto-color-emoji"
)
GREY = Background("plain", ((150, 160, 170),) * 3, 0.0, 0.1, 1)


def seconds(duration: float) -> list[float]:
    return [second + 0.5 for second in range(int(duration))]


def actor(noun: str, x: float = 0.5, y: float = 0.5, start: float = 0.0, end: float = 6.0) -> Actor:
    return Actor(noun, 0.17, 0.3, x, y, x, y, start, end)


def scenes(*parts: Scene) -> list[tuple[Scene, float]]:
    placed, start = [], 0.0
    for scene in parts:
        placed.append((scene, start))
        start += scene.duration
    return placed


def answers(video: object, kind: str, times: list[float] | None = None) -> set[tuple[str, str]]:
    """Every (named object, answer) of a kind that many draws give."""
    found = set()
    for seed in range(60):
        for item in questions(video, seeded(seed), [kind], times, per_kind=9):
            words = re.sub(r"[^a-z ]", "", item.question.lower()).split()
            nouns = [noun for noun in NOUNS if noun in words or plural(noun) in words]
            found.add((nouns[0] if nouns else "", item.answer))
    return found


# The world as data.


def test_vocabulary_is_large_and_clean() -> None:
    assert len(NOUNS) >= 48 and len(set(NOUNS.values())) == len(NOUNS)
    assert all(re.fullmatch("[a-z]+", noun) and len(emoji) == 1 for noun, emoji in NOUNS.items())
    assert len(SIGN_COLOURS) == 8 and len(SIGN_WORDS) >= 40
    assert all(3 <= len(word) <= 5 and set(word) <= set(SIGN_CHARACTERS) for word in SIGN_WORDS)
    assert not set(STRANGERS) & set(NOUNS)


def test_same_seed_same_world_and_other_seed_another() -> None:
    assert make_world(7, 60) == make_world(7, 60)
    assert make_world(7, 60) != make_world(8, 60)
    assert sample_scene(seeded("a", 1)) == sample_scene(seeded("a", 1))


@pytest.mark.parametrize("duration", [20, 60, 320, 1800])
def test_scenes_fill_the_video_and_names_are_not_used_twice(duration: int) -> None:
    world = make_world(duration, duration)
    assert world.scenes[0].start == 0
    for before, after in zip(world.scenes, world.scenes[1:], strict=False):
        assert after.start == pytest.approx(before.end)
    assert world.scenes[-1].end == pytest.approx(duration)
    nouns = [noun for placed in world.scenes for noun in placed.scene.nouns]
    assert nouns and len(nouns) == len(set(nouns)) <= len(NOUNS) - 8
    assert len(make_world(1, duration, num_scenes=3).scenes) == 3


def test_too_short_a_video_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 8 s, not 5 s"):
        make_world(1, 5, interval=2)
    with pytest.raises(ValueError, match="not 'party'"):
        sample_scene(seeded(1), kind="party")


@pytest.mark.parametrize("interval", [1.0, 3.5])
def test_scenes_keep_their_promises(interval: float) -> None:
    counts = []
    for index in range(400):
        scene = sample_scene(seeded("promise", index), interval=interval)
        assert len(scene.actors) <= 5
        for actor in scene.actors:
            assert 0 <= actor.start < actor.end <= scene.duration
            assert 0.2 <= actor.height <= 0.45
            for t in (actor.start, actor.end):
                left, top, right, bottom = actor.box(t)
                assert -1e-9 <= left < right <= 1 + 1e-9 and -1e-9 <= top < bottom <= 1 + 1e-9
        if scene.sign is None:
            continue
        sign = scene.sign
        left, top, right, bottom = sign.box
        assert 0.28 <= right - left <= 0.4 and 0.14 <= bottom - top <= 0.2
        assert left >= 0 and right <= 1 and top >= 0 and bottom <= 1
        phase = index % 7 / 7 * interval
        shown = [t for t in np.arange(phase, scene.duration, interval) if sign.visible(t)]
        counts.append(len(shown))
        for _, box in (o for facts in scene_facts(scene, shown) for o in facts.objects):
            assert box[2] <= left or right <= box[0] or box[3] <= top or bottom <= box[1]
    assert set(counts) == {1, 2, 3}


# Pictures.


@needs_font
def test_every_noun_has_a_picture_inside_of_its_box() -> None:
    width, height = 224, 126
    empty = render_scene(Scene(6, GREY), 1, width, height).astype(int)
    pictures = set()
    for noun in NOUNS:
        scene = Scene(6, GREY, (actor(noun, 0.4, 0.6),))
        picture = render_scene(scene, 1, width, height)
        changed = np.abs(picture - empty).sum(-1) > 0
        rows, columns = np.nonzero(changed)
        left, top, right, bottom = scene.actors[0].box(1)
        assert rows.min() >= top * height - 1 and rows.max() <= bottom * height + 1
        assert columns.min() >= left * width - 1 and columns.max() <= right * width + 1
        assert changed.sum() > 0.2 * (right - left) * width * (bottom - top) * height
        pictures.add(picture.tobytes())
    assert len(pictures) == len(NOUNS)


@needs_font
def test_sign_changes_the_picture_only_in_its_box_and_only_in_its_time() -> None:
    sign = Sign("428", "red", "number", (0.3, 0.2, 0.62, 0.38), 2, 4, "cat")
    bare, signed = Scene(6, GREY), Scene(6, GREY, sign=sign)
    assert (render_scene(bare, 1, 112, 112) == render_scene(signed, 1, 112, 112)).all()
    assert (render_scene(bare, 4, 112, 112) == render_scene(signed, 4, 112, 112)).all()
    picture = render_scene(signed, 3, 112, 112)
    changed = (picture != render_scene(bare, 3, 112, 112)).any(-1)
    assert changed[24:42, 35:68].mean() > 0.9
    changed[22:44, 33:70] = False
    assert not changed.any()
    # The plate has the named colour and a text of its own.
    plate = picture[24:42, 35:68].reshape(-1, 3)
    assert (np.abs(plate - np.array(SIGN_COLOURS["red"])).max(-1) < 12).mean() > 0.2
    other = Scene(6, GREY, sign=Sign("426", "red", "number", sign.box, 2, 4, "cat"))
    assert (render_scene(other, 3, 112, 112) != picture).any()


@needs_font
def test_rendering_is_deterministic_and_pans() -> None:
    panned = 0
    for index in range(60):
        scene = sample_scene(seeded("pan", index), kind="filler")
        first = render_scene(scene, 0, 96, 54)
        assert first.shape == (54, 96, 3) and first.dtype == np.uint8
        assert (first == render_scene(scene, 0, 96, 54)).all()
        moved = (first != render_scene(scene, scene.duration * 0.9, 96, 54)).any()
        assert moved == any(scene.background.pan)
        panned += moved
    assert 5 < panned < 50


@needs_font
def test_world_shows_each_scene_at_its_time() -> None:
    world = make_world(11, 40)
    placed = world.scenes[1]
    here = render(world, placed.start + 1, 96, 54)
    assert (here == render_scene(placed.scene, 1, 96, 54)).all()
    assert render(world, 1e6, 96, 54).shape == (54, 96, 3)


def test_missing_font_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from model.training import world_render

    monkeypatch.setattr(world_render, "EMOJI_FONT", Path("/nowhere/font.ttf"))
    world_render._emoji_font.cache_clear()
    with pytest.raises(FileNotFoundError, match="fonts-noto-color-emoji"):
        world_render._emoji_font()
    world_render._emoji_font.cache_clear()


# Labels.


def test_patch_labels_lie_under_the_objects() -> None:
    sign = Sign("TAXI", "blue", "word", (0.5, 0.5, 0.86, 0.68), 0, 6, "owl")
    scene = Scene(6, GREY, (actor("owl", 0.25, 0.25),), sign)
    labels = patch_labels(scene, 1, 14)
    nouns, colours, chars = labels["nouns"], labels["sign_colours"], labels["sign_chars"]
    assert nouns.shape == colours.shape == (14, 14) and chars.shape == (14, 14, 5)
    assert set(np.unique(nouns)) == {0, NOUN_IDS["owl"]} and nouns[3, 3] == NOUN_IDS["owl"]
    assert (nouns[7:] == 0).all() and (nouns[:, 7:] == 0).all()
    assert set(np.unique(colours)) == {0, COLOUR_IDS["blue"]}
    rows, columns = np.nonzero(colours)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (7, 9, 7, 11)
    text = [SIGN_CHARACTERS[index - 1] for index in chars[8, 8] if index]
    assert "".join(text) == "TAXI" and chars[8, 8, 4] == 0
    assert ((chars > 0).any(-1) == (colours > 0)).all()
    assert (labels["owners"] == np.where(colours > 0, NOUN_IDS["owl"], 0)).all()
    assert (labels["counts"] == (nouns > 0)).all()
    assert not patch_labels(scene, 7, 14)["nouns"].any()


def test_patches_know_how_many_there_are_and_whose_sign_it_is_only_where_that_is_clear() -> None:
    sign = Sign("508", "red", "number", (0.32, 0.6, 0.68, 0.78), 0, 6, "owl")
    pair = (actor("owl", 0.2, 0.25), actor("owl", 0.8, 0.25))
    labels = patch_labels(Scene(6, GREY, pair, sign), 1, 14)
    assert set(np.unique(labels["counts"])) == {0, 2}
    assert np.argwhere(labels["middles"] == 2).tolist() == [[3, 2], [3, 11]]
    assert ((labels["middles"] > 0) == (labels["counts"] > 0)).all()
    assert set(np.unique(labels["owners"])) == {0, NOUN_IDS["owl"]}
    mixed = (actor("owl", 0.2, 0.25), actor("cat", 0.8, 0.25))
    labels = patch_labels(Scene(6, GREY, mixed, sign), 1, 14)
    assert set(np.unique(labels["counts"])) == {0, 1}
    assert labels["sign_colours"].any() and not labels["owners"].any()  # as near to the cat


# Questions.


def test_answers_of_a_known_video() -> None:
    sign = Sign("428", "red", "number", (0.1, 0.1, 0.4, 0.27), 1, 3, "cat")
    word = Sign("TAXI", "blue", "word", (0.1, 0.1, 0.4, 0.27), 1, 3, "fox")
    mover = Actor("car", 0.17, 0.3, 0.2, 0.5, 0.7, 0.5, 0.0, 6.0)
    flock = tuple(actor("bee", x) for x in (0.2, 0.5, 0.8))
    video = scenes(
        Scene(6, GREY, (actor("cat", 0.8, 0.8),), sign),
        Scene(6, GREY),
        Scene(6, GREY, (mover,)),
        Scene(6, GREY, flock),
        Scene(6, GREY, (actor("fox", 0.15, 0.5, start=2),), word),
    )
    times = seconds(30)
    assert answers(video, "number", times) == {("cat", "428")}
    assert answers(video, "word", times) == {("fox", "taxi")}
    assert answers(video, "colour", times) == {("cat", "red"), ("fox", "blue")}
    assert answers(video, "when", times) == {
        ("cat", "0:00"), ("car", "0:12"), ("bee", "0:18"), ("fox", "0:26"),
    }  # fmt: skip
    assert answers(video, "before", times) == {
        ("cat", "nothing"), ("car", "a cat"), ("bee", "a car"),
    }  # fmt: skip
    assert answers(video, "after", times) == {
        ("cat", "a car"),
        ("bee", "a fox"),
        ("fox", "nothing"),
    }
    assert ("bee", "3") in answers(video, "count", times)
    assert answers(video, "where", times) == {("cat", "bottom right"), ("fox", "left")}
    assert answers(video, "direction", times) == {
        ("car", "right"), ("cat", "it stands still"), ("fox", "it stands still"),
    }  # fmt: skip
    existing = answers(video, "exists", times)
    assert {noun for noun, answer in existing if answer == "yes"} == {"cat", "car", "bee", "fox"}
    assert answers(video, "scenes", times) == {
        ("", "0:00 a cat, 0:12 a car, 0:18 bees, 0:26 a fox")
    }
    absent = answers(video, "absent", times)
    assert {answer for _, answer in absent} >= {"There is no sign.", "There is no dog."}
    assert {noun for noun, answer in absent if answer == "There is no sign."} <= {"car", "bee"}


def test_only_what_the_samples_show_is_asked_for() -> None:
    sign = Sign("428", "red", "number", (0.1, 0.1, 0.4, 0.27), 1, 3, "cat")
    video = scenes(Scene(6, GREY, (actor("cat", 0.8, 0.8),), sign))
    assert answers(video, "number", [0.5, 3.5]) == set()
    assert answers(video, "when", [4.0]) == {("cat", "0:04")}
    assert answers(video, "when") == {("cat", "0:00")}
    assert answers(video, "number") >= {("", "428"), ("cat", "428")}  # the only sign there is
    assert answers(video, "exists", [7.0])  # past the end: no error, the last scene's time


def test_an_object_in_two_scenes_has_no_when() -> None:
    video = scenes(
        Scene(6, GREY, (actor("cat"),)), Scene(6, GREY, (actor("dog"),)),
        Scene(6, GREY, (actor("cat"),)),
    )  # fmt: skip
    assert {noun for noun, _ in answers(video, "when", seconds(18))} == {"dog"}
    assert answers(video, "before", seconds(18)) == {("dog", "a cat")}
    assert make_timeline(video, seconds(18)).shown == {"cat": 2, "dog": 1}


def test_things_that_come_together_have_no_order() -> None:
    both = (actor("dog", 0.2), actor("cat", 0.8))
    video = scenes(Scene(6, GREY, both), Scene(6, GREY, (actor("owl"),)))
    assert answers(video, "before", seconds(12)) == set()
    # From left to right.
    assert answers(video, "scenes", seconds(12)) == {("", "0:00 a dog and a cat, 0:06 an owl")}
    (story,) = questions(video, seeded(0), ["scenes"], seconds(12))
    assert [(e.part, e.start) for e in story.evidence] == [(0, 0.5), (1, 0.5), (2, 6.5)]


def shown(world: World, t: float) -> dict[str, list[tuple[float, ...]]]:
    """The boxes at second `t` by name, the sign's under its text."""
    placed = world.at(t)
    (facts,) = scene_facts(placed.scene, (t - placed.start,))
    boxes = defaultdict(list)
    for noun, box in facts.objects:
        boxes[noun].append(box)
    if facts.sign is not None:
        boxes[facts.sign.text.lower()].append(facts.sign.box)
        boxes[facts.sign.colour].append(facts.sign.box)
    return boxes


def check_evidence(world: World, item: QA, times: list[float]) -> None:
    """The evidence holds sampled frames, and in each something has exactly its box."""
    for evidence in item.evidence:
        inside = [t for t in times if evidence.start <= t < evidence.end]
        assert inside, item
        for t in inside:
            visible = shown(world, t)
            every = [box for boxes in visible.values() for box in boxes]
            assert evidence.box in every, item
    if item.kind in ("number", "word", "colour"):
        (evidence,) = item.evidence
        seen = [t for t in times if item.answer in shown(world, t)]
        assert any(evidence.start <= t < evidence.end for t in seen)
    if item.kind == "when":
        assert item.answer == clock(min(t for t in times if evidence_at(item, t)))


def evidence_at(item: QA, t: float) -> bool:
    return any(evidence.start <= t < evidence.end for evidence in item.evidence)


@pytest.mark.parametrize("seed", range(12))
def test_evidence_is_where_the_facts_are(seed: int) -> None:
    world, times = make_world(seed, 90), seconds(90)
    asked = questions(world, seeded("evidence", seed), sample_times=times, per_kind=4)
    assert {item.kind for item in asked} >= set(KINDS) - {"word", "direction", "count", "number"}
    for item in asked:
        assert item.answer and item.question
        empty = item.answer in ("no", OUTSIDE_ANSWER) or item.answer.startswith("There is no")
        assert bool(item.evidence) or empty
        check_evidence(world, item, times)
        noun = next((word for word in re.findall("[a-z]+", item.question) if word in NOUNS), None)
        everywhere = {name for t in times for name in shown(world, t)}
        if item.kind == "exists" and noun:
            assert (item.answer == "yes") == (noun in everywhere)
        if item.kind == "absent" and item.answer != "There is no sign.":
            assert item.answer.split()[-1].rstrip(".") not in everywhere


def test_recombined_scenes_get_the_same_questions_as_a_world() -> None:
    world = make_world(5, 60)
    pairs = [(placed.scene, placed.start) for placed in world.scenes]
    times = seconds(60)
    assert questions(world, seeded(1), sample_times=times) == questions(
        pairs, seeded(1), sample_times=times
    )
    assert questions(list(world.scenes), seeded(1)) == questions(world, seeded(1))
    assert isinstance(world.scenes[0], Placed)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="weather"):
        questions(make_world(1, 20), seeded(1), ["weather"])


def test_no_constant_answer_is_right_more_often_than_the_guess_level() -> None:
    constant = defaultdict(lambda: defaultdict(int))
    fair = defaultdict(list)
    assert set(CHANCE) == set(KINDS)
    kinds = [kind for kind in KINDS if kind not in ("scenes", "absent", "outside")]
    for index in range(150):
        world, times = make_world(2_000_000 + index, 64), seconds(64)
        pool = defaultdict(list)
        for item in questions(world, seeded("pool", index), kinds, times, per_kind=99):
            pool[item.kind].append(item.answer)
        for item in questions(world, seeded("ask", index), kinds, times):
            constant[item.kind][item.answer] += 1
            same = pool[item.kind]
            fair[item.kind].append(same.count(item.answer) / max(len(same), 1))
    for kind in kinds:
        commonest = max(constant[kind].values()) / sum(constant[kind].values())
        guess = max(commonest, float(np.mean(fair[kind])))
        assert guess == pytest.approx(CHANCE[kind], abs=0.08), kind


def test_wording() -> None:
    assert [plural(n) for n in ("fox", "butterfly", "monkey", "snowman", "bus")] == [
        "foxes", "butterflies", "monkeys", "snowmen", "buses",
    ]  # fmt: skip
    assert [with_article(n) for n in ("owl", "cat", "umbrella", "unicorn")] == [
        "an owl", "a cat", "an umbrella", "a unicorn",
    ]  # fmt: skip
    assert [clock(t) for t in (0, 59.99, 65, 3599.5, 3661)] == [
        "0:00", "0:59", "1:05", "59:59", "1:01:01",
    ]  # fmt: skip
    texts = list(all_texts(worlds=20))
    assert len(texts) > 800 and all(text and "{" not in text for text in texts)
    assert len({text for text in texts if "pear" in text}) > 1


# Files.


@needs_font
@pytest.mark.parametrize(
    ("name", "codec", "audio"),
    [("a.mp4", "libx264", True), ("a.webm", "libvpx-vp9", True), ("a.mkv", "libx265", False)],
)
def test_written_video_shows_the_world(tmp_path: Path, name: str, codec: str, audio: bool) -> None:
    world = make_world(3, 6)
    write_video(
        world,
        tmp_path / name,
        width=160,
        height=90,
        frame_rate=10,
        codec=codec,
        audio=audio,
        gop=20,
    )
    with av.open(str(tmp_path / name)) as container:
        assert len(container.streams.audio) == audio
        frames = list(container.decode(video=0))
    assert len(frames) == 60
    for frame in frames[5::20]:
        truth = render(world, frame.time, 160, 90).astype(int)
        assert np.abs(frame.to_ndarray(format="rgb24") - truth).mean() < 6


def test_odd_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="161x90"):
        write_video(make_world(3, 6), tmp_path / "a.mp4", width=161, height=90)


def test_suggested_questions_of_the_samples_are_true() -> None:
    assert max(sample.duration for sample in make_samples.SAMPLES) >= 300
    for sample in make_samples.SAMPLES:
        assert 900_000 <= sample.seed < 1_000_000
        world = make_world(sample.seed, sample.duration, interval=sample.interval)
        items = make_samples.suggested(world, sample)
        kinds = [item.kind for item in items]
        assert len(kinds) == make_samples.SUGGESTED
        assert kinds == [kind for kind in sample.kinds if kind in kinds]  # in order, each once
        for item in items:
            pool = questions(world, random.Random(1), [item.kind], per_kind=99)
            assert item.answer in {other.answer for other in pool}
