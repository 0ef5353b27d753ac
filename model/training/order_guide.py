"""An auxiliary loss on visual tokens: what came last, and what came before that.

"What appears right before the cat?" needs every frame's tokens to know their scene and the one
before it. From answers alone this was not learnt (right in .1 to .4 of cases after 7,000 steps), so
two linear heads, thrown away afterwards, ask the LLM's hidden states for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training.library import Video
from model.training.outputs import Outputs
from model.training.packing import IGNORE, Packed
from model.training.world_facts import NOUN_IDS, make_timeline


class OrderGuide(nn.Module):
    """Heads on the hidden states of visual tokens, one layer for each of the two questions."""

    def __init__(self, crosslmm: CrossLMMForConditionalGeneration) -> None:
        super().__init__()
        layers = crosslmm.model.language_model.layers
        self.hidden = Outputs()
        # Text reads what is known here in the layers that follow, so the last ones are too late.
        for name, layer in (("latest", 1), ("previous", len(layers) - 3)):
            self.hidden.watch(name, layers[layer])
        width, classes = crosslmm.config.text_config.hidden_size, len(NOUN_IDS) + 1
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, classes) for name in ("latest", "previous")}
        )

    @staticmethod
    def labels(video: Video) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of the object that came in last and of the one before it, (T,) each, per frame.

        0 is nothing yet; IGNORE where several came in at once.
        """
        order = make_timeline(video.scenes, video.times.tolist()).appearances
        firsts = [seen.first for seen in order]
        ids = [NOUN_IDS[a.noun] if firsts.count(a.first) == 1 else IGNORE for a in order]
        ids = torch.tensor([0, 0, *ids])
        came = torch.searchsorted(
            torch.tensor(firsts, dtype=torch.double), torch.as_tensor(video.times), right=True
        )
        return ids[came + 1], ids[came]

    def loss(self, packed: Packed, videos: list[Video]) -> torch.Tensor:
        """Mean cross-entropy of both heads on the last token of each frame."""
        latest, previous = (torch.stack(x) for x in zip(*map(self.labels, videos), strict=True))
        terms = []
        for name, wanted in (("latest", latest), ("previous", previous)):
            frames = wanted.shape[1]
            visual = packed.visual_columns()
            hidden = self.hidden[name][:, visual].unflatten(1, (frames, -1))[:, :, -1]
            normed = F.layer_norm(hidden.float(), hidden.shape[-1:])
            logits = self.heads[name](normed).flatten(0, 1)
            if (wanted != IGNORE).any():
                target = wanted.flatten().to(logits.device)
                terms.append(F.cross_entropy(logits, target, ignore_index=IGNORE))
        return torch.stack(terms).mean() if terms else torch.zeros(())
