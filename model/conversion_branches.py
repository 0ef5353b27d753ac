"""New dual cross-attention that starts as a copy of its layer's own self-attention.

An LLM that has learned to read projected visual tokens (a LLaVA-OneVision) knows in each layer how
to look for them; the new branches have the same shapes, so they begin with that. Gates stay closed:
the model answers as before until training opens them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from model.modeling_crosslmm import CrossLMMForConditionalGeneration

PROJECTIONS = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias", "v_proj.weight")
PROJECTIONS += ("v_proj.bias", "o_proj.weight")


def branch_weights(
    layer: Callable[[str], torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of one branch, without its gate, from those of its decoder layer by name.

    Keys and values come from tokens that are normalised once for all layers, so the layer's own
    normalisation weights go into the projections.
    """
    norm = layer("input_layernorm.weight")
    yield "query_norm.weight", norm
    for name in PROJECTIONS:
        weight = layer(f"self_attn.{name}")
        if name in ("k_proj.weight", "v_proj.weight"):
            weight = (weight.float() * norm.float()).to(weight.dtype)
        yield name, weight


@torch.no_grad()
def seed_branches(crosslmm: CrossLMMForConditionalGeneration) -> None:
    """Give every branch of a model its layer's self-attention and close the gates."""
    crosslmm.model.memory_norm.weight.fill_(1.0)
    for i in crosslmm.config.dcal_layers:
        layer = crosslmm.model.language_model.layers[i]
        for branch in layer.dual_cross_attention.children():
            for name, weight in branch_weights(layer.get_parameter):
                branch.get_parameter(name).copy_(weight)
            branch.gate.zero_()
