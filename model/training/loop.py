"""The training loop: accelerate's parts put together, resumable to the same losses."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    gather_object,
    send_to_device,
    set_seed,
    tqdm,
)
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from model.loading import checkpoint_folder, load_processor
from model.training.checkpoints import keep_trained_only, newest, save_checkpoint, write_model
from model.training.collate import Batch, Collator
from model.training.data import IGNORE, LlavaDataset, read_records
from model.training.distill import DistillLoss, fill_in_answers, full_grid
from model.training.losses import AnswerLoss
from model.training.stages import (
    STAGES,
    checkpoint_activations,
    load_base,
    parameter_groups,
)
from model.types import InputError


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


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """An accelerator from the launcher's settings and ours."""
    if args.tracker == "tensorboard" and not (
        find_spec("tensorboard") or find_spec("tensorboardX")
    ):
        raise InputError("The tracker tensorboard is not installed: pip install tensorboard")
    return Accelerator(
        cpu=args.cpu,
        # The whole base of a quantised model is in bf16 already.
        mixed_precision="bf16" if args.quantization != "none" else None,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.accumulate, sync_with_dataloader=False
        ),
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=args.seed, even_batches=False
        ),
        log_with=args.tracker,
        project_config=ProjectConfiguration(str(args.out), logging_dir=str(args.out / "logs")),
    )


