"""The two models of `tests.bench.peers` and one run of each: memory, seconds, operations."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from model.accounting import account
from model.configuration_crosslmm import QWEN2_7B, SO400M, CrossLMMConfig
from model.cost_formulas import count_parameters
from model.dual_cross_attention import VisualContext
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.video_memory import VideoMemory

BEFORE, QUESTION = 14, 32  # text tokens before and after the video
VOCABULARY, VIDEO_TOKEN = 1024, 1000
FULL_ENCODER_TO_LLM = 412_987_248 / 6_525_621_760  # parameters of 7B, vocabulary left out


@dataclass(frozen=True)
class Sizes:
    """How far the models are scaled down."""

    divisor: int = 4  # of every width of the 7B model
    blocks: int = 1  # of 4 LLM layers with one dual cross-attention, and 4 encoder layers
    chunk: int = 4  # frames encoded and prefilled together

    def config(self) -> CrossLMMConfig:
        text = {
            **QWEN2_7B,
            "vocab_size": VOCABULARY,
            "num_hidden_layers": 4 * self.blocks,
            "max_position_embeddings": 1 << 18,
            **{
                name: QWEN2_7B[name] // self.divisor
                for name in (
                    "hidden_size",
                    "intermediate_size",
                    "num_attention_heads",
                    "num_key_value_heads",
                )
            },
        }
        width, layers = SO400M["hidden_size"] // self.divisor, 4 * self.blocks
        vision = {
            **SO400M,
            "image_size": 27 * SO400M["patch_size"],
            "hidden_size": width,
            "num_attention_heads": SO400M["num_attention_heads"] // self.divisor,
            "num_hidden_layers": layers,
            "intermediate_size": 8,
        }
        draft = self._assemble(vision, text)
        missing = body_parameters(draft) * FULL_ENCODER_TO_LLM - count_parameters(draft).encoder
        vision["intermediate_size"] += round(missing / (layers * (2 * width + 1)))
        return self._assemble(vision, text)

    @staticmethod
    def _assemble(vision: dict, text: dict) -> CrossLMMConfig:
        return CrossLMMConfig(
            vision_config=vision, text_config=text, pooled_grid=3, video_token_id=VIDEO_TOKEN
        )


def body_parameters(config: CrossLMMConfig) -> int:
    """The LLM without the tables of its vocabulary."""
    text = config.text_config
    tables = 1 if text.tie_word_embeddings else 2
    return count_parameters(config).llm - tables * text.vocab_size * text.hidden_size


def peer_config(config: CrossLMMConfig) -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        vision_config=config.vision_config.to_dict(),
        text_config=config.text_config.to_dict(),
        video_token_index=VIDEO_TOKEN,
        image_token_index=VIDEO_TOKEN + 1,
    )


# Memory and time: one run in a process of its own.


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; this bench needs Linux")


def settle() -> int:
    """Give freed memory back, forget the highest resident set, return the present one."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def pixels(config: CrossLMMConfig, frames: int) -> torch.Tensor:
    side = config.vision_config.image_size
    one = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    return one.to(torch.bfloat16).repeat(frames, 1, 1, 1)


@torch.inference_mode()
def run_crosslmm(config: CrossLMMConfig, frames: int, chunk: int) -> dict[str, float]:
    crosslmm = CrossLMMForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
    some = pixels(config, chunk)
    prefix, question = list(range(1, 1 + BEFORE)), list(range(50, 50 + QUESTION))

    def build(count: int) -> VideoMemory:
        memory = VideoMemory(crosslmm, prefix_ids=prefix, expected_frames=count)
        for start in range(0, count, chunk):
            part = some[: min(chunk, count - start)].clone()
            memory.append(part, torch.arange(start, start + len(part)))
        return memory.finish()

    def ask(memory: VideoMemory) -> None:
        with memory.turn() as cache:
            crosslmm.generate(
                memory.input_ids(question),
                past_key_values=cache,
                max_new_tokens=1,
                do_sample=False,
                pad_token_id=0,
            )

    ask(build(chunk))
    base = settle()
    began = time.perf_counter()
    memory = build(frames)
    built = time.perf_counter()
    ask(memory)
    first = time.perf_counter()
    peak = resident("VmHWM") - base
    kept = settle() - base
    later = []
    for _ in range(5):
        clock = time.perf_counter()
        ask(memory)
        later.append(time.perf_counter() - clock)
    return {
        "peak_bytes": peak,
        "kept_bytes": kept,
        "counted_bytes": memory.nbytes,
        "seconds": first - began,
        "build_seconds": built - began,
        "later_question_seconds": statistics.median(later),
        "later_question_peak_bytes": resident("VmHWM") - base - kept,
    }


@torch.inference_mode()
def run_peer(config: CrossLMMConfig, frames: int, chunk: int) -> dict[str, float]:
    """`chunk` 0: as transformers does it; else what a careful caller could do with the model."""
    peer = LlavaOnevisionForConditionalGeneration._from_config(
        peer_config(config), dtype=torch.bfloat16
    ).eval()
    inner = peer.model

    def ask(video: torch.Tensor) -> None:
        visual = account(config, video.shape[1], system="llava-onevision").tokens.visual
        ids = [1] * BEFORE + [VIDEO_TOKEN] * visual + [2] * QUESTION
        inputs = {"input_ids": torch.tensor([ids]), "pixel_values_videos": video}
        if chunk:
            parts = [
                inner.get_video_features(part).pooler_output[:, :-1]  # no newline yet
                for part in video.split(chunk, dim=1)
            ]
            visual_states = torch.cat((*parts, inner.image_newline[None, None]), dim=1)
            embeds = inner.get_input_embeddings()(inputs["input_ids"])
            embeds[:, BEFORE : BEFORE + visual] = visual_states
            del parts, visual_states
            inputs = {"inputs_embeds": embeds}
        peer.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)

    video = pixels(config, frames)[None]
    ask(video[:, :2])
    base = settle()
    began = time.perf_counter()
    ask(video)
    seconds = time.perf_counter() - began
    return {"peak_bytes": resident("VmHWM") - base, "seconds": seconds}


# Operations: PyTorch's counter, shapes only.


@torch.inference_mode()
def count_operations(config: CrossLMMConfig, frames: int, system: str) -> int:
    with torch.device("meta"):
        if system == "crosslmm":
            whole = CrossLMMForConditionalGeneration._from_config(
                config, attn_implementation="eager"
            )
        else:
            whole = LlavaOnevisionForConditionalGeneration._from_config(
                peer_config(config), attn_implementation="eager"
            )
    inner, side = whole.eval().model, config.vision_config.image_size
    video = torch.empty(1, frames, 3, side, side, device="meta")

    def text(count: int) -> torch.Tensor:
        return torch.empty(1, count, config.hidden_size, device="meta")

    with FlopCounterMode(display=False) as counter:
        visual = None
        if system == "crosslmm":
            features = inner.encode_frames(video[0])[None]
            pooled, memory = inner.embed_frames(features, None)
            pooled = pooled.flatten(1, 2)
            columns = torch.arange(pooled.shape[1], device="meta")[None] + BEFORE
            start = BEFORE + pooled.shape[1]
            visual = VisualContext(memory=memory, visual_index=columns, text_start=start)
        else:
            pooled = inner.get_video_features(video).pooler_output
        embeds = torch.cat((text(BEFORE), pooled, text(QUESTION)), dim=1)
        extra = {} if visual is None else {"visual": visual}
        hidden = inner.language_model(inputs_embeds=embeds, **extra).last_hidden_state
        whole.lm_head(hidden[:, -1:])
    return counter.get_total_flops()
