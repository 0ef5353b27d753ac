"""The run card: all that is needed to repeat a run, as plain data."""

from __future__ import annotations

import json
import re
from typing import Any

from app.choices import Choices
from app.links import query, sample_name
from app.sources import Video
from app.versions import versions
from model.types import Answer, ModelInfo


def run_card(
    answer: Answer, model: ModelInfo | None, video: Video | None, choices: Choices
) -> dict[str, Any]:
    """Describe the run behind an answer. Holds no question and no name of a visitor's file."""
    tokens = answer.savings.crosslmm.tokens_per_frame
    usual = model is None or tokens == model.pooled_tokens_per_frame
    used = Choices(len(answer.frame_times), choices.max_new_tokens, None if usual else tokens)
    return {
        "model": _model(answer, model),
        "settings": {
            "frames": len(answer.frame_times),
            "pooled_tokens_per_frame": tokens,
            "max_new_tokens": choices.max_new_tokens,
            "decoding": "greedy",
            "seed": None,  # greedy decoding draws nothing at random
        },
        "video": _video(answer, video),
        "frame_times": [round(float(time), 3) for time in answer.frame_times],
        "tokens": {
            "original": answer.tokens.original,
            "pooled": answer.tokens.pooled,
            "text": answer.tokens.text,
            "generated": answer.tokens.generated,
        },
        "repeated_frames": answer.repeated_frames,  # not encoded again
        "notices": list(answer.notices),
        "versions": versions(),
        "link": query(video, used, answer.model),
    }


def _model(answer: Answer, model: ModelInfo | None) -> dict[str, Any]:
    if model is None:
        return {"name": answer.model}
    return {
        "name": answer.model,
        "revision": model.revision,
        "quantization": model.quantization,
        "dtype": model.dtype,
        "attention_kernel": model.attention,
        "kv_precision": model.kv_precision,
        "device": model.device,
        "parameters": model.parameters,
        "dual_cross_attention_layers": list(model.dcal_layers),
        "gates": [[round(value, 4) for value in pair] for pair in model.gates],
    }


def _video(answer: Answer, video: Video | None) -> dict[str, Any]:
    info = answer.video
    return {
        "sample": sample_name(video),
        "duration": round(info.duration, 3),
        "width": info.width,
        "height": info.height,
        "codec": info.codec,
        "frame_rate": round(info.frame_rate, 3),
        "size_bytes": info.size_bytes,
    }


def as_text(card: dict[str, Any]) -> str:
    """JSON to be read: one line for each thing, also for a list of numbers."""
    text = json.dumps(card, indent=2, ensure_ascii=False)
    return re.sub(r"\[[\s\d.,eE+-]*\]", lambda found: " ".join(found[0].split()), text)
