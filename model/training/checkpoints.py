"""Checkpoints of a run, and the model folder that comes out of it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator

from model.checkpoint_files import CheckpointReader, ShardWriter
from model.configuration_crosslmm import CrossLMMConfig
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.processing_crosslmm import CrossLMMProcessor

KEEP = 2


def newest(out: Path) -> Path | None:
    """The last complete checkpoint of a run."""
    found = _checkpoints(out)
    return found[-1] if found else None


def save_checkpoint(accelerator: Accelerator, out: Path, step: int) -> None:
    """Write OUT/checkpoints/step-N; it gets its name when it is complete, then old ones go."""
    target = out / "checkpoints" / f"step-{step:08d}"
    partial = target.with_suffix(".partial")
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for old in _checkpoints(out)[:-KEEP]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _checkpoints(out: Path) -> list[Path]:
    folder = out / "checkpoints"
    named = (
        [p for p in folder.iterdir() if re.fullmatch(r"step-\d{8}", p.name)]
        if folder.is_dir()
        else []
    )
    return sorted(named)


def keep_trained_only(accelerator: Accelerator, trained: set[str]) -> None:
    """Leave weights that never move (a frozen or quantised base) out of checkpoints."""
    ends = tuple(trained)

    def thin(models: list, weights: list[dict], folder: str) -> None:
        for state in weights:
            for name in [name for name in state if not name.endswith(ends)]:
                del state[name]

    accelerator.register_save_state_pre_hook(thin)


def write_model(
    base: Path,
    config: CrossLMMConfig,
    processor: CrossLMMProcessor,
    trained: Mapping[str, torch.Tensor],
    target: Path,
) -> None:
    """Write a CrossLMM folder: the base's weights as they are in its files, trained ones anew.

    So a base that was loaded quantised comes out whole. It appears only when it is complete.
    """
    with torch.device("meta"):
        skeleton = CrossLMMForConditionalGeneration(config)
    wanted = set(skeleton.state_dict())
    if config.tie_word_embeddings:
        wanted.discard("lm_head.weight")
    building = target.with_name(f".{target.name}.{os.getpid()}.partial")
    building.mkdir(parents=True)
    try:
        reader, writer = CheckpointReader(base), ShardWriter(building)
        dtype = None
        for name, tensor in reader.tensors(set(reader.shapes) & wanted):
            dtype = tensor.dtype if tensor.is_floating_point() else dtype
            new = trained.get(name)
            writer.add(name, tensor if new is None else new.detach().cpu().to(tensor.dtype))
        for name in sorted((set(trained) & wanted) - set(reader.shapes)):
            writer.add(name, trained[name].detach().cpu().to(dtype))
        writer.close()
        config.architectures = [CrossLMMForConditionalGeneration.__name__]
        config.dtype = dtype
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.save_pretrained(building)
        processor.save_pretrained(building)
        if (base / "generation_config.json").is_file():
            shutil.copy(base / "generation_config.json", building)
        shutil.rmtree(target, ignore_errors=True)
        building.rename(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
