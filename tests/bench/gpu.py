"""What a GPU makes of the 7B shapes, with random weights: run this where there is one.

    python -m tests.bench.gpu                     # every part, at most ten minutes each
    python -m tests.bench.gpu --parts decoding hour
    python -m tests.bench.gpu --small             # dry run on a CPU, nothing is kept

Needs torch, transformers, bitsandbytes (for the 4-bit parts) and this repository. Each part runs in
a process of its own, so one that runs out of memory or time is reported and the others go on; the
JSON is written after each. Frames are already decoded and resized, in main memory; prefill is from
there to the first token, beside transformers' LLaVA-OneVision of the same shapes in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from transformers.utils import logging as transformers_logging

from model.types import InputError
from tests.bench.gpu_parts import PARTS, Row, Scale, full_scale, small_scale

RESULTS = Path(__file__).parent / "results" / "gpu.json"
MINUTES = 10  # of each part
# (part, frames, figure): what to reach, and what our count of operations allows on an H100.
AIMS = {
    ("prefill-crosslmm", 256, "seconds"): "aim 0.9, floor 0.37; the paper 2.0",
    ("prefill-crosslmm", 1024, "seconds"): "aim 3, floor 1.5",
    ("second-question", 256, "seconds"): "aim 0.15",
    ("decoding", 256, "tokens_per_second"): "aim 60",
    ("decoding", 1024, "tokens_per_second"): "aim 60",
    ("hour", 3600, "seconds"): "aim 15, floor 5.5",
    ("hour", 3600, "total_bytes"): "aim 24e9",
}
MEMORY_ERRORS = (torch.OutOfMemoryError, MemoryError)


def in_child(part: str, small: bool, device: str, minutes: float) -> dict[str, object]:
    """Run one part in a fresh process; whatever happens to it is told, not raised."""
    command = [sys.executable, "-m", "tests.bench.gpu", "--child", part, "--device", device]
    command += ["--small"] if small else []
    result: dict[str, object] = {}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=minutes * 60, check=False
        )
        out, failed = done.stdout, done.returncode
        if failed:
            lines = done.stderr.strip().splitlines()
            result["failed"] = lines[-1] if lines else f"exit code {failed}"
    except subprocess.TimeoutExpired as error:
        out = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else error.stdout
        result["timed_out"] = f"after {minutes:g} minutes"
    lines = [json.loads(line) for line in (out or "").splitlines() if line.startswith("{")]
    result["rows"] = [line for line in lines if "out_of_memory" not in line]
    for line in lines:
        result |= {k: v for k, v in line.items() if k == "out_of_memory"}
    return result


def child(part: str, scale: Scale) -> None:
    """Print one line of JSON per row; running out of memory is a line, too."""
    transformers_logging.set_verbosity_error()
    torch.manual_seed(0)
    rows = PARTS[part](scale)
    try:
        for row in rows:
            print(json.dumps(row), flush=True)
    except MEMORY_ERRORS as error:
        print(json.dumps({"out_of_memory": str(error).splitlines()[0]}), flush=True)


def machine(device: str) -> dict[str, object]:
    """Kind of machine, without its name."""
    found: dict[str, object] = {"cpu_cores": os.cpu_count()}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_bytes"] = properties.total_memory
    return found


def show(part: str, result: dict[str, object]) -> None:
    """Print what a part found, the aims beside it."""
    print(part)
    for row in result["rows"]:
        for name, value in row.items():
            aim = AIMS.get((part, row.get("frames"), name), "")
            print(f"  {name:24} {_readable(name, value):>16}  {aim}")
        print()
    for trouble in ("out_of_memory", "timed_out", "failed"):
        if trouble in result:
            print(f"  {trouble.replace('_', ' ')}: {result[trouble]}\n", flush=True)


def _readable(name: str, value: object) -> str:
    if name.endswith("bytes"):
        return f"{value / 1e6:,.0f} MB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def reductions(parts: dict[str, dict]) -> list[Row]:
    """1 - ours / LLaVA-OneVision's, where both have a row."""
    ours, peer = (
        {row["frames"]: row for row in parts.get(name, {}).get("rows", ())}
        for name in ("prefill-crosslmm", "prefill-llava-onevision")
    )
    return [
        {
            "frames": frames,
            "seconds": 1 - ours[frames]["seconds"] / peer[frames]["seconds"],
            "extra_bytes": 1 - ours[frames]["extra_bytes"] / max(1, peer[frames]["extra_bytes"]),
        }
        for frames in sorted(ours.keys() & peer.keys())
    ]


def report(options: argparse.Namespace) -> dict[str, object]:
    """Run the chosen parts; the file is written after each of them."""
    everything: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(options.device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "attention": options.scale.kernel,
        "shapes": "small" if options.small else "7B, random weights",
        "parts": {},
    }
    for part in options.parts:
        result = in_child(part, options.small, options.device, options.minutes)
        everything["parts"][part] = result
        show(part, result)
        everything["reductions"] = [] if options.small else reductions(everything["parts"])
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(everything, indent=2) + "\n")
    for row in everything["reductions"]:
        print(
            f"{row['frames']} frames against LLaVA-OneVision: {row['seconds']:.1%} less time, "
            f"{row['extra_bytes']:.1%} less extra memory"
        )
    return everything


def choose_scale(options: argparse.Namespace) -> Scale:
    """True shapes need a GPU."""
    if options.small:
        options.device = options.device or "cpu"
        return small_scale(options.device)
    options.device = options.device or "cuda"
    if not torch.cuda.is_available():
        raise InputError("PyTorch sees no GPU; a dry run at small shapes is: --small")
    return full_scale(options.device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="dry run at small shapes")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda, with --small cpu")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of each part, at most")
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS.name}; --small: none")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        options.scale = choose_scale(options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if options.child:
        child(options.child, options.scale)
        return 0
    if options.output is None and not options.small:
        options.output = RESULTS
    report(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
