"""The planner: predictions against measured allocations, choices, and refusals."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from model.accounting import account
from model.configuration_crosslmm import CrossLMMConfig
from model.loading import quantization_config
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.planner import Plan, PlanSettings, plan, predict, weight_bytes
from model.types import InputError
from model.video_memory import VideoMemory

VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 72,
    "intermediate_size": 270,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 8,
    "image_size": 112,
    "vision_use_head": False,
}
TEXT = {
    "model_type": "qwen2",
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 676,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}
SEVEN = CrossLMMConfig.from_preset("crosslmm-7b")
LOADED = PlanSettings(weights_loaded=True, max_frames=3600)
GB = 10**9


def small_config(**overrides) -> CrossLMMConfig:
    return CrossLMMConfig(vision_config=VISION, text_config=TEXT, video_token_id=499, **overrides)


def peak_bytes(run) -> int:
    """The most bytes allocated at once while `run` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize(
    ("scope", "dtype", "precision", "text_tokens"),
    [
        ({}, "bfloat16", "native", 20),
        ({}, "float32", "native", 200),
        ({}, "bfloat16", "int8", 60),
        ({}, "float32", "int4", 20),
        ({"v2v_scope": "window", "v2v_window": 3}, "bfloat16", "native", 20),
        ({"v2v_scope": "video"}, "bfloat16", "int4", 60),
        ({"time_encoding": "clock", "patch_position": "learned"}, "float32", "native", 20),
    ],
)
def test_predicted_bytes_hold_and_are_not_far_off(scope, dtype, precision, text_tokens):
    config = small_config(**scope)
    torch_dtype = getattr(torch, dtype)
    crosslmm = CrossLMMForConditionalGeneration._from_config(config, dtype=torch_dtype).eval()
    frames, chunk, answer = 48, 8, 4
    pixels = torch.randn(chunk, 3, 112, 112)

    def build_and_ask() -> None:
        memory = VideoMemory(crosslmm, precision=precision)
        for start in range(0, frames, chunk):
            memory.append(pixels.clone(), torch.arange(start, start + chunk))
        memory.finish()
        with memory.turn() as cache:
            crosslmm.generate(
                memory.input_ids([1] * text_tokens),
                past_key_values=cache,
                max_new_tokens=answer,
                min_new_tokens=answer,
                do_sample=False,
            )

    settings = PlanSettings(
        text_tokens=text_tokens,
        generated_tokens=answer,
        chunk_frames=chunk,
        dtype=dtype,
        weights_loaded=True,
    )
    predicted = predict(config, frames, precision, settings)
    measured = peak_bytes(build_and_ask)
    assert measured <= predicted.total_bytes <= 1.6 * measured
    counted = account(config, frames, text_tokens, answer, kv_precision=precision, dtype=dtype)
    assert predicted.llm_kv_bytes == counted.kv_bytes.llm
    assert predicted.t2v_kv_bytes == counted.kv_bytes.t2v
    assert predicted.operations == counted.operations.causal


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_weight_bytes(quantization, tmp_path):
    config = small_config()
    crosslmm = CrossLMMForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    if quantization != "none":
        crosslmm.save_pretrained(tmp_path)
        crosslmm = CrossLMMForConditionalGeneration.from_pretrained(
            tmp_path,
            quantization_config=quantization_config(quantization),
            dtype=torch.bfloat16,
            device_map="cpu",
        )
    held = 0
    for tensor in crosslmm.parameters():
        held += tensor.nbytes
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            scales = (state.absmax, state.state2.absmax)
            held += sum(scale.nbytes for scale in scales)
    assert weight_bytes(config, quantization) == pytest.approx(held, rel=0.01)


def test_everything_fits():
    chosen = plan(SEVEN, 256, 60 * GB, PlanSettings(max_frames=512))
    assert (chosen.frames, chosen.kv_precision, chosen.notices) == (256, "native", ())
    assert chosen.weight_bytes == 2 * account(SEVEN, 1).parameters.total
    assert chosen.t2v_kv_bytes == account(SEVEN, 256).kv_bytes.t2v
    assert chosen.total_bytes <= 0.9 * 60 * GB


