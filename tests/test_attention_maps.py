"""Captured maps against the full softmax, under eager and SDPA, and never a whole array."""

from __future__ import annotations

import pytest
import torch

from model import map_capture
from model.attention_maps import (
    frame_mass,
    patch_shares,
    patch_weights,
    self_attention_shares,
    text_to_visual,
)
from model.attention_summary import visual_map
from model.key_value_store import KeyValueStore
from model.map_capture import MapCapture
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.video_memory import VideoMemory
from tests.tiny import tiny_frames, tiny_model

FRAMES, PATCHES, HEADS, KV_HEADS, WIDTH = 5, 36, 4, 2, 8
PREFIX, QUESTION = [5, 6], [7, 10, 13]
SCOPES = [{"v2v_scope": "frame"}, {"v2v_scope": "window", "v2v_window": 2}]
CLOSE = {"atol": 1e-5, "rtol": 0}


def stored(precision: str = "native") -> KeyValueStore:
    store = KeyValueStore(precision)
    generator = torch.Generator().manual_seed(0)
    for frames in (2, FRAMES - 2):
        shape = (1, KV_HEADS, frames * PATCHES, WIDTH)
        pair = (2 * torch.randn(shape, generator=generator) for _ in range(2))
        store.append(*pair, PATCHES)
    return store


