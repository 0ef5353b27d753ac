"""Training on LLaVA-style data: what moves, what is learned, and that a break changes nothing."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

from model import video_sandbox
from model.conversion import convert
from model.loading import load
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training import loop
from model.training.collate import Collator
from model.training.data import IGNORE, Example, LlavaDataset, Skipped, read_records
from model.training.distill import DistillLoss
from model.training.losses import AnswerLoss, encode
from model.training.stages import STAGES, checkpoint_activations, load_base, part_of
from model.training.train import main
from model.types import InputError
from tests.media import make_video, truncate
from tests.published import save_llava_onevision, save_qwen2, save_siglip
from tests.tiny import tiny_model

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "model" / "training" / "configs"


def talk(question: str, *answers: str, **media: object) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}]
    for answer in answers:
        turns += [{"from": "gpt", "value": answer}, {"from": "human", "value": "And?"}]
    return {"id": question, "conversations": turns[:-1] if answers else turns, **media}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    make_video(folder / "a.mp4", duration=3, size=(64, 48))
    make_video(folder / "b.webm", codec="libvpx-vp9", duration=5, size=(48, 64))
    truncate(folder / "a.mp4", folder / "broken.mp4", 0.5)
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 100, 20)).save(folder / f"{i}.png")
    (folder / "not.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return [
        talk("<image>\nWhat is it?", "A cat.", video="a.mp4"),
        talk("<video>\nWho?", "Ann.", "Bob.", video="b.webm"),
        talk("Say it.", "Red.", image="0.png"),
        talk("One <image> two <image> three <image>", "Yes.", image=["0.png", "1.png", "2.png"]),
        talk("Hello?", "Hi there."),
        talk("<image>\nWhere?", "Left.", video="a.mp4"),
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_siglip(folder / "encoder")
    # Inputs of 64: what bitsandbytes' blocks need on a CPU.
    save_qwen2(folder / "llm", hidden_size=64, intermediate_size=64)
    return convert(folder / "encoder", folder / "start", llm=folder / "llm", pooled_grid=2)


@pytest.fixture
def data(tmp_path: Path, records: list[dict[str, Any]]) -> Path:
    file = tmp_path / "data.json"
    file.write_text(json.dumps(records))
    return file


@pytest.fixture
def stills(tmp_path: Path, records: list[dict[str, Any]]) -> Path:
    """Without videos, for runs of many updates."""
    file = tmp_path / "stills.json"
    more = [talk(f"<image>\nNumber {i}?", "No." * i, image=f"{i}.png") for i in range(3)]
    file.write_text(json.dumps([*records[2:5], *more]))
    return file


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    forget_accelerator()
    yield
    forget_accelerator()  # or the next file's trainer finds this one's precision


def forget_accelerator() -> None:
    """Accelerate keeps its state for the whole process; each run here is one of its own."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def options(base: Path, data: Path, media: Path, out: Path, *more: object) -> list[str]:
    given = ["--model", base, "--data", data, "--media-root", media, "--out", out, "--cpu"]
    return [str(x) for x in (*given, "--workers", 0, "--frames", 4, *more)]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


# Data.


def test_labels_are_the_answers_and_their_end_only(
    base: Path, media: Path, records: list[dict[str, Any]]
) -> None:
    processor = AutoProcessor.from_pretrained(base)
    dataset = LlavaDataset(records, processor, media, max_frames=4)
    decode = processor.tokenizer.decode
    wanted = ["A cat.", "Ann. Bob.", "Red.", "Yes.", "Hi there.", "Left."]
    for i, answers in enumerate(wanted):
        example = dataset[i]
        assert isinstance(example, Example)
        learned = decode([label for label in example.labels if label != IGNORE])
        assert learned.replace("<|im_end|>", " ").split() == answers.split()
        assert learned.count("<|im_end|>") == (2 if i == 1 else 1)
        assert all(a in (IGNORE, b) for a, b in zip(example.labels, example.ids, strict=True))
    text = decode(dataset[1].ids)
    assert text == (
        "<|im_start|>user\n<|video_pad|>Who?<|im_end|>\n<|im_start|>assistant\nAnn.<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nBob.<|im_end|>"
    )
    assert [len(dataset[i].times) for i in (0, 1)] == [3, 4]
    assert [dataset[i].groups for i in range(5)] == [[3], [4], [1], [1, 1, 1], []]


