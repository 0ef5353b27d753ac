"""CrossLMM as a model: against Qwen2, with and without cache, in batches, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    Qwen2ForCausalLM,
)

from model.configuration_crosslmm import CrossLMMConfig
from model.dual_cross_attention import CrossAttention
from model.loading import UNQUANTIZED
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from tests.tiny import PAD_TOKEN, tiny_config, tiny_frames, tiny_inputs, tiny_model, tiny_prompt

SCOPES = [{"v2v_scope": "frame"}, {"v2v_scope": "window", "v2v_window": 2}, {"v2v_scope": "video"}]
VARIANTS = [
    *SCOPES,
    {"time_encoding": "clock", "patch_position": "learned", "projector_norm": True},
    {"pool_after_projector": True, "frame_separator": True, "pooled_grid": 3},
    {"v2v": False},
    {"t2v": False},
    {"v2v": False, "t2v": False},
]


def names(settings: dict) -> str:
    return "-".join(f"{k}={v}" for k, v in settings.items())


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [False, True])
def test_closed_gates_are_plain_qwen2(kernel: str, tied: bool) -> None:
    config = tiny_config(text={"tie_word_embeddings": tied}, attn_implementation=kernel)
    crosslmm = tiny_model(config, gate=0.0)
    crosslmm.set_attn_implementation(kernel)
    qwen = Qwen2ForCausalLM(config.text_config).eval()
    state = {
        "model." + name: weight
        for name, weight in crosslmm.model.language_model.state_dict().items()
        if "dual_cross_attention" not in name
    }
    qwen.load_state_dict({**state, "lm_head.weight": crosslmm.lm_head.weight})
    inputs = tiny_inputs(config, batch=2)
    is_visual = (inputs["input_ids"] == config.video_token_id).unsqueeze(-1)
    with torch.no_grad():
        features = crosslmm.model.encode_frames(inputs["pixel_values_videos"].flatten(0, 1))
        pooled, _ = crosslmm.model.embed_frames(features.unflatten(0, (2, 3)), None)
        embeds = qwen.get_input_embeddings()(inputs["input_ids"])
        embeds = embeds.masked_scatter(is_visual, pooled)
        expected = qwen(inputs_embeds=embeds).logits
        logits = crosslmm(**inputs).logits
        opened = tiny_model(config)(**inputs).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert (opened - expected).abs().max() > 0.1


@pytest.mark.parametrize("settings", VARIANTS, ids=names)
def test_cached_greedy_equals_uncached(settings: dict) -> None:
    crosslmm = tiny_model(**settings)
    inputs = tiny_inputs(crosslmm.config)
    outs = [
        crosslmm.generate(
            **inputs,
            max_new_tokens=6,
            do_sample=False,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for use_cache in (True, False)
    ]
    assert outs[0].sequences.tolist() == outs[1].sequences.tolist()
    torch.testing.assert_close(
        torch.stack(outs[0].logits), torch.stack(outs[1].logits), atol=1e-4, rtol=0
    )


def test_frames_are_encoded_once_per_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    crosslmm, calls = tiny_model(), []
    encode = crosslmm.model.encode_frames
    monkeypatch.setattr(
        crosslmm.model, "encode_frames", lambda x: calls.append(len(x)) or encode(x)
    )
    crosslmm.generate(**tiny_inputs(crosslmm.config), max_new_tokens=4, do_sample=False)
    assert calls == [3]


def padded_batch(config: CrossLMMConfig, frames: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Left-padded prompts over videos of different lengths."""
    prompts = [tiny_prompt(config, n, question=3 + i) for i, n in enumerate(frames)]
    length = max(map(len, prompts))
    ids = torch.tensor([[PAD_TOKEN] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    pixels = tiny_frames(config, len(frames), max(frames))
    frame_mask = torch.tensor([[t < n for t in range(max(frames))] for n in frames])
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values_videos": pixels * frame_mask[:, :, None, None, None],
        "frame_mask": frame_mask,
    }
    if config.time_encoding == "clock":
        inputs["frame_times"] = 61.5 * torch.arange(max(frames)).float().expand(len(frames), -1)
    return inputs


@pytest.mark.parametrize("settings", VARIANTS, ids=names)
def test_batch_with_padding_equals_one_by_one(settings: dict) -> None:
    crosslmm, frames = tiny_model(**settings), (4, 1, 2)
    inputs = padded_batch(crosslmm.config, frames)
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": PAD_TOKEN,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    together = crosslmm.generate(**inputs, **options)
    for i, n in enumerate(frames):
        real = inputs["attention_mask"][i].bool()
        alone = {"input_ids": inputs["input_ids"][i : i + 1, real]}
        for name in ("pixel_values_videos", "frame_times"):
            if name in inputs:
                alone[name] = inputs[name][i : i + 1, :n]
        alone = crosslmm.generate(**alone, **options)
        assert together.sequences[i, -5:].tolist() == alone.sequences[0, -5:].tolist()
        torch.testing.assert_close(
            torch.stack(together.logits)[:, i],
            torch.stack(alone.logits)[:, 0],
            atol=1e-4,
            rtol=0,
        )


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("settings", SCOPES, ids=names)
def test_prompt_without_a_video_in_a_batch(settings: dict, kernel: str) -> None:
    crosslmm, text = tiny_model(**settings), [7, 8, 9, 10]
    crosslmm.set_attn_implementation(kernel)
    inputs = tiny_inputs(crosslmm.config, batch=2, frames=2)
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"][1] = torch.tensor([PAD_TOKEN] * (length - 4) + text)
    inputs["attention_mask"][1, :-4] = 0
    inputs["frame_mask"] = torch.tensor([[True, True], [False, False]])
    logits = crosslmm(**inputs).logits
    alone = crosslmm(input_ids=torch.tensor([text])).logits
    torch.testing.assert_close(logits[1, -4:], alone[0], atol=1e-4, rtol=0)
    logits[:, -4:].square().mean().backward()
    for name, weight in crosslmm.named_parameters():
        assert weight.grad is None or weight.grad.isfinite().all(), name


@pytest.mark.parametrize("settings", VARIANTS, ids=names)
def test_eager_equals_sdpa(settings: dict) -> None:
    crosslmm = tiny_model(**settings)
    inputs = padded_batch(crosslmm.config, (3, 1, 2))
    logits = {}
    for kernel in ("eager", "sdpa"):
        crosslmm.set_attn_implementation(kernel)
        branches = [m for m in crosslmm.modules() if isinstance(m, CrossAttention)]
        assert all(m.config._attn_implementation == kernel for m in branches)
        with torch.no_grad():
            logits[kernel] = crosslmm(**inputs).logits
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits["eager"][seen], logits["sdpa"][seen], atol=1e-4, rtol=0)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        crosslmm = tiny_model(
            v2v_scope="window", v2v_window=1, time_encoding="clock", patch_position="learned"
        ).train()
        if checkpointing:
            crosslmm.gradient_checkpointing_enable()
            layers = crosslmm.model.language_model.layers
            assert all(layer.gradient_checkpointing for layer in layers)
        inputs = padded_batch(crosslmm.config, (3, 1))
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        crosslmm(**inputs, labels=labels, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in crosslmm.named_parameters()})
    # The encoder's own final norm lies behind the features that are used.
    without = {n for n, g in gradients[0].items() if g is None}
    assert without == {f"model.vision_tower.post_layernorm.{n}" for n in ("weight", "bias")}
    for name, gradient in gradients[0].items():
        if gradient is not None:
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_in_shards_and_loaded_strictly(tmp_path: Path, tied: bool) -> None:
    config = tiny_config(
        text={"tie_word_embeddings": tied},
        time_encoding="clock",
        patch_position="learned",
        projector_norm=True,
        frame_separator=True,
    )
    crosslmm = tiny_model(config)
    crosslmm.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == crosslmm.config.to_diff_dict()
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, CrossLMMForConditionalGeneration)
    assert not any(info.values()), info
    inputs = tiny_inputs(config)
    with torch.no_grad():
        assert torch.equal(crosslmm(**inputs).logits, loaded(**inputs).logits)
    np.testing.assert_allclose(loaded.gates, [(np.tanh(0.7), -np.tanh(0.7))] * 2, rtol=1e-6)


