"""Configuration of CrossLMM (arXiv 2505.17020): encoder, LLM, token merge, dual cross-attention."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

SO400M = {  # SigLIP2 so400m, patch 14, 384 px: 27 x 27 = 729 tokens of width 1152
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 384,
    "hidden_act": "gelu_pytorch_tanh",
    "vision_use_head": False,
}
GIANT = {  # SigLIP2 giant-opt, patch 16, 384 px: 24 x 24 = 576 tokens of width 1536
    **SO400M,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 40,
    "patch_size": 16,
}
QWEN2_1B5 = {  # Qwen2.5-1.5B-Instruct
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
}
QWEN2_7B = {  # Qwen2.5-7B-Instruct
    **QWEN2_1B5,
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    "crosslmm-2b": {"vision_config": SO400M, "text_config": QWEN2_1B5, "pooled_grid": 3},
    "crosslmm-7b": {"vision_config": SO400M, "text_config": QWEN2_7B, "pooled_grid": 3},
    "crosslmm-7b-giant": {"vision_config": GIANT, "text_config": QWEN2_7B, "pooled_grid": 4},
}


class CrossLMMConfig(PreTrainedConfig):
    r"""A SigLIP-class encoder, a Qwen2-class LLM, and how dual cross-attention joins them.

    Args:
        vision_config: a SigLIP/SigLIP2 fixed-resolution vision config (or its dict).
        text_config: a Qwen2/Qwen2.5 config (or its dict).
        pooled_grid: side `g` of the pooled grid; each frame puts `g * g` tokens into the LLM.
        dcal_interval: `K`; every K-th layer holds a dual cross-attention (paper, table: 4 is best).
        dcal_layers: the layers themselves; by default `0, K, 2K, ...`. A V2V branch in the last
            layer is dead, because no later layer carries what visual positions gain to the text.
        v2v, t2v: whether the branch exists.
        v2v_scope: what a pooled token may look at: its own `frame`, a `window` of
            `v2v_window` earlier frames and its own, or the whole `video` (equation 6).
        gate_init: initial gamma of each branch; 0 leaves a pretrained LLM untouched.
        time_encoding: `none` (the paper) or `clock`: learned embeddings of the digits of h:mm:ss,
            added to pooled and original tokens.
        patch_position: `none` (the paper) or `learned`: row and column embeddings, added to
            original tokens.
        projector_norm: RMS-normalise projected tokens before time and position are added.
        pool_after_projector: LLaVA-OneVision's order; the paper merges before the projector.
        frame_separator: a learned token after the last frame (LLaVA-OneVision's newline).
        vision_post_layernorm: take the encoder's output after its final LayerNorm.
        projector_hidden_act: activation between the projector's two linear layers.
        video_token_id: id of the placeholder that pooled visual tokens replace.
        frame_rate: frames per second sampled by default.
        max_frames: most frames sampled by default.
        multi_turn: whether earlier turns belong into the prompt of a later question.

    """

    model_type = "crosslmm"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig, model_type="siglip_vision_model", init_kwargs=SO400M
        ),
        "text_config": SubConfigSpec(
            config_class=AutoConfig, model_type="qwen2", init_kwargs=QWEN2_7B
        ),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    pooled_grid: int = 3
    dcal_interval: int = 4
    dcal_layers: list[int] | None = None
    v2v: bool = True
    t2v: bool = True
    v2v_scope: str = "frame"
    v2v_window: int = 0
    gate_init: float = 0.0
    time_encoding: str = "none"
    patch_position: str = "none"
    projector_norm: bool = False
    pool_after_projector: bool = False
    frame_separator: bool = False
    vision_post_layernorm: bool = False
    projector_hidden_act: str = "gelu"
    video_token_id: int = 151656
    frame_rate: float = 1.0
    max_frames: int = 256
    multi_turn: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the sub-configs, fill the default layers and check every choice."""
        for name, default in (("vision_config", SO400M), ("text_config", QWEN2_7B)):
            value = getattr(self, name)
            if not isinstance(value, PreTrainedConfig):
                value = dict(default if value is None else value)
                value = CONFIG_MAPPING[value.pop("model_type", default["model_type"])](**value)
                setattr(self, name, value)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        if self.dcal_layers is None:
            if self.dcal_interval < 1:
                raise ValueError(f"dcal_interval must be at least 1, got {self.dcal_interval}")
            layers = range(0, self.text_config.num_hidden_layers, self.dcal_interval)
            self.dcal_layers = list(layers)
        self.validate_choices()
        super().__post_init__(**kwargs)

    def validate_choices(self) -> None:
        """Raise ValueError where a choice is impossible; names what was expected."""
        choices = {
            "v2v_scope": ("frame", "window", "video"),
            "time_encoding": ("none", "clock"),
            "patch_position": ("none", "learned"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if not 1 <= self.pooled_grid <= self.original_grid:
            raise ValueError(
                f"pooled_grid must be 1..{self.original_grid} (the encoder's grid), "
                f"got {self.pooled_grid}"
            )
        num_layers = self.text_config.num_hidden_layers
        if any(not 0 <= i < num_layers for i in self.dcal_layers):
            raise ValueError(f"dcal_layers must lie in 0..{num_layers - 1}, got {self.dcal_layers}")
        if self.v2v_scope == "window" and self.v2v_window < 1:
            raise ValueError(
                f"v2v_scope 'window' needs v2v_window of at least 1 earlier frame, "
                f"got {self.v2v_window}"
            )

    @property
    def original_grid(self) -> int:
        """Side of the encoder's patch grid."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def original_tokens_per_frame(self) -> int:
        """N: tokens per frame that cross-attention may look at."""
        return self.original_grid**2

    @property
    def pooled_tokens_per_frame(self) -> int:
        """P: tokens per frame that the LLM carries."""
        return self.pooled_grid**2

    @property
    def hidden_size(self) -> int:
        """Width of the LLM."""
        return self.text_config.hidden_size

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> CrossLMMConfig:
        """Config of the paper's models: `crosslmm-2b`, `crosslmm-7b`, `crosslmm-7b-giant`."""
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **overrides})


AutoConfig.register("crosslmm", CrossLMMConfig)