def test_training_tokens_are_those_of_the_chat(base: Path, media: Path) -> None:
    processor = AutoProcessor.from_pretrained(base)
    record = talk("<image>\nA <|im_end|> token?", "No.", video="a.mp4")
    example = LlavaDataset([record], processor, media, max_frames=4)[0]
    before, after = processor.prompt_ids("A <|im_end|> token?")
    prompt = [*before, processor.video_token_id, *after]
    assert example.ids[: len(prompt)] == prompt
    assert set(example.labels[: len(prompt)]) == {IGNORE}


def test_collated_frames_and_placeholders_fit(
    base: Path, media: Path, records: list[dict[str, Any]]
) -> None:
    processor = AutoProcessor.from_pretrained(base)
    config = load_base(base, STAGES["2"]).config
    dataset = LlavaDataset(records, processor, media, max_frames=4)
    batch = Collator(config, 0, teacher_grid=7)([dataset[i] for i in (0, 1, 3, 4)])
    assert batch["frame_mask"].sum(1).tolist() == [3, 4, 3, 0]
    visual = batch["input_ids"] == config.video_token_id
    assert visual.sum(1).tolist() == [12, 16, 12, 0]
    full = batch["teacher_input_ids"] == config.video_token_id
    assert full.sum(1).tolist() == [147, 196, 147, 0]
    answers = batch["labels"][batch["labels"] != IGNORE]
    assert torch.equal(answers, batch["teacher_labels"][batch["teacher_labels"] != IGNORE])
    assert batch["frame_times"][1].tolist() == pytest.approx([0, 1.25, 2.5, 3.75], abs=0.1)


def test_a_sample_weighs_the_same_alone_and_in_a_batch(
    base: Path, media: Path, records: list[dict[str, Any]]
) -> None:
    """Padding, masks of shorter videos, several images and text without a video change nothing."""
    crosslmm = load_base(base, STAGES["2"])
    crosslmm.model.language_model.layers[0].dual_cross_attention.t2v.gate.data.fill_(0.7)
    dataset = LlavaDataset(records, AutoProcessor.from_pretrained(base), media, max_frames=4)
    loss, collate = AnswerLoss(crosslmm), Collator(crosslmm.config, 0)
    with torch.no_grad():
        alone = sum(loss(collate([dataset[i]])) for i in range(5))
        together = loss(collate([dataset[i] for i in range(5)]))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-3)


def test_a_separator_after_the_last_frame(tmp_path: Path, media: Path, records: list) -> None:
    save_llava_onevision(tmp_path / "llava")
    folder = convert(tmp_path / "llava", tmp_path / "start", pooled_grid=2)
    crosslmm = load_base(folder, STAGES["2"])
    dataset = LlavaDataset(records, AutoProcessor.from_pretrained(folder), media, max_frames=4)
    loss, collate = AnswerLoss(crosslmm), Collator(crosslmm.config, 0)
    batch = collate([dataset[i] for i in (0, 3, 4)])
    assert (batch["input_ids"] == 260).sum(1).tolist() == [13, 13, 0]
    with torch.no_grad():
        alone = sum(loss(collate([dataset[i]])) for i in (0, 3, 4))
        torch.testing.assert_close(loss(batch), alone, rtol=1e-4, atol=1e-3)


def test_what_cannot_be_used_is_skipped_with_its_reason(base: Path, media: Path) -> None:
    bad = {
        "broken.mp4": talk("<video>\nWhat?", "It.", video="broken.mp4"),
        "no such file": talk("<video>\nWhat?", "It.", video="nowhere.mp4"),
        "cannot be read as an image": talk("<image>\nWhat?", "It.", image="not.png"),
        "take turns": {"conversations": [{"from": "gpt", "value": "x"}]},
        "2 placeholders for 3": talk("<image> <image>", "x", image=["0.png", "1.png", "2.png"]),
        "not both": talk("a", "b", image="0.png", video="a.mp4"),
        "of the form": {"conversations": [{"from": "robot", "value": "x"}]},
    }
    dataset = LlavaDataset(
        list(bad.values()), AutoProcessor.from_pretrained(base), media, max_frames=4
    )
    for i, reason in enumerate(bad):
        assert isinstance(dataset[i], Skipped), reason
        assert reason.lower() in dataset[i].reason.lower()


