"""CrossLMM against transformers' LLaVA-OneVision: same encoder and LLM shapes, same machine.

    python -m tests.bench.peers                      # about ten minutes on two free cores
    python -m tests.bench.peers --frames 32,64 --growth 64,128 --no-save

Both models are random and scaled down from the 7B one: widths, heads and MLPs are divided by 4,
depth by 7; the 27 x 27 patches of a frame stay, so every token count is that of the real models
(729 original tokens per frame; 9 pooled ones here, 196 there). The encoder's MLP is cut so that
encoder : LLM parameters are as in 7B, 413 M : 6,526 M without the vocabulary.

Each run has a process of its own. Peak extra memory is the highest resident set above that after
loading the weights and a warm-up. CrossLMM gets its frames 4 at a time, from memory that counts;
the peer, as transformers has it, gets all frames in one tensor, which does not count. Prefill
time is from pixels in memory to the first token. Operations are those of one forward pass by
PyTorch's counter, with eager attention on the meta device, where all shapes are real and no number
is computed.

Seconds are kept only from a machine that did nothing else when the bench began.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.utils import logging as transformers_logging

from model.accounting import account
from model.configuration_crosslmm import QWEN2_7B, SO400M, CrossLMMConfig
from model.cost_formulas import count_parameters
from model.dual_cross_attention import VisualContext
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.video_memory import VideoMemory

RESULTS = Path(__file__).parent / "results" / "peers.json"
PAPER = {"memory": 0.792, "operations": 0.748, "seconds": 0.487}
SYSTEMS = ("crosslmm", "llava-onevision")
BEFORE, QUESTION = 14, 32  # text tokens before and after the video
VOCABULARY, VIDEO_TOKEN = 1024, 1000
BUSY_LOAD = 0.5  # runnable processes besides us, from which on seconds are not kept
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
        memory = VideoMemory(crosslmm, prefix_ids=prefix)
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


def in_child(sizes: Sizes, threads: int, system: str, frames: int) -> dict[str, float]:
    """Run one job in a fresh process."""
    job = {**asdict(sizes), "threads": threads, "system": system, "frames": frames}
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.peers", "--job", json.dumps(job)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def child(job: dict) -> None:
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    transformers_logging.set_verbosity_error()
    sizes = Sizes(job["divisor"], job["blocks"], job["chunk"])
    if job["system"] == "crosslmm":
        result = run_crosslmm(sizes.config(), job["frames"], sizes.chunk)
    else:
        in_chunks = job["system"] == "llava-onevision-in-chunks"
        result = run_peer(sizes.config(), job["frames"], sizes.chunk if in_chunks else 0)
    print(json.dumps(result))


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


# The report.


def compare(
    config: CrossLMMConfig,
    frame_counts: list[int],
    systems: tuple[str, ...],
    run: Callable[[str, int], dict[str, float]],
) -> list[dict]:
    rows = []
    for frames in frame_counts:
        for system in systems:
            counted = system.removesuffix("-in-chunks")
            formula = account(config, frames, BEFORE + QUESTION, system=counted, text_before=BEFORE)
            row = {"frames": frames, "system": system, **run(system, frames)}
            row["operations"] = count_operations(config, frames, counted)
            row["operations_causal"] = row["operations"] - formula.operations.masked
            rows.append(row)
            print(
                f"{frames:5}  {system:26} {row['peak_bytes'] / 1e6:9,.0f} MB "
                f"{row['operations'] / 1e12:8.3f} T ({row['operations_causal'] / 1e12:.3f} causal) "
                f"{row['seconds']:8.2f} s",
                flush=True,
            )
    return rows


def reductions(rows: list[dict], peer: str) -> dict[str, object]:
    """1 - ours / peer's, for each number of frames and on average."""
    by_key = {(row["frames"], row["system"]): row for row in rows}
    result: dict[str, object] = {}
    for name, field in (
        ("memory", "peak_bytes"),
        ("operations", "operations"),
        ("operations_causal", "operations_causal"),
        ("seconds", "seconds"),
    ):
        shares = {
            frames: 1 - by_key[frames, "crosslmm"][field] / by_key[frames, peer][field]
            for frames in sorted({row["frames"] for row in rows})
        }
        result[name] = {"by_frames": shares, "average": statistics.mean(shares.values())}
    return result


def full_size_reductions(frame_counts: list[int]) -> dict[str, float]:
    """The same average, counted at the real 7B shapes."""
    config = CrossLMMConfig.from_preset("crosslmm-7b")
    pairs = [
        [account(config, frames, BEFORE + QUESTION, system=s).operations for s in SYSTEMS]
        for frames in frame_counts
    ]
    return {
        "operations": statistics.mean(1 - ours.total / peer.total for ours, peer in pairs),
        "operations_causal": statistics.mean(1 - ours.causal / peer.causal for ours, peer in pairs),
    }


def straight_line(frames: list[int], values: list[float]) -> dict[str, float]:
    """Slope per frame, and the largest distance from the fitted line as a share of the value."""
    slope, start = np.polyfit(frames, values, 1)
    fitted = slope * np.array(frames) + start
    deviation = np.abs(np.array(values) - fitted) / np.array(values)
    return {"per_frame": float(slope), "largest_deviation": float(deviation.max())}


