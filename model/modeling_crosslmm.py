"""CrossLMM (arXiv 2505.17020): encoder, token merge, projector, LLM with dual cross-attention.

Shapes: B batch, T frames, N original tokens per frame, P pooled tokens per frame, L tokens in this
forward, D LLM width, Dv encoder width, S image side in pixels.

Modules and parameters of the encoder, the projector and the LLM carry the names that
transformers' LLaVA-OneVision gives them, so published weights load as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2Model,
    Qwen2PreTrainedModel,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
)

from model.configuration_crosslmm import CrossLMMConfig
from model.dual_cross_attention import (
    CrossAttention,
    DualCrossAttention,
    VisualContext,
    VisualState,
)


def token_merge(tokens: torch.Tensor, grid: int) -> torch.Tensor:
    """Pool each frame's grid: (..., N, C) -> (..., grid * grid, C). Parameter-free.

    Average where `grid` divides the side (27 -> 3: one token per 9 x 9 block), else bilinear;
    with antialiasing when shrinking more than twice, so that no patch is left out. At ratios up
    to 2 this is LLaVA-OneVision's own pooling (27 -> 14).
    """
    side = int(tokens.shape[-2] ** 0.5)
    if grid == side:
        return tokens
    lead, width = tokens.shape[:-2], tokens.shape[-1]
    image = tokens.reshape(-1, side, side, width).permute(0, 3, 1, 2)
    if side % grid == 0:
        image = F.avg_pool2d(image, side // grid)
    else:
        size, antialias = (grid, grid), side > 2 * grid
        image = F.interpolate(image.float(), size, mode="bilinear", antialias=antialias)
    return image.permute(0, 2, 3, 1).reshape(*lead, grid * grid, width).to(tokens.dtype)


class ClockEmbedding(nn.Module):
    """Sum of learned embeddings of the digits of h:mm:ss, so any length up to 10 h is readable."""

    UNITS = (3600, 600, 60, 10, 1)
    BASES = (10, 6, 10, 6, 10)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.digits = nn.Embedding(10 * len(self.UNITS), width)

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        """Seconds of any shape (...) -> (..., D). Seconds are cut off, as on a clock."""
        seconds = (times + 1e-3).long().clamp_min(0).unsqueeze(-1)
        units = torch.tensor(self.UNITS, device=times.device)
        bases = torch.tensor(self.BASES, device=times.device)
        digits = seconds // units % bases + 10 * torch.arange(len(self.UNITS), device=times.device)
        return self.digits(digits).sum(-2)


class CrossLMMProjector(nn.Module):
    """Two linear layers with GELU between; the same for pooled and original tokens."""

    def __init__(self, config: CrossLMMConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, width)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width)
        self.norm = (
            Qwen2RMSNorm(width, eps=config.text_config.rms_norm_eps)
            if config.projector_norm
            else nn.Identity()
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(..., Dv) -> (..., D)."""
        return self.norm(self.linear_2(self.act(self.linear_1(features))))


class CrossLMMDecoderLayer(Qwen2DecoderLayer):
    """Qwen2's layer; a dual cross-attention may stand between its self-attention and its MLP."""

    def __init__(self, config: CrossLMMConfig, layer_idx: int) -> None:
        super().__init__(config.text_config, layer_idx)
        self.dual_cross_attention = None
        if layer_idx in config.dcal_layers and (config.v2v or config.t2v):
            self.dual_cross_attention = DualCrossAttention(config, layer_idx)

    def forward(
        self, hidden_states: torch.Tensor, visual: VisualContext | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """One layer, (B, L, D) -> (B, L, D)."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        if self.dual_cross_attention is not None and visual is not None:
            hidden_states = self.dual_cross_attention(hidden_states, visual)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class CrossLMMTextModel(Qwen2Model):
    """Qwen2's decoder with `CrossLMMDecoderLayer`s; `visual=` reaches every layer."""

    def __init__(self, config: CrossLMMConfig) -> None:
        text = config.text_config
        # Not Qwen2Model's own constructor: it would build and initialise every layer twice.
        Qwen2PreTrainedModel.__init__(self, text)
        self.padding_idx = text.pad_token_id
        self.vocab_size = text.vocab_size
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            CrossLMMDecoderLayer(config, i) for i in range(text.num_hidden_layers)
        )
        self.norm = Qwen2RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config=text)
        self.gradient_checkpointing = False
        self.gate_init = config.gate_init
        self.has_sliding_layers = "sliding_attention" in text.layer_types
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CrossAttention):
            init.constant_(module.gate, self.gate_init)


class CrossLMMPreTrainedModel(PreTrainedModel):
    """Weights, saving and loading."""

    config_class = CrossLMMConfig
    base_model_prefix = "model"
    input_modalities = ("video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["CrossLMMDecoderLayer", "SiglipEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "visual"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CrossAttention):  # the decoder's, when it is initialised from here
            init.constant_(module.gate, self.config.gate_init)
        elif isinstance(module, CrossLMMModel) and module.frame_separator is not None:
            init.normal_(module.frame_separator, std=self.config.hidden_size**-0.5)


