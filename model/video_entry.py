"""A video as the engine keeps it: its memory, its frames' pictures, and what what-ifs need."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from model.attention_summary import Sights, visual_map
from model.configuration_crosslmm import CrossLMMConfig
from model.map_capture import MapCapture
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.types import AttentionMap, InputError, VideoInfo, WhatIf
from model.video_memory import VideoMemory

VISUAL_BYTES = 4 << 20  # most that a video's V2V maps may take


@dataclass
class VideoEntry:
    """A video that is ready for questions, or on its way there."""

    memory: VideoMemory
    info: VideoInfo
    what_if: WhatIf = WhatIf()
    capture: MapCapture = field(default_factory=MapCapture)
    times: list[float] = field(default_factory=list)  # of all frames, hidden ones too
    seen: list[int] = field(default_factory=list)  # those that the model was given
    thumbnails: list[bytes] = field(default_factory=list)
    features: list[torch.Tensor] | None = None  # of all frames, for what-ifs
    visual: AttentionMap | None = None
    decode_seconds: float = 0.0
    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    failed_frames: int = 0
    repeated_frames: int = 0  # not encoded: they repeat the one before
    frames_left_out: int = 0  # because memory ran short
    plan_notices: tuple[str, ...] = ()  # what was lowered to make it fit
    clamped: bool = False  # more frames were asked for than are ever used

    @classmethod
    def begin(
        cls,
        crosslmm: CrossLMMForConditionalGeneration,
        info: VideoInfo,
        prefix: list[int],
        times: Sequence[float],
        what_if: WhatIf,
        *,
        precision: str = "native",
    ) -> VideoEntry:
        """Start with no frames; `times` are those that will come.

        Raises:
            InputError: nothing would be left to see, or too many tokens to carry.

        """
        check_frames(what_if, crosslmm.config, np.asarray(times))
        capture = MapCapture(v2v=what_if.v2v)
        memory = VideoMemory(
            crosslmm,
            precision=precision,
            prefix_ids=prefix,
            capture=capture,
            expected_frames=int(visible(times, what_if).sum()),
            v2v=what_if.v2v,
            pooled_grid=what_if.pooled_tokens and math.isqrt(what_if.pooled_tokens),
        )
        features = [] if what_if == WhatIf() else None
        return cls(memory, info, what_if, capture, features=features)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        features = sum(one.numel() * one.element_size() for one in self.features or ())
        maps = self.visual.nbytes if self.visual is not None else 0
        return self.memory.nbytes + sum(map(len, self.thumbnails)) + features + maps

    def take(self, times: torch.Tensor) -> torch.Tensor:
        """Note the next frames; returns which of them the model is to be given, (n,) bool."""
        kept = torch.from_numpy(visible(times.tolist(), self.what_if))
        first = len(self.times)
        self.seen += [first + i for i in kept.nonzero().flatten().tolist()]
        self.times += times.tolist()
        return kept

    def keep_features(self, features: torch.Tensor, most_bytes: int) -> None:
        """Keep encoded frames, unless all of them together become too large."""
        if self.features is None:
            return
        self.features.append(features.cpu())
        if sum(one.numel() * one.element_size() for one in self.features) > most_bytes:
            self.features = None

    def finish(self) -> None:
        """Close the video; from here on it answers questions."""
        clock = time.perf_counter()
        self.memory.finish()
        self.prefill_seconds += time.perf_counter() - clock
        self.visual = visual_map(self.capture, budget=VISUAL_BYTES)
        self.capture = MapCapture()

    def sights(self, maps: bool) -> Sights:
        """What an answer's attention needs beside the memory."""
        return Sights(
            times=np.asarray(self.times),
            seen=np.asarray(self.seen),
            pictures=tuple(self.thumbnails),
            visual=self.visual if maps else None,
        )


def visible(times: Sequence[float], what_if: WhatIf) -> np.ndarray:
    """Which frames a what-if leaves visible, (T,) bool."""
    at = np.asarray(times)
    shown = np.ones(len(at), bool)
    for start, end in what_if.hidden:
        shown &= (at < start) | (at >= end)
    return shown


def check_tokens(what_if: WhatIf, config: CrossLMMConfig) -> WhatIf:
    """Refuse more tokens than there are; the model's own number is no change."""
    tokens = what_if.pooled_tokens
    if tokens == config.pooled_tokens_per_frame:
        return replace(what_if, pooled_tokens=None)
    if tokens is not None and tokens > config.original_tokens_per_frame:
        raise InputError(
            f"This model has {config.original_tokens_per_frame} tokens per frame to merge; "
            f"{tokens} are too many. Choose fewer."
        )
    return what_if


def check_frames(what_if: WhatIf, config: CrossLMMConfig, times: np.ndarray) -> None:
    """Refuse a what-if that leaves nothing to see, or more tokens than the model can carry."""
    if len(times) and not visible(times, what_if).any():
        raise InputError(
            f"The hidden stretch covers all {len(times)} frames that were read. "
            "Leave at least one to be seen."
        )
    tokens, room = what_if.pooled_tokens, config.text_config.max_position_embeddings
    if tokens is not None and len(times) * tokens > room * 3 // 4:  # the rest is for text
        raise InputError(
            f"{len(times)} frames of {tokens} tokens are {len(times) * tokens} tokens; this model "
            f"has room for {room}, the question included. Choose fewer per frame."
        )