def test_a_decoder_that_crashes_costs_its_sample_only(
    base: Path, media: Path, records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(video_sandbox, "_PROGRAM", ("-c", crash))
    found = LlavaDataset(records, AutoProcessor.from_pretrained(base), media, max_frames=4)[0]
    assert isinstance(found, Skipped) and "crashed" in found.reason


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no data file .*gone.json"):
        read_records([tmp_path / "gone.json"])
    (tmp_path / "x.jsonl").write_text('{"conversations": []}\n{')
    with pytest.raises(InputError, match="x.jsonl is not valid jsonl"):
        read_records([tmp_path / "x.jsonl"])
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="list of records"):
        read_records([tmp_path / "x.json"])


# Stages.


@pytest.mark.parametrize(
    ("choice", "moving"),
    [
        (("--stage", "1"), {"projector", "v2v", "memory"}),
        (("--stage", "2"), {"encoder", "projector", "v2v", "t2v", "memory", "llm"}),
        (("--train", "dcal"), {"v2v", "t2v", "memory"}),
    ],
)
def test_what_must_move_moves_and_nothing_else(
    base: Path, data: Path, media: Path, tmp_path: Path, choice: Sequence[str], moving: set[str]
) -> None:
    out = tmp_path / "out"
    more = ("--batch-size", 3, "--steps", 2, "--learning-rate", 1e-3, "--warm-up", 0)
    assert main(options(base, data, media, out, *choice, *more)) == 0
    old, new = weights(base), weights(out / "model")
    if choice[1] == "1":
        assert not any(".t2v." in name for name in new)
        assert not CrossLMMForConditionalGeneration.from_pretrained(out / "model").config.t2v
    moved = {name for name in new if not torch.equal(new[name], old[name])}
    assert {part_of(name) for name in moved} == moving
    # Behind gates that were closed in the first update, projections move from the second on.
    for name in new:
        if part_of(name) in moving and not name.endswith(
            ("k_proj.bias", "norm.weight", "position_embedding.weight")
        ):
            assert name in moved or "post_layernorm" in name, name
    loaded = load(out / "model", device="cpu")
    assert loaded.info.trained


