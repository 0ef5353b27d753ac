"""VideoMemory: built in chunks or whole, asked again and again, rolled back, counted, moved."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from transformers import StoppingCriteriaList

from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.video_memory import MemoryPool, VideoMemory
from tests.tiny import tiny_frames, tiny_model

FRAMES = 7
PREFIX = [5, 6, 9]
QUESTIONS = [[7, 10, 13, 20], [30, 31]]
CLOCK = {"time_encoding": "clock", "patch_position": "learned", "projector_norm": True}
VARIANTS = [
    {"v2v_scope": "frame"},
    {"v2v_scope": "window", "v2v_window": 1},
    {"v2v_scope": "window", "v2v_window": 3, **CLOCK},
    {"v2v_scope": "window", "v2v_window": 20},
    {"v2v_scope": "video", **CLOCK},
    {"pool_after_projector": True, "frame_separator": True, "pooled_grid": 3},
    {"v2v": False},
    {"t2v": False},
]


def names(settings: dict) -> str:
    return "-".join(f"{k}={v}" for k, v in settings.items())


def times(frames: int = FRAMES) -> torch.Tensor:
    return 61.5 * torch.arange(frames).float()


def remember(
    crosslmm: CrossLMMForConditionalGeneration,
    chunks: tuple[int, ...] = (FRAMES,),
    precision: str = "native",
    prefix: list[int] | None = None,
    expected_frames: int = 0,
) -> VideoMemory:
    frames = sum(chunks)
    memory = VideoMemory(
        crosslmm,
        precision=precision,
        prefix_ids=PREFIX if prefix is None else prefix,
        expected_frames=expected_frames,
    )
    pixels = tiny_frames(crosslmm.config, 1, frames)[0]
    for part, seconds in zip(pixels.split(chunks), times(frames).split(chunks), strict=True):
        memory.append(part, seconds)
    return memory.finish()


def ask(
    crosslmm: CrossLMMForConditionalGeneration, memory: VideoMemory, question: int = 0, **options
) -> tuple[list[int], torch.Tensor]:
    """Greedy answer and the logits behind each of its tokens."""
    ids = memory.input_ids(QUESTIONS[question])
    with memory.turn() as cache, torch.inference_mode():
        out = crosslmm.generate(
            ids,
            past_key_values=cache,
            max_new_tokens=5,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    return out.sequences[0, ids.shape[1] :].tolist(), torch.cat(out.logits)


def same(first: tuple[list[int], torch.Tensor], second: tuple[list[int], torch.Tensor]) -> None:
    assert first[0] == second[0]
    torch.testing.assert_close(first[1], second[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", VARIANTS, ids=names)
def test_memory_answers_like_the_whole_prompt(settings: dict) -> None:
    crosslmm = tiny_model(**settings)
    memory = remember(crosslmm)
    ids = memory.input_ids(QUESTIONS[0])
    out = crosslmm.generate(
        ids,
        pixel_values_videos=tiny_frames(crosslmm.config, 1, FRAMES),
        frame_times=times()[None],
        max_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    plain = out.sequences[0, ids.shape[1] :].tolist(), torch.cat(out.logits)
    same(ask(crosslmm, memory), plain)


@pytest.mark.parametrize("chunks", [(1,) * FRAMES, (3, 1, 3), (2, 5)], ids=str)
@pytest.mark.parametrize("settings", VARIANTS, ids=names)
def test_chunked_build_equals_whole_build(settings: dict, chunks: tuple[int, ...]) -> None:
    crosslmm = tiny_model(**settings)
    whole, chunked = remember(crosslmm), remember(crosslmm, chunks)
    for a, b in zip(whole.cache.layers, chunked.cache.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-4, rtol=0)
        torch.testing.assert_close(a.values, b.values, atol=1e-4, rtol=0)
    assert whole.state.t2v.keys() == chunked.state.t2v.keys()
    for layer, store in whole.state.t2v.items():
        pairs = zip(store.full(), chunked.state.t2v[layer].full(), strict=True)
        assert all(torch.allclose(a, b, atol=1e-4, rtol=0) for a, b in pairs)
    assert whole.nbytes == chunked.nbytes and whole.times == chunked.times
    same(ask(crosslmm, whole), ask(crosslmm, chunked))


@pytest.mark.parametrize("precision", ["native", "int8", "int4"])
def test_second_question_equals_the_first_on_a_fresh_memory(precision: str) -> None:
    crosslmm = tiny_model(v2v_scope="window", v2v_window=2)
    memory = remember(crosslmm, (4, 3), precision)
    first, second = ask(crosslmm, memory, 0), ask(crosslmm, memory, 1)
    assert first[0] != second[0]
    same(second, ask(crosslmm, remember(crosslmm, (4, 3), precision), 1))
    same(first, ask(crosslmm, memory, 0))  # and the first one again


class CutOff(Exception):
    """What ends a turn in the middle of its forward passes."""


def raising(input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
    raise CutOff


def stopping(input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
    return torch.ones(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("stop", [raising, stopping])
def test_question_after_a_cancelled_turn(stop: Callable) -> None:
    crosslmm = tiny_model()
    memory = remember(crosslmm)
    expected, nbytes = ask(crosslmm, memory, 1), memory.nbytes
    with pytest.raises(CutOff) if stop is raising else nullcontext():
        answer, _ = ask(crosslmm, memory, 0, stopping_criteria=StoppingCriteriaList([stop]))
        assert len(answer) == 1
    assert memory.cache.get_seq_length() == memory.length
    assert memory.nbytes == nbytes
    same(ask(crosslmm, memory, 1), expected)


def test_question_costs_only_its_own_text() -> None:
    crosslmm = tiny_model()
    memory, seen = remember(crosslmm), []
    hook = crosslmm.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    ask(crosslmm, memory, 0)
    hook.remove()
    assert seen == [len(QUESTIONS[0]), 1, 1, 1, 1]


@pytest.mark.parametrize("precision", ["native", "int8", "int4"])
@pytest.mark.parametrize("settings", VARIANTS[1:6:4], ids=names)
def test_bytes_are_exact(settings: dict, precision: str) -> None:
    crosslmm = tiny_model(**settings)
    memory = remember(crosslmm, (4, 3), precision)
    config, text = memory.config, memory.config.text_config
    width = text.hidden_size // text.num_attention_heads
    rows, tokens = text.num_key_value_heads * FRAMES, config.original_tokens_per_frame
    elements = 2 * rows * tokens * width * len(config.dcal_layers)
    scales = 2 * 2 * rows * (tokens + width) * len(config.dcal_layers)
    t2v = {"native": 4 * elements, "int8": elements + scales, "int4": elements // 2 + scales}
    pooled = FRAMES * config.pooled_tokens_per_frame + int(config.frame_separator)
    assert memory.length == len(PREFIX) + pooled
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * width * 4 * memory.length
    assert memory.nbytes == t2v[precision] + cache
    with memory.turn():
        assert memory.nbytes == t2v[precision] + cache


@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.01), ("int4", 0.15)])
def test_quantised_memory_stays_near_the_exact_one(precision: str, bound: float) -> None:
    """Random weights are the worst case; the bundled model's own bounds are tested with it."""
    crosslmm = tiny_model()
    _, exact = ask(crosslmm, remember(crosslmm))
    _, logits = ask(crosslmm, remember(crosslmm, precision=precision))
    error = (logits[0] - exact[0]).norm() / exact[0].norm()
    assert 0 < error < bound


