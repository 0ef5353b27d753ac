"""How many frames of a video fit into the memory that is free, and at what key/value precision.

What a video keeps (keys and values) is exact, from `model.cost_formulas`. What it needs while it
is built and asked about is an upper estimate, from the largest tensors that live at the same time
in each phase; it holds for the `sdpa` and flash kernels, not for `eager` attention.

What gives way first: keys and values at 8 bits change hardly an answer (at most 1 in 100 is
allowed to differ), at 4 bits few (at most 3 in 100), while a frame that was left out may be the
only one that shows what is asked for. So precision goes before frames. But 4 bits are not worth
it for a few frames: leaving out a share s of evenly spread frames loses at most a share s of what
single frames show. The plan keeps the most of `frames / wanted - changed answers`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from model.accounting import account
from model.configuration_crosslmm import CrossLMMConfig
from model.cost_formulas import (
    ITEM_BYTES,
    Precision,
    Shapes,
    count_kv_bytes,
    count_parameters,
    count_tokens,
)
from model.types import InputError
from model.video import sample_times

# Share of answers that each precision may change, best first.
CHANGED_ANSWERS: dict[Precision, float] = {"native": 0.0, "int8": 0.01, "int4": 0.03}
# Tokens of a quantised T2V store that are brought back to full precision at a time.
BLOCK_TOKENS = 32768
# Bytes per weight of a quantised matrix, its scales included (NF4: 64 weights to a scale, the
# scales themselves in 8 bits).
QUANTIZED_WEIGHT = {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}


@dataclass(frozen=True)
class PlanSettings:
    """What the caller wishes, and what the model runs on."""

    max_frames: int | None = None  # None: the config's own
    frame_rate: float | None = None  # frames per second of video; None: the config's own
    min_frames: int = 8  # fewer are no use; a shorter video may have fewer
    kv_precision: Precision | None = None  # None: the best that pays
    text_tokens: int = 128  # longest prompt to be ready for, in tokens, without the video
    generated_tokens: int = 128  # longest answer
    chunk_frames: int = 16  # frames encoded and prefilled together
    dtype: str = "bfloat16"
    quantization: str = "none"  # of the weights: `none`, `8bit`, `4bit`
    weights_loaded: bool = False  # True: the free memory is what the weights have left
    operations_per_second: float | None = None  # measured; None: no time is predicted
    headroom: float = 0.1  # share of the free memory that the plan leaves alone


@dataclass(frozen=True)
class Plan:
    """A number of frames and a precision, and the memory they take (bytes)."""

    frames: int
    kv_precision: Precision
    weight_bytes: int  # 0 when they are loaded already
    llm_kv_bytes: int
    t2v_kv_bytes: int
    working_bytes: int  # the most that lives for a moment
    operations: int  # to build the video and answer one question
    seconds: float | None  # for the same; decoding the file not included
    notices: tuple[str, ...]  # what was lowered, a sentence each

    @property
    def kv_bytes(self) -> int:
        """Bytes kept for the next question."""
        return self.llm_kv_bytes + self.t2v_kv_bytes

    @property
    def total_bytes(self) -> int:
        """Most bytes in use at any moment."""
        return self.weight_bytes + self.kv_bytes + self.working_bytes


def weight_bytes(config: CrossLMMConfig, quantization: str, dtype: str = "bfloat16") -> int:
    """Bytes of the weights; under quantisation most of the LLM's matrices shrink."""
    item = ITEM_BYTES[dtype]
    parameters = count_parameters(config)
    whole = parameters.total * item
    if quantization == "none":
        return whole
    if quantization not in QUANTIZED_WEIGHT:
        allowed = ("none", *QUANTIZED_WEIGHT)
        raise ValueError(f"quantization must be one of {allowed}, got {quantization!r}")
    shapes, text = Shapes.of(config), config.text_config
    matrices = text.num_hidden_layers * 3 * shapes.width * text.intermediate_size
    output = shapes.width * shapes.query_width  # of self-attention, stays whole
    matrices += text.num_hidden_layers * (shapes.attention_weights - output)
    return whole - int(matrices * (item - QUANTIZED_WEIGHT[quantization]))


def working_bytes(
    config: CrossLMMConfig, frames: int, kv_precision: Precision, settings: PlanSettings
) -> int:
    """Upper estimate of what lives beside weights, keys and values, in the worst moment."""
    chunk = min(frames, settings.chunk_frames)
    # In video scope the first pooled token looks at the last frame: all frames go in at once.
    together = frames if config.v2v_scope == "video" else chunk
    waiting = 0
    if config.v2v_scope == "video":
        features = frames * config.original_tokens_per_frame * config.vision_config.hidden_size
        waiting = 2 * features * ITEM_BYTES[settings.dtype]
    return max(
        _encoding(config, chunk, settings) + waiting // 2,
        _prefilling(config, together, frames, kv_precision, settings) + waiting,
        _closing(config, frames, kv_precision, settings),
        _answering(config, frames, kv_precision, settings),
    )


