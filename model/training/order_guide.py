"""An auxiliary loss on visual tokens: what came last, what before that, and how to see it.

"What appears right before the cat?" needs every frame's tokens to know their object and the one
before it. From answers alone this was not learnt (right in .1 to .4 of cases after 7,000 steps).
Linear heads, thrown away afterwards, ask the LLM's hidden states for it; what came before was
still not learnt from them (.4 of frames after 6,000 steps), because a frame must first find the
right one among a hundred. So one head of self-attention in some layers is shown a way that takes a
single step at a time: the frame before tells what is new here; the last frame with something new
tells what came last, and where it was then, so which way it moves; the frame before that one knew
what had come last then. Answers' tokens are shown where to read it.

What moved must be told by a difference of two places. From labels of ways alone frames learnt to
call everything still, so they and their readers are asked for places, as numbers.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training.evidence_guide import patches_in
from model.training.order import HEADS, MOTIONS, NOWHERE, PLACE_HEADS, READERS, Order, named
from model.training.outputs import Outputs
from model.training.packing import IGNORE, Packed, answer_parts, links
from model.training.shown import ShownHead, ShownLook
from model.training.world_facts import NOUN_IDS
from model.training.world_parts import MAX_COUNT
from model.training.world_questions import KINDS, QA

# Layers whose first head is shown where to look: frames at the frame before them, at the last one
# with something new, and at the frame before them again, which knows more by then. In the last of
# them the three heads of a question's answer read what `Order.asked` says, one each, and look away
# where another reads: two names at once were often mixed up.
NEIGHBOUR, NEWS, NEIGHBOUR_AGAIN, ASKED = 0, 1, 2, 4
# Kinds whose answer a linear head reads from what the last T2V branch brings.
ANSWERS = {"direction": MOTIONS, "count": tuple(map(str, range(1, MAX_COUNT + 1)))}
LINK_LOOK_WEIGHT = 5.0  # where a list's next part is looked for: one of its seven tokens
LOOKS = (0, 2)  # layers in which frames look at what came last, in themselves
# Layers after which visual tokens are to know something. Text reads it in the layers that follow,
# so the last ones would be too late.
LAYERS = {
    "latest": 1, "copies": 1, "previous": -3, "motion": -3, "second": -3, "third": -3,
    "place": -3,
}  # fmt: skip
ASKED_FOR = 1  # the layer after which answers' tokens are to know the object that is asked for
NEAR = 0.05  # of the picture: errors of places below count by their square


def _cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of (n, C) logits; 0 where there is nothing to judge."""
    target = target.to(logits.device)
    total = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp_min(1)