class CrossLMMModel(CrossLMMPreTrainedModel):
    """Encoder, token merge, projector and the decoder, without the language-model head."""

    def __init__(self, config: CrossLMMConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = CrossLMMProjector(config)
        self.memory_norm = Qwen2RMSNorm(width, eps=config.text_config.rms_norm_eps)
        self.time_embedding = ClockEmbedding(width) if config.time_encoding == "clock" else None
        self.row_embedding = self.column_embedding = None
        if config.patch_position == "learned":
            self.row_embedding = nn.Embedding(config.original_grid, width)
            self.column_embedding = nn.Embedding(config.original_grid, width)
        self.frame_separator = nn.Parameter(torch.zeros(width)) if config.frame_separator else None
        self.language_model = CrossLMMTextModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Token embeddings of the LLM."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings of the LLM."""
        self.language_model.embed_tokens = value

    def encode_frames(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (F, 3, S, S) -> encoder features (F, N, Dv); independent of one another."""
        tower = self.vision_tower
        features = tower.encoder(inputs_embeds=tower.embeddings(pixel_values)).last_hidden_state
        return tower.post_layernorm(features) if self.config.vision_post_layernorm else features

    def embed_frames(
        self,
        features: torch.Tensor,
        frame_times: torch.Tensor | None,
        grid: int | None = None,
        kept: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, T, N, Dv), seconds (B, T) -> pooled (B, T, P, D), memory (B, T, N, D).

        The memory is RMS-normalised here, once, instead of in front of every branch. `grid` pools
        to another side than the checkpoint's; `kept` (B, T, n): the only patches in the memory.
        """
        grid = self.config.pooled_grid if grid is None else grid
        projector, after = self.multi_modal_projector, self.config.pool_after_projector
        source = projector(features) if after else features
        pooled = token_merge(source, grid)
        if kept is not None:
            source = source.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, source.shape[3]))
        original = source if after else projector(source)
        pooled = pooled if after else projector(pooled)
        if self.time_embedding is not None:
            if frame_times is None:
                raise ValueError("this checkpoint encodes time: pass frame_times, seconds, (B, T)")
            time = self.time_embedding(frame_times).unsqueeze(2).to(original.dtype)
            pooled, original = pooled + time, original + time
        if self.row_embedding is not None:
            position = self.row_embedding.weight[:, None] + self.column_embedding.weight
            position = position.flatten(0, 1).to(original.dtype)
            original = original + (position if kept is None else position[kept])
        return pooled, self.memory_norm(original).to(features.dtype)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        frame_times: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Decode a batch of prompts, each with at most one video.

        Args:
            input_ids: (B, L); `config.video_token_id` where a pooled token goes.
            attention_mask: (B, L), or (B, 1, L, L) for packed sequences.
            position_ids: (B, L).
            past_key_values: a cache; the video's T2V keys and values are kept beside it.
            inputs_embeds: (B, L, D) instead of `input_ids`; without new frames only.
            pixel_values_videos: (B, T, 3, S, S) normalised frames.
            frame_times: (B, T) seconds.
            frame_mask: (B, T) bool, False where a shorter video is padded.
            video_features: (B, T, N, Dv) in place of frames that are already encoded.
            use_cache: whether to fill `past_key_values`.
            kwargs: passed on to every decoder layer.

        Raises:
            ValueError: the placeholders in `input_ids` do not match the frames.

        """
        use_cache = self.config.text_config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config.text_config)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        state: VisualState | None = getattr(past_key_values, "visual", None)
        context = VisualContext(state=state)
        if pixel_values_videos is not None and video_features is None:
            video_features = self.encode_frames(pixel_values_videos.flatten(0, 1)).unflatten(
                0, pixel_values_videos.shape[:2]
            )
        if video_features is not None and state is None:
            if past_key_values is not None and use_cache:
                past_key_values.visual = state = VisualState(
                    self.config.original_tokens_per_frame, frame_mask=frame_mask
                )
                state.num_frames = video_features.shape[1]
            inputs_embeds, context = self._insert_video(
                input_ids, inputs_embeds, attention_mask, video_features, frame_times, frame_mask
            )
            context.state = state
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            visual=context,
            **kwargs,
        )

    def prefill_frames(
        self, features: torch.Tensor, frame_times: torch.Tensor, cache: Cache
    ) -> None:
        """Push the next frames of one video into a cache; nothing here depends on a question.

        Args:
            features: (1, n, N, Dv) encoder features; in `video` scope all frames at once.
            frame_times: (1, n) seconds.
            cache: its `visual` state must be set; grows by n * P tokens.

        """
        state: VisualState = cache.visual
        pooled, memory = self.embed_frames(features, frame_times, state.pooled_grid)
        count = pooled.shape[1] * pooled.shape[2]
        context = VisualContext(
            memory=memory,
            earlier=state.recent,
            visual_index=torch.arange(count, device=memory.device)[None],
            text_start=count,
            state=state,
        )
        state.num_frames += memory.shape[1]
        self._decode(pooled.flatten(1, 2), cache, context)
        if self.config.v2v_scope == "window":
            seen = memory if state.recent is None else torch.cat((state.recent, memory), dim=1)
            state.recent = seen[:, -self.config.v2v_window :].clone()

    def prefill_text(self, embeds: torch.Tensor, cache: Cache) -> None:
        """Push tokens (1, n, D) that never look at the video: a prompt's head, a separator."""
        self._decode(embeds, cache, None)

    def _decode(self, embeds: torch.Tensor, cache: Cache, context: VisualContext | None) -> None:
        embeds = embeds.to(self.get_input_embeddings().weight.dtype)
        self.language_model(
            inputs_embeds=embeds, past_key_values=cache, use_cache=True, visual=context
        )

    def place_frames(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor,
        pooled: torch.Tensor,
        frame_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Put pooled tokens (B, T, P, D), and the separator, at the placeholders; (B, L, D).

        Raises:
            ValueError: the placeholders in `input_ids` do not match the frames.

        """
        visual = pooled.flatten(1, 2)  # (B, T*P, D)
        keep = torch.ones(visual.shape[:2], dtype=torch.bool, device=visual.device)
        if frame_mask is not None:
            if bool((frame_mask[:, 1:] & ~frame_mask[:, :-1]).any()):
                raise ValueError(
                    "frame_mask must be True for a video's frames and False for the padding after "
                    "them; got a row with a frame after padding"
                )
            keep = frame_mask.repeat_interleave(pooled.shape[2], dim=1)
        if self.frame_separator is not None:
            separator = self.frame_separator.expand(len(visual), 1, -1).to(visual.dtype)
            visual = torch.cat((visual, separator), dim=1)
            keep = torch.cat((keep, keep.any(1, keepdim=True)), dim=1)
        is_visual = input_ids == self.config.video_token_id
        placed, given = is_visual.sum(1), keep.sum(1)
        if not torch.equal(placed, given):
            raise ValueError(
                f"each prompt needs one placeholder per pooled token: expected {given.tolist()}, "
                f"found {placed.tolist()}; build prompts with CrossLMMProcessor"
            )
        return inputs_embeds.masked_scatter(
            is_visual.unsqueeze(-1), visual[keep].to(inputs_embeds.dtype)
        )

    def _insert_video(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        features: torch.Tensor,
        frame_times: torch.Tensor | None,
        frame_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, VisualContext]:
        """Put pooled tokens at their placeholders and describe who may look at what."""
        pooled, memory = self.embed_frames(features, frame_times)
        per_frame, length = pooled.shape[2], input_ids.shape[1]
        inputs_embeds = self.place_frames(input_ids, inputs_embeds, pooled, frame_mask)
        is_visual = input_ids == self.config.video_token_id
        # Stable sort: the columns of the placeholders first, in order.
        index = is_visual.long().argsort(dim=1, descending=True, stable=True)
        columns = torch.arange(length, device=input_ids.device)
        ends = (is_visual * (columns + 1)).amax(1, keepdim=True)  # (B, 1) first column after
        start = int(ends.min())
        text_mask = columns >= ends
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            text_mask = text_mask & attention_mask.bool()
        text_mask = text_mask[:, start:]
        return inputs_embeds, VisualContext(
            memory=memory,
            frame_mask=frame_mask,
            visual_index=index[:, : memory.shape[1] * per_frame],
            text_start=start,
            text_mask=None if bool(text_mask.all()) else text_mask.unsqueeze(-1),
        )


class CrossLMMForConditionalGeneration(CrossLMMPreTrainedModel, GenerationMixin):
    """CrossLMM with its language-model head: training by `forward`, chat by `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: CrossLMMConfig) -> None:
        super().__init__(config)
        self.model = CrossLMMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        frame_times: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """See `CrossLMMModel.forward`; `labels` (B, L) with -100 where no loss is wanted."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values_videos=pixel_values_videos,
            frame_times=frame_times,
            frame_mask=frame_mask,
            video_features=video_features,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @property
    def gates(self) -> list[tuple[float, float]]:
        """tanh(gamma) of (V2V, T2V) in each dual cross-attention layer; 0 for an absent branch."""
        pairs = []
        for i in self.config.dcal_layers:
            branches = self.model.language_model.layers[i].dual_cross_attention
            pairs.append(
                tuple(
                    0.0 if branch is None else branch.gate.detach().float().tanh().item()
                    for branch in ((branches.v2v, branches.t2v) if branches else (None, None))
                )
            )
        return pairs


AutoModelForImageTextToText.register(CrossLMMConfig, CrossLMMForConditionalGeneration)
