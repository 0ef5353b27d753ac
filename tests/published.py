"""Small checkpoints in published formats: config, shards, tokenizer and processor files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    SiglipConfig,
    SiglipModel,
)

from tests.tiny import TEXT, VISION, randomize

VOCAB_SIZE = 272
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VISION_7 = {**VISION, "image_size": 28}  # 7 x 7: does not halve evenly, like 27 x 27
LLM = {**TEXT, "vocab_size": VOCAB_SIZE, "bos_token_id": 256, "eos_token_id": 258}
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PIXELS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.5, 0.5, 0.25], "do_rescale": True}


def save_tokenizer(folder: Path, extra: list[str]) -> None:
    """A byte-level Qwen2 tokenizer: 256 bytes, three control tokens, then `extra`."""
    vocab = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_tokens([*SPECIAL, *extra], special_tokens=True)
    tokenizer.save_pretrained(folder)


def save_json(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content))


def save_weights(model: PreTrainedModel, folder: Path, shard_size: str = "60KB") -> None:
    model.save_pretrained(folder, max_shard_size=shard_size)


def rename_weights(folder: Path, rename: Callable[[str], str]) -> None:
    """Give the weights of a sharded checkpoint other names."""
    for file in folder.glob("*.safetensors"):
        tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {rename(k): v for k, v in content["weight_map"].items()}
    index.write_text(json.dumps(content))


def save_llava_onevision(
    folder: Path,
    text: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> LlavaOnevisionForConditionalGeneration:
    """Like `llava-hf/llava-onevision-qwen2-*-ov-hf`, tiny, with random weights."""
    config = LlavaOnevisionConfig(
        vision_config=dict(VISION_7),
        text_config={**LLM, **(text or {})},
        image_token_index=259,
        video_token_index=260,
        **settings,
    )
    llava = randomize(LlavaOnevisionForConditionalGeneration(config), gate=None).eval().to(dtype)
    save_weights(llava, folder)
    save_tokenizer(folder, ["<image>", "<video>"])
    save_json(folder, "chat_template.json", {"chat_template": LLAVA_TEMPLATE})
    size = {"height": 28, "width": 28}
    save_json(folder, "preprocessor_config.json", {**PIXELS, "size": size})
    save_json(folder, "processor_config.json", {"video_token": "<video>", "image_token": "<image>"})
    return llava


def save_siglip(folder: Path) -> SiglipModel:
    """Like `google/siglip2-so400m-patch14-384`: both towers, with the pooling head."""
    config = SiglipConfig(
        vision_config={**VISION_7, "vision_use_head": True},
        text_config={
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    )
    siglip = randomize(SiglipModel(config), seed=2).eval()
    save_weights(siglip, folder)
    size = {"height": 28, "width": 28}
    save_json(folder, "preprocessor_config.json", {**PIXELS, "size": size})
    return siglip


def save_qwen2(
    folder: Path, tied: bool = True, placeholder: bool = True, **text: Any
) -> Qwen2ForCausalLM:
    """Like `Qwen/Qwen2.5-1.5B-Instruct`; `text` changes its config."""
    qwen = Qwen2ForCausalLM(Qwen2Config(**{**LLM, "tie_word_embeddings": tied, **text}))
    randomize(qwen, seed=3).eval()
    save_weights(qwen, folder)
    save_tokenizer(folder, ["<|image_pad|>", "<|video_pad|>"] if placeholder else [])
    return qwen
