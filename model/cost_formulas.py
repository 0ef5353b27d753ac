"""Every formula of the accounting: parameters, tokens, operations, key/value bytes of a config.

Operations are 2 per multiply-add in matrix products, convolutions and attention; norms,
activations, softmax and pooling are left out. This is what `torch.utils.flop_counter` counts in
one forward over the whole prompt, and as there, causal self-attention counts every pair of tokens.
A kernel that skips the pairs which the causal mask hides computes less: `Operations.masked` says
how much, `Operations.causal` is the count without it.

Shapes: T frames, N original and P pooled tokens per frame, L positions in the LLM, D widths.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

from model.configuration_crosslmm import CrossLMMConfig

System = Literal["crosslmm", "unpooled", "llava-onevision"]
Precision = Literal["native", "int8", "int4"]
SYSTEMS: tuple[System, ...] = get_args(System)

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
CODE_BITS = {"int8": 8, "int4": 4}
SCALE_BYTES = 2 * 2  # a quantisation group's scale and lowest value, fp16 each


@dataclass(frozen=True)
class Parameters:
    """Learned numbers in each part."""

    encoder: int
    projector: int  # with the norm of, and the embeddings added to, its output
    llm: int  # a tied head counts once
    v2v: int
    t2v: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.encoder + self.projector + self.llm + self.v2v + self.t2v


@dataclass(frozen=True)
class Tokens:
    """Positions, by kind."""

    original: int  # what the encoder makes of the frames
    visual: int  # what stands for the video in the LLM
    text: int  # of the prompt
    generated: int

    @property
    def prompt(self) -> int:
        """Positions of the first forward pass."""
        return self.visual + self.text

    @property
    def steps(self) -> int:
        """Forward passes of one token: the first new token comes out of the prompt's own pass."""
        return max(0, self.generated - 1)

    @property
    def llm(self) -> int:
        """Positions that the LLM computes, and that its cache holds in the end."""
        return self.prompt + self.steps


@dataclass(frozen=True)
class Operations:
    """Operations in each part, 2 per multiply-add."""

    encoder: int
    projector: int
    llm: int
    v2v: int
    t2v: int
    masked: int  # of `llm`: pairs of tokens that the causal mask hides

    @property
    def total(self) -> int:
        """All parts, hidden pairs included."""
        return self.encoder + self.projector + self.llm + self.v2v + self.t2v

    @property
    def causal(self) -> int:
        """All parts, for a kernel that skips hidden pairs."""
        return self.total - self.masked


@dataclass(frozen=True)
class KeyValueBytes:
    """Keys and values that are kept for the next token or question."""

    llm: int
    t2v: int

    @property
    def total(self) -> int:
        """Both."""
        return self.llm + self.t2v


@dataclass(frozen=True)
class Shapes:
    """The sizes that every formula needs, read off a config once."""

    vision_width: int
    width: int
    query_width: int  # heads * head width
    kv_heads: int
    head_width: int
    dcal_layers: int

    @classmethod
    def of(cls, config: CrossLMMConfig) -> Shapes:
        """Sizes of `config`."""
        text = config.text_config
        heads = text.num_attention_heads
        head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
        return cls(
            vision_width=config.vision_config.hidden_size,
            width=text.hidden_size,
            query_width=heads * head_width,
            kv_heads=text.num_key_value_heads,
            head_width=head_width,
            dcal_layers=len(set(config.dcal_layers)),
        )

    @property
    def kv_width(self) -> int:
        """Width of one token's keys (and of its values)."""
        return self.kv_heads * self.head_width

    @property
    def attention_weights(self) -> int:
        """Entries of the query, key, value and output matrices of one attention layer."""
        return 2 * self.width * (self.query_width + self.kv_width)


def attention_operations(queries: int, keys: int, width: int) -> int:
    """Scores and weighted sum of `queries` tokens over `keys` tokens; `width` over all heads."""
    return 4 * queries * keys * width


