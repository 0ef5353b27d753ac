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
import datetime
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.utils import logging as transformers_logging

from model.accounting import account
from model.configuration_crosslmm import CrossLMMConfig
from model.cost_formulas import count_parameters
from tests.bench.peer_models import (
    BEFORE,
    FULL_ENCODER_TO_LLM,
    QUESTION,
    Sizes,
    body_parameters,
    count_operations,
    run_crosslmm,
    run_peer,
)

RESULTS = Path(__file__).parent / "results" / "peers.json"
PAPER = {"memory": 0.792, "operations": 0.748, "seconds": 0.487}
SYSTEMS = ("crosslmm", "llava-onevision")
BUSY_LOAD = 0.5  # runnable processes besides us, from which on seconds are not kept


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
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
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
