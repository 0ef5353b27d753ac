"""Dual cross-attention (equations 4-10 of arXiv 2505.17020): V2V and T2V, each behind a tanh gate.

Shapes: B batch, T frames, N original tokens per frame, P pooled tokens per frame, M = T * N,
L tokens in this forward, D LLM width, H heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from model.configuration_crosslmm import CrossLMMConfig
from model.key_value_store import KeyValueStore

if TYPE_CHECKING:
    from model.map_capture import MapCapture


@dataclass
class VisualState:
    """What later tokens of the same sequence need of the video; lives beside the LLM's cache."""

    tokens_per_frame: int
    precision: str = "native"
    expected_frames: int = 0
    num_frames: int = 0
    t2v: dict[int, KeyValueStore] = field(default_factory=dict)
    frame_mask: torch.Tensor | None = None  # (B, T) bool; None: no frame is padding
    recent: torch.Tensor | None = None  # (B, w, N, D): the window that the next chunk looks back at
    capture: MapCapture | None = None
    v2v_open: bool = True  # False: the branch adds nothing, as if its gates were closed
    t2v_open: bool = True
    pooled_grid: int | None = None  # None: the config's own

    def store(self, layer_idx: int) -> KeyValueStore:
        """The T2V keys and values of one layer."""
        if layer_idx not in self.t2v:
            expected = self.expected_frames * self.tokens_per_frame
            self.t2v[layer_idx] = KeyValueStore(self.precision, expected)
        return self.t2v[layer_idx]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, and of the frames kept for the window."""
        recent = 0 if self.recent is None else self.recent.numel() * self.recent.element_size()
        return recent + sum(store.nbytes for store in self.t2v.values())


@dataclass
class VisualContext:
    """What one forward pass hands to every dual cross-attention."""

    # (B, T, N, D) original tokens of this forward's frames, projected and RMS-normalised: the
    # branches' pre-normalisation of keys and values, done once for all of them.
    memory: torch.Tensor | None = None
    earlier: torch.Tensor | None = None  # (B, w, N, D) the frames before them (window scope)
    frame_mask: torch.Tensor | None = None  # (B, T) bool, False where a frame is padding
    visual_index: torch.Tensor | None = None  # (B, T * P) columns of the pooled tokens
    text_start: int = 0  # first column that may hold text after the video
    text_mask: torch.Tensor | None = None  # (B, L - text_start, 1); None: all of them
    state: VisualState | None = None


def token_mask(frame_mask: torch.Tensor, tokens_per_frame: int) -> torch.Tensor:
    """Frames (B, T) -> original tokens (B, 1, 1, T * N) that may be looked at.

    Where a prompt has no frame at all everything is open, because kernels differ (NaN, mean, 0) on
    rows that are masked entirely; what comes out there has to be dropped.
    """
    seen = frame_mask | ~frame_mask.any(1, keepdim=True)
    return seen.repeat_interleave(tokens_per_frame, dim=1)[:, None, None]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    module: CrossAttention,
) -> torch.Tensor:
    """Softmax attention, (B, H, L, d) x (B, Hkv, M, d) -> (B, H, L, d).

    `mask` (B, 1, 1, M): True where all may look.
    """
    kernel = module.config._attn_implementation
    registered = kernel in ALL_ATTENTION_FUNCTIONS and kernel not in ("eager", "sdpa")
    if registered and (mask is None or not kernel.startswith("flash")):
        out, _ = ALL_ATTENTION_FUNCTIONS[kernel](
            module, query, key, value, mask, scaling=module.scaling, is_causal=False
        )
        return out.transpose(1, 2)
    # Query heads of one key/value head become rows of one product: its keys are read once, which
    # makes a single token over many keys about twelve times as fast on a CPU. Every row may look at
    # the same keys, so the mask stays as it is.
    rows = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # (B, Hkv, G * L, d)
    if kernel == "eager":
        scores = rows @ key.mT * module.scaling
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        out = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value
    else:
        out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=module.scaling)
    return out.reshape(query.shape)  # GPU kernels lay rows out before heads, so this may copy


def attend_store(query: torch.Tensor, store: KeyValueStore, scaling: float) -> torch.Tensor:
    """Attention of (B, H, L, d) over a store, block by block, with a running softmax in fp32."""
    batch, heads, length, width = query.shape
    running_max = out = total = None
    for key, value in store.blocks():
        kv_heads = key.shape[1]
        # Query heads of one key/value head become rows of one matrix product.
        rows = query.reshape(batch, kv_heads, heads // kv_heads * length, width)
        scores = (rows @ key.mT).float() * scaling
        block_max = scores.amax(dim=-1, keepdim=True)
        new_max = block_max if running_max is None else torch.maximum(running_max, block_max)
        weights = (scores - new_max).exp_()
        block_out = (weights.to(value.dtype) @ value).float()
        block_total = weights.sum(dim=-1, keepdim=True)
        if out is None:
            out, total = block_out, block_total
        else:
            decay = (running_max - new_max).exp_()
            out, total = out * decay + block_out, total * decay + block_total
        running_max = new_max
    return (out / total).to(query.dtype).reshape(batch, heads, length, width)


class CrossAttention(nn.Module):
    """One branch: gated cross-attention with the shapes of Qwen2's own grouped-query attention."""

    is_causal = False

    def __init__(self, config: CrossLMMConfig, layer_idx: int) -> None:
        super().__init__()
        text = config.text_config
        self.config = text  # the attention kernel is chosen there
        self.layer_idx = layer_idx
        self.head_dim = getattr(text, "head_dim", None) or (
            text.hidden_size // text.num_attention_heads
        )
        self.num_key_value_groups = text.num_attention_heads // text.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        width, kv_width = (
            heads * self.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads)
        )
        self.query_norm = Qwen2RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.q_proj = nn.Linear(text.hidden_size, width, bias=True)
        self.k_proj = nn.Linear(text.hidden_size, kv_width, bias=True)
        self.v_proj = nn.Linear(text.hidden_size, kv_width, bias=True)
        self.o_proj = nn.Linear(width, text.hidden_size, bias=False)
        self.gate = nn.Parameter(torch.full((1,), float(config.gate_init)))  # gamma

    def queries(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, L, D) -> (B, H, L, d)."""
        query = self.q_proj(self.query_norm(hidden))
        return query.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def keys_values(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised original tokens (B, M, D) -> two of (B, Hkv, M, d)."""
        return tuple(
            proj(memory).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.k_proj, self.v_proj)
        )

    def gated(self, attended: torch.Tensor) -> torch.Tensor:
        """(B, H, L, d) -> tanh(gamma) * O(...), (B, L, D)."""
        return self.gate.tanh().to(attended.dtype) * self.o_proj(
            attended.transpose(1, 2).flatten(-2)
        )


