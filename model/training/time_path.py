"""Give a trained model a way to tell the time of what it finds late.

`python -m model.training.time_path --start RUN/model --out OUT --minutes 13 --learning-rate 1e-3
--level 7`: the options are those of `model.training.bundled`; resumes.

In a list of what happens, self-attention of the fifth layer finds the frame of the next thing, and
by then visual tokens have all but lost their time: a linear map tells the last digit of one in two.
What they carry is hundreds of times the size of a weight's step, so asking for the digits taught
nothing in thousands of steps. But visual-to-visual attention sees the original tokens, which have
their time, and some heads are hardly used. So, by least squares:

1. A head of V2V looks at all patches alike and writes the digits of the frame's time into those
   directions of the residual stream that have the least in them.
2. The head of self-attention that finds the frame brings them to the text, and
3. heads of the last layer write them as the next token, one head for each digit.

Heads get the dimensions for it by dropping what they use least. When the last heads are to read,
and when not, is then trained (`model.training.time_guide`), in the last layer only: steps of
Adam on all weights, small as they are, undo in 250 steps what least squares have found.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch

from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training.bundled import Trainer, arguments, make_encoder
from model.training.collate import Batch
from model.training.guided_loss import GuidedLoss
from model.training.order import HEADS
from model.training.order_guide import ASKED
from model.training.packing import Packed
from model.training.time_guide import DIGITS, TimeGuide
from model.types import InputError

# Layers and heads: of V2V, without which answers were the same; of self-attention that finds.
V2V, FINDS = (2, 2), (ASKED, HEADS["latest"])
SHARE = 0.1  # size of a digit in a token, of the token's
BOOST = 4.0  # what a digit that is read adds to its logit
LONGEST = 3600.0  # seconds
BATCHES, LEVEL, DRAWS = 12, 6, 4
RIDGE = 1e-3


class Seen:
    """Inputs or outputs of modules, token by token, while `Trainer.loss` runs."""

    def __init__(self, trainer: Trainer, batches: Iterable[Batch]) -> None:
        self.trainer, self.batches = trainer, list(batches)

    @torch.no_grad()
    def outputs(self, module: torch.nn.Module) -> list[torch.Tensor]:
        """What `module` returns for each batch, (B, L, C) float32."""
        found = []

        def keep(module: torch.nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
            found.append((output if torch.is_tensor(output) else output[0]).float())

        handle = module.register_forward_hook(keep)
        self.trainer.loss.eval()
        for batch in self.batches:
            self.trainer.loss(batch)
        handle.remove()
        return found

    def part(
        self, outputs: list[torch.Tensor], columns: Callable[[Packed], slice]
    ) -> list[torch.Tensor]:
        """Some columns of each batch's outputs."""
        return [x[:, columns(b["packed"])] for x, b in zip(outputs, self.batches, strict=True)]


