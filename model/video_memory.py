"""VideoMemory: everything that depends on the video alone, built once, kept for every question.

The video stands before the question, so frame features, T2V keys and values and the LLM's cache of
the pooled tokens are the same for all questions. A later question costs only its own text.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import DynamicCache

from model.decoding import ROOM, RoomyLayer
from model.dual_cross_attention import VisualState

if TYPE_CHECKING:
    from model.map_capture import MapCapture
    from model.modeling_crosslmm import CrossLMMForConditionalGeneration


class VideoMemory:
    """One video, ready for questions.

    Fill it with `append` (any number of frames at a time; nothing but what is kept stays in
    memory), close it with `finish`, then ask within `turn()`, which rolls the cache back to the
    end of the video however the turn ends.
    """

    def __init__(
        self,
        crosslmm: CrossLMMForConditionalGeneration,
        *,
        precision: str = "native",
        prefix_ids: list[int] | None = None,
        capture: MapCapture | None = None,
        expected_frames: int = 0,
        v2v: bool = True,
        pooled_grid: int | None = None,
    ) -> None:
        """Start with no frames.

        Args:
            crosslmm: the model that this memory belongs to.
            precision: of the T2V keys and values: `native`, `int8` or `int4`.
            prefix_ids: the prompt's tokens before the video.
            capture: collects V2V maps while the video is built.
            expected_frames: how many will come, where known; saves memory while building.
            v2v: False leaves the V2V branch out.
            pooled_grid: side of the pooled grid in place of the model's own.

        Raises:
            ValueError: a pooled grid that is larger than the encoder's.

        """
        self.config = crosslmm.config
        if pooled_grid is not None:
            self.config = copy.copy(self.config)  # the model's own stays as it is
            self.config.pooled_grid = pooled_grid
            self.config.validate_choices()
        self.prefix_ids = list(prefix_ids or [])
        self.times: list[float] = []
        self.finished = False
        self.cache = DynamicCache(config=self.config.text_config)
        self.cache.layers = [RoomyLayer() for _ in self.cache.layers]
        self.cache.visual = self.state = VisualState(
            self.config.original_tokens_per_frame,
            precision=precision,
            capture=capture,
            expected_frames=expected_frames,
            v2v_open=v2v,
            pooled_grid=pooled_grid,
        )
        self._model = crosslmm.model
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []  # video scope only
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        if self.prefix_ids:
            ids = torch.tensor([self.prefix_ids], device=crosslmm.device)
            with torch.inference_mode():
                self._model.prefill_text(self._model.get_input_embeddings()(ids), self.cache)

    @torch.inference_mode()
    def append(self, pixel_values: torch.Tensor, times: torch.Tensor) -> None:
        """Encode and prefill the next frames: (n, 3, S, S) normalised pixels, (n,) seconds."""
        dtype = self._model.vision_tower.embeddings.patch_embedding.weight.dtype
        features = self._model.encode_frames(pixel_values.to(self._model.device, dtype))
        self.append_features(features, times)

    @torch.inference_mode()
    def append_features(self, features: torch.Tensor, times: torch.Tensor) -> None:
        """Prefill frames that are encoded already: (n, N, Dv) features, (n,) seconds."""
        if self.finished:
            raise ValueError("this video is finished; start a new VideoMemory to add frames")
        times = torch.as_tensor(times, dtype=torch.float32)
        self.times += times.tolist()
        chunk = features[None], times[None].to(features.device)
        if self.config.v2v_scope == "video":
            self._waiting.append(chunk)  # the first pooled token looks at the last frame
        else:
            self._model.prefill_frames(*chunk, self.cache)

    @torch.inference_mode()
    def finish(self) -> VideoMemory:
        """Close the video; from here on it only answers questions."""
        if not self.times:
            raise ValueError("a video memory needs at least one frame; append frames first")
        if self._waiting:
            features, times = zip(*self._waiting, strict=True)
            self._waiting = []
            self._model.prefill_frames(torch.cat(features, 1), torch.cat(times, 1), self.cache)
        separator = self._model.frame_separator
        if separator is not None:
            self._model.prefill_text(separator[None, None], self.cache)
        for store in self.state.t2v.values():
            store.finish()
        self.state.recent = self.state.capture = None
        self._kept = [(layer.keys, layer.values) for layer in self.cache.layers]
        self.finished = True
        return self

    @property
    def num_frames(self) -> int:
        """Frames in this memory."""
        return len(self.times)

    @property
    def dtype(self) -> str:
        """Of what is kept at full precision, as `float32`."""
        return str(self.cache.layers[0].keys.dtype).removeprefix("torch.")

    @property
    def length(self) -> int:
        """Tokens in the LLM's cache at the end of the video."""
        separator = int(self.config.frame_separator)
        return (
            len(self.prefix_ids) + self.num_frames * self.config.pooled_tokens_per_frame + separator
        )

    @property
    def nbytes(self) -> int:
        """Bytes held: T2V keys and values and the LLM's cache of the video."""
        pairs = self._kept or [(layer.keys, layer.values) for layer in self.cache.layers]
        kept = sum(t.numel() * t.element_size() for pair in pairs for t in pair if t is not None)
        return kept + self.state.nbytes

    def input_ids(self, text_ids: list[int]) -> torch.Tensor:
        """The whole prompt, (1, L): prefix, placeholders and `text_ids`, as `generate` wants it."""
        visual = self.length - len(self.prefix_ids)
        ids = self.prefix_ids + [self.config.video_token_id] * visual + list(text_ids)
        return torch.tensor([ids], device=self._model.device)

    @contextmanager
    def turn(
        self, capture: MapCapture | None = None, *, copies: int = 1, t2v: bool = True
    ) -> Iterator[DynamicCache]:
        """Lend the cache to one turn; afterwards it ends with the video again.

        `copies`: beams or returned sequences of `generate`; they share what is kept of the video.
        `t2v`: False leaves the T2V branch out of this turn.
        """
        if not self.finished:
            raise ValueError("call finish() before asking")
        for layer, pair in zip(self.cache.layers, self._kept, strict=True):
            layer.replace(*(x.expand(copies, -1, -1, -1) for x in pair), room=ROOM)
        self.state.capture, self.state.t2v_open = capture, t2v
        try:
            yield self.cache
        finally:
            self.state.capture, self.state.t2v_open = None, True
            self.rollback()

    def rollback(self) -> None:
        """Forget all text after the video. The kept tensors are never written to."""
        for layer, pair in zip(self.cache.layers, self._kept, strict=True):
            layer.replace(*pair, room=0)

    def to(self, device: str | torch.device) -> VideoMemory:
        """Move everything that is kept (to make room on a GPU, or to come back)."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device)

        self._kept = [(move(k), move(v)) for k, v in self._kept]
        for store in self.state.t2v.values():
            store.map(move)
        self.rollback()
        return self


class MemoryPool:
    """Finished memories under a byte budget; the one asked longest ago goes first."""

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 0:
            raise ValueError(f"the memory budget must not be negative, got {budget_bytes}")
        self.budget_bytes = budget_bytes
        self._kept: OrderedDict[Hashable, object] = OrderedDict()

    def get(self, key: Hashable) -> object | None:
        """What is kept under `key`, which becomes the most recent, or None."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def put(self, key: Hashable, entry: object) -> None:
        """Keep `entry` (anything with `nbytes`); drop old ones until the budget holds.

        The newest entry stays even when it alone is over the budget: it is about to be used.
        """
        self._kept.pop(key, None)
        self._kept[key] = entry
        while len(self._kept) > 1 and self.nbytes > self.budget_bytes:
            self._kept.popitem(last=False)

    def release(self, nbytes: int) -> None:
        """Forget the oldest entries until so many bytes are given back, or none is left."""
        while self._kept and nbytes > 0:
            _, entry = self._kept.popitem(last=False)
            nbytes -= entry.nbytes

    def drop(self, chosen: Callable[[Hashable], bool]) -> None:
        """Forget every entry whose key `chosen` accepts."""
        for key in [key for key in self._kept if chosen(key)]:
            del self._kept[key]

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(entry.nbytes for entry in self._kept.values())
