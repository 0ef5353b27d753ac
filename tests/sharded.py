"""A few updates with sharded weights, for a test: BASE DATA MEDIA OUT, under torch.distributed.run.

accelerate shards on accelerators only, so this calls what it calls: `fully_shard` on the layers
that the example configs name, then on the whole.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoProcessor

from model.training.collate import Collator
from model.training.data import LlavaDataset, read_records
from model.training.distill import DistillLoss
from model.training.losses import AnswerLoss
from model.training.stages import STAGES, checkpoint_activations, load_base, parameter_groups

WRAPPED = ("CrossLMMDecoderLayer", "SiglipEncoderLayer")


def losses(base: Path, data: Path, media: Path, distill: bool) -> list[float]:
    torch.manual_seed(0)
    stage = STAGES["2"]
    crosslmm = load_base(base, stage)
    checkpoint_activations(crosslmm)
    teacher = load_base(base, STAGES["dcal"])
    whole = DistillLoss(crosslmm, 7, teacher) if distill else AnswerLoss(crosslmm)
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for module in whole.modules():
        if type(module).__name__ in WRAPPED:
            fully_shard(module, mesh=mesh)
    fully_shard(whole, mesh=mesh)
    rates = dict.fromkeys(stage.rates, 1e-3)
    optimizer = torch.optim.AdamW(parameter_groups(crosslmm, rates, 0.0))
    processor = AutoProcessor.from_pretrained(base)
    dataset = LlavaDataset(read_records([data]), processor, media, max_frames=4)
    batch = Collator(crosslmm.config, 0, 7)([dataset[i] for i in (0, 1, 4)])
    found = []
    whole.train()
    for _ in range(4):
        loss = whole(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def main() -> None:
    dist.init_process_group("gloo")
    base, data, media, out = map(Path, sys.argv[1:])
    found = losses(base, data, media, False) + losses(base, data, media, True)[1:]
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