def digits_of(seconds: torch.Tensor) -> torch.Tensor:
    """One-hot digits of times (n,) that are cut off as on a clock, (n, all digits) float64."""
    whole = (seconds + 1e-3).long()
    hot = [torch.nn.functional.one_hot(whole // unit % n, n) for unit, n, _ in DIGITS.values()]
    return torch.cat(hot, -1).double()


@torch.no_grad()
def fit_digits(
    trainer: Trainer, batches: Iterable[Batch], keep: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares from the mean of a frame's original tokens to its time's digits: (D, n), (n,).

    Of random times, with all patches and with the share `keep` of them that training leaves.
    """
    means, digits = [], []
    for batch, share in itertools.product(batches, (1.0, keep) * DRAWS):
        features = batch["video_features"].float()
        times = torch.rand(features.shape[:2]) * LONGEST
        _, memory = trainer.crosslmm.model.embed_frames(features, times)
        chosen = torch.rand(memory.shape[:3]).topk(round(share * memory.shape[2])).indices
        chosen = chosen.unsqueeze(-1).expand(-1, -1, -1, memory.shape[3])
        means.append(memory.gather(2, chosen).mean(2).flatten(0, 1).double())
        digits.append(digits_of(times.flatten()))
    given, wanted = torch.cat(means), torch.cat(digits)
    middle, given = given.mean(0), given - given.mean(0)
    ridge = RIDGE * len(given) * given.var(0).mean() * torch.eye(given.shape[1]).double()
    weight = torch.linalg.solve(given.T @ given + ridge, given.T @ (wanted - wanted.mean(0)))
    return weight, -middle @ weight


@torch.no_grad()
def make_room(attention: torch.nn.Module, rows: slice, seen: Seen, free: int) -> None:
    """Leave the first `free` dimensions of a head's values unused, with the least harm.

    `rows`: those of the head in the projection of values.
    """
    values = torch.cat([x[..., rows].flatten(0, 1) for x in seen.outputs(attention.v_proj)])
    weight, bias = attention.v_proj.weight[rows].double(), attention.v_proj.bias[rows].double()
    out = attention.o_proj.weight[:, rows].double()
    spread = values.double().T @ values.double() / len(values)
    spread += 1e-6 * spread.diagonal().mean() * torch.eye(len(spread)).double()
    sizes, axes = torch.linalg.eigh(spread)
    root, back = axes * sizes.sqrt() @ axes.T, axes / sizes.sqrt() @ axes.T
    _, _, strongest = torch.linalg.svd(out @ root, full_matrices=False)
    strongest = strongest[: len(spread) - free]
    narrow, wide = strongest @ back, out @ root @ strongest.T
    attention.v_proj.weight[rows], attention.v_proj.bias[rows] = 0, 0
    attention.o_proj.weight[:, rows] = 0
    attention.v_proj.weight[rows][free:] = (narrow @ weight).float()
    attention.v_proj.bias[rows][free:] = (narrow @ bias).float()
    attention.o_proj.weight[:, rows][:, free:] = wide.float()


def weakest_directions(hidden: Iterable[torch.Tensor], count: int) -> torch.Tensor:
    """The directions (D, count) of which tokens (B, L, D) have the least, for their size."""
    spread = torch.zeros(())
    for tokens in hidden:
        unit = torch.nn.functional.normalize(tokens.flatten(0, -2).double(), dim=-1)
        spread = spread + unit.T @ unit / len(unit)
    return torch.linalg.eigh(spread)[1][:, :count]


def add_time_path(trainer: Trainer, rng: random.Random) -> None:
    """Change the weights of `trainer`'s model in place."""
    kinds = list(trainer.curriculum.level)
    seen = Seen(trainer, (trainer.batch("train", LEVEL, kinds, rng) for _ in range(BATCHES)))
    model = trainer.crosslmm.model.language_model
    branch = model.layers[V2V[0]].dual_cross_attention.v2v
    finds, last = model.layers[FINDS[0]].self_attn, model.layers[-1].self_attn
    count, width = sum(n for _, n, _ in DIGITS.values()), branch.head_dim

    def of_head(head: int) -> slice:
        return slice(head * width, (head + 1) * width)

    brings, finder = of_head(V2V[1]), of_head(FINDS[1])
    with torch.no_grad():
        branch.o_proj.weight[:, brings] = 0
    make_room(finds, finder, seen, count)
    for head, (_, n, _) in DIGITS.items():
        make_room(last, of_head(head), seen, n)
    outputs = [seen.outputs(layer) for layer in model.layers]
    visual = [seen.part(x, Packed.visual_columns) for x in outputs]
    text = [seen.part(x, lambda packed: slice(packed.text_start, None)) for x in outputs]
    in_frames = weakest_directions([*outputs[V2V[0]], *outputs[FINDS[0] - 1]], count)
    in_text = weakest_directions(outputs[FINDS[0]], count)
    weight, bias = fit_digits(trainer, seen.batches, trainer.args.keep)
    with torch.no_grad():
        for projection in (branch.q_proj, branch.v_proj):
            projection.weight[brings], projection.bias[brings] = 0, 0
        branch.v_proj.weight[brings][:count] = weight.T.float()
        branch.v_proj.bias[brings][:count] = bias.float()
        written = SHARE * size_of(visual[V2V[0]])
        write = in_frames * written / branch.gate.double().tanh()
        branch.o_proj.weight[:, brings][:, :count] = write.float()
        reads(model.layers[FINDS[0]], finder, in_frames, written, size_of(visual[FINDS[0] - 1]))
        written = SHARE * size_of(text[FINDS[0]])
        finds.o_proj.weight[:, finder][:, :count] = (in_text * written).float()
        place = 0
        for head, (_, n, _) in DIGITS.items():
            directions = in_text[:, place : place + n]
            reads(model.layers[-1], of_head(head), directions, written, size_of(text[FINDS[0]]))
            write = BOOST * digits_as_logits(trainer, n, size_of(text[-1]))
            last.o_proj.weight[:, of_head(head)][:, :n] = write.float()
            place += n


def size_of(tokens: Iterable[torch.Tensor]) -> float:
    """Mean norm of tokens."""
    return torch.cat([x.flatten(0, -2) for x in tokens]).norm(dim=-1).mean().item()


def reads(
    layer: torch.nn.Module, rows: slice, directions: torch.Tensor, written: float, size: float
) -> None:
    """Let a head's first values be what is written in `directions` (D, n) with size `written`.

    `size`: the norm of the tokens that `layer` gets.
    """
    norm, n = layer.input_layernorm.weight.double()[:, None], directions.shape[1]
    read = directions / norm * (size / written / len(norm) ** 0.5)
    layer.self_attn.v_proj.weight[rows][:n] = read.T.float()


def digits_as_logits(trainer: Trainer, n: int, size: float) -> torch.Tensor:
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


class TimesLoss(GuidedLoss):
    """Answers' tokens, and where the last layer looks for digits; the other guides are for others.

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
        self.lost = lost.item()
        return lost


class TimesTrainer(Trainer):
    """Adds the path to the model that it starts from, and trains the last layer around it."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        if self.progress.step == 0:
            add_time_path(self, random.Random(args.seed))

    def make_loss(self, separators: tuple[int, int]) -> TimesLoss:
        """Of answers and their times."""
        return TimesLoss(self.crosslmm, separators, *self.prompt.encode(":"))

    def freeze(self) -> None:
        """All but the last layer, and its part of the path."""
        self.crosslmm.requires_grad_(False)
        last = self.crosslmm.model.language_model.layers[-1].requires_grad_(True)
        attention, width = last.self_attn, last.self_attn.head_dim
        path = torch.tensor([i * width + j for i, (_, n, _) in DIGITS.items() for j in range(n)])

        def keep(weight: torch.Tensor, dim: int) -> None:
            weight.register_hook(lambda grad: grad.index_fill(dim, path.to(grad.device), 0))

        keep(attention.v_proj.weight, 0)
        keep(attention.v_proj.bias, 0)
        keep(attention.o_proj.weight, 1)


def main() -> None:
    """Command line."""
    args = arguments()
    if args.start is None:
        raise SystemExit("--start is needed: the model that shall tell times better.")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    make_encoder(args)
    try:
        trainer = TimesTrainer(args)
    except InputError as error:
        raise SystemExit(str(error)) from error
    trainer.run()


if __name__ == "__main__":
    main()
