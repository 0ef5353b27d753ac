"""What `tests.bench.gpu` measures: one function per part, each in a process of its own.

A part yields rows as they come, so that a part that runs out of memory or time keeps what it had.
"""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import nn
from transformers import LlavaOnevisionForConditionalGeneration

from model.accounting import account
from model.attention_maps import MapCapture, text_to_visual
from model.configuration_crosslmm import CrossLMMConfig
from model.decoding import decode
from model.loading import READS_DETAIL, UNQUANTIZED
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.video_memory import VideoMemory
from tests.bench.peer_models import BEFORE, peer_config, pixels, resident, settle

Row = dict[str, object]
VIDEO_TOKEN = 151656
REPEATS = 5


@dataclass(frozen=True)
class Scale:
    """Shapes and lengths: the true ones, or small ones for a dry run."""

    config: CrossLMMConfig
    device: str
    side_by_side: tuple[int, ...] = (32, 64, 128, 256)  # frames
    long: int = 1024
    middle: int = 256  # frames for second question, decoding and maps
    hour: int = 3600
    chunk: int = 16  # frames encoded together
    text: int = 32  # question tokens whose maps are drawn
    generated: int = 64

    @property
    def kernel(self) -> str:
        """The attention kernel that the app would choose."""
        flash = self.device.startswith("cuda") and find_spec("flash_attn")
        return "flash_attention_2" if flash else "sdpa"


def full_scale(device: str = "cuda") -> Scale:
    """7B shapes."""
    config = CrossLMMConfig.from_preset("crosslmm-7b", video_token_id=VIDEO_TOKEN, gate_init=0.5)
    return Scale(config, device)


def small_scale(device: str = "cpu") -> Scale:
    """Every part in seconds on a CPU; widths of 64 are what 4-bit blocks need there."""
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": 36,
        "vision_use_head": False,
    }
    text = {
        "model_type": "qwen2",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }
    config = CrossLMMConfig(
        vision_config=vision, text_config=text, pooled_grid=3, video_token_id=250, gate_init=0.5
    )
    return Scale(config, device, (2, 4), long=12, middle=6, hour=20, chunk=4, text=8, generated=6)


# Models.


def build(
    scale: Scale, kind: type, config: object, quantization: str = "none"
) -> CrossLMMForConditionalGeneration | LlavaOnevisionForConditionalGeneration:
    """Random bf16 weights, made on the device; the LLM's layers quantised one after another."""
    with torch.device(scale.device):
        whole = kind._from_config(
            config, dtype=torch.bfloat16, attn_implementation=scale.kernel
        ).eval()
    if quantization == "4bit":
        _quantize(whole, scale.device)
    return whole


def _quantize(whole: nn.Module, device: str) -> None:
    """NF4 with double quantisation, where the app has it: in the LLM's own layers."""
    import bitsandbytes

    for name, module in list(whole.named_modules()):
        kept = name.startswith(tuple(UNQUANTIZED)) or re.match(READS_DETAIL, name)
        if not isinstance(module, nn.Linear) or kept:
            continue
        small = bitsandbytes.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            device="meta",
        )
        small.weight = bitsandbytes.nn.Params4bit(
            module.weight.data, requires_grad=False, quant_type="nf4"
        ).to(device)
        small.bias = module.bias
        whole.set_submodule(name, small.eval())


# Measuring.


