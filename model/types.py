"""Plain data that crosses the process boundary.

Nothing here imports torch, so the page process can read it. Arrays are NumPy; everything pickles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Stage = Literal["loading", "reading", "encoding", "answering"]


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
class AskRequest:
    """One question about one video."""

    video: str  # path of a local file that passed the checks
    question: str
    history: tuple[tuple[str, str], ...] = ()  # earlier (question, answer) pairs on this video
    max_frames: int | None = None  # None: the model's own default
    max_new_tokens: int | None = None
    strongest_frames: int = 6  # how many frames get a patch map and a picture in the answer
    bounds: ReadBounds = ReadBounds()  # what reading the video may take


@dataclass(frozen=True)
class Progress:
    """How far a stage has come; `total` is 0 when it is not known."""

    stage: Stage
    done: int
    total: int


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
class AttentionSummary:
    """Where the answer's tokens looked, mean over heads.

    `t2v[i, l, t]` is the share of token i's attention in dual cross-attention layer l on frame t:
    each row over t sums to 1.
    """

    times: np.ndarray  # (T,) seconds
    layers: tuple[int, ...]
    tokens: tuple[str, ...]  # text of each answer token
    t2v: np.ndarray  # (tokens, layers, T) float32
    frames: tuple[FrameView, ...]  # strongest first
    peak: float  # time of the frame with the most mass, seconds

    def t2v_mean(self) -> np.ndarray:
        """Mean over the answer's tokens, (layers, T)."""
        return self.t2v.mean(axis=0)


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


@dataclass(frozen=True)
class Failure:
    """A turn that failed. `user` errors are the user's to mend, others are ours."""

    message: str
    user: bool


Event = Progress | Piece | Answer | Failure
