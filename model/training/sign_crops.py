"""Freshly painted signs on pieces of stored frames, for learning to read.

Rendering whole scenes is too slow to give every training step new numbers, and 900 numbers in some
ten thousand frames are learnt by heart. A piece of a frame without a sign gets a new one here, and
goes through the same compression and resize as a whole frame does.
"""

from __future__ import annotations

import io
import random

import numpy as np
from PIL import Image

from model.training.world_facts import (
    CHARACTER_IDS,
    COLOUR_IDS,
    LONGEST_SIGN,
    own_characters,
)
from model.training.world_parts import SIGN_COLOURS, SIGN_WORDS, Sign
from model.training.world_render import paint_sign

NUMBER_SHARE = 0.8  # words are few and soon known
PICTURES = ((256, 144), (256, 144), (256, 144), (320, 180), (224, 126), (208, 156), (160, 160))


class SignPainter:
    """Paints signs from a bank of finished plates, a part of which is renewed all the time."""

    def __init__(self, rng: random.Random, side: int, patch: int, bank: int = 3000) -> None:
        self.rng, self.side, self.patch = rng, side, patch
        self.bank = [self._plate() for _ in range(bank)]

    def _plate(self) -> tuple[str, str, tuple[int, int], tuple[float, float], Image.Image]:
        rng = self.rng
        number = rng.random() < NUMBER_SHARE
        text = str(rng.randint(100, 999)) if number else rng.choice(SIGN_WORDS)
        colour, picture = rng.choice(tuple(SIGN_COLOURS)), rng.choice(PICTURES)
        width = rng.uniform(0.28, 0.34) + 0.03 * max(len(text) - 3, 0)
        height = rng.uniform(0.15, 0.2)
        size = (round(width * picture[0]), round(height * picture[1]))
        return text, colour, picture, (width, height), paint_sign(text, colour, size)

    def paint(self, piece: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Put a sign on a square piece (S, S, 3) of a frame that shows none.

        `labels` (n, n, 2 + 5 + 1 + 1) of the piece: object, sign colour, the sign's text on each of
        its patches, the character on the patch itself, and a count. Both are returned anew.
        """
        rng = self.rng
        place = rng.randrange(len(self.bank))
        if rng.random() < 0.25:
            self.bank[place] = self._plate()
        text, colour, picture, (width, height), plate = self.bank[place]
        share = piece.shape[0] / self.side  # of the frame that the piece shows
        left, top = rng.uniform(0, share - width), rng.uniform(0, share - height)
        size = (round(picture[0] * share), round(picture[1] * share))
        image = Image.fromarray(piece).resize(size, Image.Resampling.BICUBIC)
        corner = (round(left * picture[0]), round(top * picture[1]))
        image.paste(plate, corner, plate)
        if rng.random() < 0.8:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=rng.randint(25, 90))
            image = Image.open(buffer)
        painted = np.asarray(image.resize(piece.shape[:2], Image.Resampling.BICUBIC))
        box = (left / share, top / share, (left + width) / share, (top + height) / share)
        return painted, _relabel(labels, Sign(text, colour, "", box, 0.0, 1.0, ""))


def _relabel(labels: np.ndarray, sign: Sign) -> np.ndarray:
    labels = labels.copy()
    centres = (np.arange(len(labels)) + 0.5) / len(labels)
    left, top, right, bottom = sign.box
    covered = ((centres >= top) & (centres < bottom))[:, None] & (
        (centres >= left) & (centres < right)
    )
    characters = [CHARACTER_IDS[character] for character in sign.text]
    labels[covered, 0] = 0
    labels[covered, 1] = COLOUR_IDS[sign.colour]
    text = slice(2, 2 + LONGEST_SIGN)
    labels[covered, text] = characters + [0] * (LONGEST_SIGN - len(characters))
    labels[..., text.stop] = own_characters(sign, labels[..., text])
    return labels
