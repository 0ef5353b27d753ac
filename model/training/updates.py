"""Updates of a model by accelerate's parts: counted, logged, saved, and resumed where they ended.

Shared by training on data (`model.training.loop`) and by the bundled model's recipe.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, send_to_device
from torch.optim.lr_scheduler import LRScheduler

from model.training.checkpoints import keep_trained_only, newest, save_checkpoint
from model.training.collate import Batch
from model.training.data import IGNORE
from model.training.losses import AnswerLoss


class Progress:
    """What a resumed run has to know, beside weights and optimizer."""

    def __init__(self) -> None:
        self.step = 0
        self.skipped: dict[int, str] = {}  # record -> reason

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {"step": self.step, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self.step, self.skipped = state["step"], dict(state["skipped"])


class Updates:
    """One run: a loss, an optimizer and a schedule that `prepare` takes over."""

    loss: AnswerLoss
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    progress: Progress

    def __init__(
        self, accelerator: Accelerator, out: Path, *, accumulate: int = 1, max_norm: float = 1.0
    ) -> None:
        self.accelerator, self.out = accelerator, out
        self.accumulate, self.max_norm = accumulate, max_norm
        self.fsdp = accelerator.distributed_type == DistributedType.FSDP

    def prepare(self, loss: AnswerLoss, groups: list[dict], betas: tuple[float, float]) -> None:
        """Hand the loss, and an optimizer of its parameters, to accelerate."""
        optimizer = torch.optim.AdamW(groups, betas=betas, fused=True)
        self.trained = {n for n, p in loss.named_parameters() if p.requires_grad}
        self.loss, self.optimizer = self.accelerator.prepare(loss, optimizer)

    def register(self, schedule: LRScheduler, progress: Progress) -> None:
        """Say what else belongs to a checkpoint, and resume from the newest there is."""
        self.schedule, self.progress = schedule, progress
        self.accelerator.register_for_checkpointing(schedule, progress)
        if not self.fsdp:
            keep_trained_only(self.accelerator, self.trained)
        start = newest(self.out)
        if start is not None:
            strict = {} if self.fsdp else {"strict": False}
            self.accelerator.load_state(str(start), **strict)
        if self.accelerator.is_main_process:
            self._shorten_log()

    def step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """One update from `accumulate` batches; gives the mean loss of its answer tokens."""
        accelerator = self.accelerator
        device, total = accelerator.device, torch.zeros(2, device=accelerator.device)
        for _ in range(self.accumulate):
            batch = next(batches)
            self.progress.skipped.update(batch.pop("skipped", ()))
            batch = send_to_device(batch, device)
            with accelerator.accumulate(self.loss):
                loss = self.loss(batch)
                total += torch.stack((loss.detach(), (batch["labels"] != IGNORE).sum().float()))
                # accelerate divides by the number of batches; processes are averaged.
                accelerator.backward(loss * self.accumulate * accelerator.num_processes)
                norm = 0.0
                if accelerator.sync_gradients:
                    total = accelerator.reduce(total)
                    norm = self._clip(total[1].clamp_min(1))
                self.optimizer.step()
                self.optimizer.zero_grad()
        rate = max(self.schedule.get_last_lr())
        self.progress.step += 1
        self.schedule.step()
        mean = (total[0] / total[1].clamp_min(1)).item()
        return {"loss": mean, "answer_tokens": total[1].item(), "norm": norm, "rate": rate}

    def _clip(self, tokens: torch.Tensor) -> float:
        """Turn the sums of gradients into means over answer tokens, then limit their norm."""
        parameters = [p for p in self.loss.parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(tokens)
        norm = self.accelerator.clip_grad_norm_(parameters, self.max_norm)
        return float(norm)

    def log(self, figures: Mapping[str, Any]) -> None:
        """Write one line of OUT/log.jsonl, and tell the tracker."""
        if self.accelerator.is_main_process:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": self.progress.step, **figures}) + "\n")
        self.accelerator.log(dict(figures), step=self.progress.step)

    def save(self) -> None:
        """Write a checkpoint to go on from; the newest two stay."""
        for found in gather_object([self.progress.skipped]):
            self.progress.skipped.update(found)
        save_checkpoint(self.accelerator, self.out, self.progress.step)

    def _shorten_log(self) -> None:
        """Drop lines of steps that will be taken again."""
        file = self.out / "log.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        done = self.progress.step
        file.write_text("".join(line for line in lines if json.loads(line)["step"] <= done))
