"""What-ifs against models that are built that way, and that other turns notice nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from model.attention_summary import Room
from model.engine import Engine
from model.loading import Loaded
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.types import Answer, AskRequest, InputError, WhatIf
from model.video import decode_frames, sample_times
from model.video_memory import VideoMemory
from tests.media import make_video
from tests.tiny import tiny_config, tiny_frames, tiny_model

FRAMES = 5
PREFIX, QUESTION = [5, 6], [7, 10, 13]
SCOPES = [{}, {"v2v_scope": "window", "v2v_window": 2}, {"v2v_scope": "video"}]


def logits(
    crosslmm: CrossLMMForConditionalGeneration,
    memory: VideoMemory | None = None,
    *,
    t2v: bool = True,
    **options: object,
) -> torch.Tensor:
    """Of each token of a greedy answer; `options` go to the memory."""
    if memory is None:
        memory = VideoMemory(crosslmm, prefix_ids=PREFIX, **options)
        for part in tiny_frames(crosslmm.config, 1, FRAMES)[0].split(2):
            memory.append(part, torch.zeros(len(part)))
        memory.finish()
    with torch.inference_mode(), memory.turn(t2v=t2v) as cache:
        out = crosslmm.generate(
            memory.input_ids(QUESTION),
            past_key_values=cache,
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.cat(out.logits)


def closed(branch: str, **settings: object) -> CrossLMMForConditionalGeneration:
    """The same random model with one branch's gates closed."""
    crosslmm = tiny_model(**settings)
    for name, weight in crosslmm.named_parameters():
        if name.endswith(f"{branch}.gate"):
            weight.data.zero_()
    return crosslmm


@pytest.mark.parametrize("settings", SCOPES, ids=str)
def test_v2v_off_equals_closed_v2v_gates(settings: dict) -> None:
    crosslmm = tiny_model(**settings)
    off = logits(crosslmm, v2v=False)
    torch.testing.assert_close(off, logits(closed("v2v", **settings)), atol=1e-5, rtol=0)
    assert (off - logits(crosslmm)).abs().max() > 0.01


def test_t2v_off_equals_closed_t2v_gates_and_leaves_the_memory_alone() -> None:
    crosslmm = tiny_model()
    memory = VideoMemory(crosslmm, prefix_ids=PREFIX)
    memory.append(tiny_frames(crosslmm.config, 1, FRAMES)[0], torch.zeros(FRAMES))
    memory.finish()
    before = logits(crosslmm, memory)
    off = logits(crosslmm, memory, t2v=False)
    torch.testing.assert_close(off, logits(closed("t2v")), atol=1e-5, rtol=0)
    assert (off - before).abs().max() > 0.01
    assert torch.equal(logits(crosslmm, memory), before)


