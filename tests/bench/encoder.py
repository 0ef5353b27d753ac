"""What compiling the image encoder is worth: `python -m tests.bench.encoder [--model SOURCE]`.

Frames per second as it is and compiled, taking turns in one run, and what compiling takes. Prints
one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from datetime import date

import torch

from model.frame_encoder import compiled
from model.frame_reader import CHUNK_FRAMES
from model.loading import load

ROUNDS = 9


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None)
    args = parser.parse_args()
    plain = load(args.model).crosslmm.model
    began = time.perf_counter()
    quick = compiled(copy.deepcopy(plain), CHUNK_FRAMES)
    compiling = time.perf_counter() - began
    weight = plain.vision_tower.embeddings.patch_embedding.weight
    side = plain.config.vision_config.image_size
    frames = torch.rand(CHUNK_FRAMES, 3, side, side).to(weight.device, weight.dtype)
    torch.testing.assert_close(
        quick.encode_frames(frames), plain.encode_frames(frames), atol=0.05, rtol=0.05
    )
    seconds: dict[str, list[float]] = {"plain": [], "compiled": []}
    for _ in range(ROUNDS):
        for name, model in (("plain", plain), ("compiled", quick)):
            started = time.perf_counter()
            model.encode_frames(frames)
            if frames.is_cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    rate = {name: CHUNK_FRAMES / statistics.median(times) for name, times in seconds.items()}
    print(
        json.dumps(
            {
                "date": date.today().isoformat(),
                "machine": f"{platform.machine()}, {frames.device.type}",
                "threads": torch.get_num_threads(),
                "frames_per_second": {name: round(value, 1) for name, value in rate.items()},
                "ratio": round(rate["compiled"] / rate["plain"], 3),
                "seconds_to_compile": round(compiling, 1),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
