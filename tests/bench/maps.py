"""What capturing attention maps costs: 32 text tokens over 256 frames.

    python -m tests.bench.maps

Time: text-to-visual maps of every dual cross-attention layer, their strongest frames' patches and
the LLM's own self-attention, against the prefill of the same video, with the scaled-down model of
`tests.bench.peers`. Memory: one layer at the true attention shapes of 7B (28 query heads, 4
key/value heads of 128, 729 tokens per frame; layers are worked on one after another, so one layer
is what all of them take), as the highest resident set above that before. Operations of both are
counted at the true 7B shapes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from model.accounting import account
from model.attention_maps import (
    MapCapture,
    frame_mass,
    patch_weights,
    self_attention_mass,
    text_to_visual,
)
from model.configuration_crosslmm import CrossLMMConfig
from model.key_value_store import KeyValueStore
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.video_memory import VideoMemory
from tests.bench.peer_models import BEFORE, QUESTION, Sizes, pixels, resident, settle
from tests.bench.peers import BUSY_LOAD, machine, without_seconds

RESULTS = Path(__file__).parent / "results" / "maps.json"
TOKENS, STRONGEST = 32, 6
AIMS = {"seconds_to_prefill": 0.10, "extra_bytes": 64 * 10**6}


@torch.inference_mode()
def run_scaled(frames: int) -> dict[str, float]:
    """Seconds of prefill, of a turn with and without capture, and of the maps."""
    sizes = Sizes()
    config = sizes.config()
    crosslmm = CrossLMMForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
    some, prefix = pixels(config, sizes.chunk), list(range(1, 1 + BEFORE))
    began = time.perf_counter()
    memory = VideoMemory(crosslmm, prefix_ids=prefix, expected_frames=frames)
    for start in range(0, frames, sizes.chunk):
        part = some[: min(sizes.chunk, frames - start)].clone()
        memory.append(part, torch.arange(start, start + len(part)))
    memory.finish()
    prefill = time.perf_counter() - began
    text = list(range(50, 50 + QUESTION))

    def turn(capture: MapCapture | None) -> tuple[float, float]:
        clock = time.perf_counter()
        with memory.turn(capture) as cache:
            if capture is None:
                _feed(crosslmm, cache, text)
                return time.perf_counter() - clock, 0.0
            with capture.self_attention(crosslmm):
                _feed(crosslmm, cache, text)
            answered = time.perf_counter()
            text_to_visual(crosslmm, memory, capture, last=TOKENS, strongest=STRONGEST)
            self_attention_mass(memory, capture, last=TOKENS)
            return answered - clock, time.perf_counter() - answered

    turn(MapCapture())  # warm-up
    plain = min(turn(None)[0] for _ in range(3))
    captured = [turn(MapCapture()) for _ in range(3)]
    with_capture, maps = (min(values) for values in zip(*captured, strict=True))
    return {
        "prefill_seconds": prefill,
        "turn_seconds": plain,
        "turn_with_capture_seconds": with_capture,
        "maps_seconds": maps,
    }


def _feed(crosslmm: CrossLMMForConditionalGeneration, cache: object, text: list[int]) -> None:
    crosslmm(input_ids=torch.tensor([text]), past_key_values=cache, logits_to_keep=1)


@torch.inference_mode()
def run_full_shape(frames: int) -> dict[str, float]:
    """Extra memory of the maps of one layer at the attention shapes of 7B."""
    config = CrossLMMConfig.from_preset("crosslmm-7b")
    text, per_frame = config.text_config, config.original_tokens_per_frame
    width = text.hidden_size // text.num_attention_heads
    store = KeyValueStore("native", frames * per_frame)
    for _ in range(frames):
        one = torch.randn(1, text.num_key_value_heads, per_frame, width).to(torch.bfloat16)
        store.append(one, one, per_frame)
    query = torch.randn(text.num_attention_heads, TOKENS, width).to(torch.bfloat16)
    frame_mass(query[:, :2], store, per_frame, width**-0.5)  # warm-up
    base = settle()
    clock = time.perf_counter()
    mass, total = frame_mass(query, store, per_frame, width**-0.5)
    strongest = mass.mean((0, 1)).topk(STRONGEST).indices.tolist()
    patch_weights(query, store, strongest, per_frame, width**-0.5, total)
    return {
        "extra_bytes": resident("VmHWM") - base,
        "layer_seconds": time.perf_counter() - clock,
        "store_bytes": store.nbytes,
    }


def in_child(job: str, frames: int, threads: int) -> dict[str, float]:
    """Run one part in a fresh process."""
    command = [sys.executable, "-m", "tests.bench.maps", "--job", job]
    command += ["--frames", str(frames), "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(frames: int, threads: int) -> dict[str, object]:
    load = os.getloadavg()[0]
    scaled, full = (in_child(job, frames, threads) for job in ("scaled", "full"))
    config = CrossLMMConfig.from_preset("crosslmm-7b")
    text = config.text_config
    keys = frames * config.original_tokens_per_frame
    per_layer = 2 * TOKENS * keys * text.hidden_size  # all query heads together
    operations = len(config.dcal_layers) * per_layer
    whole = account(config, frames, BEFORE + QUESTION, text_before=BEFORE).operations.total
    extra = scaled["maps_seconds"] + scaled["turn_with_capture_seconds"] - scaled["turn_seconds"]
    everything = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "threads": threads,
        "load_at_start": round(load, 2),
        "frames": frames,
        "text_tokens": TOKENS,
        "scaled_model": scaled,
        "seconds_to_prefill": extra / scaled["prefill_seconds"],
        "one_layer_at_7b_shapes": full,
        "operations_to_prefill_at_7b_shapes": operations / whole,
        "aims": AIMS,
    }
    print(
        f"{machine()}, {threads} threads, {frames} frames, {TOKENS} text tokens\n"
        f"prefill {scaled['prefill_seconds']:.2f} s, capture and maps {extra:.3f} s: "
        f"{everything['seconds_to_prefill']:.1%} (aim {AIMS['seconds_to_prefill']:.0%})\n"
        f"extra memory at 7B attention shapes {full['extra_bytes'] / 1e6:.1f} MB "
        f"(aim {AIMS['extra_bytes'] / 1e6:.0f} MB); "
        f"operations {everything['operations_to_prefill_at_7b_shapes']:.2%} of the prefill's"
    )
    if load > BUSY_LOAD:
        print(f"The machine is busy (load {load:.1f}): seconds are shown but not kept.")
        return without_seconds(everything)
    return everything


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--job", choices=("scaled", "full"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        run = run_scaled if options.job == "scaled" else run_full_shape
        print(json.dumps(run(options.frames)))
        return
    result = report(options.frames, options.threads)
    if not options.no_save:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
