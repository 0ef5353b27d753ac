"""The accounting against PyTorch's own counter, real parameters, real caches and the design."""

import dataclasses
import itertools
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from model.accounting import account, as_table, main
from model.configuration_crosslmm import PRESETS, CrossLMMConfig
from model.cost_formulas import count_parameters
from model.dual_cross_attention import VisualContext
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.video_memory import VideoMemory

VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 29,  # 7 x 7 patches, one row and column of pixels unused
    "vision_use_head": False,
}
TEXT = {
    "model_type": "qwen2",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VIDEO_TOKEN = 96
TEXT_TOKENS, TEXT_BEFORE = 11, 3


def tiny_config(**overrides) -> CrossLMMConfig:
    choices = {"pooled_grid": 3, "dcal_interval": 2, "video_token_id": VIDEO_TOKEN, **overrides}
    vision = {**VISION, **choices.pop("vision", {})}
    text = {**TEXT, **choices.pop("text", {})}
    return CrossLMMConfig(vision_config=vision, text_config=text, **choices)


def tiny_model(config: CrossLMMConfig) -> CrossLMMForConditionalGeneration:
    torch.manual_seed(0)
    # Fused kernels on CPU are not in the counter's table; eager attention is made of products.
    config._attn_implementation = "eager"
    return CrossLMMForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


def prompt(visual: int) -> torch.Tensor:
    after = TEXT_TOKENS - TEXT_BEFORE
    return torch.tensor([[1] * TEXT_BEFORE + [VIDEO_TOKEN] * visual + [2] * after])


def video(config: CrossLMMConfig, frames: int) -> dict[str, torch.Tensor]:
    side = config.vision_config.image_size
    return {
        "pixel_values_videos": torch.randn(1, frames, 3, side, side),
        "frame_times": torch.arange(frames, dtype=torch.float32)[None],
    }


@torch.inference_mode()
def counted(run) -> FlopCounterMode:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter


FORMS = {
    "frame": {},
    "window": {"v2v_scope": "window", "v2v_window": 2},
    "window longer than the video": {"v2v_scope": "window", "v2v_window": 9},
    "video": {"v2v_scope": "video"},
    "no V2V": {"v2v": False},
    "no T2V": {"t2v": False},
    "neither branch": {"v2v": False, "t2v": False},
    "one pooled token": {"pooled_grid": 1},
    "chosen layers": {"dcal_layers": [1, 4]},
    "wide heads": {"text": {"head_dim": 20}},
    "tied, separator, encoder's head": {
        "text": {"tie_word_embeddings": True},
        "vision": {"vision_use_head": True},
        "frame_separator": True,
    },
    "time, position, norm, late pooling": {
        "time_encoding": "clock",
        "patch_position": "learned",
        "projector_norm": True,
        "pool_after_projector": True,
    },
}


@pytest.mark.parametrize(
    ("form", "logits_to_keep"), [*((form, 1) for form in FORMS), ("frame", 0), ("frame", 4)]
)
def test_operations_are_those_of_a_real_forward(form, logits_to_keep):
    config = tiny_config(**FORMS[form])
    crosslmm = tiny_model(config)
    result = account(config, 6, TEXT_TOKENS, text_before=TEXT_BEFORE, logits_to_keep=logits_to_keep)
    counter = counted(
        lambda: crosslmm(
            input_ids=prompt(result.tokens.visual),
            logits_to_keep=logits_to_keep,
            **video(config, 6),
        )
    )
    assert result.operations.total == counter.get_total_flops()


@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_those_of_the_model(form):
    config = tiny_config(**FORMS[form])
    expected = count_parameters(config)
    names = {"encoder": "vision_tower", "llm": "language_model", "v2v": ".v2v.", "t2v": ".t2v."}
    found = dict.fromkeys(("encoder", "projector", "llm", "v2v", "t2v"), 0)
    for name, tensor in tiny_model(config).named_parameters():
        branch = next((b for b in ("v2v", "t2v") if names[b] in name), None)
        is_llm = names["llm"] in name or name.startswith("lm_head")
        part = "encoder" if names["encoder"] in name else "llm" if is_llm else "projector"
        found[branch or part] += tensor.numel()
    assert found == dataclasses.asdict(expected)


def test_answer_tokens_are_counted_as_generate_runs_them():
    config = tiny_config()
    crosslmm = tiny_model(config)
    result = account(config, 4, TEXT_TOKENS, 5, text_before=TEXT_BEFORE, dtype="float32")
    outputs = []
    counter = counted(
        lambda: outputs.append(
            crosslmm.generate(
                input_ids=prompt(result.tokens.visual),
                max_new_tokens=5,
                min_new_tokens=5,
                do_sample=False,
                return_dict_in_generate=True,
                **video(config, 4),
            )
        )
    )
    assert result.operations.total == counter.get_total_flops()
    layers = outputs[0].past_key_values.layers
    assert result.kv_bytes.llm == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def test_sliding_window_layers():
    """Some Qwen2.5 configs let upper layers see a window only; their cache stops growing."""
    text = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
    config = tiny_config(text=text)
    assert config.text_config.layer_types[2:] == ["sliding_attention"] * 3
    result = account(config, 4, TEXT_TOKENS, 5, text_before=TEXT_BEFORE, dtype="float32")
    crosslmm = tiny_model(config)
    outputs = []
    counter = counted(
        lambda: outputs.append(
            crosslmm.generate(
                input_ids=prompt(result.tokens.visual),
                max_new_tokens=5,
                min_new_tokens=5,
                do_sample=False,
                return_dict_in_generate=True,
                **video(config, 4),
            )
        )
    )
    layers = outputs[0].past_key_values.layers
    assert result.kv_bytes.llm == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert result.operations.total == counter.get_total_flops()


def test_masked_operations_are_the_pairs_above_the_diagonal():
    config = tiny_config(text={"num_hidden_layers": 1})
    result = account(config, 4, TEXT_TOKENS)
    length = result.tokens.llm
    hidden = torch.ones(length, length).triu(1).sum().item()
    assert result.operations.masked == hidden * 4 * TEXT["hidden_size"]
    assert result.operations.causal == result.operations.total - result.operations.masked


def test_unpooled_is_a_plain_llm_on_all_original_tokens():
    config = tiny_config()
    crosslmm = tiny_model(dataclasses.replace(config, v2v=False, t2v=False))
    inner = crosslmm.model
    frames = video(config, 3)["pixel_values_videos"][0]

    def run() -> None:
        original = inner.multi_modal_projector(inner.encode_frames(frames)).flatten(0, 1)[None]
        text = inner.get_input_embeddings()(torch.ones(1, TEXT_TOKENS, dtype=torch.long))
        out = inner.language_model(inputs_embeds=torch.cat((original, text), dim=1))
        crosslmm.lm_head(out.last_hidden_state[:, -1:])

    result = account(config, 3, TEXT_TOKENS, system="unpooled")
    assert result.operations.total == counted(run).get_total_flops()
    assert result.operations.v2v == result.operations.t2v == result.kv_bytes.t2v == 0
    assert result.parameters.v2v == result.parameters.t2v == 0
    assert result.tokens.llm == 3 * 49 + TEXT_TOKENS


def llava_config(config: CrossLMMConfig) -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        vision_config=config.vision_config.to_dict(),
        text_config=config.text_config.to_dict(),
        video_token_index=VIDEO_TOKEN,
        image_token_index=VIDEO_TOKEN - 1,
    )