class DualCrossAttention(nn.Module):
    """V2V for the pooled visual positions and T2V for the text after the video, in parallel."""

    def __init__(self, config: CrossLMMConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.scope = config.v2v_scope
        self.window = config.v2v_window
        self.pooled_tokens_per_frame = config.pooled_tokens_per_frame
        self.v2v = CrossAttention(config, layer_idx) if config.v2v else None
        self.t2v = CrossAttention(config, layer_idx) if config.t2v else None

    def forward(self, hidden: torch.Tensor, context: VisualContext) -> torch.Tensor:
        """Let (B, L, D) hidden states look back at the original tokens; residual included."""
        looks = context.memory is not None and context.visual_index is not None
        looks = looks and (context.state is None or context.state.v2v_open)
        update = None
        if self.v2v is not None and looks:
            index = context.visual_index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
            update = self._v2v(hidden.gather(1, index), context)  # (B, T*P, D)
            if context.frame_mask is not None:
                per_frame = update.shape[1] // context.frame_mask.shape[1]
                valid = context.frame_mask.repeat_interleave(per_frame, dim=1)
                update = update * valid.unsqueeze(-1)
            update = update.to(hidden.dtype)
        if self.t2v is not None:
            text = self._t2v(hidden[:, context.text_start :], context)
            if text is not None:
                hidden = torch.cat(
                    (hidden[:, : context.text_start], hidden[:, context.text_start :] + text), dim=1
                )
        if update is not None:
            hidden = hidden.scatter_add(1, index, update)
        return hidden

    def _v2v(self, hidden: torch.Tensor, context: VisualContext) -> torch.Tensor:
        """Pooled tokens (B, T*P, D) look at their own frame, a window, or the whole video."""
        batch, frames = context.memory.shape[:2]
        per_frame = hidden.shape[1] // frames
        query = self.v2v.queries(hidden)  # (B, H, T*P, d)
        capture = None if context.state is None else context.state.capture
        if self.scope == "video":
            memory = context.memory
            key, value = self.v2v.keys_values(memory.flatten(1, 2))
            mask = None
            if context.frame_mask is not None:
                mask = token_mask(context.frame_mask, memory.shape[2])
            if capture is not None:
                capture.add_v2v_video(self.layer_idx, query, key, frames, self.v2v.scaling)
            return self.v2v.gated(attend(query, key, value, mask, self.v2v))

        # One row per frame: (B*T, H, P, d) looks at (B*T, Hkv, (w+1)*N, d).
        query = query.unflatten(2, (frames, per_frame)).transpose(1, 2).flatten(0, 1)
        key, value, mask = self._frame_keys(context)
        out = attend(query, key, value, mask, self.v2v)
        if capture is not None:
            tokens = context.memory.shape[2]
            capture.add_v2v(self.layer_idx, query, key, mask, self.v2v.scaling, tokens)
        out = out.unflatten(0, (batch, frames)).transpose(1, 2).flatten(2, 3)  # (B, H, T*P, d)
        return self.v2v.gated(out)

    def _frame_keys(
        self, context: VisualContext
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values that each frame may see, (B*T, Hkv, (w+1)*N, d), and their mask."""
        memory = context.memory
        batch, frames, tokens = memory.shape[:3]
        if self.scope == "frame":
            key, value = self.v2v.keys_values(memory.flatten(0, 1))
            return key, value, None
        earlier = 0 if context.earlier is None else context.earlier.shape[1]
        if earlier:
            memory = torch.cat((context.earlier, memory), dim=1)
        missing = self.window - earlier  # frames before the first one do not exist
        pair = []
        for x in self.v2v.keys_values(memory.flatten(1, 2)):
            x = x.unflatten(2, (-1, tokens))
            x = F.pad(x, (0, 0, 0, 0, missing, 0)).unfold(2, self.window + 1, 1)
            # (B, Hkv, T, N, d, w+1) -> (B*T, Hkv, (w+1)*N, d)
            pair.append(x.permute(0, 2, 1, 5, 3, 4).flatten(0, 1).flatten(2, 3))
        if not missing:
            return *pair, None
        steps = torch.arange(self.window + 1, device=memory.device)
        exists = steps + torch.arange(frames, device=memory.device)[:, None] >= missing
        mask = exists.repeat_interleave(tokens, dim=1).repeat(batch, 1)
        return *pair, mask[:, None, None]

    def _t2v(self, hidden: torch.Tensor, context: VisualContext) -> torch.Tensor | None:
        """Text after the video (B, L', D) looks at every original token seen so far."""
        state, pair = context.state, None
        if context.memory is not None:
            pair = self.t2v.keys_values(context.memory.flatten(1, 2))
            if state is not None:
                state.store(self.layer_idx).append(*pair, context.memory.shape[2])
        if hidden.shape[1] == 0:
            return None
        frame_mask = context.frame_mask
        if state is not None:
            store = state.store(self.layer_idx)
            frame_mask = state.frame_mask
            if not store.length or not state.t2v_open:
                return None
            pair = store.full() if store.precision == "native" else None
        elif pair is None:
            return None
        query = self.t2v.queries(hidden)
        if state is not None and state.capture is not None:
            state.capture.add_t2v(self.layer_idx, query)
        if pair is None:
            out = attend_store(query, store, self.t2v.scaling)
        else:
            # Beams of one video share its keys and values.
            pair = [x.expand(len(query), -1, -1, -1) if len(x) == 1 else x for x in pair]
            mask = None
            if frame_mask is not None:
                mask = token_mask(frame_mask, pair[0].shape[2] // frame_mask.shape[1])
            out = attend(query, *pair, mask, self.t2v)
            if frame_mask is not None:  # a prompt without a video has seen nothing
                out = out * frame_mask.any(1)[:, None, None, None]
        out = self.t2v.gated(out).to(hidden.dtype)
        return out if context.text_mask is None else out * context.text_mask
