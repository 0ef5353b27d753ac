"""Write into a trained model, by least squares, a way for what training alone did not bring along.

What tokens carry in late layers is hundreds of times the size of a weight's step, so that asking
for something small there taught nothing in thousands of steps. A path is written instead: a head
gives up what it uses least, and reads or writes directions of the residual stream that have the
least in them. Then the last layer is trained to use it, and to answer all else as before: steps of
Adam on all weights, small as they are, undo in 250 steps what least squares have found.
"""

from __future__ import annotations

import argparse
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training.bundled import Trainer, arguments, started
from model.training.collate import Batch
from model.training.guided_loss import GuidedLoss
from model.training.losses import AnswerLoss
from model.training.packing import Packed

BATCHES, LEVEL = 12, 6  # what least squares are fitted to
RIDGE = 1e-3
SEED = 77  # of a path: runs that have the same one can be averaged
LONGEST = 3600.0  # seconds
TAUGHT_WEIGHT = 2.0  # of the answers that the path is for
SAME_WEIGHT, RIGHT_WEIGHT = 2.0, 0.3  # of others: as the start answers, and as is right
TAUGHT_SHARE = 4.0  # how often the kinds that the path is for are asked


class Seen:
    """What modules return, token by token, while `Trainer.loss` runs."""

    def __init__(self, trainer: Trainer, batches: Iterable[Batch]) -> None:
        self.trainer, self.batches = trainer, list(batches)

    def outputs(self, module: nn.Module) -> list[torch.Tensor]:
        """What `module` returns for each batch, (B, L, C) float32."""
        return self.all_outputs([module])[0]

    @torch.no_grad()
    def all_outputs(self, modules: Iterable[nn.Module]) -> list[list[torch.Tensor]]:
        """What each of `modules` returns for each batch, (B, L, C) float32."""
        found, handles = [], []
        for module in modules:
            mine: list[torch.Tensor] = []

            def keep(
                module: nn.Module,
                args: tuple,
                output: torch.Tensor | tuple,
                mine: list[torch.Tensor] = mine,
            ) -> None:
                mine.append((output if torch.is_tensor(output) else output[0]).float())

            found.append(mine)
            handles.append(module.register_forward_hook(keep))
        self.trainer.loss.eval()
        for batch in self.batches:
            self.trainer.loss(batch)
        for handle in handles:
            handle.remove()
        return found

    def visual(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Those of visual tokens."""
        return self._part(outputs, Packed.visual_columns)

    def text(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Those of what follows the video."""
        return self._part(outputs, lambda packed: slice(packed.text_start, None))

    def _part(
        self, outputs: list[torch.Tensor], columns: Callable[[Packed], slice]
    ) -> list[torch.Tensor]:
        return [x[:, columns(b["packed"])] for x, b in zip(outputs, self.batches, strict=True)]


def least_squares(
    given: torch.Tensor, wanted: torch.Tensor, ridge: float = RIDGE
) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear map (D, n) and the bias (n,) from tokens (N, D) to what they tell (N, n)."""
    given, wanted = given.double(), wanted.double()
    middle, mean = given.mean(0), wanted.mean(0)
    given = given - middle
    small = ridge * len(given) * given.var(0).mean() * torch.eye(given.shape[1]).double()
    weight = torch.linalg.solve(given.T @ given + small, given.T @ (wanted - mean))
    return weight, mean - middle @ weight


@torch.no_grad()
def make_room(attention: nn.Module, rows: slice, seen: Seen, free: int) -> None:
    """Leave the first `free` dimensions of a head's values unused, with the least harm.

    `rows`: those of the head in the projection of values.
    """
    values = torch.cat([x[..., rows].flatten(0, -2) for x in seen.outputs(attention.v_proj)])
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
        unit = F.normalize(tokens.flatten(0, -2).double(), dim=-1)
        spread = spread + unit.T @ unit / len(unit)
    return torch.linalg.eigh(spread)[1][:, :count]


def size_of(tokens: Iterable[torch.Tensor]) -> float:
    """Mean norm of tokens."""
    return torch.cat([x.flatten(0, -2) for x in tokens]).norm(dim=-1).mean().item()


@torch.no_grad()
def reads(
    layer: nn.Module, rows: slice, directions: torch.Tensor, written: float, size: float
) -> None:
    """Let a head's first values be what is written in `directions` (D, n) with size `written`.

    `size`: the norm of the tokens that `layer` gets.
    """
    norm, n = layer.input_layernorm.weight.double()[:, None], directions.shape[1]
    read = directions / norm * (size / written / len(norm) ** 0.5)
    layer.self_attn.v_proj.weight[rows][:n] = read.T.float()


class PathLoss(GuidedLoss):
    """Answers of some kinds as is right, the others as `teacher`, the model before, gives them.

    Trained on right answers alone, the last layer lost elsewhere what it won where the path helps:
    of what is not there, 95 % instead of 98 % were told.
    """

    taught: tuple[str, ...] = ()
    teacher: Callable[[dict, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

    def each(
        self, batch: dict[str, Any], logits: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """The loss (tokens,) of each answer token."""
        right = super().each(batch, logits, targets)
        if not self.training:
            return right
        with torch.no_grad():
            before, _ = self.teacher(batch, batch["video_features"])
        pair = (x.float().log_softmax(-1) for x in (logits, before))
        same = F.kl_div(*pair, log_target=True, reduction="none").sum(-1)
        self.told["strayed"] = same.detach().mean().item()
        marked = torch.zeros(batch["labels"].shape)
        for row, spans in enumerate(batch["packed"].spans):
            for qa, start, end in spans:
                marked[row, start:end] = qa.kind in self.taught
        taught = self.of_tokens(marked, batch["labels"]).to(right.device) > 0
        others = SAME_WEIGHT * same + RIGHT_WEIGHT * right
        return torch.where(taught, TAUGHT_WEIGHT * right, others)

    def guides(self, batch: dict[str, Any]) -> torch.Tensor:
        """None: the heads that find are trained already."""
        return torch.zeros(())


class PathTrainer(Trainer, ABC):
    """Adds a path to the model that it starts from, and trains the last layer around it."""

    taught: tuple[str, ...] = ()  # kinds of question that the path is for

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.curriculum.share.update(dict.fromkeys(self.taught, TAUGHT_SHARE))
        teacher = CrossLMMForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32)
        self.quicken(teacher)
        teacher = teacher.requires_grad_(False).eval().to(self.accelerator.device)
        self.guided.taught, self.guided.teacher = self.taught, AnswerLoss(teacher).student
        if self.progress.step == 0:
            kinds, rng = list(self.curriculum.level), random.Random(SEED)
            batches = (self.batch("train", LEVEL, kinds, rng) for _ in range(BATCHES))
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(SEED)
                self.add_path(Seen(self, batches))

    def prepare(self, loss: PathLoss, groups: list[dict], betas: tuple[float, float]) -> None:
        """Also keep in checkpoints what is not trained: the path is not in the start's weights."""
        super().prepare(loss, groups, betas)
        names = (name for name, _ in loss.named_parameters())
        self.trained = {name for name in names if ".vision_tower." not in name}

    def make_loss(self, separators: tuple[int, int]) -> PathLoss:
        """Of answers, some by a teacher."""
        return PathLoss(self.crosslmm, separators)

    def freeze(self) -> None:
        """All but the last layer."""
        self.crosslmm.requires_grad_(False)
        self.crosslmm.model.language_model.layers[-1].requires_grad_(True)

    @abstractmethod
    def add_path(self, seen: Seen) -> None:
        """Change the model's weights in place, by what `seen` shows of it."""

    def memory_at_any_time(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Original tokens (B, T, N, D) of a batch's frames at random times, and these (B, T)."""
        features = batch["video_features"].float()
        times = torch.rand(features.shape[:2]) * LONGEST
        _, memory = self.crosslmm.model.embed_frames(features, times)
        return memory, times


def command(trainer: type[PathTrainer]) -> None:
    """Command line of a path: the options are those of `model.training.bundled`; resumes."""
    args = arguments()
    if args.start is None:
        raise SystemExit("--start is needed: the trained model that is to have the path.")
    if args.heads_only:
        raise SystemExit("--heads-only is for model.training.bundled: a path trains no heads.")
    started(args, trainer).run()


def head_rows(attention: nn.Module, head: int) -> slice:
    """A head's rows in the projections of an attention."""
    return slice(head * attention.head_dim, (head + 1) * attention.head_dim)
