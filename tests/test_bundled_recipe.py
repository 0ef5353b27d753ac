"""Parts of the bundled model's recipe: painted signs, the curriculum, hidden evidence."""

from __future__ import annotations

import random

import numpy as np

from model.training.curriculum import LEVELS, Curriculum
from model.training.encoder import CLASSES, CROP, crop
from model.training.masking import evidence_stretches, other_stretch
from model.training.sign_crops import SignPainter
from model.training.world_facts import LONGEST_SIGN, SIGN_CHARACTERS
from model.training.world_questions import QA, Evidence

SIDE, PATCH = 112, 8
GRID = SIDE // PATCH


def painted(count: int = 40, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Grey frames whose crops get a sign, and the labels of the crops."""
    rng = random.Random(seed)
    frames = np.full((count, SIDE, SIDE, 3), 128, np.uint8)
    labels = np.zeros((count, GRID * GRID, len(CLASSES)), np.uint8)
    pixels, truth, _ = crop(frames, labels, rng, PATCH, SignPainter(rng, SIDE, PATCH, bank=20))
    return pixels, truth.reshape(count, CROP, CROP, -1)


def test_painted_signs_are_where_their_labels_say() -> None:
    pixels, truth = painted()
    shown = 0
    for picture, label in zip(pixels, truth, strict=True):
        signed = label[..., 1] > 0
        contrast = np.abs(picture.astype(int) - 128).max(-1)
        patches = contrast.reshape(CROP, PATCH, CROP, PATCH).mean((1, 3))
        if not signed.any():
            assert patches.max() < 12  # nothing was painted
            continue
        shown += 1
        assert patches[signed].min() > patches[~signed].mean() + 8
    assert shown > 20


def test_painted_labels_spell_the_sign() -> None:
    _, truth = painted()
    for label in truth:
        texts = {tuple(row[2:-1]) for row in label.reshape(-1, len(CLASSES)) if row[1] > 0}
        if not texts:
            continue
        (text,) = texts  # all of it on every patch of the sign
        word = "".join(SIGN_CHARACTERS[c - 1] for c in text if c)
        assert (word.isdigit() and len(word) == 3) or (word.isalpha() and len(word) <= LONGEST_SIGN)
        own = label[..., -1]
        for row in own:
            seen = [c for c in row if c]
            order = [text.index(c) for c in seen]
            assert all(c in text for c in seen)
            if len(set(text)) == len(text):
                assert order == sorted(order)  # characters stand from left to right


def test_a_kind_climbs_only_when_it_is_answered_well() -> None:
    curriculum = Curriculum(("when", "number"))
    rng = random.Random(0)
    for _ in range(400):
        curriculum.record("when", 0, True, 0.1)
        curriculum.record("number", 0, rng.random() < 0.5, 0.1)
    assert curriculum.level["when"] == 1
    assert curriculum.level["number"] == 0
    assert curriculum.kinds_at(1) == ["when"]
    assert curriculum.weight("number") > curriculum.weight("when")
    restored = Curriculum(("when", "number", "count"))
    restored.restore(curriculum.state())
    assert restored.level == {"when": 1, "number": 0, "count": 0}
    curriculum.record("number", 0, False, 0.99)  # late, long videos must not stay unseen
    assert LEVELS[curriculum.level["number"]] >= 48


def test_evidence_is_joined_and_the_other_stretch_touches_none_of_it() -> None:
    spans = tuple(Evidence(*span) for span in ((4.0, 6.0), (5.0, 8.0), (20.0, 21.0)))
    taken = evidence_stretches(QA("after", "?", "a cat", spans))
    assert taken == ((4.0, 8.0), (20.0, 21.0))
    rng = random.Random(1)
    for _ in range(50):
        start, end = other_stretch(taken, 40.0, rng)
        assert round(end - start, 9) == 5.0
        assert 0 <= start <= end <= 40.0
        assert all(end <= a or start >= b for a, b in taken)
    assert other_stretch(((0.0, 30.0),), 40.0, rng) is None
