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


@dataclass(frozen=True)
class AskRequest:
    """One question about one video."""

    video: str  # path of a local file that passed the checks
    question: str
    history: tuple[tuple[str, str], ...] = ()  # earlier (question, answer) pairs on this video
    max_frames: int | None = None  # None: the model's own default
    max_new_tokens: int | None = None
    strongest_frames: int = 6  # how many frames get a patch map and a picture in the answer


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
class Savings:
    """Counted (not measured) cost of this turn, with pooling and without."""

    original_tokens: int
    pooled_tokens: int
    text_tokens: int
    operations: float  # 2 per multiply-add, attention included
    operations_unpooled: float  # the same model with every original token in the LLM
    kv_bytes: int
    kv_bytes_unpooled: int

    @property
    def reduction(self) -> float:
        """Share of visual tokens that the LLM does not have to carry, 0..1."""
        return 1 - self.pooled_tokens / self.original_tokens


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
