"""What one turn cost and would have cost without pooling, as the page shows it."""

from __future__ import annotations

from model.accounting import account
from model.configuration_crosslmm import CrossLMMConfig
from model.cost_formulas import SYSTEMS, Precision, System, count_tokens, logit_operations
from model.types import CurvePoint, Savings, SystemCost
from model.video_memory import VideoMemory

CURVE_FRAMES = tuple(2**power for power in range(15))  # 1 .. 16,384: at 1 frame/s over 4 hours


def count_savings(memory: VideoMemory, text_tokens: int, generated_tokens: int) -> Savings:
    """One turn on `memory`, with `text_tokens` in the prompt beside the video."""
    return compare(
        memory.config,
        memory.num_frames,
        text_tokens,
        generated_tokens,
        kv_precision=memory.state.precision,
        dtype=memory.dtype,
        text_before=len(memory.prefix_ids),
    )


def compare(
    config: CrossLMMConfig,
    frames: int,
    text_tokens: int,
    generated_tokens: int = 0,
    *,
    kv_precision: Precision = "native",
    dtype: str = "bfloat16",
    text_before: int = 0,
) -> Savings:
    """Count one turn in each system; arguments as in `account`.

    Operations leave out what the causal mask hides: it weighs most where nothing is pooled, and
    counting it would flatter us.
    """
    text = text_tokens, generated_tokens, text_before
    costs = {system: _cost(config, system, frames, text, kv_precision, dtype) for system in SYSTEMS}
    return Savings(
        original_tokens=frames * config.original_tokens_per_frame,
        text_tokens=text_tokens,
        crosslmm=costs["crosslmm"],
        unpooled=costs["unpooled"],
        llava_onevision=costs["llava-onevision"],
    )


def _cost(
    config: CrossLMMConfig,
    system: System,
    frames: int,
    text: tuple[int, int, int],
    kv_precision: Precision,
    dtype: str,
) -> SystemCost:
    text_tokens, generated_tokens, text_before = text
    whole, read = (
        account(
            config,
            frames,
            prompt,
            answer,
            system=system,
            kv_precision=kv_precision,
            dtype=dtype,
            text_before=text_before,
        )
        for prompt, answer in ((text_tokens, generated_tokens), (text_before, 0))
    )
    # Reading the video predicts no token, so its logits belong to the question.
    video = read.operations.causal - logit_operations(config, 1)
    one, two = (count_tokens(config, count, system=system).visual for count in (1, 2))
    positions = config.text_config.max_position_embeddings
    room = positions - text_tokens - generated_tokens - (2 * one - two)
    return SystemCost(
        system=system,
        tokens_per_frame=two - one,
        visual_tokens=frames * (two - one),
        video_operations=video,
        question_operations=whole.operations.causal - video,
        kv_bytes=whole.kv_bytes.total,
        most_frames=max(0, room // (two - one)),
        curve=_curve(config, system, text, kv_precision, dtype),
    )


def _curve(
    config: CrossLMMConfig,
    system: System,
    text: tuple[int, int, int],
    kv_precision: Precision,
    dtype: str,
) -> tuple[CurvePoint, ...]:
    points = []
    for frames in CURVE_FRAMES:
        counted = account(
            config,
            frames,
            text[0],
            text[1],
            system=system,
            kv_precision=kv_precision,
            dtype=dtype,
            text_before=text[2],
        )
        points.append(CurvePoint(frames, counted.operations.causal, counted.kv_bytes.total))
    return tuple(points)
