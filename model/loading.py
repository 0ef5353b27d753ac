"""One front door: a local folder or a hub id -> a ready model."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoProcessor, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from model.configuration_crosslmm import CrossLMMConfig
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.processing_crosslmm import CrossLMMProcessor
from model.types import InputError, ModelInfo

BUNDLED = Path(__file__).resolve().parent.parent / "assets" / "crosslmm-tiny"
QUANTIZATIONS = ("auto", "none", "8bit", "4bit")
# Kept in full precision under quantisation: the encoder sees every original token and everything
# downstream hangs on it; gates and norms are no linear layers and stay whole anyway.
UNQUANTIZED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]

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
        source: folder or hub id; None takes the model that ships in `assets/`.
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
    folder = _folder(source)
    kernel = "flash_attention_2" if on_gpu and find_spec("flash_attn") else "sdpa"
    dtype = torch.bfloat16 if on_gpu or quantization != "none" else torch.float32
    config = CrossLMMConfig.from_pretrained(folder)
    if pooled_grid is not None:
        config.pooled_grid = pooled_grid
        config.validate_choices()
    transformers_logging.disable_progress_bar()
    crosslmm = CrossLMMForConditionalGeneration.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=kernel,
        device_map=device,
        quantization_config=_quantization(quantization),
    ).eval()
    processor = AutoProcessor.from_pretrained(folder)
    processor.pooled_tokens_per_frame = config.pooled_tokens_per_frame
    card = _card(folder)
    gates = crosslmm.gates
    info = ModelInfo(
        name=str(source) if source is not None else card.get("name", folder.name),
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
    )
    log.info(
        "model=%s device=%s quantization=%s attention=%s", info.name, device, quantization, kernel
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


def _quantization(name: str) -> BitsAndBytesConfig | None:
    if name == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=UNQUANTIZED,
        )
    if name == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=UNQUANTIZED)
    return None


def _folder(source: str | Path | None) -> Path:
    """A local folder with a CrossLMM in it, fetched from the hub if need be."""
    if source is None:
        source = BUNDLED
        if not (BUNDLED / "config.json").exists():
            raise InputError(
                f"The bundled model is missing: expected {BUNDLED / 'config.json'}; restore "
                "assets/crosslmm-tiny from the repository or pass --model."
            )
    folder = Path(source)
    if not folder.exists():
        folder = _fetch(str(source))
    config_file = folder / "config.json"
    if not config_file.exists():
        raise InputError(f"{folder} holds no config.json; expected a CrossLMM checkpoint folder.")
    kind = json.loads(config_file.read_text()).get("model_type")
    if kind != CrossLMMConfig.model_type:
        raise InputError(
            f"{folder} is a {kind!r} checkpoint, not 'crosslmm'; convert it first: "
            "python -m model.conversion SOURCE TARGET"
        )
    check_sums(folder)
    return folder


def _fetch(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"There is no folder {source!r}, and it could not be fetched from the hub "
            f"({type(error).__name__}); check the name, or the connection."
        ) from error


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
