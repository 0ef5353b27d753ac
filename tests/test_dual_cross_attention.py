"""Equations 2-10 of the paper in float64 NumPy against the PyTorch modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.dual_cross_attention import DualCrossAttention, VisualContext
from model.modeling_crosslmm import CrossLMMModel
from tests.tiny import randomize, tiny_config, tiny_frames

BATCH, FRAMES, BEFORE, TEXT = 2, 4, 3, 5
SCOPES = [("frame", 0), ("window", 1), ("window", 2), ("window", 9), ("video", 0)]


def weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in module.named_parameters()}


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def branch_formula(
    w: dict[str, np.ndarray], name: str, heads: tuple[int, int], h: np.ndarray, memory: np.ndarray
) -> np.ndarray:
    """tanh(gamma) * O(softmax(Q K^T / sqrt(d)) V) for a query vector (D,) and memory (M, D).

    Not in the paper: queries are RMS-normalised first; so is the memory, before it comes here.
    """
    w = {key.removeprefix(name + "."): value for key, value in w.items() if key.startswith(name)}
    h = rms_norm(h, w["query_norm.weight"], 1e-6)
    q = w["q_proj.weight"] @ h + w["q_proj.bias"]
    k = memory @ w["k_proj.weight"].T + w["k_proj.bias"]
    v = memory @ w["v_proj.weight"].T + w["v_proj.bias"]
    num_heads, num_kv_heads = heads
    d = len(q) // num_heads
    out = []
    for head in range(num_heads):
        shared = head // (num_heads // num_kv_heads)  # grouped queries share keys and values
        columns = slice(shared * d, (shared + 1) * d)
        scores = k[:, columns] @ q[head * d : (head + 1) * d] / np.sqrt(d)
        attention = np.exp(scores - scores.max())
        out.append(attention / attention.sum() @ v[:, columns])
    return np.tanh(w["gate"][0]) * (w["o_proj.weight"] @ np.concatenate(out))


def dual_formula(
    module: DualCrossAttention,
    heads: tuple[int, int],
    hidden: np.ndarray,
    memory: np.ndarray,
    lengths: list[int],
    starts: list[int],
) -> np.ndarray:
    """Token by token: hidden (B, L, D), memory (B, T, N, D); true frames and first video column."""
    w, per_frame, result = weights(module), module.pooled_tokens_per_frame, hidden.copy()
    for b, (frames, start) in enumerate(zip(lengths, starts, strict=True)):
        for t in range(frames):
            first = {"frame": t, "window": max(0, t - module.window), "video": 0}[module.scope]
            last = frames if module.scope == "video" else t + 1
            seen = memory[b, first:last].reshape(-1, memory.shape[-1])
            for column in range(start + t * per_frame, start + (t + 1) * per_frame):
                if module.v2v is not None:
                    result[b, column] += branch_formula(w, "v2v", heads, hidden[b, column], seen)
        everything = memory[b, :frames].reshape(-1, memory.shape[-1])
        for column in range(start + frames * per_frame, hidden.shape[1]):
            if module.t2v is not None:
                result[b, column] += branch_formula(w, "t2v", heads, hidden[b, column], everything)
    return result


def check(config, kernel: str, lengths: list[int], tolerance: float = 1e-5) -> None:
    config.text_config._attn_implementation = kernel
    module = randomize(DualCrossAttention(config, 0), seed=3).requires_grad_(False)
    per_frame, tokens = config.pooled_tokens_per_frame, config.original_tokens_per_frame
    length = BEFORE + max(lengths) * per_frame + TEXT
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(len(lengths), length, config.hidden_size, generator=generator)
    memory = torch.randn(
        len(lengths), max(lengths), tokens, config.hidden_size, generator=generator
    )
    # Left padding: every prompt ends in the same column, shorter videos start later.
    starts = [length - TEXT - n * per_frame for n in lengths]
    columns = torch.arange(length)
    is_visual = torch.stack([(columns >= s) & (columns < length - TEXT) for s in starts])
    index = is_visual.long().argsort(dim=1, descending=True, stable=True)
    frame_mask = torch.stack([torch.arange(max(lengths)) < n for n in lengths])
    context = VisualContext(
        memory=memory,
        frame_mask=None if bool(frame_mask.all()) else frame_mask,
        visual_index=index[:, : max(lengths) * per_frame],
        text_start=length - TEXT,
    )
    heads = (config.text_config.num_attention_heads, config.text_config.num_key_value_heads)
    expected = dual_formula(
        module, heads, hidden.double().numpy(), memory.double().numpy(), lengths, starts
    )
    out = module(hidden, context).double().numpy()
    assert np.abs(expected - hidden.numpy()).max() > 0.1  # the branches do something
    np.testing.assert_allclose(out, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize(("scope", "window"), SCOPES)
def test_formula(scope: str, window: int, kernel: str) -> None:
    check(tiny_config(v2v_scope=scope, v2v_window=window), kernel, [FRAMES] * BATCH)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize(("scope", "window"), SCOPES)
def test_formula_with_videos_of_different_lengths(scope: str, window: int, kernel: str) -> None:
    check(tiny_config(v2v_scope=scope, v2v_window=window), kernel, [FRAMES, 1, 3])


@pytest.mark.parametrize(("v2v", "t2v"), [(True, False), (False, True)])
def test_formula_with_one_branch(v2v: bool, t2v: bool) -> None:
    check(tiny_config(v2v=v2v, t2v=t2v), "sdpa", [FRAMES] * BATCH)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 1)])
def test_formula_with_other_groups_of_heads(heads: int, kv_heads: int) -> None:
    text = {"hidden_size": 48, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    check(tiny_config(text=text), "eager", [FRAMES] * BATCH)
    check(tiny_config(text=text), "sdpa", [FRAMES] * BATCH)


def test_formula_with_the_layout_of_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their output lies in memory as (B, L, H, d), whatever its shape says."""
    kernel = torch.nn.functional.scaled_dot_product_attention

    def laid_out(*args: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return kernel(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", laid_out)
    check(tiny_config(), "sdpa", [FRAMES, 1, 3])


def test_gates_start_closed_and_closed_gates_change_nothing() -> None:
    config = tiny_config()
    module = randomize(DualCrossAttention(config, 0), gate=None)
    assert module.v2v.gate.item() == module.t2v.gate.item() == 0
    hidden = torch.randn(1, 9, config.hidden_size)
    context = VisualContext(
        memory=torch.randn(1, 1, 36, config.hidden_size),
        visual_index=torch.arange(4)[None],
        text_start=4,
    )
    assert torch.equal(module(hidden, context), hidden)


def gelu(x: np.ndarray) -> np.ndarray:
    """Exact GELU, x * Phi(x)."""
    return x * torch.special.ndtr(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize("grid", [1, 2, 3])
@pytest.mark.parametrize("norm", [False, True])
def test_merge_projector_time_position_and_norm_formula(grid: int, norm: bool) -> None:
    config = tiny_config(
        pooled_grid=grid, projector_norm=norm, time_encoding="clock", patch_position="learned"
    )
    module = randomize(CrossLMMModel(config), seed=5).requires_grad_(False)
    pixels = tiny_frames(config, BATCH, FRAMES)
    features = module.encode_frames(pixels.flatten(0, 1)).unflatten(0, (BATCH, FRAMES))
    times = torch.tensor([[0.0, 59.0, 60.0, 3725.0]] * BATCH)
    pooled, memory = module.embed_frames(features, times)

    w, x = weights(module), features.double().numpy()
    side = config.original_grid

    def project(x: np.ndarray) -> np.ndarray:
        name = "multi_modal_projector."
        x = gelu(x @ w[name + "linear_1.weight"].T + w[name + "linear_1.bias"])
        x = x @ w[name + "linear_2.weight"].T + w[name + "linear_2.bias"]
        return rms_norm(x, w[name + "norm.weight"], 1e-6) if norm else x

    # h:mm:ss of the four times, one row of ten digits per place.
    digits = [[0, 0, 0, 0, 0], [0, 0, 0, 5, 9], [0, 0, 1, 0, 0], [1, 0, 2, 0, 5]]
    table = w["time_embedding.digits.weight"].reshape(5, 10, -1)
    clock = np.stack([sum(table[place, d] for place, d in enumerate(row)) for row in digits])
    place = w["row_embedding.weight"][:, None] + w["column_embedding.weight"][None]
    block = side // grid
    blocks = x.reshape(BATCH, FRAMES, grid, block, grid, block, -1).mean((3, 5))
    merged = blocks.reshape(BATCH, FRAMES, grid * grid, -1)

    original = project(x) + clock[:, None] + place.reshape(side * side, -1)
    expected = rms_norm(original, w["memory_norm.weight"], 1e-6)
    np.testing.assert_allclose(memory.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(pooled.numpy(), project(merged) + clock[:, None], atol=1e-5)


def test_encoder_features_are_the_last_layer_without_or_with_its_norm() -> None:
    for post_layernorm in (False, True):
        config = tiny_config(vision_post_layernorm=post_layernorm)
        module = randomize(CrossLMMModel(config)).requires_grad_(False)
        pixels = tiny_frames(config, 1, 2)[0]
        out = module.vision_tower(pixels, output_hidden_states=True)
        expected = out.last_hidden_state if post_layernorm else out.hidden_states[-1]
        torch.testing.assert_close(module.encode_frames(pixels), expected)