@pytest.mark.parametrize("settings", SCOPES, ids=str)
@pytest.mark.parametrize("grid", [1, 3])
def test_other_tokens_per_frame_equal_a_model_made_so(settings: dict, grid: int) -> None:
    crosslmm = tiny_model(**settings)
    made = CrossLMMForConditionalGeneration(tiny_config(pooled_grid=grid, **settings)).eval()
    made.load_state_dict(crosslmm.state_dict())
    own = logits(crosslmm)
    torch.testing.assert_close(logits(crosslmm, pooled_grid=grid), logits(made), atol=1e-5, rtol=0)
    assert crosslmm.config.pooled_grid == 2
    assert torch.equal(logits(crosslmm), own)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pooled_tokens": 5}, "square"),
        ({"pooled_tokens": 0}, "square"),
        ({"hidden": ((4.0, 4.0),)}, "end after it begins"),
        ({"hidden": ((-1.0, 4.0),)}, "end after it begins"),
        ({"hidden": ((0.0, float("nan")),)}, "end after it begins"),
    ],
)
def test_impossible_what_ifs_are_told(options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        WhatIf(**options)


def test_what_is_kept_fits_in_its_bytes() -> None:
    for budget in (10_000, 100_000, 10**6, 10**7, 10**8, 10**10):
        room = Room.measure(budget, 40, 6, 8, 300, 196, few=6)
        grid = 6 * 300 * 2
        size = grid * (8 + (40 if room.words else 1) + (320 if room.both else 0))
        copies = (40 if room.patch_words else 1) * (8 if room.patch_heads else 1)
        if room.patch_frames == 300:
            size += grid * 196 * copies
        assert size <= budget or not (room.words or room.both or room.patch_frames == 300)
    assert room == Room(True, True, True, True, 300)
    assert Room.measure(10**5, 40, 6, 8, 300, 196, few=6).patch_frames == 6


# The engine, with the bundled model.

bundled = pytest.mark.bundled
SECONDS = 20


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load()


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("what_if") / "film.mp4"
    make_video(path, duration=SECONDS, fps=10)
    return path


def ask(engine: Engine, path: Path, what_if: WhatIf | None = None, **more: object) -> Answer:
    request = AskRequest(str(path), "What does the sign say?", what_if=what_if or WhatIf(), **more)
    *_, last = engine.ask(request)
    assert isinstance(last, Answer)
    return last


def same_answer(one: Answer, other: Answer) -> None:
    assert one.text == other.text
    assert np.array_equal(one.attention.t2v, other.attention.t2v)


@bundled
@pytest.mark.parametrize("kept", [True, False], ids=["from features", "read again"])
def test_a_hidden_stretch_is_as_if_its_frames_were_not_there(
    engine: Engine, film: Path, kept: bool
) -> None:
    engine.forget(str(film))
    before = ask(engine, film)
    if not kept:
        engine.forget(str(film))
    what_if = WhatIf(hidden=((3.0, 8.0), (15.0, 16.0)))
    hidden = ask(engine, film, what_if)
    attention, times = hidden.attention, hidden.attention.times
    inside = ((times >= 3) & (times < 8)) | ((times >= 15) & (times < 16))
    assert 0 < inside.sum() < SECONDS and attention.hidden == tuple(np.flatnonzero(inside))
    for one in attention.maps:
        assert not one.heads[..., inside].any() and not one.words[..., inside].any()
        assert one.heads[..., ~inside].any((0, 1)).all()  # of float16, so a head may have 0
        assert not set(one.patch_frames) & set(attention.hidden)
    assert {view.index for view in attention.frames} <= set(np.flatnonzero(~inside).tolist())
    np.testing.assert_allclose(attention.t2v.sum(-1), 1, atol=1e-4)

    # Independently: a memory of just the other frames.
    prefix, suffix = engine.processor.prompt_ids("What does the sign say?")
    plan = sample_times(hidden.video.duration, max_frames=128, frame_rate=1.0)
    frames = [one for one, out in zip(decode_frames(film, plan), inside, strict=True) if not out]
    memory = VideoMemory(engine.crosslmm, prefix_ids=prefix)
    pixels = engine.processor.preprocess_frames([one.image for one in frames])
    memory.append(pixels, torch.tensor([one.time for one in frames]))
    memory.finish()
    ids = memory.input_ids(suffix)
    with torch.inference_mode(), memory.turn() as cache:
        out = engine.crosslmm.generate(
            ids, past_key_values=cache, max_new_tokens=96, do_sample=False
        )
    told = engine.processor.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert hidden.text == told.strip()
    same_answer(ask(engine, film), before)


@bundled
@pytest.mark.parametrize(
    "what_if", [WhatIf(t2v=False), WhatIf(v2v=False), WhatIf(pooled_tokens=9)], ids=repr
)
def test_a_turn_after_a_what_if_is_as_before(engine: Engine, film: Path, what_if: WhatIf) -> None:
    before = ask(engine, film)
    changed = ask(engine, film, what_if).attention
    assert (changed.map("t2v") is None) == (not what_if.t2v)
    assert (changed.map("v2v") is None) == (not what_if.v2v)
    assert changed.main == ("t2v" if what_if.t2v else "self")
    if what_if.pooled_tokens:
        assert changed.map("self").patches.shape[-1] == 3
    same_answer(ask(engine, film), before)


@bundled
def test_t2v_off_is_a_model_with_closed_gates(engine: Engine, film: Path) -> None:
    other = Engine.load()
    for name, weight in other.crosslmm.named_parameters():
        if name.endswith("t2v.gate"):
            weight.data.zero_()
    off, shut = ask(engine, film, WhatIf(t2v=False)), ask(other, film)
    assert off.text == shut.text
    mine, theirs = off.attention.map("self"), shut.attention.map("self")
    np.testing.assert_allclose(mine.heads, theirs.heads, atol=1e-3)


@bundled
def test_an_untrained_model_has_its_own_attention_first(engine: Engine, film: Path) -> None:
    info = dataclasses.replace(engine.info, trained=False)
    fresh = Engine(Loaded(engine.crosslmm, engine.processor, info, engine.folder))
    attention = ask(fresh, film).attention
    own = attention.map("self")
    assert attention.main == "self" and attention.map("t2v") is not None
    expected = own.rows().mean(0)
    np.testing.assert_allclose(attention.timeline(), expected / expected.sum(), atol=1e-4)
    assert attention.peak == attention.times[expected.argmax()]
    assert [view.index for view in attention.frames] == np.argsort(-expected)[:6].tolist()


@bundled
def test_what_cannot_be_is_told_and_nothing_is_kept(engine: Engine, film: Path) -> None:
    ask(engine, film)
    kept = len(engine.pool)
    for what_if, said in (
        (WhatIf(hidden=((0.0, 1e6),)), "Leave at least one"),
        (WhatIf(pooled_tokens=400), "are too many"),
    ):
        with pytest.raises(InputError, match=said):
            ask(engine, film, what_if)
    assert len(engine.pool) == kept


@bundled
def test_maps_agree_with_one_another(engine: Engine, film: Path) -> None:
    attention = ask(engine, film).attention
    text = attention.map("t2v")
    np.testing.assert_allclose(text.words, attention.t2v, atol=1e-3)
    np.testing.assert_allclose(text.both.mean(2), attention.t2v, atol=1e-3)
    np.testing.assert_allclose(text.rows(), attention.t2v.mean(0), atol=1e-3)
    for head in range(text.num_heads):
        np.testing.assert_allclose(text.rows(None, head), text.both[:, :, head].mean(0), atol=1e-3)
    view = attention.frames[0]
    for layer in range(len(text.layers)):
        spread = text.patch_map(layer, view.index)
        assert spread.sum() == pytest.approx(1, abs=0.01)
        absolute = spread * text.rows()[layer, view.index]
        np.testing.assert_allclose(absolute, view.patches[layer], atol=2e-3)
    assert ask(engine, film, map_bytes=0).attention.maps == ()
    small = ask(engine, film, map_bytes=1 << 14).attention
    assert sum(one.nbytes for one in small.maps if one.kind != "v2v") <= 1 << 14
    few = small.map("t2v")
    assert few.patches is not None and set(few.patch_frames) == {v.index for v in small.frames}
    np.testing.assert_allclose(few.rows(), text.rows(), atol=1e-3)
