"""The path for times of the bundled model, `model.training.time_path`, and where it is guided."""

import random
from pathlib import Path

import pytest
import torch

from model.training.bundled import Trainer
from model.training.packing import Packed
from model.training.paths import Seen
from model.training.time_guide import DIGITS, TimeGuide
from model.training.time_path import FINDS, TimesTrainer, digits_as_logits, digits_of
from model.training.world_questions import QA
from tests.small_recipe import few_scenes
from tests.tiny import tiny_model

COLON = 11


def test_digits_are_those_of_a_clock() -> None:
    one, two = digits_of(torch.tensor([125.4, 59.9996])).bool()
    assert one.nonzero().flatten().tolist() == [5, 10 + 0, 16 + 2]  # 2:05
    assert two.nonzero().flatten().tolist() == [0, 10 + 0, 16 + 1]  # 1:00


def answers() -> Packed:
    """A list of two times, and a number: columns 6 to 21 of a text that begins at 4."""
    ids = torch.full((1, 22), 5)
    ids[0, [7, 12]] = COLON  # 5:55 5 , 5:55
    ids[0, 11] = 7
    spans = [(QA("scenes", "?", ""), 6, 16), (QA("number", "?", ""), 18, 22)]
    return Packed(
        input_ids=ids,
        attention_mask=torch.ones(1, 1, 22, 22, dtype=torch.bool).tril(),
        position_ids=torch.arange(22)[None],
        labels=None,
        frame_times=None,
        video_start=1,
        text_start=4,
        spans=[spans],
    )


def test_each_digit_has_a_head_that_is_to_look_at_its_own_token() -> None:
    model = tiny_model(pooled_grid=1)
    last = model.model.language_model.layers[-1].self_attn
    for part in last.q_proj.parameters():
        part.data.zero_()  # every token looks at all before it alike
    guide, packed = TimeGuide(model, (7,), COLON), answers()
    with torch.no_grad():
        model(input_ids=packed.input_ids, position_ids=packed.position_ids)
        found = guide.loss(packed)
    # The list's tokens, but not its second part's separator nor its end.
    wanted, columns = torch.zeros(()), set(range(6, 16)) - {11, 15}
    for offset, digits in ((2, {9, 14}), (1, {8, 13}), (-1, {6, 11})):
        assert offset in {place for _, _, place in DIGITS.values()}
        # Column c is told by the one before it, which sees c columns; an answer begins with it.
        own = torch.tensor([1 / c for c in digits & columns])
        others = torch.tensor([1 - (c - 6 + 1) / c for c in columns - digits])
        wanted -= (own + 1e-4).log().mean() + (others + 1e-4).log().mean()
    torch.testing.assert_close(found, wanted)


def test_what_self_attention_finds_brings_its_time_and_training_leaves_that(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("model.training.paths.BATCHES", 30)
    monkeypatch.setattr("model.training.paths.LEVEL", 3)
    first = few_scenes(recipe, monkeypatch, "--steps", "1")
    first.run()
    made = ("--library", str(recipe / "library"), "--encoder", str(recipe / "encoder"))
    words = ("--start", str(recipe / "model"), "--out", str(tmp_path), "--steps", "3", *made)
    trainer = few_scenes(recipe, monkeypatch, *words, trainer=TimesTrainer)
    width = trainer.crosslmm.model.language_model.layers[0].self_attn.head_dim
    check_frames(trainer, width)
    check_tokens(trainer)
    before = {name: weight.clone() for name, weight in trainer.crosslmm.state_dict().items()}
    trainer.run()
    changed = {n for n, w in trainer.crosslmm.state_dict().items() if not torch.equal(w, before[n])}
    last = "model.language_model.layers.5.self_attn."
    assert all(name.startswith("model.language_model.layers.5.") for name in changed)
    assert {last + "q_proj.weight", last + "v_proj.weight"} <= changed
    after = trainer.crosslmm.state_dict()
    for head, (_, n, _) in DIGITS.items():
        path = slice(head * width, head * width + n)
        for name, rows in (("v_proj.weight", path), ("o_proj.weight", (slice(None), path))):
            moved = (after[last + name][rows] - before[last + name][rows]).abs().max()
            assert moved < 1e-3 * before[last + name][rows].abs().max(), name  # weight decay
    again = few_scenes(recipe, monkeypatch, *words, trainer=TimesTrainer)  # nothing is added twice
    assert again.progress.step == 3
    for name, weight in again.crosslmm.state_dict().items():
        assert torch.equal(weight, after[name]), name


def check_frames(trainer: Trainer, width: int) -> None:
    """The values that the finder reads of frames are mostly the digits of their times."""
    layer, head = FINDS
    batches = [trainer.batch("held_out", 3, ["when"], random.Random(i)) for i in range(10)]
    module = trainer.crosslmm.model.language_model.layers[layer].self_attn.v_proj
    read = [
        values[:, batch["packed"].visual_columns(), head * width :].flatten(0, 1)
        for values, batch in zip(Seen(trainer, batches).outputs(module), batches, strict=True)
    ]
    times = torch.cat([batch["packed"].frame_times.flatten() for batch in batches])
    sizes = [n for _, n, _ in DIGITS.values()]
    wanted = digits_of(times).split(sizes, -1)
    for told, truth in zip(torch.cat(read)[:, : sum(sizes)].split(sizes, -1), wanted, strict=True):
        # By chance one in six or ten; of a model whose embeddings were trained, all.
        assert (told.argmax(-1) == truth.argmax(-1)).float().mean() > 0.5


def check_tokens(trainer: Trainer) -> None:
    """What is written for a digit adds about 1 to its token's logit."""
    model, size = trainer.crosslmm, 40.0
    hidden = torch.nn.functional.normalize(torch.randn(64, 192), dim=-1) * size
    write = digits_as_logits(trainer, 10, size).float()
    tokens = [trainer.prompt.encode(str(digit))[0] for digit in range(10)]
    with torch.no_grad():

        def logits(x: torch.Tensor) -> torch.Tensor:
            return model.lm_head(model.model.language_model.norm(x))[:, tokens]

        for digit in range(10):
            more = (logits(hidden + 0.2 * write[:, digit]) - logits(hidden)).mean(0)
            assert more.argmax() == digit and more[digit] == pytest.approx(0.2, rel=0.3)
