"""CrossLMMProcessor: frames and messages to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from model.configuration_crosslmm import CrossLMMConfig
from model.types import InputError
from model.video import decode_frames, probe, sample_times

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|video_pad|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Video = tuple[np.ndarray, Sequence[float]]  # frames (T, H, W, 3) uint8 and their seconds


class CrossLMMProcessor(ProcessorMixin):
    """Tokenizer, frame preparation and prompt layout that belong to one checkpoint.

    Frames are squashed to a square and normalised, exactly as transformers' SigLIP processor does
    with Pillow (no torchvision needed). `resample` is Pillow's number: 3 bicubic (SigLIP,
    LLaVA-OneVision), 2 bilinear (SigLIP2).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        image_size: int = 384,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        resample: int = Image.Resampling.BICUBIC,
        pooled_tokens_per_frame: int = 9,
        frame_separator: bool = False,
        frame_rate: float = 1.0,
        max_frames: int = 256,
        video_token: str = "<|video_pad|>",
        chat_template: str | None = CHAT_TEMPLATE,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.resample = int(resample)
        self.pooled_tokens_per_frame = pooled_tokens_per_frame
        self.frame_separator = frame_separator
        self.frame_rate = frame_rate
        self.max_frames = max_frames
        self.video_token = video_token

    @classmethod
    def for_config(
        cls, config: CrossLMMConfig, tokenizer: PreTrainedTokenizerBase, **kwargs: Any
    ) -> CrossLMMProcessor:
        """A processor that fits a model's configuration."""
        return cls(
            tokenizer,
            image_size=config.vision_config.image_size,
            pooled_tokens_per_frame=config.pooled_tokens_per_frame,
            frame_separator=config.frame_separator,
            frame_rate=config.frame_rate,
            max_frames=config.max_frames,
            **kwargs,
        )

    @property
    def video_token_id(self) -> int:
        """Id of the placeholder that pooled visual tokens replace."""
        return self.tokenizer.convert_tokens_to_ids(self.video_token)

    def preprocess_frames(self, frames: Sequence[np.ndarray]) -> torch.Tensor:
        """Frames (H, W, 3) uint8 of any sizes -> (n, 3, S, S) float32."""
        size, resample = (self.image_size, self.image_size), Image.Resampling(self.resample)
        resized = np.stack(
            [np.asarray(Image.fromarray(frame).resize(size, resample)) for frame in frames]
        )
        pixels = torch.from_numpy(resized).permute(0, 3, 1, 2).float() / 255
        mean, std = (
            torch.tensor(values).view(1, 3, 1, 1) for values in (self.image_mean, self.image_std)
        )
        return (pixels - mean) / std

    def read_video(
        self, path: str, max_frames: int | None = None, frame_rate: float | None = None
    ) -> Video:
        """Decode a file's sampled frames: (T, H, W, 3) uint8 and their true times in seconds."""
        info = probe(path)
        times = sample_times(
            info.duration,
            max_frames=max_frames or self.max_frames,
            frame_rate=frame_rate or self.frame_rate,
        )
        frames = list(decode_frames(path, times, info=info))
        return np.stack([f.image for f in frames]), [f.time for f in frames]

    def expand(self, prompt: str, num_frames: int) -> str:
        """Repeat the one video placeholder of a prompt once per pooled token."""
        if prompt.count(self.video_token) != 1:
            raise ValueError(
                f"a prompt must hold the video placeholder {self.video_token} once, "
                f"found {prompt.count(self.video_token)}"
            )
        count = num_frames * self.pooled_tokens_per_frame + int(self.frame_separator)
        return prompt.replace(self.video_token, self.video_token * count)

    def __call__(
        self,
        text: str | list[str],
        videos: list[Video] | None = None,
        padding: bool | str = True,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Tokenise prompts and prepare one video for each.

        Returns:
            `input_ids`, `attention_mask` (B, L), padded on the left; with videos also
            `pixel_values_videos` (B, T, 3, S, S), `frame_times` (B, T) seconds and, where the
            videos have different numbers of frames, `frame_mask` (B, T) bool.

        """
        prompts = [text] if isinstance(text, str) else list(text)
        data: dict[str, torch.Tensor] = {}
        if videos is not None:
            if len(videos) != len(prompts):
                raise ValueError(f"got {len(prompts)} prompts but {len(videos)} videos")
            counts = [len(frames) for frames, _ in videos]
            prompts = [self.expand(p, n) for p, n in zip(prompts, counts, strict=True)]
            pixels = [self.preprocess_frames(frames) for frames, _ in videos]
            times = [torch.as_tensor(t, dtype=torch.float32) for _, t in videos]
            data["pixel_values_videos"] = torch.nn.utils.rnn.pad_sequence(pixels, True)
            data["frame_times"] = torch.nn.utils.rnn.pad_sequence(times, True)
            if len(set(counts)) > 1:
                steps = torch.arange(max(counts))
                data["frame_mask"] = steps < torch.tensor(counts)[:, None]
        encoded = self.tokenizer(
            prompts, padding=padding, padding_side="left", return_tensors=return_tensors, **kwargs
        )
        return BatchFeature({**encoded, **data})

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = True,
        max_frames: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render messages; with `tokenize=True` also read their videos and return tensors.

        Video content is `{"type": "video", "video": X}` with X a path or (frames, seconds).
        """
        batch = conversation if isinstance(conversation[0], list) else [conversation]
        add_prompt = kwargs.pop("add_generation_prompt", False)
        prompts = [
            self.tokenizer.apply_chat_template(
                messages,
                chat_template=chat_template or self.chat_template,
                tokenize=False,
                add_generation_prompt=add_prompt,
            )
            for messages in batch
        ]
        if not tokenize:
            return prompts if isinstance(conversation[0], list) else prompts[0]
        videos = []
        for messages in batch:
            for message in messages:
                for part in message["content"] if isinstance(message["content"], list) else []:
                    if part["type"] == "video":
                        video = part.get("video", part.get("path"))
                        is_path = not isinstance(video, tuple)
                        videos.append(self.read_video(video, max_frames) if is_path else video)
        inputs = self(prompts, videos or None, **kwargs)
        return inputs if return_dict else inputs["input_ids"]

    def prompt_ids(
        self, question: str, history: Sequence[tuple[str, str]] = ()
    ) -> tuple[list[int], list[int]]:
        """Token ids before and after the video of a chat turn; the user's text stays text.

        Raises:
            InputError: the question is empty.

        """
        if not question.strip():
            raise InputError("Please type a question about the video.")
        turns = [*history, (question, None)]
        messages: list[dict[str, Any]] = []
        for i, (asked, answered) in enumerate(turns):
            content: list[dict[str, str]] = [{"type": "text", "text": self.plain_text(asked)}]
            if i == 0:
                content.insert(0, {"type": "video"})
            messages.append({"role": "user", "content": content})
            if answered is not None:
                # A list, because templates of other checkpoints pass over bare strings.
                content = [{"type": "text", "text": self.plain_text(answered)}]
                messages.append({"role": "assistant", "content": content})
        text = self.apply_chat_template(messages, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        at = ids.index(self.video_token_id)
        return ids[:at], ids[at + 1 :]

    def plain_text(self, text: str) -> str:
        """A control token in someone's text must not act as one: break it after its bracket."""
        for token in self.tokenizer.get_added_vocab():
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


AutoProcessor.register(CrossLMMConfig, CrossLMMProcessor)
