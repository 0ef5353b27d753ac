"""An auxiliary loss on visual tokens: what came last, what before that, and how to see it.

"What appears right before the cat?" needs every frame's tokens to know their object and the one
before it. From answers alone this was not learnt (right in .1 to .4 of cases after 7,000 steps).
Linear heads, thrown away afterwards, ask the LLM's hidden states for it; what came before was
still not learnt from them (.4 of frames after 6,000 steps), because a frame must first find the
right one among a hundred. So one head of self-attention in some layers is shown a way that takes a
single step at a time: the frame before tells what is new here; the last frame with something new
tells what came last; the frame before that one knew what had come last then. Where an object was a
frame ago also tells which way it moves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training.library import Video
from model.training.outputs import Outputs
from model.training.packing import IGNORE, Packed
from model.training.world_facts import NOUN_IDS, Appearance, make_timeline
from model.training.world_phrases import STILL, plural
from model.training.world_questions import QA

NAMES = {name: i for noun, i in NOUN_IDS.items() for name in (noun, plural(noun))}
MOTIONS = (STILL, "left", "right", "up", "down")
# Layers whose first head is shown where to look: frames at the frame before them, at the last one
# with something new, and at the frame before them again, which knows more by then. In the last of
# them a question's first head finds the frame in which its object comes in (the one after it when
# it is about a movement), and its second head the frame in which the next one does.
NEIGHBOUR, NEWS, NEIGHBOUR_AGAIN, ASKED = 0, 1, 2, 4


@dataclass(frozen=True)
class Order:
    """What came when, by the T frames of a video that were sampled."""

    ids: torch.Tensor  # (E,) of the objects in the order they came; IGNORE: not alone
    arrival: torch.Tensor  # (E,) index of the first frame that shows it
    event: torch.Tensor  # (T,) index of the last object to come; -1: nothing yet
    crowded: torch.Tensor  # (T,) bool: several kinds of object are to be seen
    motion: torch.Tensor  # (T,) index in MOTIONS of the only object since the frame before; IGNORE

    @classmethod
    def of(cls, video: Video) -> Order:
        """That of the frames that were sampled."""
        times = video.times.tolist()
        came = make_timeline(video.scenes, times).appearances
        firsts = [seen.first for seen in came]
        ids = [NOUN_IDS[one.noun] if firsts.count(one.first) == 1 else IGNORE for one in came]
        return cls(
            torch.tensor(ids, dtype=torch.long),
            torch.from_numpy(np.searchsorted(video.times, firsts)),
            torch.from_numpy(np.searchsorted(firsts, video.times, side="right")) - 1,
            torch.tensor([sum(t in one.seen for one in came) > 1 for t in times]),
            torch.tensor([_motion(came, *pair) for pair in pairwise([-1.0, *times])]),
        )

    @property
    def news(self) -> torch.Tensor:
        """Per frame: the last one, itself included, that shows something new; or IGNORE, (T,)."""
        return torch.cat((torch.tensor([IGNORE]), self.arrival))[self.event + 1]

    def labels(self, back: int) -> torch.Tensor:
        """Id of the object that came last (`back` 0) or before it (1), (T,); 0: there is none."""
        padded = torch.cat((torch.zeros(2, dtype=torch.long), self.ids))
        return padded[self.event + 2 - back]

    def asked(self, qa: QA) -> list[tuple[int, int]]:
        """The frame in which the object of a question comes in, and that in which the next does.

        IGNORE: none. A list of scenes has a pair for each of its parts: the second is its own.
        """
        if qa.kind == "scenes":
            return [(IGNORE, frame) for frame in self.arrival.unique().tolist()]
        found = (self.ids == named(qa.question)).nonzero().flatten().tolist()
        if not found:
            return []
        frames = [*self.arrival.tolist(), IGNORE]
        late = qa.kind == "direction" and len(self.motion) > frames[found[0]] + 1
        return [(frames[found[0]] + late, frames[found[0] + 1])]


def _motion(came: Sequence[Appearance], before: float, now: float) -> int:
    here = [one for one in came if now in one.seen]
    if len(here) != 1 or len(here[0].actors) != 1 or before not in here[0].seen:
        return IGNORE
    actor = here[0].actors[0]
    right, down = actor.x1 - actor.x0, actor.y1 - actor.y0
    if not actor.moves:
        return MOTIONS.index(STILL)
    if abs(right) > abs(down):
        return MOTIONS.index("right" if right > 0 else "left")
    return MOTIONS.index("down" if down > 0 else "up")


def named(question: str) -> int:
    """Id of the object that a question names; -1: of none."""
    words = question.lower()
    found = [noun for noun in NAMES if re.search(rf"\b{noun}\b", words)]
    return NAMES[max(found, key=len)] if found else -1


class ShownHead:
    """Where a head of a layer's self-attention looks, from its projections."""

    def __init__(
        self, crosslmm: CrossLMMForConditionalGeneration, layer: int, head: int, seen: Outputs
    ) -> None:
        language_model = crosslmm.model.language_model
        self.module, self.layer, self.seen = language_model.layers[layer].self_attn, layer, seen
        width = self.module.head_dim
        key_head = head // self.module.num_key_value_groups
        self.columns = [slice(i * width, (i + 1) * width) for i in (head, key_head)]
        seen.watch("rotary", language_model.rotary_emb)
        for name in ("q_proj", "k_proj"):
            seen.watch((layer, name), getattr(self.module, name))

    def attention(self, rows: slice, packed: Packed, frames: int) -> torch.Tensor:
        """Shares (B, L, T) of each frame, for queries of `rows`; the rest lies on text."""
        query, key = (
            self.seen[self.layer, name][..., columns]
            for name, columns in zip(("q_proj", "k_proj"), self.columns, strict=True)
        )
        cos, sin = self.seen["rotary"]
        query, key = (x[:, 0] for x in apply_rotary_pos_emb(query[:, None], key[:, None], cos, sin))
        mask = packed.attention_mask[:, 0, rows].to(query.device)
        scores = (query[:, rows] @ key.mT).float() * self.module.scaling
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return weights[..., packed.visual_columns()].unflatten(-1, (frames, -1)).sum(-1)


