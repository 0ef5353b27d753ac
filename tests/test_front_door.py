"""Every published format through the front door, from folder to answer; refusals name the file."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer

from model import loading
from model.ask import main as ask
from model.conversion import convert
from model.conversion import main as convert_main
from model.engine import Engine
from model.loading import attention_kernel, load, quantization_config
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.processing_crosslmm import CrossLMMProcessor
from model.types import Answer, AskRequest, InputError
from tests.app_server import running_app
from tests.media import make_video
from tests.published import save_json, save_llava_onevision, save_qwen2, save_siglip, save_tokenizer

WIDE = {"hidden_size": 64, "intermediate_size": 64}  # what 8-bit and 4-bit need on a CPU


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "CONVERTED", tmp_path / "cache")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    make_video(path, duration=3, size=(64, 48))
    return path


@pytest.fixture(scope="module")
def crosslmm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crosslmm")
    save_llava_onevision(folder / "llava", text=WIDE)
    return convert(folder / "llava", folder / "ready", pooled_grid=2)


@pytest.fixture
def copy(crosslmm: Path, tmp_path: Path) -> Path:
    return shutil.copytree(crosslmm, tmp_path / "copy")


def answer(source: str | Path | None, video: Path, **settings: object) -> Answer:
    engine = Engine(load(source, device="cpu", **settings))
    request = AskRequest(str(video), "What is it?", max_new_tokens=3)
    return next(event for event in engine.ask(request) if isinstance(event, Answer))


def llava_half_b(folder: Path) -> str:
    save_llava_onevision(folder, text={"tie_word_embeddings": True}, tie_word_embeddings=True)
    return str(folder)


def llava_seven_b(folder: Path) -> str:
    save_llava_onevision(folder, text={"tie_word_embeddings": False})
    return str(folder)


def llava_chat(folder: Path) -> str:
    """Like -chat: the template in a file of its own, and a generation config."""
    save_llava_onevision(folder, dtype=torch.bfloat16)
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    (folder / "chat_template.json").unlink()
    (folder / "chat_template.jinja").write_text(template)
    save_json(folder, "generation_config.json", {"eos_token_id": 258, "max_new_tokens": 5})
    return str(folder)


def pair(folder: Path) -> str:
    save_siglip(folder / "siglip")
    save_qwen2(folder / "qwen")
    return f"{folder / 'siglip'}+{folder / 'qwen'}"


@pytest.mark.parametrize("make", [llava_half_b, llava_seven_b, llava_chat, pair])
@pytest.mark.parametrize("grid", [None, 1, 3])
def test_published_formats_answer(
    make: Callable[[Path], str], grid: int | None, video: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "some-model"
    folder.mkdir()
    found = answer(make(folder), video, pooled_grid=grid)
    own = 9 if make is pair else 16
    assert found.tokens.pooled == len(found.frame_times) * (grid**2 if grid else own)
    assert found.tokens.generated > 0
    engine_info = load(str(folder) if make is not pair else pair(tmp_path / "again")).info
    assert not engine_info.trained and "untrained" in engine_info.note
    assert make is pair or engine_info.name == "some-model"


def test_a_changed_source_is_converted_again(tmp_path: Path) -> None:
    source = tmp_path / "llava"
    source.mkdir()
    save_llava_onevision(source)
    first = load(source).folder
    assert load(source).folder == first
    (source / "preprocessor_config.json").write_text(
        (source / "preprocessor_config.json").read_text().replace("0.4", "0.45")
    )
    second = load(source)
    assert second.folder != first
    assert second.processor.image_mean[0] == 0.45


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_quantisation_on_a_cpu(crosslmm: Path, video: Path, quantization: str) -> None:
    if quantization != "none":
        pytest.importorskip("bitsandbytes")
    loaded = load(crosslmm, quantization=quantization, device="cpu")
    kinds: dict[bool, set[str]] = {True: set(), False: set()}  # of what reads fine detail, or not
    for name, module in loaded.crosslmm.model.language_model.layers.named_modules():
        detail = "dual_cross_attention" in name or name.endswith("self_attn.o_proj")
        kinds[detail].add(type(module).__name__)
    wanted = {"none": "Linear", "8bit": "Linear8bitLt", "4bit": "Linear4bit"}[quantization]
    assert kinds[False] & {"Linear", "Linear8bitLt", "Linear4bit"} == {wanted}
    assert kinds[True] & {"Linear", "Linear8bitLt", "Linear4bit"} == {"Linear"}
    assert type(loaded.crosslmm.model.vision_tower.encoder.layers[0].mlp.fc1).__name__ == "Linear"
    assert loaded.info.quantization == quantization
    assert loaded.info.dtype == ("float32" if quantization == "none" else "bfloat16")
    assert answer(crosslmm, video, quantization=quantization).tokens.generated > 0


def test_quantisation_without_its_library_says_what_to_install(
    crosslmm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    assert quantization_config("none") is None
    with pytest.raises(InputError, match="pip install bitsandbytes"):
        load(crosslmm, quantization="4bit")


def test_the_kernel_is_chosen_and_logged(
    crosslmm: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "model.loading"):
        assert load(crosslmm, device="cpu").info.attention == "sdpa"
    assert "quantization=none attention=sdpa" in caplog.text
    monkeypatch.setattr(loading, "find_spec", lambda name: name == "flash_attn")
    assert attention_kernel("cuda:0") == "flash_attention_2"
    assert attention_kernel("cpu") == "sdpa"
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    assert attention_kernel("cuda") == "sdpa"


def test_another_grid_lowers_the_frames_to_what_fits(copy: Path) -> None:
    content = json.loads((copy / "config.json").read_text())
    content["text_config"]["max_position_embeddings"] = 1000
    content["pooled_grid"], content["max_frames"] = 1, 200
    save_json(copy, "config.json", content)
    processor = json.loads((copy / "processor_config.json").read_text())
    save_json(copy, "processor_config.json", {**processor, "max_frames": 200})
    assert load(copy).processor.max_frames == 200
    more = load(copy, pooled_grid=4)
    assert more.processor.max_frames == more.crosslmm.config.max_frames == 750 // 16
    assert more.processor.pooled_tokens_per_frame == 16
    for grid in (0, 8):
        with pytest.raises(InputError, match="must be 1 to 7 here"):
            load(copy, pooled_grid=grid)


def test_device_map_is_understood(crosslmm: Path) -> None:
    inputs = {"input_ids": torch.arange(6)[None]}
    plain = CrossLMMForConditionalGeneration.from_pretrained(crosslmm)
    with torch.no_grad():
        expected = plain(**inputs).logits
        for device_map in ("auto", "cpu", {"": "cpu"}):
            mapped = CrossLMMForConditionalGeneration.from_pretrained(
                crosslmm, device_map=device_map
            )
            torch.testing.assert_close(mapped(**inputs).logits, expected)


# Refusals.


def drop_weight(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    tensors.pop("model.memory_norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})


def narrow_weight(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.memory_norm.weight"] = torch.zeros(3)
    save_file(tensors, file, metadata={"format": "pt"})


def surplus_weight(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    save_file({**load_file(file), "abc": torch.zeros(3)}, file, metadata={"format": "pt"})


def cut_weights(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-200])


def impossible_grid(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    save_json(folder, "config.json", {**content, "pooled_grid": 99})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (impossible_grid, r"config.json cannot be used \(.*pooled_grid must be 1..7"),
        (lambda f: next(f.glob("*.safetensors")).unlink(), "holds no model.safetensors"),
        (cut_weights, "model.safetensors cannot be read"),
        (drop_weight, "missing: model.memory_norm.weight"),
        (narrow_weight, "misshapen: model.memory_norm.weight"),
        (surplus_weight, "without a place: abc"),
        (lambda f: (f / "processor_config.json").unlink(), "holds no processor_config.json"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer in .* cannot be read"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_sentence(
    copy: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(copy)
    with pytest.raises(InputError, match=message) as caught:
        load(copy)
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)


def test_pairs_that_are_none_are_refused(crosslmm: Path, tmp_path: Path) -> None:
    save_qwen2(tmp_path / "qwen")
    with pytest.raises(InputError, match="leave --llm out|is a CrossLMM already"):
        load(f"{crosslmm}+{tmp_path / 'qwen'}")
    with pytest.raises(InputError, match="There is no folder .*gone"):
        load(f"{tmp_path / 'gone'}+{tmp_path / 'qwen'}")


# Processor.


@pytest.mark.parametrize("resample", [2, 3, None])
def test_resampling_is_the_encoders_own(tmp_path: Path, resample: int | None) -> None:
    """SigLIP2's processor is bilinear (2), SigLIP's and LLaVA-OneVision's bicubic (3)."""
    save_siglip(tmp_path / "siglip")
    save_qwen2(tmp_path / "qwen")
    file = tmp_path / "siglip" / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    save_json(file.parent, file.name, settings | ({"resample": resample} if resample else {}))
    target = convert(tmp_path / "siglip", tmp_path / "target", llm=tmp_path / "qwen")
    processor = CrossLMMProcessor.from_pretrained(target)
    image = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    small = np.asarray(Image.fromarray(image).resize((28, 28), Image.Resampling(resample or 3)))
    expected = (small / 255 - np.array([0.4, 0.5, 0.6])) / np.array([0.5, 0.5, 0.25])
    found = processor.preprocess_frames([image])[0].permute(1, 2, 0)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    save_json(file.parent, file.name, {**settings, "resample": "smooth"})
    with pytest.raises(InputError, match="resample is 'smooth'"):
        convert(tmp_path / "siglip", tmp_path / "other", llm=tmp_path / "qwen")


