"""What a turn is said to have cost, against the accounting and against a real memory."""

from __future__ import annotations

import pytest
import torch

from model.accounting import account
from model.configuration_crosslmm import CrossLMMConfig
from model.engine import Engine
from model.savings import compare, count_savings
from model.types import AskRequest, InputError
from model.video_memory import VideoMemory
from tests.tiny import tiny_frames, tiny_model

CONFIG = CrossLMMConfig.from_preset("crosslmm-7b")


def test_the_three_systems_on_the_same_turn() -> None:
    savings = compare(CONFIG, 256, text_tokens=40, generated_tokens=20, text_before=14)
    assert savings.reduction == pytest.approx(1 - 9 / 729)
    assert savings.original_tokens == 256 * 729
    assert [one.tokens_per_frame for one in savings.systems] == [9, 196, 729]
    for one in savings.systems:
        counted = account(CONFIG, 256, 40, 20, system=one.system, text_before=14)
        assert one.operations() == counted.operations.causal
        assert one.kv_bytes == counted.kv_bytes.total
    assert savings.unpooled.operations() / savings.crosslmm.operations() > 40
    assert savings.unpooled.kv_bytes > savings.crosslmm.kv_bytes


def test_a_later_question_costs_only_its_text() -> None:
    """The more text, the more; the encoder and the video's own tokens are no part of it."""
    short, long = (compare(CONFIG, 256, 14 + n, 1, text_before=14) for n in (20, 40))
    for one, more in zip(short.systems, long.systems, strict=True):
        assert one.video_operations == more.video_operations
        assert one.operations(memory_reused=True) < 0.02 * one.operations()
        assert more.question_operations > 1.9 * one.question_operations - 4e9  # one row of logits
    weights = 2 * 20 * 6.53e9  # 2 per weight and token, embeddings left out
    looking_back = 4 * 20 * (256 * 729) * 3584 * 7  # T2V in 7 layers
    asked = short.crosslmm.question_operations
    assert asked == pytest.approx(weights + looking_back, rel=0.05)


def test_the_curve_passes_through_the_turn_and_ends_where_positions_do() -> None:
    savings = compare(CONFIG, 256, 40, 20, text_before=14)
    for one in savings.systems:
        (here,) = [point for point in one.curve if point.frames == 256]
        assert (here.operations, here.kv_bytes) == (one.operations(), one.kv_bytes)
        most = one.most_frames
        positions = CONFIG.text_config.max_position_embeddings
        assert account(CONFIG, most, 40, 20, system=one.system).tokens.llm <= positions
        assert account(CONFIG, most + 1, 40, 21, system=one.system).tokens.llm > positions


@pytest.mark.parametrize("precision", ["native", "int8", "int4"])
def test_counted_bytes_are_those_of_a_real_memory(precision: str) -> None:
    crosslmm = tiny_model()
    memory = VideoMemory(crosslmm, precision=precision, prefix_ids=[1, 2, 3])
    memory.append(tiny_frames(crosslmm.config, 1, 4)[0], torch.arange(4.0))
    memory.finish()
    counted = count_savings(memory, text_tokens=3, generated_tokens=0)
    assert counted.crosslmm.kv_bytes == memory.nbytes


@pytest.mark.bundled
def test_a_lower_precision_is_used_and_counted() -> None:
    native, packed = (Engine.load(kv_precision=precision) for precision in ("native", "int4"))
    # A question that both answer alike: costs count the answer's tokens.
    request = AskRequest("assets/samples/short.mp4", "Where is the elephant?", max_frames=12)
    answers = [list(engine.ask(request))[-1] for engine in (native, packed)]
    assert answers[0].text == answers[1].text
    assert packed.info.kv_precision == "int4"
    whole, less = (answer.savings.crosslmm.kv_bytes for answer in answers)
    assert less < 0.3 * whole
    assert answers[0].savings.unpooled == answers[1].savings.unpooled
    with pytest.raises(InputError, match="kv_precision must be one of"):
        Engine.load(kv_precision="int2")