def test_stage_two_adds_t2v_with_closed_gates(
    base: Path, data: Path, media: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    assert main(options(base, data, media, first, "--stage", "1", "--steps", 1)) == 0
    crosslmm = load_base(first / "model", STAGES["2"])
    assert crosslmm.config.t2v
    v2v, t2v = zip(*crosslmm.gates, strict=True)
    assert any(v2v) and not any(t2v)
    branch = crosslmm.model.language_model.layers[0].dual_cross_attention.t2v
    assert 0 < branch.q_proj.weight.std() < 0.1


def test_rates_per_part_and_no_decay_of_gates(base: Path) -> None:
    from model.training.stages import parameter_groups

    crosslmm = load_base(base, STAGES["2"])
    groups = parameter_groups(crosslmm, STAGES["2"].rates, 0.1)
    rates = {group["part"]: group["lr"] for group in groups}
    assert rates["encoder"] == 2e-6 and {rates[p] for p in rates if p != "encoder"} == {1e-5}
    for group in groups:
        assert all((p.dim() > 1) == (group["weight_decay"] > 0) for p in group["params"])
    assert sum(len(g["params"]) for g in groups) == sum(
        p.requires_grad for p in crosslmm.parameters()
    )


def test_gradient_checkpointing_changes_no_gradient(
    base: Path, media: Path, records: list[dict[str, Any]]
) -> None:
    dataset = LlavaDataset(records, AutoProcessor.from_pretrained(base), media, max_frames=4)
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        crosslmm = load_base(base, STAGES["2"]).train()
        for i in crosslmm.config.dcal_layers:
            for branch in crosslmm.model.language_model.layers[i].dual_cross_attention.children():
                branch.gate.data.fill_(0.5)
        if checkpointing:
            checkpoint_activations(crosslmm)
        AnswerLoss(crosslmm)(Collator(crosslmm.config, 0)([dataset[0], dataset[1]])).backward()
        found.append({n: p.grad for n, p in crosslmm.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(found[1][name], gradient)


# The loop.


def test_a_small_set_is_learned_by_heart(
    base: Path, stills: Path, media: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    more = ("--stage", "2", "--batch-size", 6, "--steps", 30, "--learning-rate", 3e-3)
    assert main(options(base, stills, media, out, *more)) == 0
    curve = losses(out)
    assert curve[-1] < 0.5 * curve[0]


def test_a_resumed_run_has_the_same_losses(
    base: Path, stills: Path, media: Path, tmp_path: Path
) -> None:
    more = ["--stage", "2", "--accumulate", 2, "--steps", 7, "--learning-rate", 1e-3]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(options(base, stills, media, whole, *more)) == 0
    forget_accelerator()
    more += ["--save-every", 4]
    stop_after(5, options(base, stills, media, broken, *more))
    assert [p.name for p in (broken / "checkpoints").iterdir()] == ["step-00000004"]
    assert main(options(base, stills, media, broken, *more, "--resume")) == 0
    assert losses(broken) == losses(whole)
    a, b = weights(whole / "model"), weights(broken / "model")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert main(options(base, stills, media, broken, *more)) == 2  # not over a finished run


def stop_after(steps: int, argv: list[str]) -> None:
    """Run the training until it has taken some steps, and break it off there."""
    code = (
        "import sys\nfrom model.training import loop, train\n"
        "take = loop.Run.step\n"
        "def step(self, batches):\n"
        f"    if self.progress.step == {steps}: sys.exit(9)\n"
        "    return take(self, batches)\n"
        "loop.Run.step = step\ntrain.main(sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, check=False)
    assert done.returncode == 9


def test_two_processes_do_what_one_does(
    base: Path, data: Path, media: Path, tmp_path: Path
) -> None:
    """Each process takes another half of the global batch; one of them skips a sample."""
    records = json.loads(data.read_text())
    records += [talk("<video>\nWhat?", "It.", video="broken.mp4"), talk("Why?", "So.")]
    data.write_text(json.dumps(records))
    more = ("--stage", "2", "--steps", 6, "--learning-rate", 1e-3)
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(options(base, data, media, one, *more, "--batch-size", 2)) == 0
    # accelerate's launcher starts processes without GPUs through MPI only; torch's does it alone.
    launch = "torch.distributed.run --standalone --nproc-per-node 2 -m model.training.train"
    argv = options(base, data, media, two, *more, "--batch-size", 1)
    subprocess.run([sys.executable, "-m", *launch.split(), *argv], cwd=ROOT, check=True)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    for out in (one, two):
        (skipped,) = (out / "skipped.jsonl").read_text().splitlines()
        assert json.loads(skipped)["record"] == 6 and "broken.mp4" in skipped


def test_sharded_weights_give_the_same_losses(
    base: Path, data: Path, media: Path, tmp_path: Path
) -> None:
    """What accelerate's FSDP 2 does to the modules of the example configs, on two processes."""
    found = {}
    for count in (1, 2):
        out = tmp_path / f"{count}.json"
        launch = f"torch.distributed.run --standalone --nproc-per-node {count} -m tests.sharded"
        argv = [sys.executable, "-m", *launch.split(), base, data, media, out]
        subprocess.run([str(x) for x in argv], cwd=ROOT, check=True)
        found[count] = json.loads(out.read_text())
    assert found[2] == pytest.approx(found[1], rel=1e-4)
    assert found[1][-1] < found[1][0]


def test_errors_are_one_sentence(
    base: Path,
    data: Path,
    media: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(loop, "find_spec", lambda name: None)
    for more, message in (
        (("--stage", "1", "--resume"), "holds no checkpoint"),
        (("--stage", "1", "--batch-size", 50), "6 records do not fill one batch of 50"),
        (("--stage", "2", "--quantization", "4bit"), "use --train dcal"),
        (("--stage", "1", "--frames", 2000), "do not fit the model's 4096 positions"),
        (("--stage", "1", "--tracker", "tensorboard"), "not installed"),
    ):
        forget_accelerator()
        assert main(options(base, data, media, out, *more)) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_example_configs_are_accelerates_own(file: Path) -> None:
    content = load_config_from_file(str(file))
    assert content.mixed_precision == "bf16"
    wrapped = content.fsdp_config.get("fsdp_transformer_layer_cls_to_wrap", "")
    crosslmm = tiny_model()
    names = {type(module).__name__ for module in crosslmm.modules()}
    assert set(filter(None, wrapped.split(","))) <= names
    known = {field.name for field in dataclasses.fields(FullyShardedDataParallelPlugin)}
    given = {name.removeprefix("fsdp_") for name in content.fsdp_config}
    own_names = {
        "offload_params": "cpu_offload",
        "transformer_layer_cls_to_wrap": "transformer_cls_names_to_wrap",
    }
    assert {own_names.get(name, name) for name in given} <= known | {"version"}


# Distillation.


def questions_only(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    chosen = [records[i] for i in (0, 2, 3)]  # one video: decoding is most of a small run
    return [{**record, "conversations": record["conversations"][:1]} for record in chosen]


def test_the_teacher_is_the_same_model_with_all_tokens_and_no_cross_attention(
    base: Path, media: Path, records: list[dict[str, Any]]
) -> None:
    """Its logits are those of the pooled model at the encoder's own grid, gates closed."""
    crosslmm = load_base(base, STAGES["dcal"])
    dataset = LlavaDataset(records, AutoProcessor.from_pretrained(base), media, max_frames=4)
    batch = Collator(crosslmm.config, 0, teacher_grid=7)([dataset[i] for i in (0, 1, 4)])
    whole = load_base(base, STAGES["dcal"], pooled_grid=7)
    full = Collator(whole.config, 0)([dataset[i] for i in (0, 1, 4)])
    with torch.no_grad():
        expected, _ = AnswerLoss(whole).student(full, encode(whole, full["pixel_values_videos"]))
        for i in crosslmm.config.dcal_layers:  # open gates are not the teacher's business
            for branch in crosslmm.model.language_model.layers[i].dual_cross_attention.children():
                branch.gate.fill_(0.7)
        features = encode(crosslmm, batch["pixel_values_videos"])
        loss = DistillLoss(crosslmm, 7)
        torch.testing.assert_close(loss._teacher_logits(batch, features), expected)
        assert loss(batch) > 0.1


def test_a_student_with_all_tokens_has_nothing_to_learn(
    base: Path, media: Path, records: list[dict[str, Any]]
) -> None:
    crosslmm = load_base(base, STAGES["dcal"], pooled_grid=7)
    dataset = LlavaDataset(records, AutoProcessor.from_pretrained(base), media, max_frames=4)
    batch = Collator(crosslmm.config, 0, teacher_grid=7)([dataset[i] for i in range(5)])
    with torch.no_grad():
        assert DistillLoss(crosslmm, 7)(batch).item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("quantization", ["none", "4bit", "8bit"])
def test_distillation_from_questions_only_over_a_frozen_base(
    base: Path,
    media: Path,
    tmp_path: Path,
    records: list[dict[str, Any]],
    quantization: str,
) -> None:
    if quantization != "none":
        pytest.importorskip("bitsandbytes")
    data, out = tmp_path / "questions.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(r) + "\n" for r in questions_only(records)))
    more = ["--train", "dcal", "--distill", "--quantization", quantization, "--batch-size", 3]
    more += ["--learning-rate", 1e-2, "--max-answer-tokens", 6, "--steps"]
    assert main(options(base, data, media, out, *more, 25)) == 0
    curve = losses(out)
    assert curve[-1] < 0.7 * curve[0]
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(dict(answers)) == 3
    old, new = weights(base), weights(out / "model")
    moved = {part_of(name) for name in new if not torch.equal(new[name], old[name])}
    assert moved == {"v2v", "t2v", "memory"}
    assert all(new[name].dtype == old[name].dtype for name in new)
    (checkpoint,) = (out / "checkpoints").iterdir()
    saved = load_file(checkpoint / "model.safetensors")
    assert {part_of(name) for name in saved} == {"v2v", "t2v", "memory"}
    forget_accelerator()
    assert main(options(base, data, media, out, *more, 27, "--resume")) == 0
    assert len(losses(out)) == 27
    assert load(out / "model", device="cpu", quantization="4bit").info.trained


def test_a_base_that_moves_is_taught_by_a_copy(
    base: Path, media: Path, tmp_path: Path, stills: Path
) -> None:
    out = tmp_path / "out"
    more = ("--stage", "2", "--distill", "--steps", 8, "--batch-size", 3, "--learning-rate", 1e-3)
    assert main(options(base, stills, media, out, *more)) == 0
    curve = losses(out)
    assert curve[-1] < curve[0]
    assert set(weights(out / "model")) == set(weights(base))
