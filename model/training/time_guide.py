"""An auxiliary loss for times: each digit is taken by a head of its own, where it is written.

The self-attention that finds the frame of the next thing in a list brings its time along, see
`model.training.time_path`. A head of the last layer reads one digit of that from the very token
that is to be followed by this digit, and else looks away from the answer.
"""

from __future__ import annotations

from collections.abc import Container

import torch

from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training.outputs import Outputs
from model.training.packing import Packed, answer_parts, links
from model.training.shown import ShownHead

# By head: the seconds that one of its digit stands for, how many digits there are, and how far from
# the colon of m:ss it is written.
DIGITS = {0: (1, 10, 2), 1: (10, 6, 1), 2: (60, 10, -1)}


class TimeGuide:
    """Where heads of the last layer's self-attention look while an answer is written.

    `separators`: ids of the tokens between the parts of a list; `colon`: that of ":".
    """

    def __init__(
        self, crosslmm: CrossLMMForConditionalGeneration, separators: Container[int], colon: int
    ) -> None:
        self.separators, self.colon, self.seen = separators, colon, Outputs()
        text = crosslmm.config.text_config
        last, heads = text.num_hidden_layers - 1, text.num_attention_heads
        self.shown = {i: ShownHead(crosslmm, last, i, self.seen) for i in DIGITS if i < heads}

    def loss(self, packed: Packed) -> torch.Tensor:
        """Mean -log(share of attention) on the token itself before a head's digit.

        And of a list's other tokens on what is not the answer, for its tokens bring times. Not of
        those that decide whether more is to come, nor of other answers: they may need these heads.
        """
        total, text = torch.zeros(()), slice(packed.text_start, None)
        for head, shown in self.shown.items():
            found = self._columns(packed, DIGITS[head][2])
            if not found:
                continue
            rows, columns, digits, starts = map(torch.tensor, zip(*found, strict=True))
            weights, _ = shown.weights(text, packed)
            # The column before a token predicts it.
            mine = weights[rows, columns - 1 - packed.text_start]
            share = mine.gather(1, (columns - 1)[:, None])[:, 0]
            place = torch.arange(mine.shape[1])
            answer = (mine * (place >= starts[:, None] - 1)).sum(-1)
            for wanted, some in ((share, digits), ((1 - answer).clamp_min(0), ~digits)):
                logs = (wanted[some.to(share.device)] + 1e-4).log()
                total = total - logs.sum() / max(1, len(logs))
        return total

    def _columns(self, packed: Packed, offset: int) -> list[tuple[int, int, bool, int]]:
        """Row and column of answers' tokens, whether it is the digit, and the answer's start."""
        found = []
        for row, spans in enumerate(packed.spans):
            ids = packed.input_ids[row]
            for qa, start, end in spans:
                if qa.kind != "scenes":
                    continue
                free = set(links(ids, start, end, self.separators))
                digits = set()
                for part in answer_parts(ids, start, end, self.separators):
                    colons = [c for c in part if int(ids[c]) == self.colon]
                    digits |= {c + offset for c in colons[-1:]}
                found += [(row, c, c in digits, start) for c in range(start, end) if c not in free]
        return found