def count_parameters(config: CrossLMMConfig, system: System = "crosslmm") -> Parameters:
    """Learned numbers of a system built from `config`."""
    shapes = Shapes.of(config)
    pooled = system == "crosslmm"
    branch = shapes.attention_weights + shapes.query_width + 2 * shapes.kv_width  # matrices, biases
    branch += shapes.width + 1  # norm of the queries, gate
    branch *= shapes.dcal_layers if pooled else 0
    return Parameters(
        encoder=_encoder_parameters(config),
        projector=_projector_parameters(config, system),
        llm=_llm_parameters(config),
        v2v=branch if config.v2v else 0,
        t2v=branch if config.t2v else 0,
    )


def _encoder_parameters(config: CrossLMMConfig) -> int:
    vision = config.vision_config
    width, inner = vision.hidden_size, vision.intermediate_size
    attention = 4 * (width * width + width)
    mlp = 2 * width * inner + width + inner
    norm = 2 * width
    patches = vision.num_channels * vision.patch_size**2 * width + width
    total = patches + config.original_tokens_per_frame * width
    total += vision.num_hidden_layers * (attention + mlp + 2 * norm) + norm
    if vision.vision_use_head:  # loaded with published weights, never run
        total += width + attention + mlp + norm
    return total


def _projector_parameters(config: CrossLMMConfig, system: System) -> int:
    width = config.hidden_size
    total = config.vision_config.hidden_size * width + width + width * width + width
    if system == "llava-onevision":
        return total + width  # the newline
    total += width * (config.projector_norm + config.frame_separator)
    if system == "crosslmm":
        total += width  # norm of what cross-attention looks at
    if config.time_encoding == "clock":
        total += 50 * width  # ten digits at five places of h:mm:ss
    if config.patch_position == "learned":
        total += 2 * config.original_grid * width
    return total


def _llm_parameters(config: CrossLMMConfig) -> int:
    shapes, text = Shapes.of(config), config.text_config
    layer = shapes.attention_weights + shapes.query_width + 2 * shapes.kv_width
    layer += 3 * shapes.width * text.intermediate_size + 2 * shapes.width
    vocabulary = text.vocab_size * shapes.width
    tables = vocabulary if text.tie_word_embeddings else 2 * vocabulary
    return text.num_hidden_layers * layer + shapes.width + tables


def count_tokens(
    config: CrossLMMConfig,
    frames: int,
    text_tokens: int = 0,
    generated_tokens: int = 0,
    system: System = "crosslmm",
) -> Tokens:
    """Tokens of one video with one question."""
    per_frame, separator = config.pooled_tokens_per_frame, int(config.frame_separator)
    if system == "unpooled":
        per_frame = config.original_tokens_per_frame
    elif system == "llava-onevision":
        per_frame, separator = math.ceil(config.original_grid / 2) ** 2, 1
    return Tokens(
        original=frames * config.original_tokens_per_frame,
        visual=frames * per_frame + separator,
        text=text_tokens,
        generated=generated_tokens,
    )


def encoder_operations(config: CrossLMMConfig, frames: int) -> int:
    """Patches to features, each frame for itself."""
    vision = config.vision_config
    width, per_frame = vision.hidden_size, config.original_tokens_per_frame
    tokens = frames * per_frame
    patches = 2 * tokens * vision.num_channels * vision.patch_size**2 * width
    layer = 2 * tokens * (4 * width * width + 2 * width * vision.intermediate_size)
    layer += attention_operations(tokens, per_frame, width)
    return patches + vision.num_hidden_layers * layer


def projector_operations(config: CrossLMMConfig, tokens: Tokens, system: System) -> int:
    """All original tokens, and the pooled ones where pooling comes first."""
    shapes, projected = Shapes.of(config), tokens.original
    if system == "crosslmm" and not config.pool_after_projector:
        projected += tokens.visual - config.frame_separator
    return 2 * projected * (shapes.vision_width * shapes.width + shapes.width**2)


def _windows(config: CrossLMMConfig) -> Counter[int | None]:
    """How far back LLM layers see (None: to the beginning), and how many layers do."""
    text = config.text_config
    return Counter(
        text.sliding_window if kind == "sliding_attention" else None for kind in text.layer_types
    )


