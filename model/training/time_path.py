"""Give a trained model a way to tell the time of what it finds late.

`python -m model.training.time_path --start RUN/model --out OUT --steps 3800 --learning-rate 1e-3
--level 10`: see `model.training.paths`.

In a list of what happens, self-attention of the fifth layer finds the frame of the next thing, and
by then visual tokens have all but lost their time: a linear map tells the last digit of one in two.
But visual-to-visual attention sees the original tokens, which have their time, and some heads are
hardly used. So:

1. A head of V2V looks at all patches alike and writes the digits of the frame's time into those
   directions of the residual stream that have the least in them.
2. The head of self-attention that finds the frame brings them to the text, and
3. heads of the last layer write them as the next token, one head for each digit.

When the last heads are to read, and when not, is then trained (`model.training.time_guide`).
"""

from __future__ import annotations

import itertools
from collections.abc import Container
from typing import Any

import torch

from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training.order import HEADS
from model.training.order_guide import ASKED
from model.training.paths import (
    PathLoss,
    PathTrainer,
    Seen,
    command,
    head_rows,
    least_squares,
    make_room,
    reads,
    size_of,
    weakest_directions,
)
from model.training.time_guide import DIGITS, TimeGuide

# Layers and heads: of V2V, without which answers were the same; of self-attention that finds.
V2V, FINDS = (2, 2), (ASKED, HEADS["latest"])
SHARE = 0.1  # size of a digit in a token, of the token's
BOOST = 4.0  # what a digit that is read adds to its logit
DRAWS = 4


def digits_of(seconds: torch.Tensor) -> torch.Tensor:
    """One-hot digits of times (n,) that are cut off as on a clock, (n, all digits) float64."""
    whole = (seconds + 1e-3).long()
    hot = [torch.nn.functional.one_hot(whole // unit % n, n) for unit, n, _ in DIGITS.values()]
    return torch.cat(hot, -1).double()


class TimesLoss(PathLoss):
    """Also asks where the last layer looks for digits.

    `colon`: id of the one in a time.
    """

    def __init__(
        self, crosslmm: CrossLMMForConditionalGeneration, separators: Container[int], colon: int
    ) -> None:
        super().__init__(crosslmm, separators)
        self.times = TimeGuide(crosslmm, separators, colon)

    def guides(self, batch: dict[str, Any]) -> torch.Tensor:
        """The guide's loss for each answer token."""
        lost = self.times.loss(batch["packed"])
        self.told["lost"] = lost.item()
        return lost


class TimesTrainer(PathTrainer):
    """Adds the path for times."""

    taught = ("scenes",)

    def make_loss(self, separators: tuple[int, int]) -> TimesLoss:
        """Of answers and their times."""
        return TimesLoss(self.crosslmm, separators, *self.prompt.encode(":"))

    def freeze(self) -> None:
        """All but the last layer, and its part of the path."""
        super().freeze()
        attention = self.crosslmm.model.language_model.layers[-1].self_attn
        width = attention.head_dim
        path = torch.tensor([i * width + j for i, (_, n, _) in DIGITS.items() for j in range(n)])

        def keep(weight: torch.Tensor, dim: int) -> None:
            weight.register_hook(lambda grad: grad.index_fill(dim, path.to(grad.device), 0))

        keep(attention.v_proj.weight, 0)
        keep(attention.v_proj.bias, 0)
        keep(attention.o_proj.weight, 1)

    def add_path(self, seen: Seen) -> None:
        """Change the model's weights in place, by what `seen` shows of it."""
        model = self.crosslmm.model.language_model
        branch = model.layers[V2V[0]].dual_cross_attention.v2v
        finds, last = model.layers[FINDS[0]].self_attn, model.layers[-1].self_attn
        count = sum(n for _, n, _ in DIGITS.values())
        brings, finder = head_rows(branch, V2V[1]), head_rows(finds, FINDS[1])
        branch.o_proj.weight[:, brings] = 0
        make_room(finds, finder, seen, count)
        for head, (_, n, _) in DIGITS.items():
            make_room(last, head_rows(last, head), seen, n)
        outputs = seen.all_outputs(model.layers)
        in_frames = weakest_directions([*outputs[V2V[0]], *outputs[FINDS[0] - 1]], count)
        in_text = weakest_directions(outputs[FINDS[0]], count)
        weight, bias = self._fit_digits(seen)
        for projection in (branch.q_proj, branch.v_proj):
            projection.weight[brings], projection.bias[brings] = 0, 0
        branch.v_proj.weight[brings][:count] = weight.T.float()
        branch.v_proj.bias[brings][:count] = bias.float()
        written = SHARE * size_of(seen.visual(outputs[V2V[0]]))
        write = in_frames * written / branch.gate.double().tanh()
        branch.o_proj.weight[:, brings][:, :count] = write.float()
        found = size_of(seen.visual(outputs[FINDS[0] - 1]))
        reads(model.layers[FINDS[0]], finder, in_frames, written, found)
        size = size_of(seen.text(outputs[FINDS[0]]))
        written, place = SHARE * size, 0
        finds.o_proj.weight[:, finder][:, :count] = (in_text * written).float()
        for head, (_, n, _) in DIGITS.items():
            rows = head_rows(last, head)
            reads(model.layers[-1], rows, in_text[:, place : place + n], written, size)
            write = BOOST * digits_as_logits(self, n, size_of(seen.text(outputs[-1])))
            last.o_proj.weight[:, rows][:, :n] = write.float()
            place += n

    def _fit_digits(self, seen: Seen) -> tuple[torch.Tensor, torch.Tensor]:
        """Least squares from the mean of a frame's original tokens to its time's digits.

        Of random times, with all patches and with the share of them that training leaves.
        """
        means, digits = [], []
        for batch, share in itertools.product(seen.batches, (1.0, self.args.keep) * DRAWS):
            memory, times = self.memory_at_any_time(batch)
            chosen = torch.rand(memory.shape[:3]).topk(round(share * memory.shape[2])).indices
            chosen = chosen.unsqueeze(-1).expand(-1, -1, -1, memory.shape[3])
            means.append(memory.gather(2, chosen).mean(2).flatten(0, 1))
            digits.append(digits_of(times.flatten()))
        return least_squares(torch.cat(means), torch.cat(digits))


def digits_as_logits(trainer: PathTrainer, n: int, size: float) -> torch.Tensor:
    """What adds 1 to the logit of each of the first `n` digits, in the last layer's text, (D, n).

    `size`: the norm of that text.
    """
    norm = trainer.crosslmm.model.language_model.norm.weight.double()
    tokens = [trainer.prompt.encode(str(digit))[0] for digit in range(10)]
    rows = trainer.crosslmm.lm_head.weight[tokens].double()
    rows = (rows - rows.mean(0))[:n]
    write = torch.nn.functional.normalize(rows * norm, dim=-1)
    each = (write * norm * rows).sum(-1, keepdim=True) * len(norm) ** 0.5 / size
    return (write / each).T


if __name__ == "__main__":
    command(TimesTrainer)
