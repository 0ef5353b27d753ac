"""Plain data that crosses the process boundary.

Nothing here imports torch, so the page process can read it. Arrays are NumPy; everything pickles.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

MOST_FRAMES = 4096  # of one video, whatever is asked for

Stage = Literal["loading", "reading", "encoding", "answering"]
MapKind = Literal["t2v", "v2v", "self"]  # text to visual, visual to visual, the LLM's own


class InputError(ValueError):
    """The user's input cannot be used. The message is one sentence that can be shown as it is."""


class ModelFault(Exception):
    """The model cannot go on with this question. The message is one sentence, shown as it is."""


class Stopped(Exception):
    """The user pressed Stop; raised between two steps, when the state is consistent."""


StopCheck = Callable[[], bool]


@dataclass(frozen=True)
class VideoInfo:
    """What probing a file tells, before any frame is decoded for the model."""

    path: str
    container: str
    codec: str
    width: int  # pixels, upright (rotation applied)
    height: int
    duration: float  # seconds, from the packets' presentation times
    frame_rate: float  # average, frames per second
    num_frames: int  # frames in the stream
    rotation: int  # degrees clockwise that were applied to stand the picture upright
    size_bytes: int


@dataclass(frozen=True)
class VideoLimits:
    """What is still accepted as a video."""

    max_duration: float = 4 * 3600.0  # seconds
    max_pixels: int = 8192 * 4320  # of one frame
    max_packets: int = 2_000_000  # compressed frames in the video stream
    max_bytes: int = 16 << 30


@dataclass(frozen=True)
class ReadBounds:
    """What the process that reads a video may take before it is ended. Seconds and bytes."""

    check_seconds: float = 30.0  # checking a file
    frame_seconds: float = 60.0  # decoding until the next frame
    read_seconds: float = 900.0  # decoding all frames
    memory: int = 3 * 10**9


@dataclass(frozen=True)
class Frame:
    """One picture of the video."""

    index: int  # which of the desired times it stands for
    time: float  # seconds from the video's first frame to this very picture
    image: np.ndarray  # (height, width, 3) uint8 RGB, upright


@dataclass(frozen=True)
class ModelInfo:
    """The loaded model, as the page and the command line name it."""

    name: str
    device: str
    dtype: str
    quantization: str
    attention: str
    parameters: int
    pooled_tokens_per_frame: int
    original_tokens_per_frame: int
    dcal_layers: tuple[int, ...]
    gates: tuple[tuple[float, float], ...]  # tanh(gamma) of (V2V, T2V) in each of dcal_layers
    trained: bool  # False: the dual cross-attention is closed or untrained
    examples: tuple[str, ...] = ()  # questions this model is good at
    note: str = ""  # one sentence the page must show (what the model can and cannot do)
    revision: str = ""  # `commit:` of a hub repository, or `sha256:` of the weights
    kv_precision: str = "native"  # of the T2V keys and values


@dataclass(frozen=True)
class WhatIf:
    """What a turn leaves out or changes to see what it is good for; other turns notice nothing.

    Raises:
        InputError: a number of tokens that is no square, or a stretch that ends before it begins.

    """

    v2v: bool = True
    t2v: bool = True
    pooled_tokens: int | None = None  # per frame, a square number; None: as the model was made
    hidden: tuple[tuple[float, float], ...] = ()  # stretches (from, to) in seconds, not seen at all

    def __post_init__(self) -> None:
        tokens = self.pooled_tokens
        if tokens is not None and (tokens < 1 or math.isqrt(tokens) ** 2 != tokens):
            raise InputError(
                f"Tokens per frame form a square grid: 1, 4, 9 or 16 are possible, {tokens} is not."
            )
        for start, end in self.hidden:
            if not (math.isfinite(start) and math.isfinite(end) and 0 <= start < end):
                raise InputError(
                    f"A hidden stretch must end after it begins, but it was given as "
                    f"{start:g} s to {end:g} s."
                )

    @property
    def of_video(self) -> WhatIf:
        """The part that changes how a video is read, and not only how it is asked."""
        return dataclasses.replace(self, t2v=True)


@dataclass(frozen=True)
class AskRequest:
    """One question about one video."""

    video: str  # path of a local file that passed the checks
    question: str
    history: tuple[tuple[str, str], ...] = ()  # earlier (question, answer) pairs on this video
    max_frames: int | None = None  # None: the model's own default
    max_new_tokens: int | None = None
    strongest_frames: int = 6  # how many frames get a patch map and a picture in the answer
    bounds: ReadBounds = ReadBounds()  # what reading the video may take
    what_if: WhatIf = WhatIf()
    map_bytes: int = 16 << 20  # most that the answer's attention maps may take; 0: no maps


@dataclass(frozen=True)
class PlanRequest:
    """A video about which is to be told what a turn on it would take."""

    video: VideoInfo
    max_frames: int | None = None  # None: the model's own default
    pooled_tokens: int | None = None  # per frame; None: as the model was made