def _encoding(config: CrossLMMConfig, chunk: int, settings: PlanSettings) -> int:
    vision, item = config.vision_config, ITEM_BYTES[settings.dtype]
    pixels = 3 * vision.image_size**2 * chunk * (4 + item)
    # The patches, the layer's input and residual and a norm; then either the inner layer of an MLP
    # before and after its activation, or q, k, v, the result, its copy and its projection.
    widths = 4 * vision.hidden_size + 2 * vision.intermediate_size
    attention = 10 * vision.hidden_size
    return pixels + chunk * config.original_tokens_per_frame * max(widths, attention) * item


def _prefilling(
    config: CrossLMMConfig,
    chunk: int,
    frames: int,
    kv_precision: Precision,
    settings: PlanSettings,
) -> int:
    shapes, item = Shapes.of(config), ITEM_BYTES[settings.dtype]
    tokens = chunk * config.original_tokens_per_frame
    features = tokens * shapes.vision_width * item
    # Projecting ends in a norm: its input, the fp32 copy and the fp32 result.
    projecting = tokens * shapes.width * (item + 8)
    memory = tokens * shapes.width * item
    looked_at = config.v2v_window + 1 if config.v2v_scope == "window" else 1
    if config.v2v_scope == "window":
        memory += (chunk + 2 * config.v2v_window) * (memory // chunk)  # with the frames before
    v2v = 2 * tokens * shapes.kv_width * item * (1 + (looked_at > 1) + looked_at)
    t2v = 2 * tokens * shapes.kv_width * item
    if kv_precision != "native":
        t2v += tokens * shapes.kv_width * 12  # three fp32 copies of the keys while they are coded
    pooled = chunk * config.pooled_tokens_per_frame
    llm = _llm_activations(config, pooled, frames * config.pooled_tokens_per_frame, settings)
    return features + max(projecting, memory + max(v2v, t2v, llm))


def _llm_activations(
    config: CrossLMMConfig, new: int, positions: int, settings: PlanSettings
) -> int:
    """One layer on `new` tokens, with `positions` tokens in the cache."""
    shapes, text, item = Shapes.of(config), config.text_config, ITEM_BYTES[settings.dtype]
    states = new * (8 * shapes.width + 3 * text.intermediate_size) * item
    # A chunk after the first needs a mask; with one, keys and values are repeated for every head.
    repeated = 2 * positions * shapes.query_width * item
    grown = 4 * positions * shapes.kv_width * item  # a layer's cache, old and new
    return states + repeated + grown + 2 * new * positions * item


def _closing(
    config: CrossLMMConfig, frames: int, kv_precision: Precision, settings: PlanSettings
) -> int:
    """A layer's chunks of native keys and values become one tensor."""
    if kv_precision != "native":
        return 0
    kept = count_kv_bytes(config, frames, 0, dtype=settings.dtype).t2v
    return kept // max(1, Shapes.of(config).dcal_layers)


def _answering(
    config: CrossLMMConfig, frames: int, kv_precision: Precision, settings: PlanSettings
) -> int:
    shapes, text, item = Shapes.of(config), config.text_config, ITEM_BYTES[settings.dtype]
    length = settings.text_tokens
    positions = _positions(config, frames, settings)
    # The memory's own cache stays untouched, so a turn works on a grown copy.
    copy = count_kv_bytes(config, frames, positions, dtype=settings.dtype).llm
    looking = length * 4 * shapes.query_width * 4
    if kv_precision != "native" and config.t2v:
        # A block ends where the chunk ends that was quantised together.
        together = frames if config.v2v_scope == "video" else min(frames, settings.chunk_frames)
        per_frame = config.original_tokens_per_frame
        block = min(together * per_frame, max(BLOCK_TOKENS, per_frame))
        several = block < frames * per_frame
        looking += block * shapes.kv_width * ((2 + 2 * several) * item + 8)  # decoded
        # Scores and weights in fp32; those of the block before live on until they are replaced.
        looking += text.num_attention_heads * length * block * (16 if several else 8 + item)
    logits = text.vocab_size * (item + 8)
    return copy + max(looking, _llm_activations(config, length, positions, settings), logits)


def _positions(config: CrossLMMConfig, frames: int, settings: PlanSettings) -> int:
    return count_tokens(config, frames, settings.text_tokens, settings.generated_tokens).llm


def predict(
    config: CrossLMMConfig,
    frames: int,
    kv_precision: Precision = "native",
    settings: PlanSettings = PlanSettings(),  # noqa: B008 (frozen)
) -> Plan:
    """What `frames` frames at this precision take, whether it fits or not."""
    counted = account(
        config,
        frames,
        settings.text_tokens,
        settings.generated_tokens,
        kv_precision=kv_precision,
        dtype=settings.dtype,
    )
    speed, loaded = settings.operations_per_second, settings.weights_loaded
    return Plan(
        frames=frames,
        kv_precision=kv_precision,
        weight_bytes=0 if loaded else weight_bytes(config, settings.quantization, settings.dtype),
        llm_kv_bytes=counted.kv_bytes.llm,
        t2v_kv_bytes=counted.kv_bytes.t2v,
        working_bytes=working_bytes(config, frames, kv_precision, settings),
        operations=counted.operations.causal,
        seconds=counted.operations.causal / speed if speed else None,
        notices=(),
    )


def plan(
    config: CrossLMMConfig,
    duration: float,
    free_bytes: int,
    settings: PlanSettings = PlanSettings(),  # noqa: B008 (frozen)
) -> Plan:
    """Choose frames and precision for a video of `duration` seconds.

    Raises:
        InputError: not even the fewest frames at the lowest precision fit; one sentence.
        ValueError: an impossible setting.

    """
    if not 0 <= settings.headroom < 1:
        raise ValueError(f"headroom must be from 0 to below 1, got {settings.headroom}")
    asked = len(
        sample_times(
            duration,
            max_frames=settings.max_frames or config.max_frames,
            frame_rate=settings.frame_rate or config.frame_rate,
        )
    )
    wanted = min(asked, _most_positions(config, settings))
    least = min(wanted, max(1, settings.min_frames))
    precisions = [settings.kv_precision] if settings.kv_precision else list(CHANGED_ANSWERS)
    usable = int(free_bytes * (1 - settings.headroom))

    best: Plan | None = None
    best_worth = float("-inf")
    for precision in precisions:
        frames = _most_that_fit(config, least, wanted, precision, usable, settings)
        worth = frames / wanted - CHANGED_ANSWERS[precision]
        if frames and worth > best_worth:
            best, best_worth = predict(config, frames, precision, settings), worth
    if best is None:
        need = min(predict(config, least, p, settings).total_bytes for p in precisions)
        raise InputError(
            f"{_megabytes(need / (1 - settings.headroom))} of free memory are needed for "
            f"{least} frames of this video and {_megabytes(free_bytes)} are free: free some, "
            "take a smaller model, or load it in 4 bits."
        )
    return replace(best, notices=_notices(best, asked, wanted, precisions[0]))


def _most_positions(config: CrossLMMConfig, settings: PlanSettings) -> int:
    """Frames whose pooled tokens leave room for question and answer among the LLM's positions."""
    limit = config.text_config.max_position_embeddings
    room = limit - settings.text_tokens - settings.generated_tokens - config.frame_separator
    frames = room // config.pooled_tokens_per_frame
    if frames < 1:
        raise InputError(
            f"The language model has {limit} positions, and {settings.text_tokens} tokens of text "
            f"with {settings.generated_tokens} of answer leave none for the video: shorten them."
        )
    return frames


def _most_that_fit(
    config: CrossLMMConfig,
    least: int,
    wanted: int,
    precision: Precision,
    usable: int,
    settings: PlanSettings,
) -> int:
    """The largest number of frames from `least` to `wanted`, or 0."""

    def fits(frames: int) -> bool:
        return predict(config, frames, precision, settings).total_bytes <= usable

    if not fits(least):
        return 0
    low, high = least, wanted  # `low` fits; bytes grow with frames
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _notices(chosen: Plan, asked: int, wanted: int, first: Precision) -> tuple[str, ...]:
    notices = []
    if wanted < asked:
        notices.append(
            f"{asked:,} frames would take more positions than the language model has; "
            f"at most {wanted:,} can be used."
        )
    if chosen.frames < wanted:
        notices.append(
            f"{chosen.frames:,} of {wanted:,} frames are used: more do not fit into free memory."
        )
    if chosen.kv_precision != first:
        bits = chosen.kv_precision.removeprefix("int")
        notices.append(f"The video's keys and values are kept at {bits} bits to fit.")
    return tuple(notices)


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"
