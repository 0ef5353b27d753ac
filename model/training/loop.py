"""The training loop: accelerate's parts put together, resumable to the same losses."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import (
    GradientAccumulationPlugin,
    ProjectConfiguration,
    set_seed,
    tqdm,
)
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from model.loading import checkpoint_folder, load_processor
from model.training.checkpoints import newest, write_model
from model.training.collate import Batch, Collator
from model.training.data import LlavaDataset, read_records
from model.training.distill import DistillLoss, fill_in_answers, full_grid
from model.training.losses import AnswerLoss
from model.training.stages import (
    STAGES,
    checkpoint_activations,
    load_base,
    parameter_groups,
)
from model.training.updates import Progress, Updates
from model.types import InputError


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


class Run(Updates):
    """One training run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        if newest(args.out) is not None and not args.resume:
            raise InputError(
                f"{args.out} holds a run already; add --resume, or give another --out."
            )
        super().__init__(
            make_accelerator(args), args.out, accumulate=args.accumulate, max_norm=args.max_norm
        )
        set_seed(args.seed)
        stage = STAGES[args.stage or args.train]
        self.folder = checkpoint_folder(args.model, args.pooled_grid)
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
        loss = DistillLoss(crosslmm, grid, teacher) if args.distill else AnswerLoss(crosslmm)
        groups = parameter_groups(crosslmm, args.rates, args.weight_decay)
        self.prepare(loss, groups, betas=(0.9, 0.95))
        self._count_steps()
        schedule = get_cosine_schedule_with_warmup(
            # Not prepared: accelerate would step it once per process.
            self.optimizer,
            round(args.warm_up * self.steps),
            self.steps,
        )
        self.register(schedule, Progress())

    def _check_length(self, frames: int, teacher_grid: int | None) -> None:
        room = self.config.text_config.max_position_embeddings
        for who, grid in (("model", self.config.pooled_grid), ("teacher", teacher_grid)):
            if grid is not None and frames * grid**2 >= room:
                raise InputError(
                    f"{frames} frames of {grid * grid} tokens do not fit the {who}'s {room} "
                    f"positions; give at most --frames {(room - 1) // grid**2}, or fewer tokens."
                )

    def _count_steps(self) -> None:
        """Make the loader, and find how many updates there will be."""
        args, accelerator = self.args, self.accelerator
        loader = DataLoader(
            self.dataset,
            batch_size=args.batch_size,
            shuffle=True,
            drop_last=True,
            collate_fn=self.collator,
            num_workers=args.workers,
        )
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
        bar = tqdm(total=self.steps, initial=self.progress.step, desc="training", unit="step")
        self.loss.train()
        while self.progress.step < self.steps:
            figures = self.step(batches)
            self.log(figures)
            bar.set_postfix(loss=f"{figures['loss']:.4f}", refresh=False)
            bar.update()
            if self.progress.step % args.save_every == 0 and self.progress.step < self.steps:
                self.save()
        bar.close()
        self.save()
        self.finish()

    def finish(self) -> None:
        """Write OUT/model and say what was skipped."""
        accelerator, args = self.accelerator, self.args
        state = accelerator.get_state_dict(self.loss)
        if accelerator.is_main_process:
            trained = {name.removeprefix("crosslmm."): state[name] for name in self.trained}
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
