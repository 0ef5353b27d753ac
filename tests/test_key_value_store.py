"""T2V keys and values: exact when native, bounded error when quantised, bytes as counted."""

from __future__ import annotations

import pytest
import torch

from model.dual_cross_attention import attend_store
from model.key_value_store import KeyValueStore

BATCH, HEADS, FRAMES, TOKENS, WIDTH = 2, 2, 5, 36, 8


def keys_values(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with a few large channels, as trained models have them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, HEADS, FRAMES * TOKENS, WIDTH)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    keys[..., 3] = keys[..., 3] * 8 + 20
    return keys, values


def filled(precision: str, chunks: tuple[int, ...] = (FRAMES,)) -> KeyValueStore:
    store = KeyValueStore(precision)
    sizes = [n * TOKENS for n in chunks]
    for pair in zip(*(x.split(sizes, dim=2) for x in keys_values()), strict=True):
        store.append(*pair, TOKENS)
    return store


def largest_error(x: torch.Tensor, axis: int, bits: int) -> torch.Tensor:
    """Half a step (range of the group / (2^bits - 1)) and what rounding to 16 bits may add."""
    groups = x.unflatten(2, (FRAMES, TOKENS))
    low, high = groups.aminmax(dim=axis, keepdim=True)
    rounding = 2**-10 * torch.maximum(low.abs(), high.abs())
    return (0.5 * (high - low) / (2**bits - 1) + rounding).expand(groups.shape).flatten(2, 3)


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
def test_quantisation_error_is_within_half_a_step(precision: str, bits: int) -> None:
    for exact, kept, axis in zip(keys_values(), filled(precision).full(), (3, 4), strict=True):
        assert ((kept - exact).abs() <= largest_error(exact, axis, bits)).all()
        if bits == 4:
            assert not torch.equal(kept, exact)


def test_native_is_exact() -> None:
    for exact, kept in zip(keys_values(), filled("native", (2, 1, 2)).full(), strict=True):
        assert torch.equal(exact, kept)


@pytest.mark.parametrize("precision", ["native", "int8", "int4"])
def test_chunks_equal_whole(precision: str) -> None:
    whole, chunked = filled(precision), filled(precision, (1, 3, 1))
    for a, b in zip(whole.full(), chunked.full(), strict=True):
        assert torch.equal(a, b)
    assert whole.length == chunked.length == FRAMES * TOKENS
    assert whole.nbytes == chunked.nbytes


@pytest.mark.parametrize("precision", ["native", "int8", "int4"])
@pytest.mark.parametrize("size", [1, TOKENS, 2 * TOKENS + 5, 10**6])
def test_blocks_cover_everything_in_order(precision: str, size: int) -> None:
    store = filled(precision, (2, 3))
    for parts, full in zip(zip(*store.blocks(size), strict=True), store.full(), strict=True):
        assert torch.equal(torch.cat(parts, dim=2), full)


@pytest.mark.parametrize("precision", ["native", "int8", "int4"])
def test_bytes_are_counted_exactly(precision: str) -> None:
    rows = BATCH * HEADS * FRAMES
    elements = rows * TOKENS * WIDTH
    scales = 2 * 2 * rows * (WIDTH + TOKENS)  # scale and offset, two bytes each, keys and values
    expected = {
        "native": 2 * 4 * elements,
        "int8": 2 * elements + scales,
        "int4": elements + scales,
    }[precision]
    assert filled(precision, (1, 4)).nbytes == expected


@pytest.mark.parametrize("precision", ["native", "int8", "int4"])
def test_map_reaches_every_tensor(precision: str) -> None:
    store = filled(precision, (2, 3))
    full = store.full()
    store.map(lambda tensor: tensor[1:])
    for a, b in zip(store.full(), full, strict=True):
        assert torch.equal(a, b[1:])


@pytest.mark.parametrize("precision", ["native", "int8", "int4"])
def test_blockwise_attention_equals_softmax(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(precision, (2, 3))
    monkeypatch.setattr("model.key_value_store.BLOCK_TOKENS", TOKENS)
    monkeypatch.setattr(KeyValueStore.blocks, "__defaults__", (TOKENS,))
    query = torch.randn(BATCH, 2 * HEADS, 3, WIDTH, generator=torch.Generator().manual_seed(7))
    keys, values = (x.repeat_interleave(2, dim=1) for x in store.full())
    weights = (query @ keys.mT * WIDTH**-0.5).softmax(-1)
    out = attend_store(query, store, WIDTH**-0.5)
    torch.testing.assert_close(out, weights @ values, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.01), ("int4", 0.2)])
def test_attention_over_a_quantised_store_stays_near_the_exact_one(
    precision: str, bound: float
) -> None:
    query = torch.randn(BATCH, 2 * HEADS, 3, WIDTH, generator=torch.Generator().manual_seed(7))
    exact = attend_store(query, filled("native"), WIDTH**-0.5)
    out = attend_store(query, filled(precision), WIDTH**-0.5)
    assert (out - exact).norm() / exact.norm() < bound


def test_bfloat16_stays_bfloat16() -> None:
    for precision in ("native", "int8", "int4"):
        store = KeyValueStore(precision)
        store.append(*(x.bfloat16() for x in keys_values()), TOKENS)
        assert {x.dtype for x in store.full()} == {torch.bfloat16}


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="int4.*int8.*native.*int3"):
        KeyValueStore("int3")


@pytest.mark.parametrize("expected", [FRAMES, FRAMES + 3, FRAMES - 2])
def test_expected_tokens_change_nothing_but_memory(expected: int) -> None:
    store = KeyValueStore("native", expected * TOKENS)
    exact = keys_values()
    for pair in zip(*(x.split(TOKENS, dim=2) for x in exact), strict=True):
        store.append(*pair, TOKENS)
        if expected == FRAMES:
            assert store.nbytes == filled("native").nbytes  # from the first chunk on
    for kept, wanted in zip(store.full(), exact, strict=True):
        assert torch.equal(kept, wanted)
    store.finish()
    assert store.nbytes == filled("native").nbytes
    for kept, wanted in zip(store.full(), exact, strict=True):
        assert torch.equal(kept, wanted)
