"""What the bundled model's encoder is trained on: painted signs, mirrored frames, middles."""

from __future__ import annotations

import random

import numpy as np
import torch

from model.training.encoder import (
    CLASSES,
    COUNT,
    CROP,
    MIDDLE,
    DenseEncoder,
    crop,
    encoder_config,
    look_loss,
    middle_loss,
    mirrored,
)
from model.training.sign_crops import SignPainter
from model.training.world_facts import LONGEST_SIGN, SIGN_CHARACTERS

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
        texts = {tuple(row[2:7]) for row in label.reshape(-1, len(CLASSES)) if row[1] > 0}
        if not texts:
            continue
        (text,) = texts  # all of it on every patch of the sign
        word = "".join(SIGN_CHARACTERS[c - 1] for c in text if c)
        assert (word.isdigit() and len(word) == 3) or (word.isalpha() and len(word) <= LONGEST_SIGN)
        own = label[..., COUNT - 1]
        assert not label[..., COUNT].any()  # a piece does not show the whole frame
        for row in own:
            seen = [c for c in row if c]
            order = [text.index(c) for c in seen]
            assert all(c in text for c in seen)
            if len(set(text)) == len(text):
                assert order == sorted(order)  # characters stand from left to right


def test_signs_are_to_look_at_what_they_stand_beside() -> None:
    labels = torch.zeros(1, 4, len(CLASSES), dtype=torch.uint8)
    labels[0, 0, 0] = labels[0, 1, 0] = 7  # two patches of an object
    labels[0, 3, 1], labels[0, 3, 0] = 2, 7  # its sign
    weights = torch.full((1, 2, 4, 4), 0.25)
    weights[0, 0, 3] = torch.tensor([0.5, 0.3, 0.1, 0.1])
    found = look_loss({-1: (None, weights)}, labels)
    torch.testing.assert_close(found, -torch.tensor(0.8001).log())
    labels[0, 3, 0] = 0  # unknown
    assert look_loss({-1: (None, weights)}, labels) == 0


def test_frames_without_a_sign_are_mirrored_with_their_labels() -> None:
    frames = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    labels = np.arange(2 * 16 * 2, dtype=np.uint8).reshape(2, 16, 2)
    labels[0, :, 1] = 0  # the first frame has no sign
    turned = 0
    for seed in range(20):
        found, truth = mirrored(frames, labels, random.Random(seed))
        assert (found[1] == frames[1]).all() and (truth[1] == labels[1]).all()
        if (found[0] == frames[0]).all():
            continue
        turned += 1
        assert (found[0] == frames[0][:, ::-1]).all()
        assert (truth[0].reshape(4, 4, 2) == labels[0].reshape(4, 4, 2)[:, ::-1]).all()
    assert 4 < turned < 16


def test_an_earlier_layer_is_asked_for_the_middles_of_objects() -> None:
    net = DenseEncoder(encoder_config())
    middle = net.middle.requires_grad_(False)
    middle.bias.zero_()
    middle.weight.zero_()[:, 0] = torch.tensor([-9.0, 9.0])  # a middle has a large first feature
    labels = torch.zeros(1, 4, MIDDLE + 1)
    assert middle_loss(net, labels) == 0
    labels[0, :3, MIDDLE] = torch.tensor([1.0, 2.0, 1.0])
    hidden = torch.zeros(1, 4, 128)
    hidden[..., 0] = torch.tensor([-1.0, 1.0, -1.0, 1.0])  # the last one is no object
    net.hidden["middle"] = hidden
    assert middle_loss(net, labels) < 1e-3
    net.hidden["middle"] = -hidden
    assert middle_loss(net, labels) > 5
