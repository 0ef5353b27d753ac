"""Distillation without labels: full tokens in the LLM teach pooled tokens with cross-attention.

The teacher is the checkpoint itself, with every token of its own grid in the LLM and no
cross-attention; the student sees a few pooled tokens per frame and looks back through the dual
cross-attention. The loss is the Kullback-Leibler divergence on the answers' tokens. Where a
question has no answer, the teacher's own is generated once, before training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object, tqdm

from model.configuration_crosslmm import CrossLMMConfig
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training.collate import Collator
from model.training.data import LlavaDataset, Skipped
from model.training.losses import AnswerLoss, answer_columns, encode


def full_grid(config: CrossLMMConfig) -> int:
    """Side of the grid that the checkpoint's LLM knows: LLaVA-OneVision's is half the encoder's."""
    side = config.original_grid
    return -(-side // 2) if config.pool_after_projector else side


def teacher_embeds(
    teacher: CrossLMMForConditionalGeneration,
    input_ids: torch.Tensor,
    features: torch.Tensor,
    frame_times: torch.Tensor | None,
    frame_mask: torch.Tensor | None,
    grid: int,
) -> torch.Tensor:
    """The LLM's input (B, L, D) with `grid * grid` tokens of each frame at the placeholders."""
    model = teacher.model
    full, _ = model.embed_frames(features, frame_times, grid)
    return model.place_frames(input_ids, model.get_input_embeddings()(input_ids), full, frame_mask)


def full_token_logits(
    teacher: CrossLMMForConditionalGeneration,
    batch: dict[str, Any],
    features: torch.Tensor,
    grid: int,
) -> torch.Tensor:
    """Logits (tokens, V) of a batch's answers, with all tokens in the LLM, no cross-attention."""
    embeds = teacher_embeds(
        teacher,
        batch["teacher_input_ids"],
        features,
        batch.get("frame_times"),
        batch.get("frame_mask"),
        grid,
    )
    columns, rows, _ = answer_columns(batch["teacher_labels"])
    # Embeddings instead of ids: no frames enter the cross-attention, so it does nothing.
    logits = teacher(
        inputs_embeds=embeds,
        attention_mask=batch["teacher_attention_mask"],
        position_ids=batch.get("teacher_position_ids"),
        use_cache=False,
        logits_to_keep=columns,
    ).logits
    return logits[rows]


class DistillLoss(AnswerLoss):
    """KL(teacher || student) of the answers' tokens, summed.

    Without a `teacher` of its own the student is its own teacher: right as long as only its dual
    cross-attention moves, which the teacher does not use.
    """

    def __init__(
        self,
        crosslmm: CrossLMMForConditionalGeneration,
        grid: int,
        teacher: CrossLMMForConditionalGeneration | None = None,
    ) -> None:
        super().__init__(crosslmm)
        self.grid = grid
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        """The loss of a batch that also has `teacher_input_ids` and the like.

        Or `teacher_log_probs` (tokens, V), where the teacher has been asked already.
        """
        features = self.features(batch)
        wanted = batch.get("teacher_log_probs")
        if wanted is None:
            with torch.no_grad():
                wanted = self._teacher_logits(batch, features).float().log_softmax(-1)
        logits, _ = self.student(batch, features)
        given = logits.float().log_softmax(-1)
        return F.kl_div(given, wanted, reduction="sum", log_target=True)

    def _teacher_logits(self, batch: dict[str, Any], features: torch.Tensor) -> torch.Tensor:
        teacher = self.crosslmm if self.teacher is None else self.teacher
        if self.teacher is not None and "video_features" not in batch:
            features = encode(teacher, batch["pixel_values_videos"])  # the student's encoder moves
        return full_token_logits(teacher, batch, features, self.grid)


@torch.no_grad()
def generate_answer(
    teacher: CrossLMMForConditionalGeneration,
    collator: Collator,
    example: Any,
    grid: int,
    max_new_tokens: int,
) -> list[int]:
    """Ids of the teacher's own greedy answer to an example that ends with a question."""
    device = teacher.device
    text = collator.text([example], grid**2)
    frames = {name: value.to(device) for name, value in collator.frames([example]).items()}
    embeds = teacher_embeds(
        teacher,
        text["input_ids"].to(device),
        encode(teacher, frames["pixel_values_videos"]),
        frames["frame_times"],
        frames["frame_mask"],
        grid,
    )
    return teacher.generate(
        inputs_embeds=embeds,
        attention_mask=text["attention_mask"].to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )[0].tolist()


def fill_in_answers(
    dataset: LlavaDataset,
    teacher: CrossLMMForConditionalGeneration,
    collator: Collator,
    grid: int,
    accelerator: Accelerator,
    file: Path,
    max_new_tokens: int = 256,
    source: str = "",
) -> int:
    """Let the teacher answer records that end with a question; kept in `file` for later runs.

    `source` names the teacher's weights. Returns how many answers were generated now. Each process
    takes a share of the records.
    """
    known = _read(file)
    keys = {i: _key(dataset.records[i], source, grid) for i in dataset.unanswered()}
    missing = [i for i, key in keys.items() if key not in known]
    # bitsandbytes repacks 4-bit weights on a CPU for good when it meets them in evaluation, and
    # no gradient goes through those; without dropout the modes are the same.
    teacher.train(getattr(teacher, "is_quantized", False))
    found: list[tuple[str, str]] = []
    with accelerator.split_between_processes(missing) as mine, accelerator.autocast():
        for index in tqdm(mine, desc="teacher's answers", disable=not mine):
            example = dataset[index]
            if isinstance(example, Skipped):
                continue  # counted when training meets it
            ids = generate_answer(teacher, collator, example, grid, max_new_tokens)
            text = dataset.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
            found.append((keys[index], text))
    found = gather_object(found)
    known |= dict(found)
    if found and accelerator.is_main_process:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text("".join(json.dumps(pair) + "\n" for pair in known.items()))
        part.rename(file)
    for index, key in keys.items():
        if known.get(key):
            record = dataset.records[index]
            turn = {"from": "gpt", "value": known[key]}
            dataset.records[index] = {**record, "conversations": [*record["conversations"], turn]}
    return len(found)


def _key(record: dict[str, Any], source: str, grid: int) -> str:
    """What an answer hangs on."""
    text = json.dumps([record, source, grid], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _read(file: Path) -> dict[str, str]:
    lines: Iterable[str] = file.read_text().splitlines() if file.exists() else ()
    return dict(json.loads(line) for line in lines)