def test_resampling_is_that_of_transformers_processor(tmp_path: Path) -> None:
    from transformers import SiglipImageProcessorPil

    save_tokenizer(tmp_path, [])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    for resample in (2, 3):
        theirs = SiglipImageProcessorPil(size={"height": 28, "width": 28}, resample=resample)
        ours = CrossLMMProcessor(tokenizer, image_size=28, resample=resample)
        expected = theirs(Image.fromarray(image), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(ours.preprocess_frames([image]), expected)


@pytest.mark.parametrize("key", ["video", "path"])
def test_a_chat_template_with_a_path_reads_the_video(crosslmm: Path, video: Path, key: str) -> None:
    model = CrossLMMForConditionalGeneration.from_pretrained(crosslmm).eval()
    processor = AutoProcessor.from_pretrained(crosslmm)
    content = [{"type": "video", key: str(video)}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        max_frames=2,
    )
    assert inputs["pixel_values_videos"].shape == (1, 2, 3, 28, 28)
    assert (inputs["input_ids"] == processor.video_token_id).sum() == 2 * 4 + 1
    before, after = processor.prompt_ids("What is it?")
    ids = inputs["input_ids"][0].tolist()
    assert ids[: len(before)] == before and ids[-len(after) :] == after
    out = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3


# The programs.


def test_the_command_line_takes_a_published_folder(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "llava"
    source.mkdir()
    save_llava_onevision(source)
    assert ask([str(video), "What is it?", "--model", str(source)]) == 0
    assert "untrained and closed" in capsys.readouterr().err
    (source / "tokenizer.json").unlink()
    assert ask([str(video), "What is it?", "--model", str(source)]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    assert convert_main([str(tmp_path / "none"), str(tmp_path / "t")]) == 2


def test_the_app_takes_a_published_folder(tmp_path: Path) -> None:
    source = tmp_path / "llava"
    source.mkdir()
    save_llava_onevision(source, text=WIDE)
    options = ("--model", str(source), "--quantization", "4bit", "--pooled-grid", "2")
    cache = str(tmp_path / "cache")
    with running_app(*options, fake=False, CROSSLMM_CACHE=cache) as app:
        health = app.wait_for("ready", "failed")
        assert (health["state"], health["model"]["name"]) == ("ready", "llava")
    (source / "model.safetensors.index.json").write_text("{")
    with running_app(*options, fake=False, CROSSLMM_CACHE=cache) as app:
        health = app.wait_for("ready", "failed")
        assert health["state"] == "failed"
        assert "model.safetensors.index.json is damaged" in health["error"]
