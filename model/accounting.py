"""What a video costs, counted from a config: tokens, operations, key/value bytes.

    python -m model.accounting --preset crosslmm-7b --frames 32,64,128,256,1024,3600

Three systems are counted by the same formulas, those of `model.cost_formulas`:

- `crosslmm`: pooled tokens in the LLM, original tokens behind dual cross-attention.
- `unpooled`: the same encoder, projector and LLM with every original token in the LLM.
- `llava-onevision`: pooled after the projector to ceil(side / 2)^2 tokens per frame (196 for a
  27 x 27 grid) and one newline token after the last frame.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from model.configuration_crosslmm import PRESETS, CrossLMMConfig
from model.cost_formulas import (
    ITEM_BYTES,
    SYSTEMS,
    KeyValueBytes,
    Operations,
    Parameters,
    Precision,
    System,
    Tokens,
    count_kv_bytes,
    count_parameters,
    count_tokens,
    encoder_operations,
    llm_operations,
    projector_operations,
    t2v_operations,
    v2v_operations,
)


@dataclass(frozen=True)
class Account:
    """One system on one video."""

    system: System
    frames: int
    parameters: Parameters
    tokens: Tokens
    operations: Operations
    kv_bytes: KeyValueBytes


def account(
    config: CrossLMMConfig,
    frames: int,
    text_tokens: int = 0,
    generated_tokens: int = 0,
    *,
    system: System = "crosslmm",
    kv_precision: Precision = "native",
    dtype: str = "bfloat16",
    text_before: int = 0,
    logits_to_keep: int = 1,
) -> Account:
    """Count one video with one question and its answer.

    Args:
        config: the model; for `unpooled` and `llava-onevision` its encoder and its LLM.
        frames: T.
        text_tokens: tokens of the prompt that are not visual.
        generated_tokens: tokens of the answer; the last one is never fed back.
        system: which of the three systems.
        kv_precision: of the T2V keys and values: `native` (`dtype`), `int8` or `int4`.
        dtype: of weights, activations and the LLM's cache.
        text_before: how many of `text_tokens` stand before the video, where T2V does not reach.
        logits_to_keep: as in `forward`: prompt positions whose logits are computed, 0 for all.

    Raises:
        ValueError: a number that cannot be, or an unknown choice.

    """
    _check(frames, text_tokens, generated_tokens, text_before, logits_to_keep)
    for name, value, allowed in (
        ("system", system, SYSTEMS),
        ("kv_precision", kv_precision, get_args(Precision)),
        ("dtype", dtype, tuple(ITEM_BYTES)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    tokens = count_tokens(config, frames, text_tokens, generated_tokens, system)
    llm, masked = llm_operations(config, tokens, logits_to_keep)
    crosslmm = system == "crosslmm"
    return Account(
        system=system,
        frames=frames,
        parameters=count_parameters(config, system),
        tokens=tokens,
        operations=Operations(
            encoder=encoder_operations(config, frames),
            projector=projector_operations(config, tokens, system),
            llm=llm,
            v2v=v2v_operations(config, tokens) if crosslmm else 0,
            t2v=t2v_operations(config, tokens, text_before) if crosslmm else 0,
            masked=masked,
        ),
        kv_bytes=count_kv_bytes(
            config,
            frames,
            tokens.llm,
            system=system,
            kv_precision=kv_precision,
            dtype=dtype,
        ),
    )


def _check(
    frames: int, text_tokens: int, generated_tokens: int, text_before: int, logits_to_keep: int
) -> None:
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    if min(text_tokens, generated_tokens, text_before, logits_to_keep) < 0:
        raise ValueError(
            "token counts must not be negative, got "
            f"{text_tokens=}, {generated_tokens=}, {text_before=}, {logits_to_keep=}"
        )
    if text_before > text_tokens:
        raise ValueError(
            f"text_before counts some of text_tokens, so at most {text_tokens}; got {text_before}"
        )


def as_row(result: Account) -> dict[str, object]:
    """One row of the JSON report."""
    counted = asdict(result.operations)
    del counted["masked"]
    return {
        "frames": result.frames,
        "system": result.system,
        "tokens": {"original": result.tokens.original, "llm": result.tokens.llm},
        "operations": {**counted, "total": result.operations.total},
        "kv_bytes": {**asdict(result.kv_bytes), "total": result.kv_bytes.total},
    }


def as_table(accounts: list[Account]) -> str:
    """The same for reading: tera-operations and megabytes (10^6)."""
    head = ("frames", "system", "original", "in LLM", "encoder", "projector", "LLM", "V2V", "T2V")
    head += ("total", "causal", "KV LLM", "KV T2V")
    rows = [head]
    for a in accounts:
        counts = a.operations
        parts = (counts.encoder, counts.projector, counts.llm, counts.v2v, counts.t2v)
        parts += (counts.total, counts.causal)
        rows.append(
            (f"{a.frames}", a.system, f"{a.tokens.original:,}", f"{a.tokens.llm:,}")
            + tuple(f"{n / 1e12:,.2f}" for n in parts)
            + tuple(f"{n / 1e6:,.1f}" for n in (a.kv_bytes.llm, a.kv_bytes.t2v))
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(r, widths, strict=True)) for r in rows]
    p = accounts[0].parameters
    sizes = " + ".join(f"{name} {n / 1e6:,.2f}" for name, n in asdict(p).items() if n)
    return "\n".join(
        [
            f"Parameters, million: {p.total / 1e6:,.2f} = {sizes}",
            "Operations in 10^12 (total counts every pair in causal attention, 'causal' only the "
            "visible ones); keys and values in MB.",
            *lines,
        ]
    )


def _frames(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(
            f"expected frame counts of at least 1, separated by commas, got {text!r}"
        )
    return counts


def main(arguments: list[str] | None = None) -> None:
    """Command line: a table, or `--json`."""
    parser = argparse.ArgumentParser(
        prog="python -m model.accounting",
        description="Tokens, operations and key/value bytes of CrossLMM and what it replaces.",
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="crosslmm-7b")
    parser.add_argument("--model", metavar="FOLDER", help="count this checkpoint, not a preset")
    parser.add_argument("--frames", type=_frames, default="32,64,128,256,1024,3600")
    parser.add_argument("--text-tokens", type=int, default=0, help="of a question after the video")
    parser.add_argument("--generated-tokens", type=int, default=0)
    parser.add_argument("--kv-precision", choices=get_args(Precision), default="native")
    parser.add_argument("--dtype", choices=tuple(ITEM_BYTES), default="bfloat16")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.model and not (Path(options.model) / "config.json").is_file():
        parser.error(f"expected a folder with a config.json, got {options.model}")
    try:
        config = (
            CrossLMMConfig.from_pretrained(options.model)
            if options.model
            else CrossLMMConfig.from_preset(options.preset)
        )
        accounts = [
            account(
                config,
                frames,
                options.text_tokens,
                options.generated_tokens,
                system=system,
                kv_precision=options.kv_precision,
                dtype=options.dtype,
            )
            for frames in options.frames
            for system in SYSTEMS
        ]
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if options.json:
        report = {
            "parameters": asdict(accounts[0].parameters),
            "rows": [as_row(result) for result in accounts],
        }
        print(json.dumps(report, indent=2))
    else:
        print(as_table(accounts))


if __name__ == "__main__":
    main()
