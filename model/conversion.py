"""Published weights as a CrossLMM: LLaVA-OneVision, or a SigLIP encoder and a Qwen2 LLM.

    python -m model.conversion SOURCE TARGET [--llm ID] [--pooled-grid G]

Dual cross-attention comes with closed gates, so a converted LLaVA-OneVision answers as it did; its
projections start as a copy of the layers' own self-attention. An encoder with an LLM is the
untrained start of the paper's recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from model.checkpoint_files import CheckpointReader, ShardWriter, local_folder, read_json, some
from model.configuration_crosslmm import CrossLMMConfig
from model.conversion_branches import branch_weights
from model.conversion_names import Rename, encoder_names, llava_onevision_names, llm_names
from model.conversion_processor import video_token_id, write_processor
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.types import InputError

ENCODERS = ("siglip", "siglip_vision_model")
ANSWER_ROOM = 2048  # positions kept free of pooled tokens for prompts and answers
NEW = ("dual_cross_attention", "memory_norm")  # modules that no published checkpoint has


@dataclass(frozen=True)
class _Plan:
    """What the new checkpoint is made of."""

    config: CrossLMMConfig
    parts: list[tuple[CheckpointReader, Rename]]  # weights, and what they are called here
    new: tuple[str, ...]  # modules without published weights, by the end of their path
    seeded: bool  # the LLM reads visual tokens already: new branches start from its self-attention


def convert(
    source: str | Path,
    target: str | Path,
    *,
    llm: str | Path | None = None,
    pooled_grid: int | None = None,
    name: str | None = None,
) -> Path:
    """Write a CrossLMM folder from published weights, reading one tensor at a time.

    Args:
        source: folder or hub id of a LLaVA-OneVision (transformers' format), or of a SigLIP or
            SigLIP2 fixed-resolution encoder when `llm` is given.
        target: folder to create.
        llm: folder or hub id of a Qwen2 or Qwen2.5 LLM.
        pooled_grid: side of the pooled grid. LLaVA-OneVision: 1 up to its own (14), the default.
            Encoder and LLM: 1 up to the encoder's grid, by default 3.
        name: what the page calls it; by default the target's.

    Returns:
        `target`. It appears only when it is complete.

    Raises:
        InputError: what is missing or does not fit, and what to do.

    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists already; give a new folder or remove that one.")
    folder = local_folder(source)
    kind = checkpoint_kind(folder)
    if llm is None and kind == "llava_onevision":
        plan = _from_llava_onevision(folder, pooled_grid)
        tokenizer_folder, note = folder, f"Converted from {source}."
    elif llm is not None and kind == "encoder":
        llm_folder = local_folder(llm)
        plan = _from_encoder_and_llm(folder, llm_folder, pooled_grid)
        tokenizer_folder = llm_folder
        note = f"{source} and {llm}, joined by an untrained projector: train it before asking."
    else:
        raise InputError(_unusable(folder, kind, llm))
    note += (
        " The dual cross-attention is untrained and closed: answers come from the pooled tokens "
        "alone."
    )
    building = target.with_name(f".{target.name}.{os.getpid()}.partial")
    building.mkdir(parents=True)
    try:
        _write_weights(plan, building)
        plan.config.save_pretrained(building)
        generation = tokenizer_folder / "generation_config.json"
        if generation.is_file():
            shutil.copy(generation, building)
        write_processor(plan.config, folder, tokenizer_folder, building)
        card = {"name": name or target.name, "note": note}
        (building / "card.json").write_text(json.dumps(card, indent=2) + "\n")
        if target.exists():
            target.rmdir()
        building.rename(target)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{target} could not be written ({error}); free some space or give another folder."
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def checkpoint_kind(folder: Path) -> str:
    """`crosslmm`, `llava_onevision`, `encoder`, `llm`, or the model type that it is instead."""
    kind = str(read_json(folder, "config.json").get("model_type"))
    return "encoder" if kind in ENCODERS else "llm" if kind == "qwen2" else kind


def _unusable(folder: Path, kind: str, llm: str | Path | None) -> str:
    if kind == "crosslmm":
        return f"{folder} is a CrossLMM already; load it as it is."
    if kind == "encoder":
        return f"{folder} is an encoder; give the LLM that it goes with, too: --llm ID_OR_FOLDER."
    if kind == "llm":
        return f"{folder} is an LLM; give an encoder as SOURCE and this one as --llm."
    if kind == "llava_onevision" and llm is not None:
        return f"{folder} is a LLaVA-OneVision with an LLM of its own; leave --llm out."
    return (
        f"{folder} is a {kind!r} checkpoint; expected 'llava_onevision', or one of {ENCODERS} "
        "together with --llm."
    )


def _load_config(folder: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{folder / 'config.json'} cannot be used ({error}); download it again."
        ) from error


def _from_llava_onevision(folder: Path, pooled_grid: int | None) -> _Plan:
    """LLaVA-OneVision's own order: project, pool to half the side, one newline after the video."""
    source = _load_config(folder)
    _require(folder, "text_config.model_type", source.text_config.model_type, "qwen2")
    _require(
        folder, "vision_config.model_type", source.vision_config.model_type, "siglip_vision_model"
    )
    strategy = source.vision_feature_select_strategy
    _require(folder, "vision_feature_select_strategy", strategy, "full")
    _require(folder, "multimodal_projector_bias", source.multimodal_projector_bias, True)
    layers = _encoder_layers(folder, source)
    own_grid = -(-(source.vision_config.image_size // source.vision_config.patch_size) // 2)
    pooled_grid = own_grid if pooled_grid is None else pooled_grid
    if not 1 <= pooled_grid <= own_grid:
        raise InputError(f"The pooled grid must be 1 to {own_grid} here, got {pooled_grid}.")
    reader = CheckpointReader(folder)
    lm_head = next((name for name in reader.shapes if name.endswith("lm_head.weight")), None)
    config = CrossLMMConfig(
        vision_config=_vision(source.vision_config, layers),
        text_config=_text(source.text_config, reader, lm_head, source.tie_word_embeddings),
        pooled_grid=pooled_grid,
        pool_after_projector=True,
        frame_separator=True,
        projector_hidden_act=source.projector_hidden_act,
        video_token_id=source.video_token_index,
        max_frames=most_frames(source.text_config, pooled_grid),
    )
    return _Plan(config, [(reader, llava_onevision_names(config))], NEW, seeded=True)


def _from_encoder_and_llm(folder: Path, llm: Path, pooled_grid: int | None) -> _Plan:
    """The paper's start: published encoder and LLM, a new projector between them."""
    if checkpoint_kind(llm) != "llm":
        kind = checkpoint_kind(llm)
        raise InputError(f"{llm} is a {kind!r} checkpoint; expected a Qwen2 or Qwen2.5 LLM.")
    encoder, text = _load_config(folder), _load_config(llm)
    vision = getattr(encoder, "vision_config", encoder)
    grid = vision.image_size // vision.patch_size
    pooled_grid = min(3, grid) if pooled_grid is None else pooled_grid
    if not 1 <= pooled_grid <= grid:
        raise InputError(f"The pooled grid must be 1 to {grid} here, got {pooled_grid}.")
    reader = CheckpointReader(llm)
    lm_head = "lm_head.weight" if "lm_head.weight" in reader.shapes else None
    config = CrossLMMConfig(
        vision_config=_vision(vision, vision.num_hidden_layers),
        text_config=_text(text, reader, lm_head, text.tie_word_embeddings),
        pooled_grid=pooled_grid,
        max_frames=most_frames(text, pooled_grid),
        video_token_id=video_token_id(llm, text.vocab_size),
    )
    parts = [(CheckpointReader(folder), encoder_names), (reader, llm_names(config))]
    return _Plan(config, parts, (*NEW, "multi_modal_projector"), seeded=False)


def _require(folder: Path, name: str, found: object, expected: object) -> None:
    if found != expected:
        raise InputError(
            f"{folder / 'config.json'}: {name} is {found!r}, but only {expected!r} can be "
            "converted."
        )


def _encoder_layers(folder: Path, source: PreTrainedConfig) -> int:
    """How many encoder layers lie before the features that LLaVA-OneVision takes."""
    total, chosen = source.vision_config.num_hidden_layers, source.vision_feature_layer
    if isinstance(chosen, (list, tuple)) and len(chosen) == 1:
        chosen = chosen[0]
    layers = None
    if isinstance(chosen, int):  # an index into the embeddings' and every layer's output
        layers = total + 1 + chosen if chosen < 0 else chosen
    if layers is None or not 1 <= layers <= total:
        raise InputError(
            f"{folder / 'config.json'}: vision_feature_layer is {chosen!r}; expected one layer "
            f"of the encoder's {total}."
        )
    return layers


def _vision(vision: PreTrainedConfig, layers: int) -> dict:
    settings = vision.to_dict()
    return {**settings, "num_hidden_layers": layers, "vision_use_head": False}


def _text(
    text: PreTrainedConfig, reader: CheckpointReader, lm_head: str | None, tied: bool
) -> dict:
    """The LLM's config; tied embeddings only where the weights are one and the same."""
    if tied and lm_head is not None:
        embedding = next(n for n in reader.shapes if n.endswith("embed_tokens.weight"))
        tied = torch.equal(reader.tensor(lm_head), reader.tensor(embedding))
    return {**text.to_dict(), "tie_word_embeddings": tied}


def most_frames(text: PreTrainedConfig, pooled_grid: int) -> int:
    """As many frames as fit the LLM's positions, at most the usual 256."""
    positions = text.max_position_embeddings
    room = positions - min(ANSWER_ROOM, positions // 4)
    return max(1, min(256, room // pooled_grid**2))


def _write_weights(plan: _Plan, folder: Path) -> None:
    """Stream the published weights into shards, then the new modules; set the config's dtype."""
    with torch.device("meta"):
        skeleton = CrossLMMForConditionalGeneration(plan.config)
    new_modules = _check_names(plan, skeleton)
    writer, dtype = ShardWriter(folder), None
    for reader, rename in plan.parts:
        wanted = {name for name in reader.shapes if rename(name) is not None}
        for name, tensor in reader.tensors(wanted):
            writer.add(rename(name), tensor)
            if name.endswith("embed_tokens.weight"):
                dtype = tensor.dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same conversion twice gives the same files
        for path in new_modules:
            module = skeleton.get_submodule(path).to_empty(device="cpu")
            module.apply(skeleton._init_weights)
            weights = module.state_dict()
            if plan.seeded and path.endswith("dual_cross_attention"):
                weights |= _seeds(plan, path)
            for name, weight in weights.items():
                writer.add(f"{path}.{name}", weight.to(dtype))
            module.to("meta")
    writer.close()
    plan.config.architectures = [type(skeleton).__name__]
    plan.config.dtype = dtype


def _seeds(plan: _Plan, path: str) -> dict[str, torch.Tensor]:
    """Weights of a layer's two branches, from its own self-attention."""
    layer = path.removesuffix("dual_cross_attention")
    sources = {
        rename(name): (reader, name) for reader, rename in plan.parts for name in reader.shapes
    }

    def read(name: str) -> torch.Tensor:
        reader, published = sources[layer + name]
        return reader.tensor(published)

    return {
        f"{branch}.{name}": weight.clone()
        for name, weight in branch_weights(read)
        for branch in ("v2v", "t2v")
    }


def _check_names(plan: _Plan, skeleton: nn.Module) -> list[str]:
    """Compare names and shapes before anything is written; gives the modules that start new."""
    expected = {name: tuple(weight.shape) for name, weight in skeleton.state_dict().items()}
    if plan.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    given: set[str] = set()
    surplus, misshapen = [], []
    for reader, rename in plan.parts:
        for name, shape in reader.shapes.items():
            new = rename(name)
            if new is None:
                continue
            given.add(new)
            if new not in expected:
                surplus.append(name)
            elif expected[new] != shape:
                misshapen.append(f"{name} {shape} instead of {expected[new]}")
    new_modules = [path for path, _ in skeleton.named_modules() if path.endswith(plan.new)]
    # Never used without `vision_post_layernorm`; some checkpoints leave it out.
    unused = "model.vision_tower.post_layernorm"
    if not any(name.startswith(unused) for name in given):
        new_modules.append(unused)
    absent = [n for n in expected if n not in given and not n.startswith(tuple(new_modules))]
    if absent or surplus or misshapen:
        folders = " and ".join(str(reader.folder) for reader, _ in plan.parts)
        kinds = (("missing", absent), ("without a place", surplus), ("misshapen", misshapen))
        found = "; ".join(f"{kind}: {some(names)}" for kind, names in kinds if names)
        raise InputError(
            f"The weights in {folders} do not fit config.json ({found}); download weights and "
            "config.json again from the same place."
        )
    return new_modules


def main(arguments: list[str] | None = None) -> int:
    """Command line of the conversion; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m model.conversion", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("source", help="LLaVA-OneVision, or an encoder: folder or hub id")
    parser.add_argument("target", help="folder to create")
    parser.add_argument("--llm", help="Qwen2 or Qwen2.5 that goes with an encoder")
    parser.add_argument("--pooled-grid", type=int, help="side of the pooled grid, 1 or more")
    options = parser.parse_args(arguments)
    try:
        target = convert(
            options.source, options.target, llm=options.llm, pooled_grid=options.pooled_grid
        )
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{target}: {read_json(target, 'card.json')['note']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