@dataclass(frozen=True)
class VideoPlan:
    """What a turn on a video will take, told before anything of it is read. Bytes and seconds."""

    frames: int
    most_frames: int  # that can be chosen for this video
    frame_rate: float  # frames sampled per second of video
    original_tokens: int
    pooled_tokens: int
    tokens_per_frame: int
    token_choices: tuple[int, ...]  # numbers of tokens per frame that can be chosen
    kv_precision: str  # of the T2V keys and values
    kept_bytes: int  # for the next question
    peak_bytes: int  # most at any moment, beside the model itself
    free_bytes: int
    seconds: float | None  # until it can be asked about; None: not measured here yet
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Progress:
    """How far a stage has come; `total` is 0 when it is not known."""

    stage: Stage
    done: int
    total: int


@dataclass(frozen=True)
class FramesRead:
    """The next sampled frames of the video, as they are read; from the first on when it was before.

    Small pictures stand for some of them, evenly spread over the whole video.
    """

    first: int  # which frame the first of `times` is
    times: tuple[float, ...]  # seconds
    pictures: tuple[tuple[float, bytes], ...]  # (seconds, JPEG)


@dataclass(frozen=True)
class Piece:
    """The next piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class TokenCounts:
    """How many tokens one turn had of each kind."""

    original: int
    pooled: int
    text: int  # prompt tokens that are not visual
    generated: int


@dataclass(frozen=True)
class Timings:
    """Seconds. `decode` .. `prefill` are 0 for a later question on the same video."""

    decode: float
    encode: float
    prefill: float
    first_token: float
    total: float


@dataclass(frozen=True)
class FrameView:
    """A frame as the model saw it, with the weight of each patch."""

    index: int
    time: float  # seconds
    mass: float  # share of the text-to-visual attention, mean over layers
    jpeg: bytes  # the upright picture in the video's own aspect ratio
    patches: np.ndarray  # (layers, grid, grid) float32, text-to-visual weight of each patch


@dataclass(frozen=True)
class AttentionMap:
    """One kind of attention over layers and frames, as finely as its share of the budget allows.

    Shapes: W words' tokens or 1 (all together), K layers, H heads or 1 (their mean), T frames,
    F frames with patches, g side of the grid of patches. Of float16.
    """

    kind: MapKind
    measure: Literal["share", "focus"]  # share of attention on a frame; or how narrow it is there
    layers: tuple[int, ...]
    words: np.ndarray  # (W, K, T) mean over heads
    heads: np.ndarray  # (K, H, T) mean over tokens
    both: np.ndarray | None = None  # (W, K, H, T), where there is room
    patches: np.ndarray | None = None  # (W, K, H, F, g, g), each grid sums to 1
    patch_frames: tuple[int, ...] = ()  # which frames have patches: all, or the strongest

    def rows(self, tokens: slice | None = None, head: int | None = None) -> np.ndarray:
        """(K, T) float32 of some tokens (None: all), of one head or the mean of all.

        Where `both` had no room, a head's rows are those of all tokens; see `exact`.
        """
        if head is None:
            chosen = self.words if tokens is None or len(self.words) == 1 else self.words[tokens]
            return chosen.astype(np.float32).mean(0)
        if tokens is None or self.both is None or len(self.both) == 1:
            return self.heads[:, head].astype(np.float32)
        return self.both[tokens][:, :, head].astype(np.float32).mean(0)

    def exact(self, tokens: slice | None = None, head: int | None = None) -> bool:
        """Whether `rows` has just these tokens, and not all for want of room."""
        if tokens is None or self.kind == "v2v":
            return True
        kept = self.words if head is None else self.both
        return kept is not None and len(kept) > 1

    def patch_map(
        self, layer: int | None, frame: int, tokens: slice | None = None, head: int | None = None
    ) -> np.ndarray | None:
        """(g, g) float32 that sums to 1: how attention is spread within a frame; None: not kept.

        `layer` counts the rows; None is the mean of all. Heads and tokens that are not kept apart
        stand for all of them.
        """
        if self.patches is None or frame not in self.patch_frames:
            return None
        place = self.patch_frames.index(frame)
        rows = slice(None) if layer is None else slice(layer, layer + 1)
        words = tokens if tokens is not None and len(self.patches) > 1 else slice(None)
        several = self.patches.shape[2] > 1
        column = slice(head, head + 1) if head is not None and several else slice(None)
        grids = self.patches[words, rows, column, place].astype(np.float32)  # (w, k, h, g, g)
        if self.measure == "focus":
            return grids.mean((0, 1, 2))
        weight = np.ones(grids.shape[:3], np.float32)  # by how much of them is on this frame
        if several and self.both is not None and len(self.both) == len(self.patches):
            weight = self.both[words, rows, column, frame].astype(np.float32)
        elif several:
            weight *= self.heads[None, rows, column, frame]
        elif len(self.words) == len(self.patches):
            weight = self.words[words, rows, None, frame].astype(np.float32)
        total = float(weight.sum())
        if not total:
            return np.zeros(grids.shape[3:], np.float32)
        return (grids * weight[..., None, None]).sum((0, 1, 2)) / total

    @property
    def num_heads(self) -> int:
        """H."""
        return self.heads.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = (self.words, self.heads, self.both, self.patches)
        return sum(array.nbytes for array in arrays if array is not None)


@dataclass(frozen=True)
class AttentionSummary:
    """Where the answer's tokens looked, mean over heads.

    `t2v[i, l, t]` is the share of token i's attention in dual cross-attention layer l on frame t:
    each row over t sums to 1. It has no layers where the turn had no T2V.
    """

    times: np.ndarray  # (T,) seconds
    layers: tuple[int, ...]
    tokens: tuple[str, ...]  # text of each answer token
    t2v: np.ndarray  # (tokens, layers, T) float32
    frames: tuple[FrameView, ...]  # strongest first, by the kind `main`
    peak: float  # time of the frame with the most mass, seconds, by the kind `main`
    main: MapKind = "t2v"  # what to show first: "self" where T2V is untrained, closed or off
    maps: tuple[AttentionMap, ...] = ()
    pictures: tuple[bytes, ...] = ()  # JPEG of every frame, upright, in the video's aspect ratio
    hidden: tuple[int, ...] = ()  # frames that a `WhatIf` kept from the model
    v2v_scope: str = "frame"

    def t2v_mean(self) -> np.ndarray:
        """Mean over the answer's tokens, (layers, T)."""
        return self.t2v.mean(axis=0)

    @property
    def nbytes(self) -> int:
        """Bytes of maps and of the strongest frames, without `pictures`."""
        arrays = [self.t2v, *(frame.patches for frame in self.frames)]
        for one in self.maps:
            arrays += [one.words, one.heads, one.both, one.patches]
        jpegs = sum(len(frame.jpeg) for frame in self.frames)
        return jpegs + sum(a.nbytes for a in arrays if a is not None)

    def map(self, kind: MapKind) -> AttentionMap | None:
        """The map of a kind, where there is one."""
        return next((one for one in self.maps if one.kind == kind), None)

    def timeline(self) -> np.ndarray:
        """Share of the answer's attention on each frame by the kind `main`, (T,), mean over layers.

        Of self-attention, whose rest lies on text, scaled to sum to 1 as well.
        """
        shown = self.map(self.main)
        rows = self.t2v_mean() if shown is None else shown.rows()
        mass = rows.mean(axis=0) if len(rows) else np.zeros(len(self.times), np.float32)
        return mass / (float(mass.sum()) or 1.0)