class Meter:
    """Clock and memory of the device."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def base(self) -> int:
        """Forget the peak; give the bytes in use now."""
        gc.collect()
        if not self.cuda:
            return settle()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        """Most bytes in use since `base`."""
        return torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")

    def reserved(self) -> int:
        """Most bytes that PyTorch held of the device since `base`, free blocks included."""
        return torch.cuda.max_memory_reserved() if self.cuda else resident("VmHWM")

    def seconds(self, work: Callable[[], object]) -> float:
        """How long `work` takes, until the device is done with it."""
        if self.cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began


class Ours:
    """CrossLMM and what is done with it."""

    def __init__(self, scale: Scale, quantization: str = "none") -> None:
        self.scale, self.meter = scale, Meter(scale.device)
        self.crosslmm = build(scale, CrossLMMForConditionalGeneration, scale.config, quantization)
        self.some = pixels(scale.config, scale.chunk)  # in main memory, as decoding leaves them
        if self.meter.cuda:
            self.some = self.some.pin_memory()
        self.question = list(range(50, 50 + scale.text))

    def memory(self, frames: int, precision: str = "native") -> VideoMemory:
        """A video of `frames` frames, a chunk at a time."""
        memory = VideoMemory(
            self.crosslmm,
            precision=precision,
            prefix_ids=list(range(1, 1 + BEFORE)),
            expected_frames=frames,
        )
        for start in range(0, frames, self.scale.chunk):
            count = min(self.scale.chunk, frames - start)
            memory.append(
                self.some[:count].to(self.scale.device, non_blocking=True),
                torch.arange(start, start + count),
            )
        return memory.finish()

    def ask(self, memory: VideoMemory, tokens: int = 1, capture: MapCapture | None = None) -> None:
        """Prefill the question and generate exactly `tokens` tokens, as the app does."""
        with memory.turn(capture) as cache:
            ids = torch.tensor([self.question], device=self.scale.device)
            for _ in decode(self.crosslmm, ids, cache, tokens, ends=()):
                pass

    def ask_by_generate(self, memory: VideoMemory, tokens: int = 1) -> None:
        """The same by the loop of transformers, with its cache that copies itself each token."""
        with memory.turn() as cache:
            for layer in cache.layers:
                layer.room = 0
            self.crosslmm.generate(
                memory.input_ids(self.question),
                past_key_values=cache,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )


# Parts.


@torch.inference_mode()
def prefill_ours(scale: Scale) -> Iterator[Row]:
    """Frames in main memory to first token, bf16."""
    ours = Ours(scale)
    ours.ask(ours.memory(scale.chunk))  # warm-up
    for frames in (*scale.side_by_side, scale.long):
        yield from _one_prefill(ours, frames)


def _one_prefill(ours: Ours, frames: int) -> Iterator[Row]:
    meter = ours.meter
    base = meter.base()
    memory: list[VideoMemory] = []
    build_seconds = meter.seconds(lambda: memory.append(ours.memory(frames)))
    ask_seconds = meter.seconds(lambda: ours.ask(memory[0]))
    yield {
        "frames": frames,
        "seconds": build_seconds + ask_seconds,
        "build_seconds": build_seconds,
        "extra_bytes": meter.peak() - base,
        "kept_bytes": memory[0].nbytes,
    }


@torch.inference_mode()
def prefill_peer(scale: Scale) -> Iterator[Row]:
    """The same for transformers' LLaVA-OneVision: all frames in one tensor, as it takes them."""
    peer = build(scale, LlavaOnevisionForConditionalGeneration, peer_config_of(scale))
    meter = Meter(scale.device)

    def ask(video: torch.Tensor) -> None:
        visual = account(scale.config, video.shape[1], system="llava-onevision").tokens.visual
        ids = [1] * BEFORE + [scale.config.video_token_id] * visual + [2] * scale.text
        peer.generate(
            input_ids=torch.tensor([ids], device=scale.device),
            pixel_values_videos=video.to(scale.device),
            min_new_tokens=1,
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=0,
        )

    ask(pixels(scale.config, 2)[None])  # warm-up
    for frames in scale.side_by_side:
        video = pixels(scale.config, frames)[None]
        base = meter.base()
        seconds = meter.seconds(lambda video=video: ask(video))
        yield {"frames": frames, "seconds": seconds, "extra_bytes": meter.peak() - base}


