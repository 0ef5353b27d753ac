"""Processor files of a converted checkpoint, from its source's tokenizer and image settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from model.checkpoint_files import read_json
from model.configuration_crosslmm import CrossLMMConfig
from model.processing_crosslmm import CrossLMMProcessor
from model.types import InputError

VIDEO_TOKEN = "<|video_pad|>"
# Where transformers' versions keep the image settings of a checkpoint: file, key inside it.
IMAGE_SETTINGS = (
    ("video_preprocessor_config.json", None),
    ("video_processor/preprocessor_config.json", None),
    ("processor_config.json", "video_processor"),
    ("processor_config.json", "image_processor"),
    ("preprocessor_config.json", None),
)
TEMPLATES = ("chat_template.json", "processor_config.json")


def write_processor(
    config: CrossLMMConfig, image_folder: Path, tokenizer_folder: Path, target: Path
) -> None:
    """Write tokenizer, image settings and chat template into `target`.

    Raises:
        InputError: which file is missing or does not fit.

    """
    tokenizer = load_tokenizer(tokenizer_folder)
    if config.video_token_id == len(tokenizer):  # an LLM whose tokenizer has no placeholder yet
        tokenizer.add_tokens([VIDEO_TOKEN], special_tokens=True)
    video_token = tokenizer.convert_ids_to_tokens(config.video_token_id)
    if video_token is None:
        raise InputError(
            f"The tokenizer in {tokenizer_folder} has no token {config.video_token_id}, the "
            "placeholder of videos in config.json; download both from the same place."
        )
    settings = _image_settings(image_folder, config.vision_config.image_size)
    template = _chat_template(tokenizer_folder, video_token)
    if template is not None:
        settings["chat_template"] = template
    processor = CrossLMMProcessor.for_config(config, tokenizer, video_token=video_token, **settings)
    processor.save_pretrained(target)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        InputError: its files are missing or damaged.

    """
    has_vocabulary = (folder / "tokenizer.json").is_file() or (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    )
    if not has_vocabulary or not (folder / "tokenizer_config.json").is_file():
        raise InputError(
            f"{folder} has no tokenizer: expected tokenizer_config.json and tokenizer.json (or "
            "vocab.json and merges.txt); download them."
        )
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises plain Exception on a bad file
        raise InputError(
            f"The tokenizer in {folder} cannot be read ({error}); download tokenizer.json and "
            "tokenizer_config.json again."
        ) from error


def video_token_id(folder: Path, vocab_size: int) -> int:
    """Id of the video placeholder in an LLM's tokenizer, or the first one that is free."""
    tokenizer = load_tokenizer(folder)
    known = tokenizer.get_vocab().get(VIDEO_TOKEN)
    if known is not None:
        return known
    if len(tokenizer) >= vocab_size:
        raise InputError(
            f"The tokenizer in {folder} has no {VIDEO_TOKEN} and its model no free row for one "
            f"(vocabulary of {vocab_size}); take a Qwen2.5 checkpoint."
        )
    return len(tokenizer)


def _image_settings(folder: Path, image_size: int) -> dict[str, Any]:
    """How pixels are resampled and normalised; the size must be the encoder's own."""
    for name, key in IMAGE_SETTINGS:
        if not (folder / name).is_file():
            continue
        content = read_json(folder, name)
        content = content.get(key) if key is not None else content
        if not content or "image_mean" not in content or "image_std" not in content:
            continue
        size = content.get("size") or {}
        side = size.get("height", size.get("shortest_edge", image_size))
        if side != image_size:
            raise InputError(
                f"{folder / name} resizes to {side} pixels, but the encoder in config.json takes "
                f"{image_size}; download both from the same place."
            )
        resample = content.get("resample", Image.Resampling.BICUBIC)
        if resample not in set(Image.Resampling):
            raise InputError(
                f"{folder / name}: resample is {resample!r}; expected one of Pillow's numbers, "
                "as 2 (bilinear) or 3 (bicubic)."
            )
        return {
            "image_mean": content["image_mean"],
            "image_std": content["image_std"],
            "resample": int(resample),
        }
    raise InputError(
        f"{folder} holds no preprocessor_config.json with image_mean and image_std; download it."
    )


def _chat_template(folder: Path, video_token: str) -> str | None:
    """The source's own chat template where it can place a video, else None: ours."""
    if (folder / "chat_template.jinja").is_file():
        found = [(folder / "chat_template.jinja").read_text(encoding="utf-8")]
    else:
        files = [name for name in TEMPLATES if (folder / name).is_file()]
        found = [read_json(folder, name).get("chat_template") for name in files]
    usable = [text for text in found if isinstance(text, str) and video_token in text]
    return usable[0] if usable else None
