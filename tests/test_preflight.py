"""Plans that are told before a video is read, and that the engine then keeps to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from model.engine import Engine
from model.loading import load
from model.preflight import Rates, free_bytes
from model.types import Answer, AskRequest, InputError, PlanRequest, VideoInfo, WhatIf
from tests.media import make_video

pytestmark = pytest.mark.bundled


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(load(), memory_budget=1 << 30)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    make_video(path, duration=30, fps=5)
    return path


def video(duration: float) -> VideoInfo:
    return VideoInfo("/v.mp4", "mp4", "h264", 640, 360, duration, 25.0, int(25 * duration), 0, 1)


def ask(engine: Engine, path: Path, **more: object) -> Answer:
    request = AskRequest(str(path), "Is there a cat?", max_new_tokens=2, **more)
    return next(event for event in engine.ask(request) if isinstance(event, Answer))


def test_frames_and_tokens_of_a_video_that_fits(engine: Engine) -> None:
    plan = engine.plan(PlanRequest(video(320.0)))
    per_frame = engine.info.original_tokens_per_frame
    assert (plan.frames, plan.most_frames) == (128, 320)
    assert plan.original_tokens == 128 * per_frame
    assert plan.pooled_tokens == 128 * engine.info.pooled_tokens_per_frame
    assert plan.frame_rate == pytest.approx(0.4)
    assert 0 < plan.kept_bytes < plan.peak_bytes < plan.free_bytes
    assert plan.notices == ()


def test_what_cannot_be_chosen_is_clamped_and_told(engine: Engine) -> None:
    plan = engine.plan(PlanRequest(video(40.0), max_frames=500))
    assert plan.frames == plan.most_frames == 40
    assert plan.notices == ("500 frames are more than this video gives: 40, at 1 per second.",)
    many = engine.plan(PlanRequest(video(3000.0), max_frames=2000, pooled_tokens=16))
    assert many.frames == many.most_frames < 2000
    assert many.frames * 16 <= engine.crosslmm.config.text_config.max_position_embeddings
    assert "With 16 tokens per frame there is room for" in many.notices[0]
    with pytest.raises(InputError, match="cannot be chosen"):
        engine.plan(PlanRequest(video(40.0), pooled_tokens=7))


def test_the_engine_keeps_to_what_fits_and_says_so(
    engine: Engine, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.forget(str(clip))
    info = replace(video(30.0), path=str(clip))
    whole = engine.plan(PlanRequest(info))
    monkeypatch.setattr(engine.preflight, "spare", lambda: 0)
    monkeypatch.setattr(engine.preflight, "free", lambda: int(0.7 * whole.peak_bytes))
    plan = engine.plan(PlanRequest(info))
    assert plan.frames < whole.frames or plan.kv_precision != "native"
    answer = ask(engine, clip)
    assert len(answer.frame_times) == plan.frames
    assert set(plan.notices) <= set(answer.notices) and plan.notices
    assert ask(engine, clip).memory_reused
    monkeypatch.setattr(engine.preflight, "free", lambda: 1000)
    with pytest.raises(InputError, match="of free memory are needed"):
        ask(engine, clip, max_frames=9)
    monkeypatch.undo()
    again = ask(engine, clip)  # there is memory now
    assert len(again.frame_times) == whole.frames and not again.memory_reused


def test_more_tokens_per_frame_take_fewer_frames_not_an_error(engine: Engine, clip: Path) -> None:
    most = max(engine.preflight.token_choices())
    answer = ask(engine, clip, what_if=WhatIf(pooled_tokens=most))
    assert answer.tokens.pooled == most * len(answer.frame_times)
    assert (
        len(answer.frame_times) == engine.plan(PlanRequest(answer.video, pooled_tokens=most)).frames
    )


def test_other_videos_make_room(
    engine: Engine, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(engine, clip)
    kept = engine.pool.nbytes
    assert kept
    need = engine.plan(PlanRequest(video(30.0))).peak_bytes
    monkeypatch.setattr(engine.preflight, "free", lambda: int(1.2 * need) - kept)
    answer = ask(engine, clip, max_frames=29)
    assert len(answer.frame_times) == 29
    assert len(engine.pool) == 1


def test_seconds_are_told_once_a_video_was_read(clip: Path) -> None:
    engine = Engine(load())
    assert engine.plan(PlanRequest(video(30.0))).seconds is None
    answer = ask(engine, clip)
    told = engine.plan(PlanRequest(answer.video)).seconds
    spent = answer.timings.first_token
    assert 0.2 * spent < told < 2 * spent
    assert engine.plan(PlanRequest(video(3000.0))).seconds > told


def test_rates_follow_what_was_measured() -> None:
    rates = Rates()
    assert rates.seconds(1e9, 1e6) is None
    rates.add(operations=1e9, compute=2.0, pixels=1e6, decode=5.0, whole=6.0)
    assert rates.seconds(1e9, 1e6) == pytest.approx(6.0)
    rates.add(operations=1e9, compute=1.0, pixels=1e6, decode=5.0, whole=0.0)  # nonsense: ignored
    assert rates.seconds(2e9, 2e6) == pytest.approx(12.0)


def test_free_memory_is_what_the_machine_has() -> None:
    assert 1 << 20 < free_bytes("cpu") < 1 << 46
