"""Tokens per second of an answer, beside transformers' own parts in the same run.

    python -m tests.bench.tokens

The same model, memory and question go through `model.decoding.decode` with `attend`, and through
`generate` with transformers' attention function: its loop reads every token before it goes on, its
cache copies all keys and values for each token, and every query head reads the keys of its group
anew. Shapes are those of `tests.bench.peers`.
"""

from __future__ import annotations

import statistics

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as transformers_logging

from tests.bench.gpu_parts import Ours, Scale
from tests.bench.peer_models import Sizes

FRAMES = (64, 256, 1024)
TOKENS, REPEATS = 16, 3
PEER = "transformers_sdpa"  # under another name, so that cross-attention uses it, too


@torch.inference_mode()
def main() -> None:
    """Command line."""
    transformers_logging.set_verbosity_error()
    AttentionInterface.register(PEER, sdpa_attention_forward)
    AttentionMaskInterface.register(PEER, sdpa_mask)
    torch.manual_seed(0)
    ours = Ours(Scale(Sizes().config(), "cpu"))
    ways = {"sdpa": ours.ask, PEER: ours.ask_by_generate}
    print(f"{'frames':>8} {'ours':>8} {'transformers':>13} {'ratio':>6}   tokens/s")
    for frames in FRAMES:
        memory = ours.memory(frames)
        rates: dict[str, list[float]] = {kernel: [] for kernel in ways}
        for _ in range(REPEATS):
            for kernel, ask in ways.items():
                ours.crosslmm.set_attn_implementation({"text_config": kernel})
                short = ours.meter.seconds(lambda a=ask, m=memory: a(m))
                whole = ours.meter.seconds(lambda a=ask, m=memory: a(m, 1 + TOKENS))
                rates[kernel].append(TOKENS / (whole - short))
        mine, theirs = map(statistics.median, rates.values())
        print(f"{frames:>8} {mine:>8.1f} {theirs:>13.1f} {mine / theirs:>6.2f}", flush=True)
        del memory


if __name__ == "__main__":
    main()
