"""Rows 4, 9, 16, 19 and 25 inside the model: the bundled one, and what ends a turn of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from model import engine as engine_module
from model.engine import Engine
from model.guards import is_out_of_memory, repeats
from model.types import (
    Answer,
    AskRequest,
    Event,
    InputError,
    ModelFault,
    Piece,
    Progress,
    ReadBounds,
    Stopped,
)
from model.video_memory import VideoMemory
from tests.faults import decoder
from tests.media import flip_bits, make_video

pytestmark = pytest.mark.bundled
QUESTION = "What happens in the video?"
BOUNDS = ReadBounds(check_seconds=30, frame_seconds=30, read_seconds=120)
MORE_MEMORY = 100 << 20


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load()


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    make_video(path, duration=20, fps=5, gop=10, size=(160, 96))
    return path


@pytest.fixture(scope="module")
def answer(engine: Engine, film: Path) -> str:
    return ask(engine, film).text


@pytest.fixture(autouse=True)
def sound(engine: Engine, film: Path, answer: str) -> Iterator[None]:
    """After every row: as many threads, files and bytes as before, and the same answer."""
    here = psutil.Process()
    before = here.memory_info().rss, threading.active_count(), here.num_fds()
    yield
    assert ask(engine, film).text == answer
    lines = [" ".join(child.cmdline()) for child in here.children()]
    assert not [line for line in lines if "video_child" in line or "faults.decoder" in line]
    after = here.memory_info().rss - MORE_MEMORY, threading.active_count(), here.num_fds()
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)


def ask(engine: Engine, path: Path, **more: int) -> Answer:
    return list(engine.ask(AskRequest(str(path), QUESTION, bounds=BOUNDS, **more)))[-1]


def short_of_memory(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> None:
    """From `most` frames on there is no memory for a video."""
    append = VideoMemory.append_features

    def limited(self: VideoMemory, features: torch.Tensor, times: torch.Tensor) -> None:
        if self.num_frames + len(times) > most:
            raise error
        append(self, features, times)

    monkeypatch.setattr(VideoMemory, "append_features", limited)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python"])
def test_out_of_memory_is_tried_once_more_with_fewer_frames(
    error: Exception, engine: Engine, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 19."""
    assert is_out_of_memory(error)
    engine.forget(str(film))
    frames = 16
    with monkeypatch.context() as patch:
        short_of_memory(patch, frames - 1, error)
        told = ask(engine, film, max_frames=frames)
    assert len(told.frame_times) == frames // 2
    assert any("Memory ran short, so only 8 frames" in notice for notice in told.notices)
    assert ask(
        engine, film, max_frames=frames
    ).memory_reused  # the next question costs no more tries
    engine.forget(str(film))
    assert len(ask(engine, film, max_frames=frames).frame_times) == frames


def test_out_of_memory_twice_is_a_sentence(
    engine: Engine, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 19."""
    engine.forget(str(film))
    with monkeypatch.context() as patch:
        short_of_memory(patch, 0, ERRORS[0])
        with pytest.raises(ModelFault, match="not enough memory"):
            ask(engine, film, max_frames=16)
    assert len(engine.pool) == 0


def test_numbers_that_break_down_end_the_turn(engine: Engine, film: Path) -> None:
    """Row 25: NaN in the model's scores."""
    head = engine.crosslmm.lm_head
    handle = head.register_forward_hook(lambda *parts: parts[-1] * float("nan"))
    try:
        with pytest.raises(ModelFault, match="NaN"):
            ask(engine, film)
    finally:
        handle.remove()


def test_endless_repetition_ends_with_a_notice(engine: Engine, film: Path) -> None:
    """Row 25: the model says one word for ever."""
    word = engine.processor.tokenizer.encode(" the")[0]

    def one_word(_module: object, _given: object, scores: torch.Tensor) -> torch.Tensor:
        scores = torch.zeros_like(scores)
        scores[..., word] = 1.0
        return scores

    handle = engine.crosslmm.lm_head.register_forward_hook(one_word)
    try:
        told = ask(engine, film, max_new_tokens=400)
    finally:
        handle.remove()
    assert told.tokens.generated < 60
    assert any("repeated itself" in notice for notice in told.notices)


def test_what_counts_as_repetition() -> None:
    phrase = [5, 6, 7, 8, 9]
    assert repeats(phrase * 20) and repeats([1, 2, 3] + [4] * 60)
    assert not repeats(phrase * 5) and not repeats(list(range(300)))
    assert not repeats([1, 2, 3, 4] * 8 + list(range(100)))


def test_a_damaged_stream_says_how_many_frames_it_used(engine: Engine, tmp_path: Path) -> None:
    """Row 4."""
    whole, bad = tmp_path / "whole.mp4", tmp_path / "bad.mp4"
    make_video(whole, codec="libsvtav1", duration=12, gop=10, fps=10, size=(160, 96))
    lost = 0
    for seed, flips in enumerate((5, 20, 100)):
        flip_bits(whole, bad, flips, seed)
        try:
            told = ask(engine, bad)
        except InputError as error:
            assert str(error).endswith(".")
            continue
        missing = 12 - len(told.frame_times)
        lost += missing
        assert not missing or any(
            f"{missing} sampled frames could not be decoded" in notice for notice in told.notices
        )
    assert lost


@pytest.mark.parametrize("how", ["segfault", "lie"])
def test_a_decoder_that_fails_while_the_model_reads(
    how: str, engine: Engine, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 5 and 6: the worker's own process is not touched."""
    monkeypatch.setattr("model.video_sandbox._PROGRAM", ("-m", "tests.faults.decoder"))
    path = decoder.mark(film, tmp_path / "bad.mp4", "decode", how)
    with pytest.raises(InputError, match="decoder crashed"):
        ask(engine, path)


def test_frames_beyond_all_reason_are_clamped(
    engine: Engine, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 9: num_frames = 1e9."""
    monkeypatch.setattr(engine_module, "MOST_FRAMES", 8)
    told = ask(engine, film, max_frames=10**9)
    assert len(told.frame_times) == 8
    assert any("At most 8 frames" in notice for notice in told.notices)


@pytest.mark.parametrize("stage", ["reading", "encoding", "answering"])
def test_stop_inside_a_long_step(stage: str, engine: Engine, film: Path, tmp_path: Path) -> None:
    """Row 16: in the middle of a stage, not at its end."""
    engine.forget(str(film))
    stop, events = threading.Event(), iter(())
    events = engine.ask(AskRequest(str(film), QUESTION, bounds=BOUNDS), stop.is_set)
    started, last = 0.0, None
    try:
        for event in events:
            last = event
            if not started and reached(event, stage):
                threading.Timer(0.02, stop.set).start()
                started = time.monotonic()
    except Stopped:
        last = None
    assert started and time.monotonic() - started < 1 + 4  # and time for a busy machine
    assert last is None or isinstance(last, Answer)


def reached(event: Event, stage: str) -> bool:
    if stage == "answering":
        return isinstance(event, Piece)
    return isinstance(event, Progress) and event.stage == stage
