"""Training data in LLaVA's format, as in LLaVA-Video-178K: conversations and media paths.

A record of the JSON list (or a line of JSON lines) has `conversations`, a list of
`{"from": "human" | "gpt" | "system", "value": text}`, and at most one of `video` (a path) and
`image` (a path or a list of paths). `<image>` or `<video>` in a question says where its frames go.
An image is a video of one frame at second 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from model.processing_crosslmm import CrossLMMProcessor
from model.types import InputError, ReadBounds
from model.video import sample_times
from model.video_sandbox import decode_frames, probe

IGNORE = -100  # label of tokens that take no loss
PLACEHOLDER = re.compile(r"\s*<(?:image|video)>\s*")
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip
Message = dict[str, Any]
# A file that hangs or crashes a decoder costs its sample, not the run (nor its partners' patience).
BOUNDS = ReadBounds(frame_seconds=30.0, read_seconds=240.0)


@dataclass
class Example:
    """One record, ready to be put into a batch."""

    index: int
    ids: list[int]  # token ids; one video placeholder for each entry of `groups`
    labels: list[int]  # IGNORE outside of answers
    groups: list[int] = field(default_factory=list)  # frames at each placeholder
    pixels: torch.Tensor | None = None  # (T, 3, S, S)
    times: torch.Tensor | None = None  # (T,) seconds


@dataclass(frozen=True)
class Skipped:
    """A record that cannot be used, and why."""

    index: int
    reason: str


def read_records(files: Sequence[str | Path]) -> list[dict[str, Any]]:
    """All records of JSON and JSON-lines files.

    Raises:
        InputError: a file is missing or not in the format, and where.

    """
    records: list[dict[str, Any]] = []
    for file in map(Path, files):
        if not file.is_file():
            raise InputError(f"There is no data file {file}; give JSON or JSONL files.")
        text = file.read_text(encoding="utf-8")
        try:
            if file.suffix == ".jsonl":
                found = [json.loads(line) for line in text.splitlines() if line.strip()]
            else:
                found = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{file} is not valid {file.suffix[1:]} ({error}).") from error
        good = isinstance(found, list) and all(
            isinstance(r, dict) and isinstance(r.get("conversations"), list) for r in found
        )
        if not good:
            raise InputError(
                f"{file} should hold a list of records with `conversations`, as LLaVA's data does."
            )
        records += found
    if not records:
        raise InputError("The data files hold no record.")
    return records


def messages_of(record: dict[str, Any], media: int, plain: Any = str) -> list[Message]:
    """A record's conversation as chat messages, its media as `{"type": "video"}` parts.

    `media`: how many images or videos the record has; where the text places them at one spot or
    not at all, all go to one place. `plain` makes text safe to tokenise.

    Raises:
        ValueError: roles or placeholders make no sense.

    """
    turns = []
    for turn in record["conversations"]:
        role = ROLES.get(turn.get("from", turn.get("role")))
        text = turn.get("value", turn.get("content"))
        if role is None or not isinstance(text, str):
            raise ValueError("a turn is not of the form {from: human or gpt, value: text}")
        turns.append((role, text))
    spoken = [role for role, _ in turns if role != "system"]
    if spoken[::2] != ["user"] * len(spoken[::2]) or "user" in spoken[1::2] or not spoken:
        raise ValueError("human and gpt do not take turns, human first")
    messages: list[Message] = []
    placed = 0
    for role, text in turns:
        parts: list[dict[str, str]] = []
        pieces = PLACEHOLDER.split(text) if role == "user" and media else [text]
        for i, piece in enumerate(pieces):
            if i:
                parts.append({"type": "video"})
                placed += 1
            if piece:
                parts.append({"type": "text", "text": plain(piece)})
        messages.append({"role": role, "content": parts})
    if media and not placed:
        first = next(m for m in messages if m["role"] == "user")
        first["content"].insert(0, {"type": "video"})
    elif placed not in (0, 1, media):
        raise ValueError(f"{placed} placeholders for {media} media")
    return messages


def encode_messages(
    processor: CrossLMMProcessor, messages: list[Message]
) -> tuple[list[int], list[int]]:
    """Token ids and labels; answers are tokenised apart, exactly as they will be generated.

    A conversation that ends with a question ends with the assistant's header and has no label for
    it.
    """

    def render(count: int, prompt: bool) -> str:
        return processor.apply_chat_template(messages[:count], add_generation_prompt=prompt)

    def add(text: str, answer: bool) -> None:
        found = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.extend(found)
        labels.extend(found if answer else [IGNORE] * len(found))

    ids: list[int] = []
    labels: list[int] = []
    done, end_token = "", processor.tokenizer.eos_token
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, whole = render(i, True), render(i + 1, False)
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            raise ValueError("the chat template rewrites earlier turns; it cannot be trained on")
        end = whole.rfind(end_token)
        cut = end + len(end_token) if end >= len(prompt) else len(whole)
        add(prompt[len(done) :], False)
        add(whole[len(prompt) : cut], True)
        done = whole[:cut]
    if messages[-1]["role"] == "user":
        add(render(len(messages), True)[len(done) :], False)
    return ids, labels


class LlavaDataset(Dataset):
    """Records with their frames; what cannot be used comes out as `Skipped`."""

    def __init__(
        self,
        records: list[dict[str, Any]],
        processor: CrossLMMProcessor,
        media_root: str | Path = ".",
        *,
        max_frames: int,
        frame_rate: float | None = None,
        max_text_tokens: int = 2048,
    ) -> None:
        self.records = records
        self.processor = processor
        self.media_root = Path(media_root)
        self.max_frames = max_frames
        self.frame_rate = frame_rate or processor.frame_rate
        self.max_text_tokens = max_text_tokens

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example | Skipped:
        """Decode and tokenise one record."""
        record = self.records[index]
        try:
            return self._example(index, record)
        except (InputError, ValueError, OSError) as error:
            return Skipped(index, f"{self._name(record)}: {error}")

    def unanswered(self) -> list[int]:
        """Records whose conversation ends with a question."""
        return [
            i
            for i, record in enumerate(self.records)
            if record["conversations"]
            and ROLES.get(record["conversations"][-1].get("from")) == "user"
        ]

    def _example(self, index: int, record: dict[str, Any]) -> Example:
        videos, images = (_paths(record.get(key)) for key in ("video", "image"))
        if len(videos) > 1 or (videos and images):
            raise ValueError("a record may have one video or some images, not both")
        media = len(videos) or len(images)
        messages = messages_of(record, media, self.processor.plain_text)
        ids, labels = encode_messages(self.processor, messages)
        if len(ids) > self.max_text_tokens:
            ids, labels = ids[: self.max_text_tokens], labels[: self.max_text_tokens]
        example = Example(index, ids, labels)
        spots = ids.count(self.processor.video_token_id)
        if media and not spots:
            raise ValueError("its text is too long; the placeholder was cut off")
        if videos:
            example.pixels, example.times = self._frames(self.media_root / videos[0])
        elif images:
            example.pixels = torch.cat([self._image(self.media_root / path) for path in images])
            example.times = torch.zeros(len(images))
        if media:
            count = len(example.times)
            example.groups = [1] * spots if spots == count and images else [count]
        return example

    def _frames(self, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
        """A video's sampled frames (T, 3, S, S), prepared one by one, and their seconds."""
        info = probe(path, bounds=BOUNDS)
        times = sample_times(info.duration, max_frames=self.max_frames, frame_rate=self.frame_rate)
        pixels, seconds = [], []
        with decode_frames(path, times, info=info, bounds=BOUNDS) as frames:
            for frame in frames:
                pixels.append(self.processor.preprocess_frames([frame.image]))
                seconds.append(frame.time)
        return torch.cat(pixels), torch.tensor(seconds)

    def _image(self, path: Path) -> torch.Tensor:
        try:
            with Image.open(path) as image:
                return self.processor.preprocess_frames([np.asarray(image.convert("RGB"))])
        except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
            raise ValueError(f"cannot be read as an image ({error})") from error

    @staticmethod
    def _name(record: dict[str, Any]) -> str:
        return str(record.get("video") or record.get("image") or record.get("id") or "text")


def _paths(value: Any) -> list[str]:
    if not value:
        return []
    return [str(path) for path in value] if isinstance(value, list) else [str(value)]
