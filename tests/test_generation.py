"""`generate` with its options: sampling, beams, streamers, stopping, static cache."""

from __future__ import annotations

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from tests.tiny import tiny_inputs, tiny_model


@pytest.fixture(scope="module")
def crosslmm() -> CrossLMMForConditionalGeneration:
    return tiny_model(v2v_scope="window", v2v_window=1)


def answers(model: CrossLMMForConditionalGeneration, **options) -> list[list[int]]:
    inputs = tiny_inputs(model.config, batch=2)
    length = inputs["input_ids"].shape[1]
    out = model.generate(**inputs, **{"max_new_tokens": 5, "do_sample": False, **options})
    return out[:, length:].tolist()


def test_videos_and_questions_make_a_difference(crosslmm) -> None:
    first, second = answers(crosslmm)
    assert first != second


def test_sampling_repeats_with_its_seed(crosslmm) -> None:
    options = {"do_sample": True, "temperature": 2.0, "top_k": 50, "num_return_sequences": 3}
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(answers(crosslmm, **options))
    assert draws[0] == draws[1] != draws[2]
    assert len(draws[0]) == 6


@pytest.mark.parametrize("beams", [2, 4])
def test_beams_with_cache_equal_beams_without(crosslmm, beams: int) -> None:
    options = {"num_beams": beams, "num_return_sequences": 2}
    cached = answers(crosslmm, **options)
    assert cached == answers(crosslmm, **options, use_cache=False)
    assert len(cached) == 4


def test_static_cache_equals_dynamic(crosslmm) -> None:
    static = answers(crosslmm, cache_implementation="static", disable_compile=True)
    assert static == answers(crosslmm)


class Collect(BaseStreamer):
    """Keeps every piece that `generate` hands over."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streamer_gets_every_token_as_it_comes(crosslmm) -> None:
    inputs, streamer = tiny_inputs(crosslmm.config), Collect()
    out = crosslmm.generate(**inputs, max_new_tokens=5, do_sample=False, streamer=streamer)
    prompt, *tokens = streamer.pieces
    assert prompt == inputs["input_ids"][0].tolist()
    assert [[t] for t in out[0, len(prompt) :].tolist()] == tokens
    assert streamer.ended


class StopAfter(StoppingCriteria):
    """Stops once a row has `length` tokens."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_stopping_criteria_and_end_token(crosslmm) -> None:
    whole = answers(crosslmm)
    prompt = tiny_inputs(crosslmm.config)["input_ids"].shape[1]
    stop = StoppingCriteriaList([StopAfter(prompt + 2)])
    assert answers(crosslmm, stopping_criteria=stop) == [row[:2] for row in whole]
    end, cut = whole[0][1], whole[0].index(whole[0][1]) + 1
    assert answers(crosslmm, eos_token_id=end, pad_token_id=0)[0][:cut] == whole[0][:cut]