def growth(config: CrossLMMConfig, rows: dict[int, dict]) -> dict[str, object]:
    frames = sorted(rows)
    counted = account(config, 2).kv_bytes.total - account(config, 1).kv_bytes.total
    lines = {
        field: straight_line(frames, [rows[count][field] for count in frames])
        for field in ("kept_bytes", "peak_bytes", "seconds")
    }
    return {
        "frames": frames,
        "rows": [{"frames": count, **rows[count]} for count in frames],
        "lines": lines,
        "counted_bytes_per_frame": counted,
        "kept_to_counted": lines["kept_bytes"]["per_frame"] / counted,
        "peak_to_counted": lines["peak_bytes"]["per_frame"] / counted,
    }


def machine() -> str:
    """Kind of machine, without its name."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kind = names[0] if names else "unknown processor"
    return f"{os.cpu_count()} CPU cores, {kind}, {memory / 2**30:.0f} GiB"


def without_seconds(value: object) -> object:
    """The report with every time taken out, for a machine that was busy."""
    if isinstance(value, dict):
        return {
            key: None if "seconds" in str(key) else without_seconds(item)
            for key, item in value.items()
        }
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def report(options: argparse.Namespace) -> dict[str, object]:
    sizes = Sizes(options.divisor, options.blocks, options.chunk)
    config = sizes.config()
    load = os.getloadavg()[0]
    busy = load > BUSY_LOAD
    parameters = count_parameters(config)
    body = body_parameters(config)
    print(
        f"{machine()}; {options.threads} threads, bfloat16\n"
        f"encoder {parameters.encoder / 1e6:.2f} M : LLM {body / 1e6:.2f} M without vocabulary "
        f"= 1 : {body / parameters.encoder:.1f} (7B: 1 : {1 / FULL_ENCODER_TO_LLM:.1f})"
    )
    if busy:
        print(f"The machine is busy (load {load:.1f}): seconds are shown but not kept.")

    def run(system: str, frames: int) -> dict[str, float]:
        return in_child(sizes, options.threads, system, frames)

    peers = ("llava-onevision",)
    if options.in_chunks:
        peers += ("llava-onevision-in-chunks",)
    rows = compare(config, options.frames, ("crosslmm", *peers), run)
    ours = {row["frames"]: row for row in rows if row["system"] == "crosslmm"}
    grown = {n: ours[n] if n in ours else run("crosslmm", n) for n in options.growth}
    everything = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "threads": options.threads,
        "versions": {"torch": torch.__version__, "transformers": _transformers_version()},
        "load_at_start": round(load, 2),
        "sizes": {**asdict(sizes), "encoder": parameters.encoder, "llm_without_vocabulary": body},
        "rows": rows,
        "reductions": {peer: reductions(rows, peer) for peer in peers},
        "operations_reduction_at_7b_shapes": full_size_reductions(options.frames),
        "paper": PAPER,
        "second_question": {
            frames: {
                "first_seconds": row["seconds"],
                "later_seconds": row["later_question_seconds"],
                "share_of_seconds": row["later_question_seconds"] / row["seconds"],
            }
            for frames, row in ours.items()
        },
        "growth": growth(config, grown),
    }
    show(everything, peers)
    return without_seconds(everything) if busy else everything


def _transformers_version() -> str:
    import transformers

    return transformers.__version__


def show(everything: dict, peers: tuple[str, ...]) -> None:
    for peer in peers:
        print(f"Average reduction against {peer}:")
        for name, value in everything["reductions"][peer].items():
            paper = f" (paper {PAPER[name]:.1%})" if name in PAPER else ""
            print(f"  {name:18} {value['average']:.1%}{paper}")
    full = everything["operations_reduction_at_7b_shapes"]
    print(
        f"Operations at the full 7B shapes: {full['operations']:.1%}, "
        f"causal {full['operations_causal']:.1%}"
    )
    for frames, turn in everything["second_question"].items():
        print(
            f"First token at {frames} frames: {turn['first_seconds']:.2f} s, later question "
            f"{turn['later_seconds']:.3f} s = 1 / {1 / turn['share_of_seconds']:.0f}"
        )
    grown = everything["growth"]
    for name, line in grown["lines"].items():
        print(
            f"Growth over {grown['frames']}: {name} {line['per_frame']:,.4g} per frame, "
            f"off the line by at most {line['largest_deviation']:.1%}"
        )
    print(
        f"Counted {grown['counted_bytes_per_frame']:,} bytes per frame; kept is "
        f"{grown['kept_to_counted']:.3f} of it, peak {grown['peak_to_counted']:.3f}"
    )


def main() -> None:
    def counts(text: str) -> list[int]:
        return sorted({int(part) for part in text.split(",")})

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=counts, default="32,64,128,256")
    parser.add_argument("--growth", type=counts, default="64,128,256,512,1024")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--divisor", type=int, default=4, help="of the widths of 7B: 1, 2 or 4")
    parser.add_argument("--chunk", type=int, default=4, help="frames encoded together")
    parser.add_argument("--blocks", type=int, default=1, help="of 4 LLM layers; 7B has 7")
    parser.add_argument(
        "--in-chunks",
        action="store_true",
        help="also measure a peer that encodes its frames in chunks, which transformers does not",
    )
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        child(json.loads(options.job))
        return
    result = report(options)
    if not options.no_save:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
