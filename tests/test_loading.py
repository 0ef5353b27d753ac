"""The front door: what `load` takes, and what it says when it cannot."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from model import checkpoint_files, loading
from model.types import InputError
from tests.published import save_llava_onevision, save_qwen2


def test_llava_onevision_is_converted_once_and_says_that_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "CONVERTED", tmp_path / "cache")
    source = tmp_path / "llava"
    source.mkdir()
    save_llava_onevision(source)
    first = loading.load(source, pooled_grid=2)
    assert first.crosslmm.config.pooled_grid == 2
    assert first.info.pooled_tokens_per_frame == 4
    assert not first.info.trained
    assert "closed" in first.info.note
    written = {file: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    again = loading.load(source, pooled_grid=2)
    assert again.folder == first.folder
    assert {file: file.stat().st_mtime_ns for file in again.folder.iterdir()} == written
    other = loading.load(source, pooled_grid=1)
    assert other.folder != first.folder
    assert other.info.pooled_tokens_per_frame == 1


def test_an_llm_alone_is_refused_with_what_helps(tmp_path: Path) -> None:
    save_qwen2(tmp_path)
    with pytest.raises(InputError, match=r"given as ENCODER\+LLM"):
        loading.load(tmp_path)


def test_a_wrong_name_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="There is no folder 'nobody/nothing'"):
        loading.load("nobody/nothing")
    with pytest.raises(InputError, match="quantization must be one of"):
        loading.load(quantization="3bit")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_said() -> None:
    with pytest.raises(InputError, match="sees no GPU"):
        loading.load(device="cuda")


def test_checksums_find_a_damaged_file(tmp_path: Path) -> None:
    from model.training.release import write_sums

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "crosslmm"}))
    write_sums(tmp_path)
    loading.check_sums(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="config.json is missing or damaged"):
        loading.check_sums(tmp_path)


@pytest.mark.parametrize("kind", ["crosslmm", "llava"])
def test_an_impossible_grid_is_said(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "CONVERTED", tmp_path / "cache")
    source = None
    if kind == "llava":
        source = tmp_path / "llava"
        source.mkdir()
        save_llava_onevision(source)
    with pytest.raises(InputError, match="The pooled grid must be 1 to .* here, got 99"):
        loading.load(source, pooled_grid=99)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("config.json"))


def test_weights_have_a_revision_that_changes_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"a" * 100)
    first = checkpoint_files.revision(tmp_path)
    assert first == "sha256:" + hashlib.sha256(b"a" * 100).hexdigest()
    weights.write_bytes(b"a" * 99 + b"b")
    assert checkpoint_files.revision(tmp_path) != first
    monkeypatch.setattr(checkpoint_files, "_WHOLE_BYTES", 10)
    sampled = checkpoint_files.revision(tmp_path)
    assert sampled.startswith("sha256-sampled:")
    weights.write_bytes(b"a" * 100)
    assert checkpoint_files.revision(tmp_path) != sampled
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    assert checkpoint_files.revision(snapshot) == "commit:0123abc"
