"""What published checkpoints call their weights, and what those are called here.

Hub files, transformers 4.52 and later, and transformers 5 prefix the same names differently; all
are accepted. A rename that gives None marks a weight that is known and not needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from model.configuration_crosslmm import CrossLMMConfig

Rename = Callable[[str], "str | None"]
LLAVA_ONEVISION = (
    (r"^(?:model\.)?image_newline$", "model.frame_separator"),
    (r"^(?:model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
    (r"^(?:language_model\.)?lm_head\.", "lm_head."),
    (r"^(?:model\.)?language_model\.(?:model\.)?", "model.language_model."),
)


def llava_onevision_names(config: CrossLMMConfig) -> Rename:
    """Names of a LLaVA-OneVision whose encoder may have layers behind the features it uses."""
    layers = config.vision_config.num_hidden_layers

    def rename(name: str) -> str | None:
        for pattern, replacement in LLAVA_ONEVISION:
            new, count = re.subn(pattern, replacement, name)
            if count:
                break
        layer = re.match(r"model\.vision_tower\.encoder\.layers\.(\d+)\.", new)
        if _unneeded(new) or (layer and int(layer[1]) >= layers):
            return None
        return None if new == "lm_head.weight" and config.tie_word_embeddings else new

    return rename


def encoder_names(name: str) -> str | None:
    """Names of a whole SigLIP or of its vision tower alone."""
    if name.startswith("text_model.") or name in ("logit_scale", "logit_bias"):
        return None  # the other tower
    new = "model.vision_tower." + name.removeprefix("vision_model.")
    return None if _unneeded(new) else new


def llm_names(config: CrossLMMConfig) -> Rename:
    """Names of a Qwen2 with its language-model head."""

    def rename(name: str) -> str | None:
        if name == "lm_head.weight":
            return None if config.tie_word_embeddings else name
        new = re.sub(r"^model\.", "model.language_model.", name)
        return None if _unneeded(new) else new

    return rename


def _unneeded(name: str) -> bool:
    """Buffers of older versions, and the pooling head that no feature passes."""
    return name.endswith(("position_ids", "inv_freq")) or name.startswith("model.vision_tower.head")
