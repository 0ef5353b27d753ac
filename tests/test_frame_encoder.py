"""Frames that repeat the one before are encoded once, and nothing else changes."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch

from model.engine import Engine
from model.frame_encoder import FrameEncoder, compiled
from model.types import Answer, AskRequest
from tests.media import make_video
from tests.tiny import tiny_frames, tiny_model

PATTERN = [0, 0, 1, 1, 1, 0, 2, 2, 2, 2, 3]  # pictures; 5 runs


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 11])
def test_features_are_those_of_every_frame(chunk: int) -> None:
    crosslmm = tiny_model()
    pixels = tiny_frames(crosslmm.config, 1, 4)[0][PATTERN]
    encoder = FrameEncoder(crosslmm.model)
    with torch.inference_mode():
        whole = crosslmm.model.encode_frames(pixels)
        parts = torch.cat([encoder(part) for part in pixels.split(chunk)])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    assert encoder.repeated == len(PATTERN) - 5


def test_a_threshold_joins_what_is_close_but_no_slow_change() -> None:
    crosslmm = tiny_model()
    first = tiny_frames(crosslmm.config, 1, 1)[0]
    drift = torch.cat([first + 0.01 * step for step in range(10)])
    exact, loose = FrameEncoder(crosslmm.model), FrameEncoder(crosslmm.model, threshold=0.025)
    exact(drift), loose(drift)
    assert exact.repeated == 0
    assert loose.repeated == 6  # encoded: steps 0, 3, 6 and 9
    with pytest.raises(ValueError, match="threshold"):
        FrameEncoder(crosslmm.model, threshold=-1)


def test_the_engine_counts_repeats_of_a_still_video(tmp_path) -> None:
    path = tmp_path / "still.mp4"
    make_video(path, duration=4.0, pattern="plain")
    answers = [
        event
        for event in Engine.load(repeat_threshold=2.0).ask(AskRequest(str(path), "What is it?"))
        if isinstance(event, Answer)
    ]
    assert answers[0].repeated_frames == len(answers[0].frame_times) - 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles for a CPU with g++")
def test_a_compiled_encoder_gives_the_same_features_for_any_number_of_frames() -> None:
    plain = tiny_model().model
    quick = compiled(copy.deepcopy(plain), frames=4)
    assert quick.vision_tower.encoder._compiled_call_impl is not None
    for count in (1, 3, 4, 7):
        frames = tiny_frames(plain.config, 1, count)[0]
        with torch.inference_mode():
            wanted = plain.encode_frames(frames)
            torch.testing.assert_close(quick.encode_frames(frames), wanted, atol=1e-4, rtol=1e-4)