def test_nothing_waits_outside_the_video_scope() -> None:
    """What a chunk leaves behind: its keys and values, and the window's frames."""
    for settings, kept in (
        ({"v2v_scope": "frame"}, 0),
        ({"v2v_scope": "window", "v2v_window": 2}, 2),
    ):
        crosslmm = tiny_model(**settings)
        memory = VideoMemory(crosslmm)
        for pixels in tiny_frames(crosslmm.config, 1, 6)[0].split(2):
            memory.append(pixels, torch.zeros(2))
            recent = memory.state.recent
            assert (0 if recent is None else recent.shape[1]) == kept
            assert not memory._waiting
        assert memory.finish().state.recent is None


@pytest.mark.parametrize("precision", ["native", "int8", "int4"])
def test_moves_everything(precision: str) -> None:
    crosslmm = tiny_model()
    memory = remember(crosslmm, (4, 3), precision)
    expected, nbytes = ask(crosslmm, memory), memory.nbytes
    same(ask(crosslmm, memory.to("cpu")), expected)
    memory.to("meta")
    held = [t for layer in memory.cache.layers for t in (layer.keys, layer.values)]
    for store in memory.state.t2v.values():
        held += store.full() if precision == "native" else []
        for keys, values, _ in store._quantized:
            held += [*keys.tensors(), *values.tensors()]
    assert {tensor.device.type for tensor in held} == {"meta"}
    assert memory.nbytes == nbytes


