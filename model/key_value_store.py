"""Keys and values of one T2V branch over all original tokens, kept whole or quantised.

Shapes: B batch, H key/value heads, M = T * N original tokens, d head width.
Keys are quantised per channel (their outliers sit in few channels), values per token; both in
groups of one frame, so that a video built in chunks equals one built at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

PRECISIONS = {"native": None, "int8": 8, "int4": 4}
BLOCK_TOKENS = 32768  # tokens brought back to full precision at a time


@dataclass
class _Quantized:
    """`codes * scale + low`, with 4-bit codes packed in pairs along the last axis."""

    codes: torch.Tensor  # uint8
    scale: torch.Tensor
    low: torch.Tensor
    bits: int

    @classmethod
    def encode(cls, x: torch.Tensor, axis: int, bits: int) -> _Quantized:
        low, high = x.float().aminmax(dim=axis, keepdim=True)
        # Rounded to the stored type first, so that codes fit the scale that will decode them.
        low = low.to(torch.float16)
        scale = ((high - low.float()) / (2**bits - 1)).clamp_min(1e-6).to(torch.float16)
        codes = ((x.float() - low.float()) / scale.float()).round_().clamp_(0, 2**bits - 1)
        codes = codes.to(torch.uint8)
        if bits == 4:
            codes = codes[..., ::2] | (codes[..., 1::2] << 4)
        return cls(codes, scale, low, bits)

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
        return (codes.to(self.scale.dtype) * self.scale + self.low).to(dtype)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.codes, self.scale, self.low

    def map(self, fn) -> _Quantized:  # noqa: ANN001 (a plain tensor -> tensor function)
        return _Quantized(fn(self.codes), fn(self.scale), fn(self.low), self.bits)


class KeyValueStore:
    """Grows by frames; hands back blocks of keys and values at full precision."""

    def __init__(self, precision: str = "native", expected_tokens: int = 0) -> None:
        """`expected_tokens`: how many will come, where known.

        Room for them is then taken once, so that joining chunks never holds them twice.
        """
        if precision not in PRECISIONS:
            raise ValueError(
                f"key/value precision must be one of {sorted(PRECISIONS)}, got {precision!r}"
            )
        self.precision = precision
        self.expected_tokens = expected_tokens
        self.length = 0  # tokens
        self._native: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._quantized: list[tuple[_Quantized, _Quantized, int]] = []
        self._room = 0  # tokens for which the one native pair still has room
        self.dtype: torch.dtype | None = None

    def append(self, keys: torch.Tensor, values: torch.Tensor, tokens_per_frame: int) -> None:
        """Add frames. `keys`, `values`: (B, H, n * tokens_per_frame, d)."""
        self.dtype = keys.dtype
        self.length += keys.shape[2]
        bits = PRECISIONS[self.precision]
        if bits is None:
            self._append_native(keys, values)
            return
        shape = (*keys.shape[:2], -1, tokens_per_frame, keys.shape[3])  # (B, H, n, N, d)
        self._quantized.append(
            (
                _Quantized.encode(keys.reshape(shape), axis=3, bits=bits),
                _Quantized.encode(values.reshape(shape), axis=4, bits=bits),
                keys.shape[2],
            )
        )

    def _append_native(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        count = keys.shape[2]
        if not self._native and count < self.expected_tokens:
            shape = (*keys.shape[:2], self.expected_tokens, keys.shape[3])
            self._native = [(keys.new_empty(shape), values.new_empty(shape))]
            self._room = self.expected_tokens
        if count <= self._room:
            end = self._native[0][0].shape[2] - self._room
            for whole, part in zip(self._native[0], (keys, values), strict=True):
                whole[:, :, end : end + count] = part
            self._room -= count
        else:
            self._trim()
            self._native.append((keys, values))

    def _trim(self) -> None:
        """Give back room that was not needed."""
        if self._room:
            end = self._native[0][0].shape[2] - self._room
            self._native[0] = tuple(x[:, :, :end].clone() for x in self._native[0])
            self._room = 0

    def full(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, (B, H, M, d). For a quantised store this undoes its saving."""
        if self.precision == "native":
            if len(self._native) > 1:
                keys, values = zip(*self._native, strict=True)
                self._native = [(torch.cat(keys, dim=2), torch.cat(values, dim=2))]
            keys, values = self._native[0]
            return keys[:, :, : self.length], values[:, :, : self.length]
        blocks = list(self.blocks())
        return torch.cat([k for k, _ in blocks], dim=2), torch.cat([v for _, v in blocks], dim=2)

    def finish(self) -> None:
        """No more frames will come: one tensor instead of a list, and no room left over."""
        self._trim()
        if len(self._native) > 1:
            self.full()

    def blocks(self, size: int = BLOCK_TOKENS) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Consecutive blocks of about `size` tokens: (B, H, m, d) keys and values."""
        if self.precision == "native":
            keys, values = self.full()
            yield from zip(keys.split(size, dim=2), values.split(size, dim=2), strict=True)
            return
        for keys, values, _ in self._quantized:
            frames, per_frame = keys.codes.shape[2:4]
            step = max(1, size // per_frame)
            for start in range(0, frames, step):
                part = slice(start, start + step)
                yield tuple(
                    x.map(lambda t, p=part: t[:, :, p]).decode(self.dtype).flatten(2, 3)
                    for x in (keys, values)
                )

    def frame_keys(self, frames: list[int], tokens_per_frame: int) -> torch.Tensor:
        """Keys of chosen frames, (B, H, len(frames), N, d), at full precision."""
        if self.precision == "native":
            keys = self.full()[0].unflatten(2, (-1, tokens_per_frame))
            return keys[:, :, frames]
        chosen: dict[int, torch.Tensor] = {}
        start = 0
        for keys, _, _ in self._quantized:
            count = keys.codes.shape[2]
            for frame in {f for f in frames if start <= f < start + count}:
                at = slice(frame - start, frame - start + 1)
                chosen[frame] = keys.map(lambda t, at=at: t[:, :, at]).decode(self.dtype)
            start += count
        return torch.cat([chosen[frame] for frame in frames], dim=2)

    @property
    def nbytes(self) -> int:
        """Bytes that this store really holds."""
        tensors = [t for pair in self._native for t in pair]
        for keys, values, _ in self._quantized:
            tensors += [*keys.tensors(), *values.tensors()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def map(self, fn) -> None:  # noqa: ANN001 (a plain tensor -> tensor function)
        """Replace every tensor by `fn(tensor)` (a move, or a selection along the batch)."""
        self._native = [(fn(k), fn(v)) for k, v in self._native]
        self._quantized = [(k.map(fn), v.map(fn), n) for k, v, n in self._quantized]