class OrderGuide(nn.Module):
    """Heads on the hidden states of visual tokens, one layer for each of the three questions."""

    def __init__(self, crosslmm: CrossLMMForConditionalGeneration, comma: int) -> None:
        super().__init__()
        self.comma = comma
        layers = crosslmm.model.language_model.layers
        self.hidden = Outputs()
        # Text reads what is known here in the layers that follow, so the last ones are too late.
        for name, layer in (("latest", 1), ("previous", -3), ("motion", -3)):
            self.hidden.watch(name, layers[layer])
        width, nouns = crosslmm.config.text_config.hidden_size, len(NOUN_IDS) + 1
        classes = {"latest": nouns, "previous": nouns, "motion": len(MOTIONS)}
        self.heads = nn.ModuleDict({name: nn.Linear(width, n) for name, n in classes.items()})
        shown = [(NEIGHBOUR, 0), (NEWS, 0), (NEIGHBOUR_AGAIN, 0), (ASKED, 0), (ASKED, 1)]
        self.shown = {
            (layer, head): ShownHead(crosslmm, layer, head, self.hidden)
            for layer, head in shown
            if layer < len(layers)
        }

    def loss(self, packed: Packed, videos: list[Video]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of the linear heads, and that of the shown heads' attention."""
        orders = [Order.of(video) for video in videos]
        news = torch.stack([order.news for order in orders])
        places = torch.arange(news.shape[1]).expand_as(news)
        is_news = news == places
        latest, previous = (torch.stack([o.labels(back) for o in orders]) for back in (0, 1))
        # Crowded frames are few and hard: what is new must be told from what was there before.
        crowded = torch.stack([order.crowded for order in orders])
        labels = (
            self.label_loss("latest", packed, latest.where(~crowded, IGNORE))
            + self.label_loss("latest", packed, latest.where(crowded, IGNORE))
            + self.label_loss("previous", packed, previous.where(is_news, IGNORE))
            + self.label_loss("motion", packed, torch.stack([o.motion for o in orders]))
        ) / 2
        neighbour = (places - 1).where(places > 0, IGNORE)
        looks = [
            self._frame_loss(NEIGHBOUR, packed, neighbour),
            self._frame_loss(NEWS, packed, news),
            self._frame_loss(NEIGHBOUR_AGAIN, packed, neighbour),
            self._question_loss(packed, orders, head=0),
            self._question_loss(packed, orders, head=1),
        ]
        return labels, torch.stack(looks).sum()

    def label_loss(self, name: str, packed: Packed, wanted: torch.Tensor) -> torch.Tensor:
        """Of the last token of each frame; wanted (B, T)."""
        hidden = self.hidden[name][:, packed.visual_columns()]
        hidden = hidden.unflatten(1, (wanted.shape[1], -1))[:, :, -1]
        logits = self.heads[name](F.layer_norm(hidden.float(), hidden.shape[-1:])).flatten(0, 1)
        target = wanted.flatten().to(logits.device)
        total = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
        return total / (target != IGNORE).sum().clamp_min(1)

    def _frame_loss(self, layer: int, packed: Packed, wanted: torch.Tensor) -> torch.Tensor:
        """Mean -log(share of attention on the wanted frame) of the last token of each frame."""
        if (layer, 0) not in self.shown or (wanted == IGNORE).all():
            return torch.zeros(())
        per_frame = (packed.text_start - packed.video_start) // wanted.shape[1]
        rows = slice(packed.video_start + per_frame - 1, packed.text_start, per_frame)
        found = self.shown[layer, 0].attention(rows, packed, wanted.shape[1])
        logs = (found + 1e-4).log().flatten(0, 1)
        return F.nll_loss(logs, wanted.flatten().to(logs.device), ignore_index=IGNORE)

    def _question_loss(self, packed: Packed, orders: list[Order], head: int) -> torch.Tensor:
        """The same of answers' tokens, for one of the two heads."""
        wanted = [
            (row, column, pair[head])
            for row, (spans, order) in enumerate(zip(packed.spans, orders, strict=True))
            for qa, start, end in spans
            for pair, part in zip(
                order.asked(qa), self._parts(packed.input_ids[row], start, end), strict=False
            )
            for column in part
            if pair[head] != IGNORE
        ]
        if (ASKED, head) not in self.shown or not wanted:
            return torch.zeros(())
        rows, columns, frames = torch.tensor(wanted).T
        text = slice(packed.text_start, None)
        found = self.shown[ASKED, head].attention(text, packed, len(orders[0].event))
        # The column before a token predicts it.
        return -(found[rows, columns - 1 - packed.text_start, frames] + 1e-4).log().mean()

    def _parts(self, ids: torch.Tensor, start: int, end: int) -> list[range]:
        """Columns of an answer's parts, without commas and without its end."""
        commas = [c for c in range(start, end) if ids[c] == self.comma]
        begins, ends = [start, *(c + 1 for c in commas)], [*commas, end - 1]
        return list(map(range, begins, ends))
