"""One front door: a local folder or a hub id -> a ready model."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoProcessor, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from model.checkpoint_files import CheckpointReader, local_folder, read_json, revision, some
from model.configuration_crosslmm import CrossLMMConfig
from model.conversion import checkpoint_kind, convert, most_frames
from model.conversion_processor import load_tokenizer
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
# So does what reads fine detail (in NF4 four of 102 answers of a bundled model became others), and
# what brings it on: of 740 answers 26 became others, 13 with self-attention's output whole.
READS_DETAIL = r"model\.language_model\.layers\.\d+\.(?:dual_cross_attention|self_attn\.o_proj)"

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
            load), or ENCODER+LLM (joined on its first load, untrained); None takes the model that
            ships in `assets/`.
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
    kernel = attention_kernel(device)
    dtype = torch.bfloat16 if on_gpu or quantization != "none" else torch.float32
    config = load_config(folder, pooled_grid)
    crosslmm = load_weights(
        folder,
        config,
        dtype=dtype,
        attn_implementation=kernel,
        device_map=device,
        quantization_config=quantization_config(quantization),
    ).eval()
    processor = load_processor(folder, config)
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


def attention_kernel(device: str) -> str:
    """flash-attn on a GPU where it can be imported, else PyTorch's own."""
    return "flash_attention_2" if device.startswith("cuda") and find_spec("flash_attn") else "sdpa"


def quantization_config(name: str) -> BitsAndBytesConfig | None:
    """Settings of `4bit` (NF4) or `8bit` for the LLM, without what reads fine detail.

    Raises:
        InputError: bitsandbytes is not installed.

    """
    if name == "none":
        return None
    if not find_spec("bitsandbytes"):
        raise InputError(
            f"Quantisation to {name} needs bitsandbytes: pip install bitsandbytes, or choose none."
        )
    whole = [*UNQUANTIZED, READS_DETAIL]
    if name == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=whole,
    )


def load_config(folder: Path, pooled_grid: int | None = None) -> CrossLMMConfig:
    """The configuration of a CrossLMM folder, with another pooled grid where one is given.

    Raises:
        InputError: `config.json` is missing or says something impossible, or the grid does.

    """
    read_json(folder, "config.json")
    try:
        config = CrossLMMConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{folder / 'config.json'} cannot be used ({reason}); restore it."
        ) from error
    if pooled_grid is not None:
        if not 1 <= pooled_grid <= config.original_grid:
            raise InputError(
                f"The pooled grid must be 1 to {config.original_grid} here, got {pooled_grid}."
            )
        if pooled_grid > config.pooled_grid:  # more tokens per frame: fewer frames fit
            config.max_frames = min(config.max_frames, most_frames(config.text_config, pooled_grid))
        config.pooled_grid = pooled_grid
    return config


def load_weights(
    folder: Path,
    config: CrossLMMConfig,
    new: tuple[str, ...] = (),
    gone: tuple[str, ...] = (),
    **settings: Any,
) -> CrossLMMForConditionalGeneration:
    """The model with a folder's weights, all of them; `settings` go to `from_pretrained`.

    `new`: parts of names that may be missing and start new; `gone`: of names that are left out.

    Raises:
        InputError: files or weights that are missing, damaged or do not fit.

    """
    CheckpointReader(folder)  # names the file that is missing or damaged
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its table of differences is our error below
    transformers_logging.disable_progress_bar()
    try:
        crosslmm, found = CrossLMMForConditionalGeneration.from_pretrained(
            folder,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **settings,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    wrong = {
        "missing": [n for n in found["missing_keys"] if not any(part in n for part in new)],
        "without a place": [
            n for n in found["unexpected_keys"] if not any(part in n for part in gone)
        ],
        "misshapen": [entry[0] for entry in found["mismatched_keys"]],
    }
    if any(wrong.values()):
        named = "; ".join(f"{kind}: {some(sorted(n))}" for kind, n in wrong.items() if n)
        raise InputError(
            f"The weights in {folder} do not fit its config.json ({named}); restore both from the "
            "same place."
        )
    return crosslmm


def load_processor(folder: Path, config: CrossLMMConfig) -> CrossLMMProcessor:
    """The processor of a CrossLMM folder, fitted to `config`.

    Raises:
        InputError: a file of it is missing or damaged.

    """
    read_json(folder, "processor_config.json")
    load_tokenizer(folder)
    processor = AutoProcessor.from_pretrained(folder)
    processor.pooled_tokens_per_frame = config.pooled_tokens_per_frame
    processor.max_frames = min(processor.max_frames, config.max_frames)
    return processor


def checkpoint_folder(source: str | Path | None, pooled_grid: int | None = None) -> Path:
    """A local CrossLMM folder: the source itself, fetched from the hub, or converted once.

    Raises:
        InputError: what is missing or unusable, and what to do.

    """
    if source is None:
        if not (BUNDLED / "config.json").exists():
            raise InputError(
                f"The bundled model is missing: expected {BUNDLED / 'config.json'}; restore "
                "assets/crosslmm-tiny from the repository or pass --model."
            )
        source = BUNDLED
    if "+" in str(source) and not Path(source).exists():
        encoder, _, llm = str(source).partition("+")
        folders = [local_folder(encoder), local_folder(llm)]
        return _converted(folders, str(source), pooled_grid)
    folder = local_folder(source)
    kind = checkpoint_kind(folder)
    if kind == CrossLMMConfig.model_type:
        check_sums(folder)
        return folder
    if kind == "llava_onevision":
        return _converted([folder], str(source), pooled_grid)
    raise InputError(
        f"{folder} is a {kind!r} checkpoint; expected a CrossLMM or a LLaVA-OneVision. An encoder "
        "and an LLM are given as ENCODER+LLM."
    )


def _converted(folders: list[Path], source: str, pooled_grid: int | None) -> Path:
    """The conversion of published weights, made when there is none of these very files yet."""
    files = [
        f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}"
        for folder in folders
        for file in sorted(folder.resolve().iterdir())
        if file.is_file()
    ]
    name = hashlib.sha256("\n".join([*files, str(pooled_grid)]).encode()).hexdigest()[:16]
    target = CONVERTED / name
    if not (target / "config.json").exists():
        log.info("converting %s once, into %s", source, target)
        llm = folders[1] if len(folders) > 1 else None
        known = source.rstrip("/").split("/")[-1]
        convert(folders[0], target, llm=llm, pooled_grid=pooled_grid, name=known)
    return target


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
