"""The bundled model's recipe: curriculum, training and going on, ablations, hidden evidence."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SiglipVisionModel
from transformers.utils import SAFE_WEIGHTS_NAME

from model.loading import load
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training import ablation, bundled, bundled_model
from model.training.ablation import VARIANTS
from model.training.bundled import HEADS_FILE, INTERVALS, LATEST, THIN_FROM
from model.training.curriculum import FIRST, LEVELS, LONGEST, Curriculum
from model.training.encoder import encoder_config
from model.training.evidence_guide import patches_in
from model.training.guided_loss import GuidedLoss, right_answers
from model.training.library import Video
from model.training.masking import evidence_stretches, other_stretch
from model.training.order import Order
from model.training.packing import IGNORE, Packed
from model.training.release import EXAMPLES, release
from model.training.world_parts import Actor, Background, Placed, Scene, Sign
from model.training.world_questions import QA, Evidence
from model.types import InputError
from tests.small_recipe import few_scenes
from tests.tiny import tiny_model

ROOT = Path(__file__).parent.parent
GREY = Background("plain", ((128, 128, 128),) * 3, 0, 0.1, 0)


def test_a_kind_climbs_only_when_it_is_answered_well() -> None:
    curriculum = Curriculum(("when", "number"))
    rng = random.Random(0)
    for _ in range(400):
        curriculum.record("when", 0, True, 0.05)
        curriculum.record("number", 0, rng.random() < 0.5, 0.05)
    assert curriculum.level["when"] == 1
    assert curriculum.level["number"] == 0
    assert curriculum.kinds_at(1) == ["when"]
    assert curriculum.weight("number") > curriculum.weight("when")
    begun = Curriculum(("when", "number", "count"), 6, new=("count",))
    assert begun.level == {"when": 6, "number": 6, "count": FIRST}
    restored = Curriculum(("when", "number", "count"))
    restored.restore(curriculum.state())
    assert restored.level == {"when": 1, "number": 0, "count": 0}
    curriculum.record("number", 0, False, 0.99)  # late, long videos must not stay unseen
    assert LEVELS[curriculum.level["number"]] >= 48
    lists = Curriculum(("scenes",))  # ... but of lists, long videos hold too few
    lists.record("scenes", 0, False, 0.99)
    assert LEVELS[lists.level["scenes"]] == 18
    assert Curriculum(("when", "scenes"), 10).level == {"when": 10, "scenes": LONGEST["scenes"]}
    # A single frame shows no movement: asked for there, the kind would never be answered.
    assert Curriculum(("when", "direction")).level == {"when": 0, "direction": 1}
    assert Curriculum(("direction",), fixed=True).level == {"direction": 0}


def test_evidence_is_joined_and_the_other_stretch_touches_none_of_it() -> None:
    spans = tuple(Evidence(*span) for span in ((4.0, 6.0), (5.0, 8.0), (20.0, 21.0)))
    taken = evidence_stretches(QA("after", "?", "a cat", spans))
    assert taken == ((4.0, 8.0), (20.0, 21.0))
    rng = random.Random(1)
    for _ in range(50):
        start, end = other_stretch(taken, 40.0, rng)
        assert round(end - start, 9) == 5.0
        assert 0 <= start <= end <= 40.0
        assert all(end <= a or start >= b for a, b in taken)
    assert other_stretch(((0.0, 30.0),), 40.0, rng) is None


def test_the_recipe_trains_saves_and_goes_on(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first = few_scenes(recipe, monkeypatch, "--steps", "3")
    first.run()
    assert first.progress.step == 3 and first.done == 1
    again = few_scenes(recipe, monkeypatch, "--steps", "5")
    assert again.progress.step == 3 and again.progress.seconds == first.progress.seconds
    assert again.curriculum.count == first.curriculum.count and again.curriculum.count
    for name, weight in again.crosslmm.state_dict().items():
        assert torch.equal(weight, first.crosslmm.state_dict()[name]), name
    for name, weight in again.guided.order.state_dict().items():
        assert torch.equal(weight, first.guided.order.state_dict()[name]), name
    again.run()
    before, after = first.crosslmm.state_dict(), again.crosslmm.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert "model.language_model.layers.0.dual_cross_attention.t2v.q_proj.weight" in changed
    assert not any(".vision_tower." in name for name in changed)
    kept = CrossLMMForConditionalGeneration.from_pretrained(recipe / "model")
    for name, weight in kept.state_dict().items():
        assert torch.equal(weight, after[name]), name
    assert set(again.evaluate(0, batches=2)) <= set(bundled.TRAINED_KINDS)
    released = recipe / "released"
    release(recipe / "model", released, show=["when"])
    loaded = load(str(released))
    assert loaded.info.examples == (EXAMPLES["when"],) and loaded.info.trained
    card = json.loads((released / "card.json").read_text())
    assert card["kinds"] == list(bundled.TRAINED_KINDS)


def test_two_processes_train_one_model(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few_scenes(recipe, monkeypatch)  # the library
    more = ["--out", tmp_path, "--encoder", recipe / "encoder", "--library", recipe / "library"]
    launch = "torch.distributed.run --standalone --nproc-per-node 2 -m -- tests.side_by_side"
    for steps in (3, 5):  # the second one resumes
        argv = [sys.executable, "-m", *launch.split(), recipe, *more, "--steps", steps]
        subprocess.run([str(x) for x in argv], cwd=ROOT, check=True)
        one, two = (json.loads((tmp_path / f"process-{i}.json").read_text()) for i in (0, 1))
        asked = one.pop("answers"), two.pop("answers")
        assert one == two and one["step"] == steps and one["curriculum"]["count"]
        assert asked[0] != asked[1]
    kept = CrossLMMForConditionalGeneration.from_pretrained(tmp_path / "model").state_dict()
    assert [w.double().sum().item() for w in kept.values()] == one["weights"]
    alone = few_scenes(recipe, monkeypatch, *map(str, more), "--steps", "6")
    assert alone.progress.step == 5
    for name, weight in alone.crosslmm.state_dict().items():
        assert torch.equal(weight, kept[name]), name


def test_an_ablation_starts_from_a_model_with_more_branches(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = few_scenes(recipe, monkeypatch, "--steps", "3")
    folder = tmp_path / "model"
    whole.crosslmm.save_pretrained(folder)
    whole.processor.tokenizer.model_max_length = 1234
    whole.processor.save_pretrained(folder)
    # As a released model says it; a run leaves `kinds.json`.
    (folder / "card.json").write_text(json.dumps({"kinds": ["when", "number"]}))
    more = ("--out", str(tmp_path), "--library", str(recipe / "library"))
    more += ("--encoder", str(recipe / "encoder"), "--start", str(folder))
    part = few_scenes(recipe, monkeypatch, *more, "--override", '{"t2v": false}')
    # Its weights know its own tokens only, whatever today's texts would give.
    assert part.processor.tokenizer.model_max_length == 1234
    weights = part.crosslmm.state_dict()
    assert not any(".t2v." in name for name in weights)
    for name, weight in weights.items():
        if ".vision_tower." not in name:
            assert torch.equal(weight, whole.crosslmm.state_dict()[name]), name
    part.crosslmm.save_pretrained(folder)  # as after the paper's first stage
    both = few_scenes(recipe, monkeypatch, *more)
    missing = set(both.crosslmm.state_dict()) - set(weights)
    assert missing and all(".t2v." in name for name in missing)
    with pytest.raises(InputError, match="another model"):
        few_scenes(recipe, monkeypatch, *more, "--override", '{"patch_position": "none"}')
    words = ["--start", str(folder), "--out", str(tmp_path / "on")]
    bundled.make_encoder(bundled.arguments(words))
    taken = SiglipVisionModel.from_pretrained(tmp_path / "on" / "encoder").state_dict()
    for name, weight in SiglipVisionModel.from_pretrained(recipe / "encoder").state_dict().items():
        assert torch.equal(weight, taken[name]), name


def test_another_run_goes_on_with_the_heads_that_it_has_in_common(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = ("--library", str(recipe / "library"), "--encoder", str(recipe / "encoder"))
    (tmp_path / "first").mkdir()
    first = few_scenes(recipe, monkeypatch, *made, "--out", str(tmp_path / "first"))
    first.save()
    heads = load_file(tmp_path / "first" / HEADS_FILE)
    fewer = {k: v for k, v in heads.items() if not k.startswith("heads.third.")}
    save_file(fewer | {"heads.copies.bias": torch.zeros(2)}, tmp_path / "first" / HEADS_FILE)
    (tmp_path / "second").mkdir()
    start = ("--out", str(tmp_path / "second"), "--start", str(tmp_path / "first" / "model"))
    own = few_scenes(recipe, monkeypatch, *made, *start, "--seed", "1").guided.order.state_dict()
    differ = {name for name, tensor in own.items() if not torch.equal(tensor, heads[name])}
    assert differ == {"heads.third.weight", "heads.third.bias", "heads.copies.bias"}


def test_heads_alone_learn_beside_a_start_that_came_without(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = ("--library", str(recipe / "library"), "--encoder", str(recipe / "encoder"))
    (tmp_path / "first").mkdir()
    few_scenes(recipe, monkeypatch, *made, "--out", str(tmp_path / "first")).save()
    (tmp_path / "first" / HEADS_FILE).unlink()
    (tmp_path / "second").mkdir()
    start = ("--out", str(tmp_path / "second"), "--start", str(tmp_path / "first" / "model"))
    alone = few_scenes(recipe, monkeypatch, *made, *start, "--heads-only", "--steps", "2")
    before = {name: head.clone() for name, head in alone.guided.order.state_dict().items()}
    alone.run()
    first, second = (
        load_file(tmp_path / name / "model" / SAFE_WEIGHTS_NAME) for name in ("first", "second")
    )
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    heads = load_file(tmp_path / "second" / HEADS_FILE)
    assert not torch.equal(heads["heads.latest.weight"], before["heads.latest.weight"])


def test_half_of_the_videos_for_lists_have_things_that_come_together(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled, "FRAMES_PER_STEP", 36)
    made = ("--library", str(recipe / "library"), "--encoder", str(recipe / "encoder"))
    (recipe / "lists").mkdir()
    trainer = few_scenes(recipe, monkeypatch, *made, "--out", str(recipe / "lists"))
    trainer.library.shots = trainer.shots["train"]

    def lists(share: float) -> float:
        monkeypatch.setattr(bundled, "TOGETHER", share)
        batches = [trainer.batch("train", 3, ["scenes"], random.Random(i)) for i in range(40)]
        spans = [span for batch in batches for row in batch["packed"].spans for span in row]
        asked = [qa.answer for qa, _, _ in spans if qa.kind == "scenes"]
        return sum(" and " in answer for answer in asked) / len(asked)

    assert lists(1.0) > lists(0.0) + 0.3


def test_times_begin_anywhere_from_the_start_and_are_sampled_thinly_later(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ("--library", str(recipe / "library"), "--encoder", str(recipe / "encoder"))
    (recipe / "times").mkdir()
    trainer = few_scenes(recipe, monkeypatch, *made, "--out", str(recipe / "times"))
    drawn: list[tuple[float, float]] = []
    video = trainer.library.video

    def note(rng: random.Random, frames: int, interval: float, start: float) -> Video:
        drawn.append((interval, start))
        return video(rng, frames, interval, start)

    monkeypatch.setattr(trainer.library, "video", note)
    for level in (0, LEVELS.index(THIN_FROM)):
        trainer.curriculum.level["when"] = level
        drawn.clear()
        for seed in range(10):
            trainer.batch("train", 0, ["when"], random.Random(seed))
        starts = [start for _, start in drawn]
        assert 0 in starts and max(starts) > LATEST / 2 and max(starts) <= LATEST
        assert {interval for interval, _ in drawn} <= set(INTERVALS if level else (1,))
        assert (max(interval for interval, _ in drawn) > 1) == (level > 0)


def test_answers_are_right_when_every_token_is() -> None:
    qa = [QA("when", "?", "0:12"), QA("where", "?", "top")]
    labels = torch.full((1, 9), IGNORE)
    labels[0, 2:5], labels[0, 7:9] = torch.tensor([11, 12, 2]), torch.tensor([13, 2])
    packed = Packed(*[None] * 5, 0, 0, spans=[[(qa[0], 2, 5), (qa[1], 7, 9)]])
    batch = {"labels": labels, "packed": packed}
    told = right_answers(batch, torch.tensor([11, 12, 2, 13, 2]))
    assert told == [(qa[0], True), (qa[1], True)]
    told = right_answers(batch, torch.tensor([11, 12, 5, 13, 2]))  # goes on instead of ending
    assert told == [(qa[0], False), (qa[1], True)]


def test_patches_are_left_out_of_the_memory_only_while_training() -> None:
    loss = GuidedLoss(tiny_model(), separators=(0,))
    features = torch.randn(1, 3, 16, loss.crosslmm.config.vision_config.hidden_size)
    loss.keep = 0.5
    cat = Actor("cat", 0.2, 0.2, *[0.3] * 4, 1, 3)
    sign = Sign("428", "red", "number", (0.5, 0.5, 0.9, 0.7), 2.0, 3.0, "cat")
    placed = (Placed(Scene(3.0, GREY, (cat,), sign), 0.0),)
    loss.orders = [Order.of(Video(placed, np.arange(3) + 0.5, np.arange(3)))]
    loss.evidence.grid = 4
    memory = loss.train().crosslmm.model.embed_frames(features, torch.zeros(1, 3))[1]
    assert memory.shape[2] == 8 and loss.kept.shape == (1, 3, 8)
    assert all(len(set(frame)) == 8 for frame in loss.kept[0].tolist())
    boxes = ((), (cat.box(1.5),), (cat.box(2.5), sign.box))  # what is shown always stays
    for frame, seen in zip(loss.kept[0].tolist(), boxes, strict=True):
        shown = patches_in(seen, 4).flatten().nonzero().flatten().tolist()
        assert len(shown) == (len(seen) * 2 - 1 if seen else 0) and set(shown) <= set(frame)
    whole = loss.eval().crosslmm.model.embed_frames(features, torch.zeros(1, 3))[1]
    assert whole.shape[2] == 16 and loss.kept is None


def test_two_stages_of_an_ablation_share_its_steps(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few_scenes(recipe, monkeypatch)  # makes the library
    monkeypatch.setattr(ablation, "TESTS", 3)
    monkeypatch.setattr(ablation, "FINE", ("exists",))
    args = argparse.Namespace(
        out=tmp_path, encoder=recipe / "encoder", library=recipe / "library", steps=3, level=1,
        kinds=["exists", "outside"], start=None,
    )  # fmt: skip
    found = ablation.train(args, "both, in two stages", 0)
    assert set(found["kinds"]) == {"exists", "outside"} and len(found["gates"]) == 3
    first, second = (
        load_file(tmp_path / n / "model/model.safetensors") for n in ("stage_1", "run")
    )
    assert second.keys() - first.keys() == {name for name in second if ".t2v." in name} != set()
    steps = [sorted((tmp_path / n / "checkpoints").iterdir())[-1].name for n in ("stage_1", "run")]
    assert steps == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_the_ablation_is_a_model(variant: str) -> None:
    ids = {"eos": 0, "pad": 1, "video": 2}
    config = bundled_model.model_config(SiglipVisionModel(encoder_config()), 64, ids)
    for name, value in VARIANTS[variant].items():
        setattr(config, name, value)
    config.validate_choices()
    crosslmm = CrossLMMForConditionalGeneration(config)
    tokens = crosslmm.config.pooled_tokens_per_frame
    assert tokens == config.pooled_grid**2
    if variant == "no pooling":
        assert tokens == config.original_grid**2
