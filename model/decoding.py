"""Greedy decoding that does not stall an accelerator: no copy of the cache, no wait per token.

transformers' `generate` reads every token before it starts the next step, so that the device waits
for the host, and its dynamic cache copies all keys and values for each token. Here the next step is
under way while a token is read, and the cache has room for what is still to come.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from model.types import ModelFault

if TYPE_CHECKING:
    from model.modeling_crosslmm import CrossLMMForConditionalGeneration

ROOM = 256  # tokens taken at a time for what is still to come


class RoomyLayer(DynamicLayer):
    """A layer of a dynamic cache that, while it has `room`, does not copy itself for each token."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.room = 0  # tokens to take at a time; 0: none, as transformers' own layer
        self._whole: tuple[torch.Tensor, torch.Tensor] | None = None
        self._given: torch.Tensor | None = None  # the keys as this layer left them

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add (B, H, n, d) keys and values; all of them come back."""
        before = self.get_seq_length()
        if not self.room or not before:
            return super().update(key_states, value_states, *args, **kwargs)
        end = before + key_states.shape[-2]
        # Somebody else may have reordered, cut or replaced the keys since.
        if self._whole is None or self.keys is not self._given or end > self._whole[0].shape[-2]:
            self._whole = tuple(
                _with_room(x, end - before + self.room) for x in (self.keys, self.values)
            )
        for whole, new in zip(self._whole, (key_states, value_states), strict=True):
            whole[..., before:end, :] = new
        self.keys, self.values = (whole[..., :end, :] for whole in self._whole)
        self._given = self.keys
        return self.keys, self.values

    def replace(self, keys: torch.Tensor, values: torch.Tensor, room: int) -> None:
        """Hold other keys and values, which are never written to."""
        self.keys, self.values, self.room = keys, values, room
        self._whole = self._given = None


def _with_room(tensor: torch.Tensor, more: int) -> torch.Tensor:
    batch, heads, length, width = tensor.shape
    whole = tensor.new_empty(batch, heads, length + more, width)
    whole[..., :length, :] = tensor
    return whole


@dataclass
class _Step:
    """A token that is still being computed, and the way to read it."""

    token: torch.Tensor  # (1, 1) on the device
    told: torch.Tensor  # (2,) on the host: the token, and whether the scores are no numbers
    ready: torch.Event | None

    def read(self) -> int:
        if self.ready is not None:
            self.ready.synchronize()
        token, broken = self.told.tolist()
        if broken:
            raise ModelFault(
                "The model's numbers broke down on this question (NaN), so there is no answer; "
                "ask differently or use another video."
            )
        return token


def _start(crosslmm: CrossLMMForConditionalGeneration, ids: torch.Tensor, cache: Cache) -> _Step:
    """Queue one forward pass over (1, n) tokens; nothing here waits for the device."""
    logits = crosslmm(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    scores = logits[0, -1].float()
    token = scores.argmax()
    broken = scores.isnan().any() | ~scores.isfinite().any()
    both = torch.stack((token, broken.long()))
    if both.device.type == "cpu":
        return _Step(token.view(1, 1), both, None)
    told = torch.empty_like(both, device="cpu", pin_memory=both.is_cuda)
    told.copy_(both, non_blocking=True)
    ready = torch.Event(device=both.device, blocking=True)
    ready.record()
    return _Step(token.view(1, 1), told, ready)


@torch.inference_mode()
def decode(
    crosslmm: CrossLMMForConditionalGeneration,
    ids: torch.Tensor,
    cache: Cache,
    limit: int,
    ends: Collection[int],
    *,
    ahead: bool | None = None,
) -> Iterator[int]:
    """The likeliest tokens after `ids` (1, n), until one of `ends`, which is the last, or `limit`.

    `ids` are those that are not in `cache` yet. `ahead`: start each step before the token before it
    is read, one step too many in the end, whose traces are removed; by default where the device
    works on its own.

    Raises:
        ModelFault: the scores are no numbers any more.

    """
    ahead = ids.device.type != "cpu" if ahead is None else ahead
    step: _Step | None = _start(crosslmm, ids, cache)
    following: _Step | None = None
    try:
        for count in range(1, limit + 1):
            following = None
            if ahead and count < limit:
                following = _start(crosslmm, step.token, cache)
            token = step.read()
            yield token
            if token in ends or count == limit:
                return
            step = following or _start(crosslmm, step.token, cache)
    finally:
        capture = getattr(getattr(cache, "visual", None), "capture", None)
        if following is not None and capture is not None:
            capture.forget_last()