def test_without_a_prefix_and_with_one_frame() -> None:
    crosslmm = tiny_model(v2v_scope="window", v2v_window=2)
    memory = remember(crosslmm, (1,), prefix=[])
    assert memory.length == crosslmm.config.pooled_tokens_per_frame
    answer, _ = ask(crosslmm, memory)
    out = crosslmm.generate(
        memory.input_ids(QUESTIONS[0]),
        pixel_values_videos=tiny_frames(crosslmm.config, 1, 1),
        max_new_tokens=5,
        do_sample=False,
    )
    assert out[0, -5:].tolist() == answer


def test_wrong_order_is_told() -> None:
    crosslmm = tiny_model()
    with pytest.raises(ValueError, match="at least one frame"):
        VideoMemory(crosslmm).finish()
    with pytest.raises(ValueError, match="finish"), VideoMemory(crosslmm).turn():
        pass
    memory = remember(crosslmm)
    with pytest.raises(ValueError, match="finished"):
        memory.append(tiny_frames(crosslmm.config, 1, 1)[0], torch.zeros(1))


class Entry:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def test_pool_drops_what_was_asked_longest_ago() -> None:
    pool = MemoryPool(10)
    for key in "abc":
        pool.put(key, Entry(3))
    assert pool.get("a").nbytes == 3  # now the most recent
    pool.put("d", Entry(3))
    assert [pool.get(key) is not None for key in "abcd"] == [True, False, True, True]
    assert pool.nbytes == 9 and len(pool) == 3
    pool.put("big", Entry(50))
    assert len(pool) == 1 and pool.get("big") is not None
    pool.put("big", Entry(4))
    assert pool.nbytes == 4
    pool.put("other", Entry(1))
    pool.drop(lambda key: key == "big")
    assert len(pool) == 1 and pool.get("other") is not None
    with pytest.raises(ValueError, match="-1"):
        MemoryPool(-1)


@pytest.mark.parametrize("expected", [FRAMES, FRAMES + 4, 3])
def test_a_wrong_expectation_changes_no_answer(expected: int) -> None:
    crosslmm = tiny_model()
    plain, told = remember(crosslmm), remember(crosslmm, (2, 2, 3), expected_frames=expected)
    assert told.nbytes == plain.nbytes
    ids, logits = ask(crosslmm, plain)
    told_ids, told_logits = ask(crosslmm, told)
    assert told_ids == ids
    torch.testing.assert_close(told_logits, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("precision", ["native", "int8"])
def test_beams_share_a_memory(kernel: str, precision: str) -> None:
    crosslmm = tiny_model()
    crosslmm.set_attn_implementation(kernel)
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 5, "do_sample": False}
    memory = remember(crosslmm, precision=precision)
    before = memory.nbytes
    with memory.turn(copies=3) as cache:
        shared = crosslmm.generate(
            memory.input_ids(QUESTIONS[0]), past_key_values=cache, **options
        ).tolist()
    assert memory.nbytes == before
    assert len({tuple(row) for row in shared}) == 3
    with memory.turn() as cache:  # a plain turn afterwards
        crosslmm.generate(memory.input_ids(QUESTIONS[0]), past_key_values=cache, max_new_tokens=2)
    if precision == "native":
        alone = crosslmm.generate(
            memory.input_ids(QUESTIONS[0]),
            pixel_values_videos=tiny_frames(crosslmm.config, 1, FRAMES),
            frame_times=times()[None],
            use_cache=False,
            **options,
        )
        assert shared == alone.tolist()
