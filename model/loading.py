"""One front door: a local folder or a hub id -> a ready model."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoProcessor, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from model.checkpoint_files import local_folder, revision
from model.configuration_crosslmm import CrossLMMConfig
from model.conversion import checkpoint_kind, convert
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.processing_crosslmm import CrossLMMProcessor
from model.types import InputError, ModelInfo

CONVERTED = Path(
    os.environ.get("CROSSLMM_CACHE", Path.home() / ".cache" / "crosslmm")
)  # LLaVA-OneVision checkpoints, converted on their first load
BUNDLED = Path(__file__).resolve().parent.parent / "assets" / "crosslmm-tiny"
QUANTIZATIONS = ("auto", "none", "8bit", "4bit")
# Kept in full precision under quantisation: the encoder sees every original token and everything
# downstream hangs on it; gates and norms are no linear layers and stay whole anyway.
UNQUANTIZED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
CROSS_ATTENTION = (r"model\.language_model\.layers\.\d+\.dual_cross_attention",)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A model with its processor, and what to tell people about it."""

    crosslmm: CrossLMMForConditionalGeneration
    processor: CrossLMMProcessor
    info: ModelInfo
    folder: Path


def load(
    source: str | Path | None = None,
    *,
    quantization: str = "auto",
    device: str = "auto",
    pooled_grid: int | None = None,
) -> Loaded:
    """Load a CrossLMM.

    Args:
        source: folder or hub id of a CrossLMM or of a LLaVA-OneVision (converted on its first
            load); None takes the model that ships in `assets/`.
        quantization: `none`, `8bit`, `4bit` (NF4, double quantisation), or `auto`: 4-bit on a
            GPU, none on a CPU.
        device: `cpu`, `cuda`, or `auto`.
        pooled_grid: another number of pooled tokens per side than the checkpoint's own.

    Raises:
        InputError: what is missing or unusable, and what to do.

    """
    if quantization not in QUANTIZATIONS:
        raise InputError(f"quantization must be one of {QUANTIZATIONS}, got {quantization!r}.")
    device = _device(device)
    on_gpu = device.startswith("cuda")
    if quantization == "auto":
        quantization = "4bit" if on_gpu else "none"
    folder = checkpoint_folder(source, pooled_grid)
    kernel = "flash_attention_2" if on_gpu and find_spec("flash_attn") else "sdpa"
    dtype = torch.bfloat16 if on_gpu or quantization != "none" else torch.float32
    config = CrossLMMConfig.from_pretrained(folder)
    if pooled_grid is not None:
        config.pooled_grid = pooled_grid
        if not 1 <= pooled_grid <= config.original_grid:
            raise InputError(
                f"The pooled grid must be 1 to {config.original_grid} here, got {pooled_grid}."
            )
    transformers_logging.disable_progress_bar()
    crosslmm = CrossLMMForConditionalGeneration.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=kernel,
        device_map=device,
        quantization_config=quantization_config(quantization),
    ).eval()
    processor = AutoProcessor.from_pretrained(folder)
    processor.pooled_tokens_per_frame = config.pooled_tokens_per_frame
    card = _card(folder)
    gates = crosslmm.gates
    info = ModelInfo(
        name=card.get("name") or (folder.name if Path(str(source)).exists() else str(source)),
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        quantization=quantization,
        attention=kernel,
        parameters=sum(p.numel() for p in crosslmm.parameters()),
        pooled_tokens_per_frame=config.pooled_tokens_per_frame,
        original_tokens_per_frame=config.original_tokens_per_frame,
        dcal_layers=tuple(config.dcal_layers),
        gates=tuple(gates),
        trained=any(value for pair in gates for value in pair),
        examples=tuple(card.get("examples", ())),
        note=card.get("note", "" if any(v for p in gates for v in p) else CLOSED),
        revision=revision(folder),
    )
    log.info(
        "model=%s revision=%s device=%s quantization=%s attention=%s",
        info.name,
        info.revision,
        device,
        quantization,
        kernel,
    )
    return Loaded(crosslmm, processor, info, folder)


CLOSED = (
    "The dual cross-attention of this checkpoint is untrained and closed: it answers from the "
    "pooled tokens alone."
)


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for, but PyTorch sees no GPU; use cpu.")
    return device


def quantization_config(name: str, keep: tuple[str, ...] = ()) -> BitsAndBytesConfig | None:
    """Settings of `4bit` (NF4) or `8bit`; modules that match `keep` stay whole, too."""
    whole = [*UNQUANTIZED, *keep]
    if name == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=whole,
        )
    if name == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return None


def checkpoint_folder(source: str | Path | None, pooled_grid: int | None = None) -> Path:
    """A local CrossLMM folder: the source itself, fetched from the hub, or converted once."""
    if source is None:
        if not (BUNDLED / "config.json").exists():
            raise InputError(
                f"The bundled model is missing: expected {BUNDLED / 'config.json'}; restore "
                "assets/crosslmm-tiny from the repository or pass --model."
            )
        source = BUNDLED
    folder = local_folder(source)
    kind = checkpoint_kind(folder)
    if kind == CrossLMMConfig.model_type:
        check_sums(folder)
        return folder
    if kind == "llava_onevision":
        name = hashlib.sha256(f"{folder.resolve()} {pooled_grid}".encode()).hexdigest()[:16]
        target = CONVERTED / name
        if not (target / "config.json").exists():
            log.info("converting %s once, into %s", folder, target)
            convert(folder, target, pooled_grid=pooled_grid)
        return target
    raise InputError(
        f"{folder} is a {kind!r} checkpoint; expected a CrossLMM or a LLaVA-OneVision. An encoder "
        "and an LLM are joined by: python -m model.conversion ENCODER TARGET --llm LLM"
    )


def check_sums(folder: Path) -> None:
    """Compare files with `SHA256SUMS` where the folder has one.

    Raises:
        InputError: a file is damaged or missing.

    """
    sums = folder / "SHA256SUMS"
    if not sums.exists():
        return
    for line in sums.read_text().splitlines():
        digest, name = line.split(maxsplit=1)
        file = folder / name
        if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise InputError(f"{file} is missing or damaged (checksum differs); restore it.")


def _card(folder: Path) -> dict:
    """Name, example questions and note that come with a checkpoint."""
    file = folder / "card.json"
    return json.loads(file.read_text()) if file.exists() else {}