def place_loss(told: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Of places (n, 2), by their distance; 0 where none is known."""
    known = ~places.isnan().any(1)
    if not known.any():
        return torch.zeros(())
    truth = places[known].to(told)
    return F.smooth_l1_loss(told[known.to(told.device)], truth, beta=NEAR) / NEAR


class OrderGuide(nn.Module):
    """Linear heads on the hidden states of visual tokens, and heads of attention that are shown."""

    def __init__(
        self, crosslmm: CrossLMMForConditionalGeneration, separators: Container[int]
    ) -> None:
        super().__init__()
        self.separators = separators
        layers = crosslmm.model.language_model.layers
        self.hidden = Outputs()
        for name, layer in LAYERS.items():
            self.hidden.watch(name, layers[layer])
        self.hidden.watch("asked for", layers[ASKED_FOR])
        width, nouns = crosslmm.config.text_config.hidden_size, len(NOUN_IDS) + 1
        sizes = dict.fromkeys(("latest", "second", "third", "previous"), nouns)
        sizes |= {"motion": len(MOTIONS), "copies": MAX_COUNT + 1}
        sizes["place"] = 2
        self.heads = nn.ModuleDict({name: nn.Linear(width, n) for name, n in sizes.items()})
        self.asked_for = nn.Linear(width, nouns)
        head_dim = layers[0].self_attn.head_dim
        self.readers = nn.ModuleDict({name: nn.Linear(head_dim, sizes[name]) for name in HEADS})
        self.places = nn.ModuleDict({str(head): nn.Linear(head_dim, 2) for head in PLACE_HEADS})
        shown = [(NEIGHBOUR, 0), (NEWS, 0), (NEIGHBOUR_AGAIN, 0)]
        shown += [(ASKED, head) for head in sorted(set(HEADS.values()))]
        self.answers = nn.ModuleDict(
            {kind: nn.Linear(width, len(answers)) for kind, answers in ANSWERS.items()}
        )
        last = crosslmm.config.dcal_layers[-1]
        if crosslmm.config.t2v:
            self.hidden.watch("brought", layers[last].dual_cross_attention.t2v.o_proj)
        self.shown = {
            (layer, head): ShownHead(crosslmm, layer, head, self.hidden)
            for layer, head in shown
            if layer < len(layers) and head < crosslmm.config.text_config.num_attention_heads
        }
        self.grid = crosslmm.config.original_grid
        sees = crosslmm.config.v2v and crosslmm.config.v2v_scope == "frame"
        self.looks = [
            ShownLook(crosslmm, layer, self.hidden)
            for layer in LOOKS
            if sees and layer in crosslmm.config.dcal_layers
        ]

    def loss(
        self, packed: Packed, orders: list[Order], kept: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of what is to be known of visual tokens, and that of the shown heads' attention.

        `kept` (B, T, n): the patches in the memory, where not all are.
        """
        news = torch.stack([order.news for order in orders])
        places = torch.arange(news.shape[1]).expand_as(news)
        first, second, third = (torch.stack([o.came(i) for o in orders]) for i in range(3))
        known = {
            "latest": first,
            "second": second,
            "third": third,
            "previous": torch.stack([order.previous for order in orders]),
            "motion": torch.stack([order.motion for order in orders]),
            "copies": torch.stack([order.copies for order in orders]),
        }
        # Few and hard ones are asked apart, or the others would hide them: in a crowded frame what
        # is new must be told from what was there before; most objects stand still and come alone.
        crowded = torch.stack([order.crowded for order in orders])
        rare = {"latest": crowded, "copies": crowded, "motion": known["motion"] > 0}
        rare |= {"second": second > 0, "third": third > 0}
        wanted = [("previous", known["previous"].where(news == places, IGNORE))]
        for name, few in rare.items():
            wanted.append((name, known[name].where(few, IGNORE)))
            wanted.append((name, known[name].where(~few, IGNORE)))
        labels = sum(self.label_loss(name, packed, truth) for name, truth in wanted) / 2
        spots = torch.stack([order.places for order in orders])
        told = self._told("place", packed, news.shape[1])
        labels = labels + place_loss(told, spots.flatten(0, 1))
        labels = labels + self.reading_loss(packed, orders, spots)
        neighbour = (places - 1).where(places > 0, IGNORE)
        looks = [
            self.frame_loss(NEIGHBOUR, packed, neighbour),
            self.frame_loss(NEWS, packed, news),
            self.frame_loss(NEIGHBOUR_AGAIN, packed, neighbour),
        ]
        for head in sorted(set(HEADS.values())):
            read = {name: known[name] for name, reader in HEADS.items() if reader == head}
            look, misread = self.question_loss(packed, orders, head, read)
            looks.append(look)
            labels = labels + misread
        looks.append(self.object_loss(orders, kept))
        labels = labels + self.answer_loss(packed) + self.asked_for_loss(packed)
        return labels, sum(looks)  # not stacked: where there is nothing to judge, 0 is on the CPU

    def label_loss(self, name: str, packed: Packed, wanted: torch.Tensor) -> torch.Tensor:
        """Of the last token of each frame; wanted (B, T)."""
        return _cross_entropy(self._told(name, packed, wanted.shape[1]), wanted.flatten())

    def reading_loss(
        self, packed: Packed, orders: list[Order], places: torch.Tensor
    ) -> torch.Tensor:
        """Of the places (B, T, 2) that two heads of an answer about a movement read."""
        total, text = torch.zeros(()), slice(packed.text_start, None)
        for head in PLACE_HEADS:
            found = self._wanted(packed, orders, head, ("direction",))
            if (ASKED, head) not in self.shown or not found:
                continue
            rows, columns, frames = (torch.tensor([one[i] for one in found]) for i in range(3))
            _, read = self.shown[ASKED, head].attention(text, packed, places.shape[1])
            read = read[rows, columns - 1 - packed.text_start].float()
            total = total + place_loss(self.places[str(head)](read), places[rows, frames])
        return total

    def _told(self, name: str, packed: Packed, frames: int) -> torch.Tensor:
        """What a linear head says of each frame's last token, (B * T, C)."""
        hidden = self.hidden[name][:, packed.visual_columns()]
        hidden = hidden.unflatten(1, (frames, -1))[:, :, -1]
        return self.heads[name](F.layer_norm(hidden.float(), hidden.shape[-1:])).flatten(0, 1)

    def frame_loss(self, layer: int, packed: Packed, wanted: torch.Tensor) -> torch.Tensor:
        """Mean -log(share of attention on the wanted frame) of the last token of each frame."""
        if (layer, 0) not in self.shown or (wanted == IGNORE).all():
            return torch.zeros(())
        per_frame = (packed.text_start - packed.video_start) // wanted.shape[1]
        rows = slice(packed.video_start + per_frame - 1, packed.text_start, per_frame)
        found, _ = self.shown[layer, 0].attention(rows, packed, wanted.shape[1])
        logs = (found + 1e-4).log().flatten(0, 1)
        return F.nll_loss(logs, wanted.flatten().to(logs.device), ignore_index=IGNORE)

    def question_loss(
        self, packed: Packed, orders: list[Order], head: int, known: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of answers' tokens for one of the three heads, and the loss of what it reads.

        `known` (B, T): the labels that it is to read, by name.
        """
        wanted = self._wanted(packed, orders, head)
        if (ASKED, head) not in self.shown or not wanted:
            return torch.zeros(()), torch.zeros(())
        rows, columns, frames, kinds, weights = zip(*wanted, strict=True)
        rows, columns, frames, weights = map(torch.tensor, (rows, columns, frames, weights))
        text, count = slice(packed.text_start, None), len(orders[0].event)
        shares, read = self.shown[ASKED, head].attention(text, packed, count)
        # The column before a token predicts it.
        place = rows, columns - 1 - packed.text_start
        shares = torch.cat((shares, 1 - shares.sum(-1, keepdim=True)), -1)  # NOWHERE is the last
        misread = torch.zeros((), device=read.device)
        for name, labels in known.items():
            reads = torch.tensor([name in READERS.get(kind, ()) for kind in kinds])
            target = labels[rows, frames].where(reads & (frames != NOWHERE), IGNORE)
            misread = misread + _cross_entropy(self.readers[name](read[place].float()), target)
        logs, weights = (shares[(*place, frames)].clamp_min(0) + 1e-4).log(), weights.to(shares)
        return -(logs * weights).sum() / weights.sum(), misread

    def _wanted(
        self,
        packed: Packed,
        orders: list[Order],
        head: int,
        kinds: Container[str] = KINDS,
    ) -> list[tuple[int, int, int, str, float]]:
        """Row, column, the frame that a head is to look at, kind and weight of answers' tokens."""
        return [
            (row, column, frames[head], qa.kind, LINK_LOOK_WEIGHT if column in linked else 1.0)
            for row, (spans, order) in enumerate(zip(packed.spans, orders, strict=True))
            for qa, start, end in spans
            if qa.kind in kinds
            for linked in [links(packed.input_ids[row], start, end, self.separators)]
            for frames, part in self._asked(order, qa, packed.input_ids[row], start, end)
            for column in part
            if frames[head] != IGNORE
        ]

    def _asked(
        self, order: Order, qa: QA, ids: torch.Tensor, start: int, end: int
    ) -> Iterator[tuple[tuple[int, int, int], range]]:
        """What the tokens of each part of an answer are to look at, and their columns."""
        asked, parts = order.asked(qa), answer_parts(ids, start, end, self.separators)
        if len(asked) > len(parts) and set(asked[len(parts)]) == {NOWHERE}:
            parts.append(range(end - 1, end))  # a list's end is told by there being nothing more
        return zip(asked, parts, strict=False)

    def answer_loss(self, packed: Packed) -> torch.Tensor:
        """What T2V brings in must itself tell answers that are a difference or a sum of places."""
        brought, total = self.hidden.get("brought"), torch.zeros(())
        for kind, answers in ANSWERS.items():
            found = [
                (row, start - 1 - packed.text_start, answers.index(qa.answer))
                for row, spans in enumerate(packed.spans)
                for qa, start, _ in spans
                if qa.kind == kind and qa.answer in answers
            ]
            if found and brought is not None:
                rows, columns, target = map(torch.tensor, zip(*found, strict=True))
                logits = self.answers[kind](brought[rows, columns].float())
                total = total + _cross_entropy(logits, target)
        return total

    def asked_for_loss(self, packed: Packed) -> torch.Tensor:
        """Of the object that a question names, told by the tokens of its answer.

        Without it a run from nothing did not carry the name there in 17,000 steps (a linear map
        found it in .05 of answers) and answered every "is there a ...?" with no.
        """
        found = [
            (row, column - 1, noun)
            for row, spans in enumerate(packed.spans)
            for qa, start, end in spans
            for noun in [named(qa.question)]
            for column in range(start, end)
            if noun > 0
        ]
        if not found:
            return torch.zeros(())
        rows, columns, target = map(torch.tensor, zip(*found, strict=True))
        hidden = self.hidden["asked for"][rows, columns].float()
        return _cross_entropy(self.asked_for(F.layer_norm(hidden, hidden.shape[-1:])), target)

    def object_loss(self, orders: list[Order], kept: torch.Tensor | None) -> torch.Tensor:
        """Mean -log(share of V2V attention on what came last), of the frames that show it."""
        wanted = torch.stack(
            [
                torch.stack([patches_in(boxes, self.grid).flatten() for boxes in order.boxes])
                for order in orders
            ]
        )
        if kept is not None:
            wanted = wanted.gather(2, kept.cpu())
        shows = wanted.any(-1)
        if not self.looks or not shows.any():
            return torch.zeros(())
        found = [look.mass(wanted)[shows.to(look.branch.gate.device)] for look in self.looks]
        return torch.stack([-(mass + 1e-4).log().mean() for mass in found]).sum()