def softmax(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """(H, L, d) and (Hkv, M, d) -> every weight, (H, L, M), in float64."""
    keys = keys.repeat_interleave(query.shape[0] // keys.shape[0], dim=0).double()
    return (query.double() @ keys.mT * query.shape[-1] ** -0.5).softmax(-1)


@pytest.mark.parametrize("precision", ["native", "int8", "int4"])
@pytest.mark.parametrize("block", [1, 10**9])
def test_mass_and_patches_equal_the_full_softmax(
    precision: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(map_capture, "_CPU_SCORES", block)
    store = stored(precision)
    query = torch.randn(HEADS, 3, WIDTH, generator=torch.Generator().manual_seed(1))
    full = softmax(query, store.full()[0][0]).unflatten(-1, (FRAMES, PATCHES))
    mass, log_total = frame_mass(query, store, PATCHES, WIDTH**-0.5)
    torch.testing.assert_close(mass, full.sum(-1).float(), **CLOSE)
    torch.testing.assert_close(mass.sum(-1), torch.ones(HEADS, 3), **CLOSE)
    chosen = [4, 0, 2]
    patches = patch_weights(query, store, chosen, PATCHES, WIDTH**-0.5, log_total)
    torch.testing.assert_close(patches, full.mean(0)[:, chosen].float(), **CLOSE)
    for words, heads in ((True, True), (True, False), (False, False)):
        axes = [axis for axis, apart in ((0, heads), (1, words)) if not apart]
        expected = full.mean(axes, keepdim=True) if axes else full
        expected = (expected / expected.sum(-1, keepdim=True)).transpose(0, 1)
        shares = patch_shares(
            query, store, PATCHES, WIDTH**-0.5, log_total, words=words, heads=heads
        )
        torch.testing.assert_close(shares.double(), expected, atol=1e-3, rtol=0)


def test_scores_are_held_in_bounded_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    limit, sizes = 2 * HEADS * 3 * PATCHES * 4, []
    inner = map_capture.frame_scores

    def watch(*args: object) -> torch.Tensor:
        scores = inner(*args)
        sizes.append(scores.numel() * scores.element_size())
        return scores

    monkeypatch.setattr(map_capture, "_CPU_SCORES", limit)
    monkeypatch.setattr(map_capture, "frame_scores", watch)
    frame_mass(torch.randn(HEADS, 3, WIDTH), stored(), PATCHES, WIDTH**-0.5)
    assert len(sizes) == 3 and max(sizes) <= limit


def build(
    crosslmm: CrossLMMForConditionalGeneration, capture: MapCapture | None = None
) -> VideoMemory:
    memory = VideoMemory(crosslmm, prefix_ids=PREFIX, capture=capture)
    pixels = tiny_frames(crosslmm.config, 1, FRAMES)[0]
    for part in pixels.split(2):
        memory.append(part, torch.zeros(len(part)))
    return memory.finish()


def answer(
    crosslmm: CrossLMMForConditionalGeneration, memory: VideoMemory, capture: MapCapture
) -> list[int]:
    """Generate within a turn that the caller has opened."""
    ids = memory.input_ids(QUESTION)
    with torch.inference_mode():
        out = crosslmm.generate(
            ids, past_key_values=memory.cache, max_new_tokens=4, do_sample=False
        )
    return out[0, ids.shape[1] :].tolist()


def recorded_t2v(
    crosslmm: CrossLMMForConditionalGeneration, memory: VideoMemory, ids: list[int]
) -> dict[int, torch.Tensor]:
    """Weights (L, H, T, N) of the last positions from one plain pass, by the definition."""
    queries: dict[int, torch.Tensor] = {}
    hooks = []
    for layer in crosslmm.config.dcal_layers:
        branch = crosslmm.model.language_model.layers[layer].dual_cross_attention.t2v

        def keep(module, args, out, layer: int = layer) -> None:
            queries[layer] = out.unflatten(-1, (HEADS, -1))[0, -len(ids) :].transpose(0, 1)

        hooks.append(branch.q_proj.register_forward_hook(keep))
    with torch.inference_mode():
        crosslmm(
            input_ids=memory.input_ids([*QUESTION, *ids[:-1]]),
            pixel_values_videos=tiny_frames(crosslmm.config, 1, FRAMES),
            use_cache=False,
        )
    for hook in hooks:
        hook.remove()
    return {
        layer: softmax(query, memory.state.t2v[layer].full()[0][0])
        .unflatten(-1, (FRAMES, PATCHES))
        .transpose(0, 1)
        for layer, query in queries.items()
    }


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_text_maps_of_an_answer_equal_the_full_softmax(kernel: str) -> None:
    crosslmm = tiny_model()
    crosslmm.set_attn_implementation(kernel)
    memory, capture = build(crosslmm), MapCapture()
    with memory.turn(capture):
        ids = answer(crosslmm, memory, capture)
        maps = text_to_visual(crosslmm, memory, capture, last=len(ids), strongest=2)
    expected = recorded_t2v(crosslmm, memory, ids)
    assert maps.layers == sorted(expected) == [0, 2]
    full = torch.stack([expected[layer] for layer in maps.layers], dim=1).float()
    # (L, layers, H, T, N)
    torch.testing.assert_close(maps.head_mass, full.sum(-1), **CLOSE)
    torch.testing.assert_close(maps.mass, full.sum(-1).mean(2), **CLOSE)
    torch.testing.assert_close(maps.mass.sum(-1), torch.ones(len(ids), 2), **CLOSE)
    order = maps.mass.mean((0, 1)).argsort(descending=True).tolist()
    assert maps.frames == order[:2]
    torch.testing.assert_close(maps.patches, full.mean((0, 2))[:, maps.frames], **CLOSE)


def test_more_frames_asked_for_than_there_are() -> None:
    crosslmm = tiny_model()
    memory, capture = build(crosslmm), MapCapture()
    with memory.turn(capture):
        ids = answer(crosslmm, memory, capture)
        maps = text_to_visual(crosslmm, memory, capture, last=len(ids), strongest=50)
    assert sorted(maps.frames) == list(range(FRAMES))
    torch.testing.assert_close(maps.patches.sum((1, 2)), torch.ones(2), **CLOSE)


def test_no_text_branch_no_maps() -> None:
    crosslmm = tiny_model(t2v=False)
    memory, capture = build(crosslmm), MapCapture()
    with memory.turn(capture):
        answer(crosslmm, memory, capture)
        assert text_to_visual(crosslmm, memory, capture, last=4) is None


def test_a_later_turn_does_not_see_the_queries_of_an_earlier_one() -> None:
    crosslmm = tiny_model()
    memory, masses = build(crosslmm), []
    for _ in range(2):
        capture = MapCapture()
        with memory.turn(capture):
            ids = answer(crosslmm, memory, capture)
            masses.append(text_to_visual(crosslmm, memory, capture, last=len(ids)).mass)
    assert torch.equal(*masses)


@pytest.mark.parametrize("settings", SCOPES, ids=str)
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_visual_maps_equal_the_full_softmax(settings: dict, kernel: str) -> None:
    crosslmm = tiny_model(**settings)
    crosslmm.set_attn_implementation(kernel)
    capture, states, memories = MapCapture(v2v=True), {}, []
    hooks = []
    for layer in crosslmm.config.dcal_layers:
        module = crosslmm.model.language_model.layers[layer].dual_cross_attention

        def keep(module, args, layer: int = layer) -> None:
            hidden, context = args
            states.setdefault(layer, []).append(hidden[0])
            if layer == 0:
                memories.append(context.memory[0])

        hooks.append(module.register_forward_pre_hook(keep))
    build(crosslmm, capture)
    for hook in hooks:
        hook.remove()
    memory = torch.cat(memories)  # (T, N, D)
    window = crosslmm.config.v2v_window
    for layer in crosslmm.config.dcal_layers:
        branch = crosslmm.model.language_model.layers[layer].dual_cross_attention.v2v
        pooled = torch.cat(states[layer])
        received = torch.zeros(HEADS, FRAMES)
        for t in range(FRAMES):
            first = max(0, t - window)
            keys = memory[first : t + 1].flatten(0, 1)[None]
            with torch.inference_mode():
                query = branch.queries(pooled[None, 4 * t : 4 * t + 4])[0]
                full = softmax(query, branch.keys_values(keys)[0][0]).float()  # (H, P, keys)
            shares = full.mean(1).unflatten(-1, (-1, PATCHES))  # (H, frames seen, N)
            received[:, first : t + 1] += shares.sum(-1) / FRAMES
            own = shares[:, -1] / shares[:, -1].sum(-1, keepdim=True)
            kept = torch.cat(capture.v2v_patches[layer])[t].float()
            torch.testing.assert_close(kept, own, atol=1e-3, rtol=0)
            if not window:
                even = torch.full_like(full, 1 / PATCHES)
                narrow = (full * (full / even).log()).sum(-1) / torch.tensor(PATCHES).log()
                focus = torch.cat(capture.v2v_focus[layer])[t]
                torch.testing.assert_close(focus, narrow.mean(1), **CLOSE)
        drawn = visual_map(capture, budget=10**6)
        row = torch.from_numpy(drawn.heads[drawn.layers.index(layer)]).float()
        if window:
            torch.testing.assert_close(row, received, atol=1e-3, rtol=0)
            assert drawn.measure == "share"
        else:
            assert drawn.measure == "focus" and row.min() >= 0 and row.max() <= 1


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_visual_mass_in_video_scope_equals_the_full_softmax(kernel: str) -> None:
    crosslmm = tiny_model(v2v_scope="video")
    crosslmm.set_attn_implementation(kernel)
    capture, seen = MapCapture(v2v=True), {}
    module = crosslmm.model.language_model.layers[0].dual_cross_attention
    hook = module.register_forward_pre_hook(lambda _, args: seen.update(args=args))
    build(crosslmm, capture)
    hook.remove()
    hidden, context = seen["args"]
    with torch.inference_mode():
        query = module.v2v.queries(hidden)[0]
        keys, _ = module.v2v.keys_values(context.memory.flatten(1, 2))
        full = softmax(query, keys[0]).mean(1).float()  # (H, M), mean over all pooled tokens
    mass = full.unflatten(-1, (FRAMES, -1)).sum(-1)
    torch.testing.assert_close(capture.v2v_video[0], mass, **CLOSE)


def test_self_attention_equals_the_full_softmax_for_every_layer() -> None:
    crosslmm = tiny_model()
    masses = {}
    for kernel in ("sdpa", "eager"):
        crosslmm.set_attn_implementation(kernel)
        memory, capture = build(crosslmm), MapCapture()
        with memory.turn(capture), capture.self_attention(crosslmm):
            ids = answer(crosslmm, memory, capture)
            layers = range(crosslmm.config.text_config.num_hidden_layers)
            shares = [self_attention_shares(memory, capture, i, last=len(ids)) for i in layers]
            masses[kernel] = torch.stack(shares)  # (layers, H, L, T, P)
    torch.testing.assert_close(masses["eager"], masses["sdpa"], **CLOSE)
    with torch.inference_mode():
        attentions = crosslmm(
            input_ids=memory.input_ids([*QUESTION, *ids[:-1]]),
            pixel_values_videos=tiny_frames(crosslmm.config, 1, FRAMES),
            use_cache=False,
            output_attentions=True,
        ).attentions
    full = torch.stack([a[0, :, -len(ids) :] for a in attentions])
    visual = full[..., len(PREFIX) : memory.length].unflatten(-1, (FRAMES, -1))
    torch.testing.assert_close(masses["eager"], visual, **CLOSE)
    assert (visual.sum((-1, -2)) < 1).all()


def test_capture_leaves_the_answer_alone() -> None:
    crosslmm = tiny_model()
    memory, answers = build(crosslmm), []
    for capture in (MapCapture(), MapCapture(), None):
        with memory.turn(capture):
            answers.append(answer(crosslmm, memory, capture))
    assert answers[0] == answers[1] == answers[2]
    assert memory.state.capture is None