class Run:
    """One training run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        start = newest(args.out)
        if start is not None and not args.resume:
            raise InputError(
                f"{args.out} holds a run already; add --resume, or give another --out."
            )
        self.accelerator = make_accelerator(args)
        set_seed(args.seed)
        stage = STAGES[args.stage or args.train]
        self.folder = checkpoint_folder(args.model, args.pooled_grid)
        self.fsdp = self.accelerator.distributed_type == DistributedType.FSDP
        bf16 = self.accelerator.mixed_precision == "bf16" and not self.fsdp
        base = {
            "quantization": args.quantization,
            "pooled_grid": args.pooled_grid,
            "device": self.accelerator.device,
            "frozen_dtype": torch.bfloat16 if bf16 else torch.float32,
        }
        crosslmm = load_base(self.folder, stage, **base)
        self.config = crosslmm.config
        self.processor = load_processor(self.folder, self.config)
        teacher, grid = None, None
        if args.distill:
            grid = args.teacher_grid or full_grid(self.config)
            if not args.train:  # the base moves, so it cannot teach itself
                teacher = load_base(self.folder, STAGES["dcal"], **base)
        frames = args.frames or stage.frames
        self._check_length(frames, grid)
        self.dataset = LlavaDataset(
            read_records(args.data),
            self.processor,
            args.media_root,
            max_frames=frames,
            frame_rate=args.frame_rate,
            max_text_tokens=args.max_text_tokens,
        )
        pad = self.processor.tokenizer.pad_token_id
        self.collator = Collator(self.config, 0 if pad is None else pad, grid)
        if args.distill:
            answering = teacher or crosslmm
            if args.quantization == "none":
                answering = answering.to(self.accelerator.device)
            fill_in_answers(
                self.dataset,
                answering,
                self.collator,
                grid,
                self.accelerator,
                args.out / "answers.jsonl",
                args.max_answer_tokens,
                str(self.folder.resolve()),
            )
        if args.gradient_checkpointing:
            checkpoint_activations(crosslmm)
        self.trained = {n for n, p in crosslmm.named_parameters() if p.requires_grad}
        loss = DistillLoss(crosslmm, grid, teacher) if args.distill else AnswerLoss(crosslmm)
        self._prepare(loss, crosslmm)
        if start is not None:
            self.accelerator.load_state(str(start), **({} if self.fsdp else {"strict": False}))

    def _check_length(self, frames: int, teacher_grid: int | None) -> None:
        room = self.config.text_config.max_position_embeddings
        for who, grid in (("model", self.config.pooled_grid), ("teacher", teacher_grid)):
            if grid is not None and frames * grid**2 >= room:
                raise InputError(
                    f"{frames} frames of {grid * grid} tokens do not fit the {who}'s {room} "
                    f"positions; give at most --frames {(room - 1) // grid**2}, or fewer tokens."
                )

    def _prepare(self, loss: AnswerLoss, crosslmm: Any) -> None:
        """Hand everything to accelerate."""
        args, accelerator = self.args, self.accelerator
        loader = DataLoader(
            self.dataset,
            batch_size=args.batch_size,
            shuffle=True,
            drop_last=True,
            collate_fn=self.collator,
            num_workers=args.workers,
        )
        optimizer = torch.optim.AdamW(
            parameter_groups(crosslmm, args.rates, args.weight_decay), betas=(0.9, 0.95)
        )
        self.loss, self.optimizer = accelerator.prepare(loss, optimizer)
        # Batches go to the device when they are used: several wait while gradients accumulate.
        self.loader = accelerator.prepare_data_loader(loader, device_placement=False)
        self.per_epoch = len(self.loader)
        if not self.per_epoch:
            raise InputError(
                f"{len(self.dataset)} records do not fill one batch of {args.batch_size} on each "
                f"of {accelerator.num_processes} processes; lower --batch-size."
            )
        total = args.steps or int(args.epochs * self.per_epoch / args.accumulate)
        self.steps = max(1, total)
        # Not prepared: accelerate would step it once per process.
        self.schedule = get_cosine_schedule_with_warmup(
            self.optimizer, round(args.warm_up * self.steps), self.steps
        )
        self.progress = Progress()
        accelerator.register_for_checkpointing(self.schedule, self.progress)
        if not self.fsdp:
            keep_trained_only(accelerator, self.trained)

    def batches(self, first: int) -> Iterator[Batch]:
        """Batches of this process from number `first` on, epoch after epoch."""
        epoch, skip = divmod(first, self.per_epoch)
        while True:
            self.loader.set_epoch(epoch)
            loader = self.loader
            if skip:
                loader = self.accelerator.skip_first_batches(self.loader, skip)
            yield from loader
            epoch, skip = epoch + 1, 0

    def run(self) -> None:
        """Train to the end and write the model."""
        args, accelerator = self.args, self.accelerator
        if args.tracker:
            accelerator.init_trackers("crosslmm", {k: str(v) for k, v in vars(args).items()})
        batches = self.batches(self.progress.step * args.accumulate)
        if accelerator.is_main_process:
            self._shorten_log()
        bar = tqdm(total=self.steps, initial=self.progress.step, desc="training", unit="step")
        self.loss.train()
        while self.progress.step < self.steps:
            figures = self.step(batches)
            self.progress.step += 1
            self.log(figures)
            bar.set_postfix(loss=f"{figures['loss']:.4f}", refresh=False)
            bar.update()
            if self.progress.step % args.save_every == 0 and self.progress.step < self.steps:
                self.save()
        bar.close()
        self.save()
        self.finish()

    def step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """One update from `accumulate` batches; gives the mean loss of its answer tokens."""
        accelerator = self.accelerator
        device, total = accelerator.device, torch.zeros(2, device=accelerator.device)
        for _ in range(self.args.accumulate):
            batch = next(batches)
            self.progress.skipped.update(batch.pop("skipped"))
            batch = send_to_device(batch, device)
            with accelerator.accumulate(self.loss):
                loss = self.loss(batch)
                total += torch.stack((loss.detach(), (batch["labels"] != IGNORE).sum().float()))
                # accelerate divides by the number of batches; processes are averaged.
                accelerator.backward(loss * self.args.accumulate * accelerator.num_processes)
                norm = 0.0
                if accelerator.sync_gradients:
                    total = accelerator.reduce(total)
                    norm = self._clip(total[1].clamp_min(1))
                self.optimizer.step()
                self.optimizer.zero_grad()
        rate = max(self.schedule.get_last_lr())
        self.schedule.step()
        mean = (total[0] / total[1].clamp_min(1)).item()
        return {"loss": mean, "answer_tokens": total[1].item(), "norm": norm, "rate": rate}

    def _clip(self, tokens: torch.Tensor) -> float:
        """Turn the sums of gradients into means over answer tokens, then limit their norm."""
        parameters = [p for p in self.loss.parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(tokens)
        norm = self.accelerator.clip_grad_norm_(parameters, self.args.max_norm)
        return float(norm)

    def _shorten_log(self) -> None:
        """Drop lines of steps that will be taken again."""
        file = self.args.out / "log.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        done = self.progress.step
        file.write_text("".join(line for line in lines if json.loads(line)["step"] <= done))

    def log(self, figures: dict[str, float]) -> None:
        """Write one line of OUT/log.jsonl, and tell the tracker."""
        if self.accelerator.is_main_process:
            with open(self.args.out / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": self.progress.step, **figures}) + "\n")
        self.accelerator.log(figures, step=self.progress.step)

    def save(self) -> None:
        """Write a checkpoint to go on from; the newest two stay."""
        for found in gather_object([self.progress.skipped]):
            self.progress.skipped.update(found)
        save_checkpoint(self.accelerator, self.args.out, self.progress.step)

    def finish(self) -> None:
        """Write OUT/model and say what was skipped."""
        accelerator, args = self.accelerator, self.args
        state = accelerator.get_state_dict(self.loss)
        if accelerator.is_main_process:
            state = {name.removeprefix("crosslmm."): tensor for name, tensor in state.items()}
            trained = {name: state[name] for name in self.trained}
            write_model(self.folder, self.config, self.processor, trained, args.out / "model")
            skipped = self.progress.skipped
            lines = [json.dumps({"record": i, "reason": r}) for i, r in sorted(skipped.items())]
            (args.out / "skipped.jsonl").write_text("".join(f"{line}\n" for line in lines))
            print(f"{args.out / 'model'} is trained: {self.steps} updates.")
            if skipped:
                print(
                    f"{len(skipped)} of {len(self.dataset)} records could not be used and were "
                    f"skipped; {args.out / 'skipped.jsonl'} says why."
                )
        accelerator.wait_for_everyone()
        accelerator.end_training()


def train(args: argparse.Namespace) -> None:
    """Run the command line's wishes."""
    if args.resume and newest(args.out) is None:
        raise InputError(f"{args.out} holds no checkpoint to resume from; leave --resume out.")
    args.out.mkdir(parents=True, exist_ok=True)
    Run(args).run()
