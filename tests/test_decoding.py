"""Greedy decoding: the tokens of `generate`, nothing waited for, nothing copied, no traces."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.decoding import ROOM, RoomyLayer, decode
from model.map_capture import MapCapture
from model.types import ModelFault
from model.video_memory import VideoMemory
from tests.tiny import tiny_frames, tiny_model

FRAMES, PREFIX, QUESTION = 5, [1, 2, 3], [7, 8, 9]
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero"}


@pytest.fixture(scope="module", params=["native", "int8"])
def memory(request: pytest.FixtureRequest) -> VideoMemory:
    crosslmm = tiny_model(v2v_scope="window", v2v_window=1)
    crosslmm.generation_config.eos_token_id = None
    memory = VideoMemory(crosslmm, prefix_ids=PREFIX, precision=request.param)
    memory.crosslmm = crosslmm  # for the tests
    memory.append(tiny_frames(crosslmm.config, 1, FRAMES)[0], torch.arange(FRAMES).float())
    return memory.finish()


def wanted(memory: VideoMemory, tokens: int) -> list[int]:
    """What transformers' own loop says."""
    prompt = memory.input_ids(QUESTION)
    with memory.turn() as cache:
        options = {"max_new_tokens": tokens, "do_sample": False, "past_key_values": cache}
        return memory.crosslmm.generate(prompt, **options)[0, prompt.shape[1] :].tolist()


def said(memory: VideoMemory, tokens: int, ends: tuple = (), **options) -> list[int]:
    with memory.turn(options.pop("capture", None)) as cache:
        ids = torch.tensor([QUESTION])
        return list(decode(memory.crosslmm, ids, cache, tokens, ends, **options))


@pytest.mark.parametrize("ahead", [False, True])
def test_tokens_are_those_of_generate(memory: VideoMemory, ahead: bool) -> None:
    tokens = wanted(memory, 12)
    assert said(memory, 12, ahead=ahead) == tokens
    last = tokens.index(tokens[4])
    assert said(memory, 12, (tokens[4],), ahead=ahead) == tokens[: last + 1]
    assert said(memory, 1, ahead=ahead) == tokens[:1]


def test_the_step_too_many_leaves_no_trace(memory: VideoMemory) -> None:
    tokens, captures = wanted(memory, 12), []
    ends = (tokens[4],)
    for ahead in (False, True):
        capture = MapCapture()
        with capture.self_attention(memory.crosslmm):
            said(memory, 12, ends, ahead=ahead, capture=capture)
        captures.append(capture)
    plain, early = captures
    for name in ("t2v_queries", "self_queries"):
        one, other = getattr(plain, name), getattr(early, name)
        assert one.keys() == other.keys() and one
        for layer, parts in one.items():
            torch.testing.assert_close(torch.cat(other[layer], -2), torch.cat(parts, -2))
    assert len(plain.rotary) == len(early.rotary)
    length = memory.cache.get_seq_length()
    assert length == memory.length and wanted(memory, 12) == tokens


class Waits(TorchDispatchMode):
    """Notes every operation for which the host would wait for an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:  # noqa: ANN001 (PyTorch's)
        if func.overloadpacket._qualified_op_name.removeprefix("aten::") in WAITS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_is_under_way_before_the_token_before_it_is_read(
    memory: VideoMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model import decoding

    order, start, read = [], decoding._start, decoding._Step.read

    def starting(*args: object) -> object:
        with Waits() as waits:
            step = start(*args)
        assert not waits.found
        order.append("start")
        return step

    def reading(step: object) -> int:
        order.append("read")
        return read(step)

    monkeypatch.setattr(decoding, "_start", starting)
    monkeypatch.setattr(decoding._Step, "read", reading)
    said(memory, 4, ahead=True)
    assert order == ["start", "start", "read", "start", "read", "start", "read", "read"]
    with Waits() as waits:  # the check can fail
        bool(torch.ones(2).max() == 1)
    assert waits.found


def test_numbers_that_break_down_are_told(memory: VideoMemory) -> None:
    head = memory.crosslmm.lm_head
    for bad in (float("nan"), float("inf")):
        handle = head.register_forward_hook(lambda *parts, bad=bad: -parts[-1].abs() * bad)
        try:
            with pytest.raises(ModelFault, match="numbers broke down"):
                said(memory, 3)
        finally:
            handle.remove()


def test_a_roomy_layer_equals_that_of_transformers_and_copies_once() -> None:
    roomy, plain = RoomyLayer(), RoomyLayer()
    generator = torch.Generator().manual_seed(0)

    def some(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.randn(2, 3, tokens, 4, generator=generator) for _ in range(2))

    video = some(5)
    for layer in (roomy, plain):
        layer.update(*video)
    roomy.room = ROOM
    places = set()
    for tokens in (3, 1, 1, 1):
        pair = some(tokens)
        for found, expected in zip(roomy.update(*pair), plain.update(*pair), strict=True):
            torch.testing.assert_close(found, expected, atol=0, rtol=0)
        places.add(roomy.keys.data_ptr())
    assert len(places) == 1
    for layer in (roomy, plain):  # as beams do
        layer.batch_select_indices(torch.tensor([1, 1]))
        layer.crop(-2)
    pair = some(ROOM + 9)  # more than there is room for
    for found, expected in zip(roomy.update(*pair), plain.update(*pair), strict=True):
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
    roomy.replace(*video, room=ROOM)
    roomy.update(*some(1))
    assert roomy.get_seq_length() == 6 and video[0].shape[2] == 5
