"""The bench for GPUs, in small on a CPU: every part runs, and troubles are told, not raised."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from tests.bench import gpu, gpu_parts

SMALL = replace(
    gpu_parts.small_scale(), side_by_side=(2,), long=5, middle=3, hour=6, text=4, generated=3
)


@pytest.mark.parametrize("part", gpu_parts.PARTS)
def test_every_part_runs(part: str) -> None:
    if part in ("decoding", "hour"):
        pytest.importorskip("bitsandbytes")
    rows = list(gpu_parts.PARTS[part](SMALL))
    frames = {
        "prefill-crosslmm": [2, 5],
        "prefill-llava-onevision": [2],
        "second-question": [3],
        "decoding": [3, 5],
        "maps": [3, 3],
        "hour": [6],
    }
    assert [row["frames"] for row in rows] == frames[part]
    for row in rows:
        figures = [v for k, v in row.items() if k in ("seconds", "tokens_per_second")]
        assert figures and all(value > 0 for value in figures)
    json.dumps(rows)


def test_true_shapes_are_those_of_7b_and_every_aim_is_measured() -> None:
    scale = gpu_parts.full_scale("cpu")
    config, text = scale.config, scale.config.text_config
    assert (config.original_tokens_per_frame, config.pooled_tokens_per_frame) == (729, 9)
    assert (text.hidden_size, text.num_hidden_layers, config.v2v_scope) == (3584, 28, "frame")
    assert scale.hour * 9 + 100 < text.max_position_embeddings
    lengths = {scale.middle, scale.long, scale.hour}
    assert all(part in gpu_parts.PARTS and frames in lengths for part, frames, _ in gpu.AIMS)


def test_four_bits_change_the_llm_only() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    whole = gpu_parts.build(SMALL, CrossLMMForConditionalGeneration, SMALL.config, "4bit")
    quantized = {
        name for name, m in whole.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)
    }
    assert quantized and not any("dual_cross_attention" in name for name in quantized)
    assert not any("self_attn.o_proj" in name for name in quantized)
    assert all(name.startswith("model.language_model.layers.") for name in quantized)
    left = {name for name, m in whole.named_modules() if type(m) is torch.nn.Linear}
    kept = ("dual_cross_attention", "self_attn.o_proj")
    assert all(any(k in name for k in kept) for name in left if "language_model" in name)


def test_a_part_out_of_memory_keeps_its_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bursting(scale: gpu_parts.Scale) -> Iterator[gpu_parts.Row]:
        yield {"frames": 1, "seconds": 2.0}
        raise torch.OutOfMemoryError("tried to allocate much\nand more")

    monkeypatch.setitem(gpu_parts.PARTS, "hour", bursting)
    gpu.child("hour", SMALL)
    printed = capsys.readouterr().out

    def run(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, "a warning\n" + printed, "")

    monkeypatch.setattr(subprocess, "run", run)
    result = gpu.in_child("hour", True, "cpu", 1)
    assert result == {
        "rows": [{"frames": 1, "seconds": 2.0}],
        "out_of_memory": "tried to allocate much",
    }
    gpu.show("hour", result)
    assert "out of memory: tried to allocate much" in capsys.readouterr().out


def test_a_part_that_fails_or_takes_too_long_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert gpu.in_child("hour", True, "cpu", 1) == {"failed": "exit code 1", "rows": []}

    def late(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("x", 60, output=b'{"frames": 1, "seconds": 1.0}\n')

    monkeypatch.setattr(subprocess, "run", late)
    options = argparse.Namespace(
        parts=["hour", "maps"], small=True, device="cpu", minutes=1, scale=SMALL,
        output=tmp_path / "results" / "gpu.json",
    )  # fmt: skip
    gpu.report(options)
    written = json.loads(options.output.read_text())
    assert written["parts"]["hour"]["timed_out"] == "after 1 minutes"
    assert written["parts"]["maps"]["rows"] == [{"frames": 1, "seconds": 1.0}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_true_shapes_want_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    assert "--small" in capsys.readouterr().err
