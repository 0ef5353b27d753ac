"""The run card at the end of the panel "What it saved", and what can be taken along."""

from __future__ import annotations

from typing import Any

from app.panels.draw import esc
from app.run_card import as_text

_REVISION_CHARS = 14  # of the sum, enough to tell checkpoints apart by eye


def run_card_section(card: dict[str, Any], export: str) -> str:
    """The card in short, whole on request; `export` is the address of the visitor's exports."""
    text = as_text(card)
    facts = "".join(
        f"<div><dt>{name}</dt><dd>{esc(value)}</dd></div>" for name, value in _facts(card)
    )
    link = esc(card["link"])
    return (
        '<div class="run-card"><h3>Run card</h3>'
        f'<dl class="facts">{facts}</dl>'
        '<p class="actions">'
        '<button type="button" class="chip" data-copy="run-card-text">Copy</button>'
        f'<a class="chip" href="{esc(export)}/run-card.json" download>Download JSON</a>'
        f'<a class="chip" href="{link}" data-copy-link>Copy link to these settings</a>'
        '<span class="copied" role="status"></span></p>'
        '<details class="more"><summary>The whole card</summary>'
        f'<pre id="run-card-text" tabindex="0">{esc(text)}</pre></details>'
        "<h3>Conversation</h3>"
        '<p class="actions">'
        f'<a class="chip" href="{esc(export)}/conversation.md" download>Markdown</a>'
        f'<a class="chip" href="{esc(export)}/conversation.json" download>JSON</a></p></div>'
    )


def _facts(card: dict[str, Any]) -> list[tuple[str, str]]:
    model, settings = card["model"], card["settings"]
    kind, _, revision = model.get("revision", "").partition(":")
    shown = f"{kind} {revision[:_REVISION_CHARS]}" if revision else "not known"
    sample = card["video"]["sample"]
    return [
        ("Model", model["name"]),
        ("Revision", shown),
        ("Weights", f"{model.get('quantization', '')} · {model.get('dtype', '')}"),
        ("Attention kernel", model.get("attention_kernel", "not known")),
        ("Keys and values", model.get("kv_precision", "not known")),
        ("Decoding", f"{settings['decoding']}, so no seed"),
        ("Frames", f"{settings['frames']} × {settings['pooled_tokens_per_frame']} tokens"),
        ("Video", f"sample {sample}" if sample else "own file"),
    ]