def test_device_map_and_dtype(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    loaded = CrossLMMForConditionalGeneration.from_pretrained(
        tmp_path, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    inputs = tiny_inputs(loaded.config)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].bfloat16()
    assert loaded.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_leaves_gates_norms_and_encoder_alone(tmp_path: Path, bits: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    text = {"hidden_size": 64, "intermediate_size": 128}  # NF4 works in blocks of 64
    crosslmm = tiny_model(text=text)
    crosslmm.save_pretrained(tmp_path)
    quantization = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=UNQUANTIZED,
        )
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=UNQUANTIZED)
    )
    loaded = CrossLMMForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"}
    )
    kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    quantized = {n for n, m in loaded.named_modules() if isinstance(m, kind)}
    assert not [n for n in quantized if "vision_tower" in n or "lm_head" in n]
    layer = loaded.model.language_model.layers[0]
    branch = layer.dual_cross_attention.t2v
    assert isinstance(branch.k_proj, kind) and isinstance(layer.mlp.up_proj, kind)
    before = dict(crosslmm.named_parameters())
    kept = [n for n in before if n.endswith("gate") or "norm" in n or "vision_tower" in n]
    for name in kept:
        assert torch.equal(loaded.get_parameter(name), before[name]), name
    inputs = tiny_inputs(crosslmm.config)
    with torch.no_grad():
        difference = loaded(**inputs).logits - crosslmm(**inputs).logits
    assert 0 < difference.norm() / crosslmm(**inputs).logits.norm() < (0.6 if bits == 4 else 0.1)


