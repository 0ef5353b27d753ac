"""What a video will take, told before it is read: frames, tokens, memory and seconds.

`Preflight` belongs to an engine. Its plans are the engine's own: what it says fits is what is read.
It only looks at the config and at figures, so it may be asked from another thread.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.configuration_crosslmm import CrossLMMConfig
from model.planner import Plan, PlanSettings, plan
from model.types import MOST_FRAMES, InputError, ModelInfo, PlanRequest, VideoInfo, VideoPlan
from model.video import sample_times

TEXT_TOKENS = 256  # room for a question and what came before, where they are not known yet
_SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14)  # pooled grids to choose from
_VISUAL_SHARE = 0.75  # of the LLM's positions, where another grid than the model's is chosen
_GROUP_FILES = (  # limit and use of a container's memory, both versions of cgroups
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def free_bytes(device: torch.device | str) -> int:
    """Memory that can still be had on a device."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    free = _available()
    for limit, used in _GROUP_FILES:
        try:
            room = int(Path(limit).read_text()) - int(Path(used).read_text())
        except (OSError, ValueError):  # there is no such limit, or it says `max`
            continue
        free = min(free, max(0, room))
    return free


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo names no available memory")


@dataclass
class Rates:
    """How fast this machine was on the videos that were read so far; 0: not measured."""

    operations: float = 0.0  # per second, encoding and prefill
    pixels: float = 0.0  # per second, decoding: of the sampled frames
    overlap: float = 1.0  # whole time over that of the slower of the two

    def add(
        self, operations: float, compute: float, pixels: float, decode: float, whole: float
    ) -> None:
        """Take one video in; the newer half of what is known counts as much as all before."""
        if min(operations, compute, pixels, decode, whole) <= 0:
            return
        known = self.operations > 0
        now = operations / compute, pixels / decode, max(1.0, whole / max(compute, decode))
        before = (self.operations, self.pixels, self.overlap) if known else now
        self.operations, self.pixels, self.overlap = (
            (new + old) / 2 for new, old in zip(now, before, strict=True)
        )

    def seconds(self, operations: float, pixels: float) -> float | None:
        """Until such a video can be asked about; None when nothing has been measured yet."""
        if not self.operations:
            return None
        return self.overlap * max(operations / self.operations, pixels / self.pixels)


class Preflight:
    """Plans videos for one model. `spare` tells what can be given up for a new video, in bytes."""

    def __init__(
        self,
        config: CrossLMMConfig,
        info: ModelInfo,
        frame_rate: float,
        max_frames: int,
        spare: Callable[[], int],
        *,
        chunk_frames: int = 16,
    ) -> None:
        self.config, self.info = config, info
        self.frame_rate, self.max_frames = frame_rate, max_frames
        self.spare = spare
        self.rates = Rates()
        self.free: Callable[[], int] = lambda: free_bytes(info.device)
        self._chunk_frames = chunk_frames

    def of(self, request: PlanRequest) -> VideoPlan:
        """Tell what a turn on a video would take.

        Raises:
            InputError: not even a few frames of it fit.

        """
        video, tokens = request.video, self._tokens(request.pooled_tokens)
        most = self._room(self._given(video.duration), tokens)
        wanted = min(request.max_frames or self.max_frames, MOST_FRAMES)
        chosen = self.choose(video.duration, wanted, tokens)
        notices = list(chosen.notices)
        given = self._given(video.duration)
        if request.max_frames is not None and request.max_frames > given:
            notices.insert(
                0,
                f"{request.max_frames:,} frames are more than this video gives: {given:,}, "
                f"at {self.frame_rate:g} per second.",
            )
        if tokens != self.info.pooled_tokens_per_frame and self.info.trained:
            notices.append(
                f"The model was trained with {self.info.pooled_tokens_per_frame} per frame; with "
                f"{tokens} its answers may be worse."
            )
        pixels = chosen.frames * video.width * video.height
        return VideoPlan(
            frames=chosen.frames,
            most_frames=most,
            frame_rate=chosen.frames / video.duration,
            original_tokens=chosen.frames * self.config.original_tokens_per_frame,
            pooled_tokens=chosen.frames * tokens,
            tokens_per_frame=tokens,
            token_choices=self.token_choices(),
            kv_precision=chosen.kv_precision,
            kept_bytes=chosen.kv_bytes,
            peak_bytes=chosen.kv_bytes + chosen.working_bytes,
            free_bytes=self.free() + self.spare(),
            seconds=self.rates.seconds(chosen.operations, pixels),
            notices=tuple(notices),
        )

    def choose(
        self, duration: float, max_frames: int, tokens: int, text: int = 0, generated: int = 128
    ) -> Plan:
        """Frames and key/value precision that fit now, with what is kept of other videos gone."""
        native = self.info.kv_precision == "native"
        settings = PlanSettings(
            max_frames=self._room(max_frames, tokens),
            frame_rate=self.frame_rate,
            kv_precision=None if native else self.info.kv_precision,
            text_tokens=max(text, min(TEXT_TOKENS, self._positions // 8)),
            generated_tokens=min(generated, self._positions // 8),
            chunk_frames=self._chunk_frames,
            dtype=self.info.dtype,
            weights_loaded=True,
        )
        chosen = plan(self._pooling(tokens), duration, self.free() + self.spare(), settings)
        if self._room(MOST_FRAMES, tokens) < min(max_frames, self._given(duration)):
            told = f"With {tokens} tokens per frame there is room for {chosen.frames:,} frames."
            return replace(chosen, notices=(told, *chosen.notices))
        return chosen

    def measured(
        self, video: VideoInfo, chosen: Plan, compute: float, decode: float, whole: float
    ) -> None:
        """Learn from a video that was read: seconds of compute, decoding and in all."""
        pixels = chosen.frames * video.width * video.height
        self.rates.add(chosen.operations, compute, pixels, decode, whole)

    def token_choices(self) -> tuple[int, ...]:
        """Numbers of pooled tokens per frame that this model can be asked with."""
        own = math.isqrt(self.info.pooled_tokens_per_frame)
        room = self._positions * _VISUAL_SHARE / 8  # at least some frames must fit
        sides = {g for g in _SIDES if g <= self.config.original_grid and g * g <= room}
        return tuple(g * g for g in sorted(sides | {own}))

    def carries(self, frames: int, tokens: int | None) -> bool:
        """Whether so many frames can have this number of tokens each; None: the model's own."""
        return tokens is None or self._room(frames, tokens) == frames

    @property
    def _positions(self) -> int:
        return self.config.text_config.max_position_embeddings

    def _tokens(self, asked: int | None) -> int:
        choices = self.token_choices()
        if asked is None:
            return self.info.pooled_tokens_per_frame
        if asked not in choices:
            raise InputError(
                f"{asked} tokens per frame cannot be chosen; this model can have "
                f"{', '.join(map(str, choices))}."
            )
        return asked

    def _room(self, frames: int, tokens: int) -> int:
        """At most so many frames when another grid than the model's own is chosen."""
        if tokens == self.info.pooled_tokens_per_frame:
            return frames
        return max(1, min(frames, int(self._positions * _VISUAL_SHARE) // tokens))

    def _given(self, duration: float) -> int:
        """Frames that such a video gives at the model's rate, whether they fit or not."""
        return len(sample_times(duration, max_frames=MOST_FRAMES, frame_rate=self.frame_rate))

    def _pooling(self, tokens: int) -> CrossLMMConfig:
        if tokens == self.config.pooled_tokens_per_frame:
            return self.config
        config = copy.copy(self.config)
        config.pooled_grid = math.isqrt(tokens)
        return config