@dataclass(frozen=True)
class CurvePoint:
    """Counted cost of reading a video of this many frames and of one question about it."""

    frames: int
    operations: float
    kv_bytes: int


@dataclass(frozen=True)
class SystemCost:
    """Counted (not measured) cost of one turn in one system; see `model.accounting`."""

    system: str  # `crosslmm`, `unpooled` or `llava-onevision`
    tokens_per_frame: int  # that its LLM carries
    visual_tokens: int
    video_operations: float  # to read the video, once for all its questions
    question_operations: float  # of a question and its answer on a video that has been read
    kv_bytes: int
    most_frames: int  # that fit among its LLM's positions beside this question
    curve: tuple[CurvePoint, ...] = ()

    def operations(self, memory_reused: bool = False) -> float:
        """What a turn takes: a reused memory leaves only the question's own text."""
        return self.question_operations + (0.0 if memory_reused else self.video_operations)


@dataclass(frozen=True)
class Savings:
    """Counted (not measured) cost of this turn, with pooling and without.

    Operations are 2 per multiply-add, attention included, pairs that the causal mask hides not.
    All systems are counted alike: each keeps the video that it has read.
    """

    original_tokens: int
    text_tokens: int
    crosslmm: SystemCost
    unpooled: SystemCost  # the same model with every original token in the LLM
    llava_onevision: SystemCost  # its pooling, ceil(side / 2)^2 tokens per frame

    @property
    def pooled_tokens(self) -> int:
        """Visual tokens in the LLM."""
        return self.crosslmm.visual_tokens

    @property
    def reduction(self) -> float:
        """Share of visual tokens that the LLM does not have to carry, 0..1."""
        return 1 - self.pooled_tokens / self.original_tokens

    @property
    def systems(self) -> tuple[SystemCost, ...]:
        """All that are compared, ours first."""
        return self.crosslmm, self.llava_onevision, self.unpooled

    def without_curves(self) -> Savings:
        """The same for a conversation's sums: what other lengths would cost is left out."""
        names = ("crosslmm", "unpooled", "llava_onevision")
        return replace(self, **{n: replace(getattr(self, n), curve=()) for n in names})


@dataclass(frozen=True)
class Answer:
    """The end of a turn."""

    text: str
    stopped: bool
    model: str
    tokens: TokenCounts
    timings: Timings
    frame_times: np.ndarray  # (T,) seconds
    attention: AttentionSummary | None  # None when stopped before the first token
    savings: Savings
    memory_reused: bool
    video: VideoInfo
    notices: tuple[str, ...] = field(default=())
    repeated_frames: int = 0  # frames that were not encoded: they repeat the one before


@dataclass(frozen=True)
class Failure:
    """A turn that failed. `user` errors are the user's to mend, others are ours."""

    message: str
    user: bool


Event = Progress | FramesRead | Piece | Answer | Failure
