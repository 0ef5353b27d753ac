"""Published formats -> CrossLMM: same answers, every name accounted for, clear refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

from model.checkpoint_files import CheckpointReader, ShardWriter
from model.conversion import convert, main
from model.conversion_branches import seed_branches
from model.loading import load as front_door
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.types import InputError
from tests.published import (
    VOCAB_SIZE,
    rename_weights,
    save_json,
    save_llava_onevision,
    save_qwen2,
    save_siglip,
)
from tests.tiny import randomize

FRAMES = 3
HUB_NAMES = [  # transformers 4.45, in which the hub's files were written
    (r"^vision_tower\.", "vision_tower.vision_model."),
]
LATER_NAMES = [  # transformers 4.52 and later
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^vision_tower\.", "model.vision_tower.vision_model."),
    (r"^(multi_modal_projector|image_newline)", r"model.\1"),
]
NEW_NAMES = [*LATER_NAMES[:2], (r"^(vision_tower|multi_modal|image_newline)", r"model.\1")]


def load(folder: Path) -> CrossLMMForConditionalGeneration:
    crosslmm, info = CrossLMMForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()), info
    return crosslmm.eval()


def video_logits(model: PreTrainedModel, video_token: int, tokens: int) -> torch.Tensor:
    text = [257, 10, 11, *[video_token] * tokens, 20, 21, 22, 258]
    ids = torch.tensor([text, [*text[:-2], 23, 258]])
    pixels = tiny_frames_28()
    with torch.no_grad():
        return model(
            input_ids=ids, pixel_values_videos=pixels, attention_mask=torch.ones_like(ids)
        ).logits


def tiny_frames_28() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, FRAMES, 3, 28, 28, generator=generator)


def check_same(llava: PreTrainedModel, target: Path, tolerance: float = 1e-4) -> None:
    crosslmm, tokens = load(target), FRAMES * 16 + 1  # 7 x 7 -> 4 x 4, and the newline
    expected = video_logits(llava, 260, tokens)
    torch.testing.assert_close(
        video_logits(crosslmm, 260, tokens), expected, atol=tolerance, rtol=0
    )
    assert expected.std() > 0.1
    assert set(sum(crosslmm.gates, ())) == {0.0}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    save_llava_onevision(folder)
    return folder


@pytest.fixture
def source(published: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(published, tmp_path / "source"))


@pytest.mark.parametrize("names", [[], HUB_NAMES, LATER_NAMES, NEW_NAMES])
def test_llava_onevision_gives_the_same_video_logits(source: Path, names: list) -> None:
    llava = LlavaOnevisionForConditionalGeneration.from_pretrained(source).eval()
    assert len(list(source.glob("model-*.safetensors"))) > 2

    def rename(name: str) -> str:
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        return name

    rename_weights(source, rename)
    check_same(llava, convert(source, source.parent / "target"))


@pytest.mark.parametrize("layer", [-2, 2, [-1], 1])
def test_llava_onevision_with_features_of_another_layer(tmp_path: Path, layer: object) -> None:
    llava = save_llava_onevision(tmp_path / "source", vision_feature_layer=layer)
    target = convert(tmp_path / "source", tmp_path / "target")
    check_same(llava, target)
    expected = 1 if layer in (-2, 1) else 2
    assert load(target).config.vision_config.num_hidden_layers == expected


@pytest.mark.parametrize("kept", [False, True])
def test_llava_onevision_with_tied_embeddings(tmp_path: Path, kept: bool) -> None:
    """As the 0.5B model: tied by its config; hub files may hold the head all the same."""
    source = tmp_path / "source"
    llava = save_llava_onevision(source, text={"tie_word_embeddings": True})
    if kept:
        add_weight(source, "language_model.lm_head.weight", llava.lm_head.weight.detach())
    check_same(llava, convert(source, tmp_path / "target"))
    assert load(tmp_path / "target").config.tie_word_embeddings


def test_head_that_only_claims_to_be_tied_is_kept(tmp_path: Path) -> None:
    source = tmp_path / "source"
    llava = save_llava_onevision(source, text={"tie_word_embeddings": True})
    head = torch.randn_like(llava.lm_head.weight)
    add_weight(source, "language_model.lm_head.weight", head)
    crosslmm = load(convert(source, tmp_path / "target"))
    assert torch.equal(crosslmm.lm_head.weight, head)
    assert not crosslmm.config.tie_word_embeddings


def add_weight(folder: Path, name: str, weight: torch.Tensor) -> None:
    file = sorted(folder.glob("model-*.safetensors"))[0]
    save_file({**load_file(file), name: weight.clone()}, file, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = file.name
    save_json(folder, "model.safetensors.index.json", index)


def drop_weight(folder: Path, name: str) -> None:
    for file in folder.glob("model-*.safetensors"):
        weights = {k: v for k, v in load_file(file).items() if k != name}
        save_file(weights, file, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    save_json(folder, "model.safetensors.index.json", index)


def test_everything_new_is_initialised_and_repeats(published: Path, tmp_path: Path) -> None:
    first, second = (load(convert(published, tmp_path / name)) for name in ("a", "b"))
    for (name, weight), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert weight.isfinite().all(), name
        assert torch.equal(weight, other), name
    assert (first.model.memory_norm.weight == 1).all()


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_smaller_pooled_grids(published: Path, tmp_path: Path, grid: int) -> None:
    crosslmm = load(convert(published, tmp_path / "target", pooled_grid=grid))
    assert crosslmm.config.pooled_tokens_per_frame == grid**2
    assert video_logits(crosslmm, 260, FRAMES * grid**2 + 1).isfinite().all()
    processor = AutoProcessor.from_pretrained(tmp_path / "target")
    assert processor.pooled_tokens_per_frame == grid**2


def test_configuration_and_files(published: Path, tmp_path: Path) -> None:
    target = convert(published, tmp_path / "deep" / "target")
    config = load(target).config
    assert (config.pooled_grid, config.v2v_scope, config.vision_post_layernorm) == (
        4,
        "frame",
        False,
    )
    assert config.pool_after_projector and config.frame_separator
    assert config.max_frames == (4096 - 1024) // 16
    assert (target / "generation_config.json").is_file()
    assert "closed" in json.loads((target / "card.json").read_text())["note"]
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    save_llava_onevision(tmp_path / "source", dtype=torch.bfloat16)
    crosslmm = load(convert(tmp_path / "source", tmp_path / "target"))
    assert {p.dtype for p in crosslmm.parameters()} == {torch.bfloat16}


def test_processor_keeps_template_pixels_and_placeholder(published: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(convert(published, tmp_path / "target"))
    assert processor.video_token == "<video>" and processor.video_token_id == 260
    assert processor.image_mean == [0.4, 0.5, 0.6] and processor.image_std == [0.5, 0.5, 0.25]
    assert processor.image_size == 28 and processor.frame_separator
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Who?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == ("<|im_start|>user\n<video>\nWho?<|im_end|>\n<|im_start|>assistant\n")
    before, after = processor.prompt_ids("Why?", [("Who?", "Ann.")])
    text = processor.tokenizer.decode([*before, 260, *after])
    assert text == (
        "<|im_start|>user\n<video>\nWho?<|im_end|>\n<|im_start|>assistant\nAnn.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_typed_control_tokens_stay_text(published: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(convert(published, tmp_path / "target"))
    question = "<video> <|im_end|> <image> <|im_start|>"
    before, after = processor.prompt_ids(question, [(question, question)])
    plain = processor.prompt_ids("a", [("b", "c")])
    for ids, expected in zip((before, after), plain, strict=True):
        assert [i for i in ids if i > 255] == [i for i in expected if i > 255]


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_front_door_says_that_the_branches_are_closed(
    published: Path, tmp_path: Path, quantization: str
) -> None:
    if quantization == "4bit":
        pytest.importorskip("bitsandbytes")
    target = convert(published, tmp_path / "target")
    loaded = front_door(target, quantization=quantization, device="cpu")
    assert not loaded.info.trained and "untrained and closed" in loaded.info.note
    assert loaded.processor.video_token_id == loaded.crosslmm.config.video_token_id == 260


def test_encoder_and_llm(tmp_path: Path) -> None:
    siglip, qwen = save_siglip(tmp_path / "siglip"), save_qwen2(tmp_path / "qwen")
    target = convert(tmp_path / "siglip", tmp_path / "target", llm=tmp_path / "qwen")
    crosslmm = load(target)
    config = crosslmm.config
    assert (config.pooled_grid, config.video_token_id, config.tie_word_embeddings) == (3, 260, True)
    branch = crosslmm.model.language_model.layers[0].dual_cross_attention.v2v
    assert 0.01 < branch.k_proj.weight.std() < 0.03  # an LLM that saw no image has nothing to copy
    assert (branch.query_norm.weight == 1).all() and (branch.k_proj.bias == 0).all()
    pixels = tiny_frames_28()[0]
    with torch.no_grad():
        features = siglip.vision_model(pixels, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(crosslmm.model.encode_frames(pixels), features)
        ids = torch.arange(30).reshape(2, 15)
        torch.testing.assert_close(crosslmm(input_ids=ids).logits, qwen(ids).logits)
        assert video_logits(crosslmm, 260, FRAMES * 9).isfinite().all()
    processor = AutoProcessor.from_pretrained(target)
    assert processor.video_token == "<|video_pad|>" and processor.image_std == [0.5, 0.5, 0.25]


def test_vision_tower_alone_and_untied_llm_without_placeholder(tmp_path: Path) -> None:
    siglip = save_siglip(tmp_path / "both")
    siglip.vision_model.save_pretrained(tmp_path / "tower")
    shutil.copy(tmp_path / "both" / "preprocessor_config.json", tmp_path / "tower")
    qwen: Qwen2ForCausalLM = save_qwen2(tmp_path / "qwen", tied=False, placeholder=False)
    target = convert(tmp_path / "tower", tmp_path / "target", llm=tmp_path / "qwen", pooled_grid=2)
    crosslmm, processor = load(target), AutoProcessor.from_pretrained(target)
    assert crosslmm.config.video_token_id == processor.video_token_id == 259
    assert torch.equal(crosslmm.lm_head.weight, qwen.lm_head.weight)
    ids = processor.tokenizer(processor.expand("a<|video_pad|>b", 2))["input_ids"]
    assert ids[1:-1] == [259] * 8


def truncate(folder: Path) -> None:
    file = sorted(folder.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])


def set_config(**settings: object):
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        save_json(folder, "config.json", {**content, **settings})

    return change


def remove(pattern: str):
    def change(folder: Path) -> None:
        for file in folder.glob(pattern):
            file.unlink()

    return change


def pickled_only(folder: Path) -> None:
    remove("model*")(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")


def narrow(folder: Path) -> None:
    drop_weight(folder, "image_newline")
    add_weight(folder, "image_newline", torch.zeros(8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "no config.json"),
        (remove("model-00002-*"), r"lacks model-00002-of-\d+\.safetensors, 1 of"),
        (truncate, r"model-00002-of-\d+\.safetensors cannot be read"),
        (remove("model*"), "no model.safetensors and no model.safetensors.index.json"),
        (pickled_only, "only pytorch_model.bin"),
        (remove("tokenizer.json"), "no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer in .* cannot be read"),
        (remove("*processor_config.json"), "no preprocessor_config.json"),
        (lambda f: drop_weight(f, "image_newline"), "missing: model.frame_separator"),
        (lambda f: add_weight(f, "abc.weight", torch.zeros(2)), "without a place: abc.weight"),
        (narrow, r"misshapen: image_newline \(8,\) instead of \(32,\)"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (set_config(model_type="llava"), "is a 'llava' checkpoint"),
        (set_config(model_type="crosslmm"), "is a CrossLMM already"),
        (set_config(model_type="siglip"), "--llm"),
        (set_config(model_type="qwen2"), "as --llm"),
        (set_config(vision_feature_layer=[-1, -2]), "vision_feature_layer"),
        (set_config(vision_feature_layer=-4), "vision_feature_layer"),
        (set_config(vision_feature_select_strategy="default"), "only 'full'"),
        (set_config(multimodal_projector_bias=False), "only True"),
        (set_config(video_token_index=VOCAB_SIZE - 1), "no token 271"),
    ],
)
def test_what_is_wrong_is_named(source: Path, damage, message: str) -> None:
    damage(source)
    with pytest.raises(InputError, match=message):
        convert(source, source.parent / "target")
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_wrong_sizes_of_images_and_grids_are_named(source: Path, tmp_path: Path) -> None:
    for grid in (0, 5):
        with pytest.raises(InputError, match="1 to 4"):
            convert(source, tmp_path / "target", pooled_grid=grid)
    save_json(
        source,
        "preprocessor_config.json",
        {"image_mean": [0], "image_std": [1], "size": {"height": 384, "width": 384}},
    )
    with pytest.raises(InputError, match="384 pixels.*takes 28"):
        convert(source, tmp_path / "target")


def test_existing_target_is_left_alone(published: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious").write_text("x")
    with pytest.raises(InputError, match="exists already"):
        convert(published, tmp_path / "target")
    (tmp_path / "target" / "precious").unlink()
    assert load(convert(published, tmp_path / "target"))


def test_full_disk_leaves_nothing_behind(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("model.checkpoint_files.save_file", full)
    with pytest.raises(InputError, match="No space left"):
        convert(published, tmp_path / "target")
    assert not list(tmp_path.iterdir())


def test_hub_id_through_the_local_cache(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--someone--llava"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(published, repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load(convert("someone/llava", tmp_path / "target"))
    with pytest.raises(InputError, match="someone/other.*could not be fetched"):
        convert("someone/other", tmp_path / "target2")
    with pytest.raises(InputError, match="no folder"):
        convert(tmp_path / "nowhere" / "at" / "all", tmp_path / "target2")


def test_command_line(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "target")
    assert main([str(published), target, "--pooled-grid", "2"]) == 0
    assert "closed" in capsys.readouterr().out
    assert main([str(published), target]) == 2
    error = capsys.readouterr().err
    assert "exists already" in error and error.count("\n") == 1
    assert load(tmp_path / "target").config.pooled_grid == 2


def test_shards_are_bounded(tmp_path: Path) -> None:
    writer, weights = ShardWriter(tmp_path, shard_bytes=1000), {}
    for i in range(7):
        weights[f"w{i}"] = torch.full((100,), float(i))
        writer.add(f"w{i}", weights[f"w{i}"])
        assert sum(t.numel() * 4 for t in writer._waiting.values()) <= 1000
    writer.close()
    assert len(list(tmp_path.glob("model-*-of-00004.safetensors"))) == 4
    reader = CheckpointReader(tmp_path)
    assert reader.shapes == {name: (100,) for name in weights}
    for name, tensor in reader.tensors({"w1", "w5"}):
        assert torch.equal(tensor, weights[name])


def test_full_tokens_and_a_trained_gate_differ(published: Path, tmp_path: Path) -> None:
    """Opened gates change a converted model, so the branches are wired to its memory."""
    crosslmm = load(convert(published, tmp_path / "target"))
    closed = video_logits(crosslmm, 260, FRAMES * 16 + 1)
    for i in crosslmm.config.dcal_layers:
        randomize(crosslmm.model.language_model.layers[i].dual_cross_attention, gate=0.7)
    assert (video_logits(crosslmm, 260, FRAMES * 16 + 1) - closed).abs().max() > 0.1


def test_new_branches_start_from_the_layers_self_attention(published: Path, tmp_path: Path) -> None:
    """On the same tokens, without rotation, a branch computes what the self-attention does."""
    crosslmm = load(convert(published, tmp_path / "target"))
    assert not any(gate for pair in crosslmm.gates for gate in pair)
    crosslmm.model.memory_norm.weight.data.fill_(1.0)
    tokens = torch.randn(1, 5, crosslmm.config.hidden_size)
    for i in crosslmm.config.dcal_layers:
        layer = crosslmm.model.language_model.layers[i]
        normed = layer.input_layernorm(tokens)
        memory = crosslmm.model.memory_norm(tokens)
        for branch in layer.dual_cross_attention.children():
            with torch.no_grad():
                query = branch.queries(tokens).transpose(1, 2).flatten(-2)
                torch.testing.assert_close(query, layer.self_attn.q_proj(normed))
                for found, name in zip(branch.keys_values(memory), "kv", strict=True):
                    expected = getattr(layer.self_attn, f"{name}_proj")(normed)
                    torch.testing.assert_close(found.transpose(1, 2).flatten(-2), expected)
    again = load(convert(published, tmp_path / "again"))
    seed_branches(again)
    for name, weight in again.named_parameters():
        assert torch.equal(weight, crosslmm.get_parameter(name)), name
