"""Several questions about one video in one sequence, so that the video is paid for once.

Keys and values of the video do not depend on the text; a block mask lets each question see the
video and itself only, exactly as if it had been asked alone.
"""

from __future__ import annotations

import random
from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from model.processing_crosslmm import CrossLMMProcessor
from model.training.library import Video
from model.training.world_questions import QA

IGNORE = -100


@dataclass
class Packed:
    """A batch of videos of equal length with their questions."""

    input_ids: torch.Tensor  # (B, L)
    attention_mask: torch.Tensor  # (B, 1, L, L) bool
    position_ids: torch.Tensor  # (B, L)
    labels: torch.Tensor  # (B, L), IGNORE outside of answers
    frame_times: torch.Tensor  # (B, T)
    video_start: int  # first column of the video
    text_start: int  # first column after it
    spans: list[
        list[tuple[QA, int, int]]
    ]  # per video: question, columns [start, end) of its answer

    def visual_columns(self) -> slice:
        """The columns of visual tokens."""
        return slice(self.video_start, self.text_start)


class PromptIds:
    """Token ids of the chat template around a question, as the processor writes it."""

    def __init__(self, processor: CrossLMMProcessor) -> None:
        self.tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        self.video_token_id = processor.video_token_id
        self.prefix, suffix = processor.prompt_ids("?")
        self.tail = suffix[len(self.encode("?")) :]
        self.end = [self.tokenizer.eos_token_id]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def pack(
    videos: Sequence[Video],
    asked: Sequence[Sequence[QA]],
    prompt: PromptIds,
    rng: random.Random,
    max_gap: int,
    per_frame: int = 1,
    extra: int = 0,
) -> Packed:
    """Lay out a batch. `max_gap`: a random jump of position between video and text.

    The jump teaches the text to read videos longer than those of training. `per_frame`: tokens of a
    frame; `extra`: columns kept free in front of the end of each answer, for one to be written.
    """
    count = len(videos[0].times) * per_frame
    head = prompt.prefix + [prompt.video_token_id] * count
    rows, groups, positions, labels, spans = [], [], [], [], []
    for questions in asked:
        ids, group, place = list(head), [0] * len(head), list(range(len(head)))
        label, answers = [IGNORE] * len(head), []
        for number, qa in enumerate(questions, start=1):
            question = prompt.encode(qa.question) + prompt.tail
            answer = prompt.encode(qa.answer) + prompt.end * (1 + extra)
            first = len(head) + rng.randint(0, max_gap)
            answers.append((qa, len(ids) + len(question), len(ids) + len(question) + len(answer)))
            ids += question + answer
            label += [IGNORE] * len(question) + answer
            group += [number] * (len(question) + len(answer))
            place += range(first, first + len(question) + len(answer))
        rows.append(ids)
        groups.append(group)
        positions.append(place)
        labels.append(label)
        spans.append(answers)

    length = max(map(len, rows))

    def padded(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([v + [fill] * (length - len(v)) for v in values])

    group = padded(groups, -1)
    same = group[:, :, None] == group[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = (same | (group[:, None, :] == 0)) & causal
    return Packed(
        input_ids=padded(rows, prompt.tokenizer.pad_token_id),
        attention_mask=mask[:, None],
        position_ids=padded(positions, 0),
        labels=padded(labels, IGNORE),
        frame_times=torch.stack([torch.as_tensor(v.times, dtype=torch.float32) for v in videos]),
        video_start=len(prompt.prefix),
        text_start=len(head),
        spans=spans,
    )


def answer_parts(
    ids: torch.Tensor, start: int, end: int, separators: Container[int]
) -> list[range]:
    """Columns of the parts of an answer, with the separator before each; without its end token.

    "0:03 a cat and a dog, 0:08 owls": three parts, at " and" and ",".
    """
    begins = [start, *(c for c in range(start + 1, end - 1) if int(ids[c]) in separators)]
    return list(map(range, begins, [*begins[1:], end - 1]))


def links(ids: torch.Tensor, start: int, end: int, separators: Container[int]) -> list[int]:
    """Columns of an answer at which it is decided whether more comes: separators and its end."""
    parts = answer_parts(ids, start, end, separators)
    return [*(part[0] for part in parts[1:]), end - 1]