def llm_operations(config: CrossLMMConfig, tokens: Tokens, logits_to_keep: int) -> tuple[int, int]:
    """All operations of the LLM, and those of them that the causal mask hides."""
    shapes, text = Shapes.of(config), config.text_config
    weights = shapes.attention_weights + 3 * shapes.width * text.intermediate_size
    total = 2 * tokens.llm * weights * text.num_hidden_layers
    heads = min(logits_to_keep, tokens.prompt) if logits_to_keep else tokens.prompt
    total += logit_operations(config, heads + tokens.steps)
    hidden = 0
    for window, layers in _windows(config).items():
        pairs = tokens.prompt**2
        seen = min(tokens.prompt, window or tokens.prompt)
        visible = seen * (seen + 1) // 2 + (tokens.prompt - seen) * seen
        hidden += layers * attention_operations(1, pairs - visible, shapes.query_width)
        lengths = range(tokens.prompt + 1, tokens.llm + 1)
        pairs += sum(lengths) if window is None else sum(min(n, window) for n in lengths)
        total += layers * attention_operations(1, pairs, shapes.query_width)
    return total, hidden


def logit_operations(config: CrossLMMConfig, positions: int) -> int:
    """Scores of the whole vocabulary at `positions` of the LLM."""
    return 2 * positions * Shapes.of(config).width * config.text_config.vocab_size


def v2v_operations(config: CrossLMMConfig, tokens: Tokens) -> int:
    """Pooled tokens that look at their scope, in every dual cross-attention layer."""
    if not config.v2v:
        return 0
    shapes, per_frame = Shapes.of(config), config.original_tokens_per_frame
    looked_at = {
        "frame": per_frame,
        "window": per_frame * (config.v2v_window + 1),  # frames before the first are masked
        "video": tokens.original,
    }[config.v2v_scope]
    queries = tokens.visual - config.frame_separator
    return shapes.dcal_layers * _branch_operations(shapes, queries, tokens.original, looked_at)


def t2v_operations(config: CrossLMMConfig, tokens: Tokens, text_before: int) -> int:
    """Text after the video that looks at all of it; keys and values are built without text too."""
    if not config.t2v:
        return 0
    shapes = Shapes.of(config)
    queries = tokens.text - text_before + tokens.steps
    return shapes.dcal_layers * _branch_operations(
        shapes, queries, tokens.original, tokens.original
    )


def _branch_operations(shapes: Shapes, queries: int, memory: int, looked_at: int) -> int:
    """One branch in one layer: `memory` tokens become keys and values, each query sees some."""
    projections = 2 * queries * shapes.width * shapes.query_width * 2
    projections += 2 * memory * shapes.width * shapes.kv_width * 2
    return projections + attention_operations(queries, looked_at, shapes.query_width)


def count_kv_bytes(
    config: CrossLMMConfig,
    frames: int,
    positions: int,
    *,
    system: System = "crosslmm",
    kv_precision: Precision = "native",
    dtype: str = "bfloat16",
) -> KeyValueBytes:
    """Keys and values of `positions` tokens in the LLM, and of all original tokens for T2V."""
    shapes = Shapes.of(config)
    item = ITEM_BYTES[dtype]
    held = sum(
        layers * (positions if window is None else min(positions, window - 1))
        for window, layers in _windows(config).items()
    )
    t2v = 0
    if system == "crosslmm" and config.t2v:
        entries = config.original_tokens_per_frame * shapes.kv_width  # keys of a frame; so values
        if kv_precision == "native":
            per_frame = 2 * entries * item
        else:
            # Keys are quantised per channel, values per token, in groups of one frame.
            groups = shapes.kv_width + config.original_tokens_per_frame * shapes.kv_heads
            per_frame = 2 * entries * CODE_BITS[kv_precision] // 8 + groups * SCALE_BYTES
        t2v = shapes.dcal_layers * frames * per_frame
    return KeyValueBytes(llm=2 * held * shapes.kv_width * item, t2v=t2v)
