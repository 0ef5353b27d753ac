"""Token merge, clock and configuration: the small parts, each against its own definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.configuration_crosslmm import CrossLMMConfig
from model.modeling_crosslmm import ClockEmbedding, token_merge
from tests.tiny import tiny_config


def shrink(old: int, new: int) -> np.ndarray:
    """(new, old) weights: area mean where it divides, triangle filter or two neighbours else."""
    scale = old / new
    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * scale  # in units of old pixels, whose centres lie at j + 0.5
        for j in range(old):
            if old % new == 0:
                matrix[i, j] = abs(j + 0.5 - centre) < scale / 2
            else:
                reach = scale if scale > 2 else 1.0
                matrix[i, j] = max(0.0, 1 - abs(j + 0.5 - centre) / reach)
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("side", "grid"), [(27, 3), (27, 1), (27, 4), (27, 14), (27, 27), (24, 4), (24, 12), (27, 10)]
)
def test_token_merge_against_its_weights(side: int, grid: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 3, side * side, 5, generator=generator, dtype=torch.float32)
    weights = shrink(side, grid)
    image = tokens.double().numpy().reshape(2, 3, side, side, 5)
    expected = np.einsum("ai,bj,xyijc->xyabc", weights, weights, image)
    merged = token_merge(tokens, grid)
    np.testing.assert_allclose(merged.numpy(), expected.reshape(2, 3, grid * grid, 5), atol=1e-5)
    assert (weights.sum(0) > 0).all()  # no patch is left out


def test_clock_shows_digits_of_hours_minutes_seconds() -> None:
    clock = ClockEmbedding(4)
    rows = clock.digits.weight.detach()
    times = {0: "00000", 0.9996: "00001", 59.9: "00059", 60: "00100", 3599: "05959", 36000: "00000"}
    times |= {3661.5: "10101", 35999: "95959"}
    out = clock(torch.tensor([list(times)])).detach()[0]
    for row, digits in zip(out, times.values(), strict=True):
        expected = sum(rows[10 * place + int(d)] for place, d in enumerate(digits))
        torch.testing.assert_close(row, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooled_grid": 7}, "1..6"),
        ({"pooled_grid": 0}, "1..6"),
        ({"v2v_scope": "movie"}, "v2v_scope"),
        ({"v2v_scope": "window"}, "v2v_window"),
        ({"time_encoding": "rope"}, "time_encoding"),
        ({"dcal_layers": [0, 4]}, "0..3"),
        ({"dcal_interval": 0}, "dcal_interval"),
    ],
)
def test_bad_configurations_are_told(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings)


def test_presets() -> None:
    shapes = {}
    for name in ("crosslmm-2b", "crosslmm-7b", "crosslmm-7b-giant"):
        config = CrossLMMConfig.from_preset(name)
        tokens = (config.original_tokens_per_frame, config.pooled_tokens_per_frame)
        shapes[name] = (*tokens, config.hidden_size, len(config.dcal_layers))
    assert shapes == {
        "crosslmm-2b": (729, 9, 1536, 7),
        "crosslmm-7b": (729, 9, 3584, 7),
        "crosslmm-7b-giant": (576, 16, 3584, 7),
    }
    with pytest.raises(ValueError, match="crosslmm-7b"):
        CrossLMMConfig.from_preset("crosslmm-70b")