def test_stage_one_parameters_of_the_2b_model() -> None:
    """Projector and one branch: 42.68 M, plus norms and gates (paper, stage 1)."""
    with torch.device("meta"):
        crosslmm = CrossLMMForConditionalGeneration(CrossLMMConfig.from_preset("crosslmm-2b"))
    trained = ("multi_modal_projector", ".memory_norm", ".v2v.")
    sizes = {
        n: p.numel() for n, p in crosslmm.named_parameters() if any(part in n for part in trained)
    }
    small = {n for n in sizes if "norm" in n or n.endswith("gate")}
    assert sum(sizes.pop(n) for n in small) == 1536 + 7 * (1536 + 1)
    assert round(sum(sizes.values()) / 1e6, 2) == 42.68


def test_wrong_number_of_placeholders_is_told() -> None:
    crosslmm = tiny_model()
    inputs = tiny_inputs(crosslmm.config)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][:, :2]
    with pytest.raises(ValueError, match=r"expected \[8\], found \[12\]"):
        crosslmm(**inputs)


@pytest.mark.parametrize("settings", VARIANTS, ids=names)
def test_a_part_of_the_memory_is_that_part_of_it(settings: dict) -> None:
    model = tiny_model(**settings).model
    config = model.config
    features = torch.randn(2, 3, config.original_grid**2, config.vision_config.hidden_size)
    times = torch.rand(2, 3) * 100
    kept = torch.rand(features.shape[:3]).topk(5).indices
    pooled, memory = model.embed_frames(features, times)
    same, part = model.embed_frames(features, times, kept=kept)
    assert torch.equal(same, pooled)
    wanted = memory.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, memory.shape[3]))
    torch.testing.assert_close(part, wanted)


def test_missing_times_are_told() -> None:
    crosslmm = tiny_model(time_encoding="clock")
    inputs = tiny_inputs(crosslmm.config)
    del inputs["frame_times"]
    with pytest.raises(ValueError, match="frame_times"):
        crosslmm(**inputs)


def test_frames_after_padding_are_refused() -> None:
    crosslmm = tiny_model()
    inputs = tiny_inputs(crosslmm.config, batch=1)
    mask = torch.ones(inputs["pixel_values_videos"].shape[:2], dtype=torch.bool)
    mask[:, 0] = False
    with pytest.raises(ValueError, match="padding after them"):
        crosslmm(**{**inputs, "frame_mask": mask})