def test_llava_onevision_is_what_transformers_computes():
    config = tiny_config()
    peer = LlavaOnevisionForConditionalGeneration._from_config(
        llava_config(config), attn_implementation="eager"
    ).eval()
    result = account(config, 6, TEXT_TOKENS, system="llava-onevision", dtype="float32")
    assert result.tokens.visual == 6 * 16 + 1
    outputs = []
    counter = counted(
        lambda: outputs.append(
            peer(
                input_ids=prompt(result.tokens.visual),
                pixel_values_videos=video(config, 6)["pixel_values_videos"],
                use_cache=True,
                logits_to_keep=1,
            )
        )
    )
    assert result.operations.total == counter.get_total_flops()
    assert result.parameters.total == sum(p.numel() for p in peer.parameters())
    layers = outputs[0].past_key_values.layers
    assert result.kv_bytes.llm == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


@pytest.mark.parametrize("precision", ["native", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_what_a_memory_holds(precision, dtype):
    config = tiny_config(frame_separator=True)
    crosslmm = tiny_model(config).to(getattr(torch, dtype))
    memory = VideoMemory(crosslmm, precision=precision, prefix_ids=[1] * TEXT_BEFORE)
    frames = video(config, 7)["pixel_values_videos"][0]
    for start, end in itertools.pairwise((0, 3, 4, 7)):
        memory.append(frames[start:end], torch.arange(start, end))
    memory.finish()
    result = account(config, 7, TEXT_BEFORE, kv_precision=precision, dtype=dtype).kv_bytes
    assert result.t2v == sum(store.nbytes for store in memory.state.t2v.values())
    assert result.llm == sum(x.keys.nbytes + x.values.nbytes for x in memory.cache.layers)
    assert result.total == memory.nbytes


def on_meta(name: str, **overrides) -> CrossLMMForConditionalGeneration:
    with torch.device("meta"):
        return CrossLMMForConditionalGeneration._from_config(
            CrossLMMConfig.from_preset(name, **overrides), attn_implementation="eager"
        ).eval()


def test_stage_one_trains_43_million_parameters():
    """Projector and one branch of the 2B model: 42.68 M, besides norms and gates."""
    crosslmm = on_meta("crosslmm-2b", t2v=False)
    sizes = {
        name: tensor.numel()
        for name, tensor in crosslmm.named_parameters()
        if any(part in name for part in (".v2v.", "multi_modal_projector", "memory_norm"))
    }
    matrices = sum(n for name, n in sizes.items() if "norm" not in name and "gate" not in name)
    branch = 7 * (2 * 1536**2 + 2 * 1536 * 256 + 1536 + 2 * 256)
    projector = 1152 * 1536 + 1536**2 + 2 * 1536
    assert matrices == branch + projector == 42_681_344
    counted_parts = count_parameters(crosslmm.config)
    assert sum(sizes.values()) == counted_parts.v2v + counted_parts.projector
    assert sum(sizes.values()) - matrices == 7 * (1536 + 1) + 1536


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_the_presets(name):
    crosslmm = on_meta(name)
    expected = count_parameters(crosslmm.config)
    assert expected.total == sum(p.numel() for p in crosslmm.parameters())


def test_the_7b_model_at_256_frames_on_the_meta_device():
    """A forward of the paper's shapes, without numbers: 229 tera-operations."""
    crosslmm = on_meta("crosslmm-7b")
    config, inner = crosslmm.config, crosslmm.model
    pooled_tokens = 256 * 9
    pixels = torch.empty(256, 3, 384, 384, device="meta")

    def run() -> None:
        features = inner.encode_frames(pixels)
        pooled, memory = inner.embed_frames(features[None], None)
        text = torch.empty(1, TEXT_TOKENS, config.hidden_size, device="meta")
        hidden = inner.language_model(
            inputs_embeds=torch.cat((pooled.flatten(1, 2), text), dim=1),
            visual=VisualContext(
                memory=memory,
                visual_index=torch.arange(pooled_tokens, device="meta")[None],
                text_start=pooled_tokens,
            ),
        ).last_hidden_state
        crosslmm.lm_head(hidden[:, -1:])

    result = account(config, 256, TEXT_TOKENS)
    assert result.operations.total == counted(run).get_total_flops()


def test_llava_onevision_7b_at_256_frames_on_the_meta_device():
    config = CrossLMMConfig.from_preset("crosslmm-7b")
    with torch.device("meta"):
        peer = LlavaOnevisionForConditionalGeneration._from_config(
            llava_config(config), attn_implementation="eager"
        ).eval()
    pixels = torch.empty(1, 256, 3, 384, 384, device="meta")

    def run() -> None:
        visual = peer.model.get_video_features(pixels).pooler_output
        text = torch.empty(1, TEXT_TOKENS, config.hidden_size, device="meta")
        hidden = peer.model.language_model(inputs_embeds=torch.cat((visual, text), dim=1))
        peer.lm_head(hidden.last_hidden_state[:, -1:])

    result = account(config, 256, TEXT_TOKENS, system="llava-onevision")
    assert result.operations.total == counted(run).get_total_flops()


def test_the_estimates_of_the_design():
    """7B, 256 frames, causal attention counted where it is visible."""
    config = CrossLMMConfig.from_preset("crosslmm-7b")
    result = account(config, 256)
    tera = {name: n / 1e12 for name, n in dataclasses.asdict(result.operations).items()}
    assert tera["encoder"] == pytest.approx(170, rel=0.01)
    assert tera["projector"] == pytest.approx(6.4, rel=0.01)
    assert tera["llm"] - tera["masked"] == pytest.approx(31, rel=0.01)
    assert tera["t2v"] == pytest.approx(9.6, rel=0.01)  # keys and values alone
    assert tera["v2v"] - tera["t2v"] == pytest.approx(1.0, rel=0.01)  # queries, output, attention
    assert result.operations.causal / 1e12 == pytest.approx(230, rel=0.01)
    whole = account(CrossLMMConfig.from_preset("crosslmm-7b", v2v_scope="video"), 256)
    assert (whole.operations.v2v - result.operations.v2v) / 1e12 == pytest.approx(43, rel=0.01)
    peer = account(config, 256, system="llava-onevision")
    assert peer.operations.causal / 1e12 == pytest.approx(1330, rel=0.01)
    assert result.kv_bytes.t2v / 1e9 == pytest.approx(2.7, rel=0.01)
    hour = account(config, 3600)
    assert hour.tokens.original == 2_624_400
    assert hour.tokens.llm == 32_400
    assert hour.kv_bytes.t2v / 1e9 == pytest.approx(37, rel=0.02)
    packed = account(config, 3600, kv_precision="int4")
    assert packed.kv_bytes.t2v / 1e9 == pytest.approx(10, rel=0.05)


def test_command_line(capsys):
    main(["--preset", "crosslmm-7b", "--frames", "32,64", "--json"])
    report = json.loads(capsys.readouterr().out)
    parts = {"encoder", "projector", "llm", "v2v", "t2v"}
    assert set(report) == {"parameters", "rows"}
    assert set(report["parameters"]) == parts
    assert [(row["frames"], row["system"]) for row in report["rows"]] == [
        (frames, system)
        for frames in (32, 64)
        for system in ("crosslmm", "unpooled", "llava-onevision")
    ]
    for row in report["rows"]:
        assert set(row) == {"frames", "system", "tokens", "operations", "kv_bytes"}
        assert set(row["tokens"]) == {"original", "llm"}
        assert set(row["operations"]) == parts | {"total"}
        assert row["operations"]["total"] == sum(row["operations"][part] for part in parts)
        assert row["kv_bytes"]["total"] == row["kv_bytes"]["llm"] + row["kv_bytes"]["t2v"]
    assert [row["tokens"]["llm"] for row in report["rows"][:3]] == [288, 23328, 6273]
    main(["--frames", "32"])
    assert "llava-onevision" in capsys.readouterr().out


def test_command_line_counts_a_saved_checkpoint(tmp_path, capsys):
    config = tiny_config(v2v_scope="window", v2v_window=2)
    config.save_pretrained(tmp_path)
    main(["--model", str(tmp_path), "--frames", "5", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["rows"][0]["operations"]["total"] == account(config, 5).operations.total


@pytest.mark.parametrize(
    "arguments",
    [["--frames", "0"], ["--frames", "a"], ["--model", "nowhere"], ["--text-tokens", "-1"]],
)
def test_command_line_refuses_in_words(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_impossible_numbers_are_refused():
    config = tiny_config()
    for wrong in (
        {"frames": 0},
        {"frames": 1, "text_tokens": -1},
        {"frames": 1, "text_tokens": 2, "text_before": 3},
        {"frames": 1, "system": "other"},
        {"frames": 1, "kv_precision": "int2"},
        {"frames": 1, "dtype": "int8"},
    ):
        with pytest.raises(ValueError, match="must|at least|at most"):
            account(config, **wrong)


def test_table_shows_every_row():
    config = tiny_config()
    text = as_table([account(config, 3), account(config, 3, system="unpooled")])
    assert len({len(line) for line in text.splitlines()[2:]}) == 1
