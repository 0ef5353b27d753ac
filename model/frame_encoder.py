"""Encode the frames of one video, each different picture once.

Slides, a static camera or a still title give the same picture again and again, and the encoder is
three quarters of all work at 7B. A frame that repeats the last encoded one gets its features; time
and position are added later, so nothing else changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from model.modeling_crosslmm import CrossLMMModel


class FrameEncoder:
    """Call it with chunk after chunk of one video; `repeated` counts frames that were not encoded.

    `threshold` is the mean absolute difference, in normalised pixel values (SigLIP: -1 .. 1), up to
    which two frames count as the same; 0 wants them identical, and gives identical features.
    """

    def __init__(self, model: CrossLMMModel, threshold: float = 0.0) -> None:
        if not threshold >= 0:
            raise ValueError(f"threshold must be 0 or more, got {threshold}")
        self.model = model
        self.threshold = threshold
        self.repeated = 0
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None  # picture, features

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised frames (n, 3, S, S) -> encoder features (n, N, Dv)."""
        # Compared with the last picture that was encoded, not with the neighbour, or a slow change
        # would never be seen.
        reference = None if self._last is None else self._last[0]
        sources, fresh = [], []
        for index, picture in enumerate(pixels):
            if reference is None or not self._same(picture, reference):
                fresh.append(index)
                reference = picture
            sources.append(len(fresh) - 1)  # -1: the last picture of the chunk before
        self.repeated += len(pixels) - len(fresh)
        if not fresh:
            return self._last[1].expand(len(pixels), -1, -1)
        weight = self.model.vision_tower.embeddings.patch_embedding.weight
        chosen = pixels if len(fresh) == len(pixels) else pixels[fresh]
        encoded = self.model.encode_frames(chosen.to(weight.device, weight.dtype))
        earlier = None if self._last is None else self._last[1]
        self._last = reference.clone(), encoded[-1:].clone()
        if len(fresh) == len(pixels):
            return encoded
        if earlier is not None:
            encoded = torch.cat((earlier, encoded))
            sources = [source + 1 for source in sources]
        return encoded[sources]

    def _same(self, picture: torch.Tensor, reference: torch.Tensor) -> bool:
        if self.threshold == 0:
            return torch.equal(picture, reference)
        return (picture - reference).abs().mean().item() <= self.threshold


@torch.inference_mode()
def compiled(model: CrossLMMModel, frames: int) -> CrossLMMModel:
    """Compile the encoder's layers, for batches of `frames` and for those of any other size."""
    model.vision_tower.encoder.compile()
    weight = model.vision_tower.embeddings.patch_embedding.weight
    side = model.config.vision_config.image_size
    # The second size makes the compiler take the number of frames as a variable from then on.
    for batch in (frames, frames - 1):
        model.encode_frames(weight.new_zeros(batch, 3, side, side))
    return model