@pytest.mark.parametrize(
    ("free", "frames", "precision"),
    [(60, 3600, "native"), (30, 3600, "int8"), (20, 3600, "int4")],
)
def test_precision_goes_before_frames(free, frames, precision):
    """An hour at a frame per second, the weights loaded already."""
    chosen = plan(SEVEN, 3600, free * GB, LOADED)
    assert (chosen.frames, chosen.kv_precision) == (frames, precision)
    assert bool(chosen.notices) == (precision != "native")


def test_four_bits_are_not_worth_a_few_frames():
    """One frame short of what 8 bits hold: 3,599 frames at 8 bits beat 3,600 at 4 bits."""
    whole = predict(SEVEN, 3600, "int8", LOADED).total_bytes
    free = int((whole - 1) / (1 - LOADED.headroom))
    chosen = plan(SEVEN, 3600, free, LOADED)
    assert (chosen.frames, chosen.kv_precision) == (3599, "int8")
    assert len(chosen.notices) == 2


def test_then_frames_go_and_what_fits_is_used():
    chosen = plan(SEVEN, 3600, 8 * GB, LOADED)
    assert chosen.kv_precision == "int4"
    assert 8 < chosen.frames < 3600
    usable = 8 * GB * (1 - LOADED.headroom)
    one_more = predict(SEVEN, chosen.frames + 1, "int4", LOADED)
    assert chosen.total_bytes <= usable < one_more.total_bytes
    assert f"{chosen.frames:,} of 3,600" in " ".join(chosen.notices)


def test_more_memory_is_never_worse():
    def worth(chosen: Plan) -> float:
        return chosen.frames / 3600 - {"native": 0, "int8": 0.01, "int4": 0.03}[chosen.kv_precision]

    plans = [plan(SEVEN, 3600, free * GB, LOADED) for free in range(4, 60, 4)]
    worths = [worth(chosen) for chosen in plans]
    assert worths == sorted(worths)


def test_a_fixed_precision_is_kept():
    chosen = plan(SEVEN, 3600, 60 * GB, replace(LOADED, kv_precision="int8"))
    assert (chosen.kv_precision, chosen.notices) == ("int8", ())
    short = plan(SEVEN, 3600, 12 * GB, replace(LOADED, kv_precision="int8"))
    assert short.kv_precision == "int8"
    assert short.frames < 3600


def test_positions_of_the_language_model_limit_the_frames():
    chosen = plan(SEVEN, 4 * 3600, 200 * GB, replace(LOADED, max_frames=100_000))
    limit = (32768 - 128 - 128) // 9
    assert chosen.frames == limit
    assert "positions" in chosen.notices[0]
    with pytest.raises(InputError, match="positions"):
        plan(SEVEN, 60, 60 * GB, replace(LOADED, text_tokens=40_000))


def test_refused_in_one_sentence_when_even_the_least_does_not_fit():
    with pytest.raises(InputError) as refusal:
        plan(SEVEN, 600, 10 * GB)
    message = str(refusal.value)
    assert "10,000 MB" in message
    assert "8 frames" in message
    assert message.count(". ") == 0
    assert message.endswith(".")
    needed = int(message.split(" MB")[0].replace(",", "")) * 10**6
    assert plan(SEVEN, 600, needed + 10**6).frames >= 8


def test_a_short_video_may_have_fewer_frames_than_the_least():
    assert plan(SEVEN, 3, 60 * GB).frames == 3


def test_seconds_follow_from_a_measured_speed():
    assert plan(SEVEN, 60, 60 * GB).seconds is None
    chosen = plan(SEVEN, 60, 60 * GB, PlanSettings(operations_per_second=1e14))
    assert chosen.seconds == pytest.approx(chosen.operations / 1e14)


def test_impossible_settings():
    with pytest.raises(ValueError, match="headroom"):
        plan(SEVEN, 60, GB, PlanSettings(headroom=1))
    with pytest.raises(ValueError, match="quantization"):
        weight_bytes(SEVEN, "2bit")
