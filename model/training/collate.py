"""Examples to batches: placeholders repeated once per pooled token, padding on the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from model.configuration_crosslmm import CrossLMMConfig
from model.training.data import IGNORE, Example, Skipped

Batch = dict[str, Any]


class Collator:
    """Puts examples into one batch for every grid that a model is to see them with."""

    def __init__(
        self, config: CrossLMMConfig, pad_token_id: int, teacher_grid: int | None = None
    ) -> None:
        self.config = config
        self.pad_token_id = pad_token_id
        self.teacher_grid = teacher_grid

    def __call__(self, items: Sequence[Example | Skipped]) -> Batch:
        """A batch of what is usable; `skipped` lists the rest.

        Returns:
            `input_ids`, `attention_mask`, `labels` (B, L), `pixel_values_videos` (B, T, 3, S, S),
            `frame_times`, `frame_mask` (B, T); with a teacher grid also `teacher_input_ids`,
            `teacher_attention_mask` and `teacher_labels`. A batch in which nothing is usable has
            one empty row without labels, so that all processes keep in step.

        """
        examples = [item for item in items if isinstance(item, Example)]
        batch: Batch = {
            "skipped": [(i.index, i.reason) for i in items if isinstance(i, Skipped)],
        }
        if not examples:
            examples = [Example(-1, [self.pad_token_id], [IGNORE])]
        batch |= self.text(examples, self.config.pooled_tokens_per_frame)
        if self.teacher_grid is not None:
            full = self.text(examples, self.teacher_grid**2)
            batch |= {f"teacher_{name}": value for name, value in full.items()}
        return batch | self.frames(examples)

    def text(self, examples: Sequence[Example], per_frame: int) -> Batch:
        """`input_ids`, `attention_mask` and `labels` (B, L) with `per_frame` tokens a frame."""
        rows = [self._expand(example, per_frame) for example in examples]
        ids = [torch.tensor(row) for row, _ in rows]
        batch = {
            "input_ids": (ids, self.pad_token_id),
            "attention_mask": ([torch.ones_like(row) for row in ids], 0),
            "labels": ([torch.tensor(row) for _, row in rows], IGNORE),
        }
        # Room for the tokens of one frame even where no row has any.
        missing = max(0, per_frame - max(map(len, ids)))
        return {
            name: F.pad(pad_sequence(values, True, fill), (0, missing), value=fill)
            for name, (values, fill) in batch.items()
        }

    def frames(self, examples: Sequence[Example]) -> Batch:
        """Frames, seconds, and which of them are padding."""
        side = self.config.vision_config.image_size
        none = torch.zeros(0, 3, side, side)
        pixels = [none if e.pixels is None else e.pixels for e in examples]
        counts = torch.tensor([len(p) for p in pixels])
        most = max(1, int(counts.max()))  # one masked frame where there is none at all
        batch = torch.zeros(len(pixels), most, 3, side, side)
        times = torch.zeros(len(pixels), most)
        for i, example in enumerate(examples):
            if example.pixels is not None:
                batch[i, : counts[i]] = example.pixels
                times[i, : counts[i]] = example.times
        return {
            "pixel_values_videos": batch,
            "frame_times": times,
            "frame_mask": torch.arange(most) < counts[:, None],
        }

    def _expand(self, example: Example, per_frame: int) -> tuple[list[int], list[int]]:
        """Repeat each placeholder; the separator's is the last one's."""
        video = self.config.video_token_id
        ids: list[int] = []
        labels: list[int] = []
        left = list(example.groups)
        for token, label in zip(example.ids, example.labels, strict=True):
            count = 1
            if token == video:
                count = left.pop(0) * per_frame
                count += int(self.config.frame_separator and not left)
            ids += [token] * count
            labels += [label] * count
        return ids, labels