def peer_config_of(scale: Scale) -> object:
    """LLaVA-OneVision with the same encoder and LLM."""
    config = peer_config(scale.config)
    config.video_token_id = scale.config.video_token_id
    config.image_token_id = scale.config.video_token_id + 1
    return config


@torch.inference_mode()
def second_question(scale: Scale) -> Iterator[Row]:
    """Another question on a video that is in memory."""
    ours = Ours(scale)
    memory = ours.memory(scale.middle)
    ours.ask(memory)
    found = [ours.meter.seconds(lambda: ours.ask(memory)) for _ in range(REPEATS)]
    yield {"frames": scale.middle, "text_tokens": scale.text, "seconds": statistics.median(found)}


@torch.inference_mode()
def decoding(scale: Scale) -> Iterator[Row]:
    """Tokens per second, 4-bit weights; beside it those of transformers' own loop."""
    ours = Ours(scale, "4bit")
    for frames in (scale.middle, scale.long):
        memory = ours.memory(frames)
        rates, extra = {}, 0
        for ask in (ours.ask_by_generate, ours.ask):
            ask(memory, 4)
            short = min(ours.meter.seconds(lambda a=ask, m=memory: a(m)) for _ in range(2))
            base = ours.meter.base()
            whole = ours.meter.seconds(lambda a=ask, m=memory: a(m, 1 + scale.generated))
            rates[ask.__name__] = scale.generated / max(whole - short, 1e-9)
            extra = ours.meter.peak() - base
        yield {
            "frames": frames,
            "tokens_per_second": rates["ask"],
            "by_generate": rates["ask_by_generate"],
            "extra_bytes": extra,
        }
        del memory


@torch.inference_mode()
def maps(scale: Scale) -> Iterator[Row]:
    """A turn without and with text-to-visual maps of its text tokens."""
    ours = Ours(scale)
    memory = ours.memory(scale.middle)

    def turn(capturing: bool) -> None:
        capture = MapCapture() if capturing else None
        ours.ask(memory, capture=capture)
        if capture is not None:
            text_to_visual(ours.crosslmm, memory, capture, last=scale.text)

    for capturing in (False, True):
        turn(capturing)
        base = ours.meter.base()
        found = [ours.meter.seconds(lambda c=capturing: turn(c)) for _ in range(REPEATS)]
        yield {
            "frames": scale.middle,
            "maps": capturing,
            "text_tokens": scale.text,
            "seconds": statistics.median(found),
            "extra_bytes": ours.meter.peak() - base,
        }


@torch.inference_mode()
def hour(scale: Scale) -> Iterator[Row]:
    """One hour at a frame per second: 4-bit weights, keys and values; all memory counted."""
    ours = Ours(scale, "4bit")
    ours.ask(ours.memory(scale.chunk, "int4"))
    ours.meter.base()
    memory: list[VideoMemory] = []
    build_seconds = ours.meter.seconds(lambda: memory.append(ours.memory(scale.hour, "int4")))
    ask_seconds = ours.meter.seconds(lambda: ours.ask(memory[0]))
    later = ours.meter.seconds(lambda: ours.ask(memory[0]))
    decode = ours.meter.seconds(lambda: ours.ask(memory[0], 1 + scale.generated)) - later
    yield {
        "frames": scale.hour,
        "seconds": build_seconds + ask_seconds,
        "build_seconds": build_seconds,
        "second_question_seconds": later,
        "tokens_per_second": scale.generated / max(decode, 1e-9),
        "kept_bytes": memory[0].nbytes,
        "total_bytes": ours.meter.peak(),
        "reserved_bytes": ours.meter.reserved(),
    }


PARTS: dict[str, Callable[[Scale], Iterator[Row]]] = {
    "prefill-crosslmm": prefill_ours,
    "prefill-llava-onevision": prefill_peer,
    "second-question": second_question,
    "decoding": decoding,
    "maps": maps,
    "hour": hour,
}
