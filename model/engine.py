"""The engine: one loaded model, many videos, one question at a time, answers as a stream of events.

Imports no Gradio. Runs in the background worker, in the command line and in evaluation alike.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from model.attention_summary import summarize
from model.decoded import Decoded
from model.filmstrip import frames_read
from model.frame_encoder import FrameEncoder, compiled
from model.frame_reader import CHUNK_FRAMES, read_ahead, read_chunks
from model.generation import Generation
from model.guards import LayerStop, free_memory, is_out_of_memory
from model.key_value_store import PRECISIONS
from model.loading import Loaded, load
from model.map_capture import MapCapture
from model.planner import Plan, PlanSettings, predict
from model.preflight import Preflight
from model.savings import count_savings
from model.types import (
    MOST_FRAMES,
    Answer,
    AskRequest,
    AttentionSummary,
    Event,
    InputError,
    ModelFault,
    ModelInfo,
    PlanRequest,
    Progress,
    StopCheck,
    Stopped,
    Timings,
    TokenCounts,
    VideoInfo,
    VideoPlan,
    WhatIf,
)
from model.video import sample_times
from model.video_entry import VideoEntry, check_frames, check_tokens
from model.video_memory import MemoryPool
from model.video_sandbox import probe

SECONDS_PER_TOKEN = 0.05  # of an answer, when its time is foretold
FEATURES_SHARE = 8  # encoder features are kept for what-ifs up to this part of the budget

_NO_MEMORY = (
    "There is not enough memory for this video, not even with fewer frames; "
    "use a shorter video or try again later."
)


@dataclass
class _Turn:
    """A question on its way, and what is known when it has to be tried again."""

    request: AskRequest
    prefix: list[int]
    suffix: list[int]
    key: tuple[object, ...]
    max_frames: int
    what_if: WhatIf
    decoded: Decoded | None = None
    started: float = field(default_factory=time.perf_counter)
    planned: int = 0  # frames of the first try
    said: bool = False


class Engine:
    """Answers questions about local video files."""

    def __init__(
        self,
        loaded: Loaded,
        *,
        memory_budget: int = 2 << 30,
        kv_precision: str = "native",
        repeat_threshold: float = 0.0,
    ) -> None:
        self.crosslmm = loaded.crosslmm
        self.processor = loaded.processor
        self.info: ModelInfo = replace(loaded.info, kv_precision=kv_precision)
        self.folder: Path = loaded.folder
        self.pool = MemoryPool(memory_budget)
        self.repeat_threshold = repeat_threshold
        self.preflight = Preflight(
            self.crosslmm.config,
            self.info,
            self.processor.frame_rate,
            self.processor.max_frames,
            spare=lambda: self.pool.nbytes,
            chunk_frames=CHUNK_FRAMES,
        )
        self._layer_stop = LayerStop(self.crosslmm)
        self._t2v_trusted = self.info.trained and any(t2v != 0 for _, t2v in self.info.gates)

    @classmethod
    def load(
        cls,
        source: str | None = None,
        *,
        quantization: str = "auto",
        device: str = "auto",
        memory_budget: int = 2 << 30,
        pooled_grid: int | None = None,
        kv_precision: str = "native",
        repeat_threshold: float = 0.0,
        compile_encoder: bool = False,
    ) -> Engine:
        """Load a model (see `model.loading.load`) keeping `memory_budget` bytes of videos.

        Their T2V keys and values are held at `kv_precision`: `native`, `int8` or `int4`.
        `repeat_threshold` is that of `model.frame_encoder.FrameEncoder`. `compile_encoder` compiles
        the encoder now, for a minute or so, that it is quicker later: `tests.bench.encoder` tells.
        """
        if kv_precision not in PRECISIONS:
            raise InputError(
                f"kv_precision must be one of {sorted(PRECISIONS)}, got {kv_precision!r}."
            )
        loaded = load(source, quantization=quantization, device=device, pooled_grid=pooled_grid)
        if compile_encoder:
            compiled(loaded.crosslmm.model, CHUNK_FRAMES)
        return cls(
            loaded,
            memory_budget=memory_budget,
            kv_precision=kv_precision,
            repeat_threshold=repeat_threshold,
        )

    def forget(self, video: str) -> None:
        """Drop everything that is kept of a file."""
        self.pool.drop(lambda key: key[0] == str(video))

    def plan(self, request: PlanRequest) -> VideoPlan:
        """Tell what a turn on a video would take; may be called from another thread.

        Raises:
            InputError: there is too little memory, or what is asked for cannot be.

        """
        return self.preflight.of(request)

    def decode(self, request: AskRequest, folder: Path, stop: StopCheck = lambda: False) -> Decoded:
        """Read a question's video without the model, into a file in `folder`; see `ask`."""
        bounds = request.bounds
        info = probe(request.video, stop=stop, bounds=bounds)
        times = sample_times(
            info.duration,
            max_frames=min(request.max_frames or self.processor.max_frames, MOST_FRAMES),
            frame_rate=self.processor.frame_rate,
        )
        chunks = read_chunks(self.processor, info, times, bounds, stop)
        return Decoded.collect(chunks, folder, info, len(times), stop)

    def model_seconds(
        self, request: AskRequest, frames: int, operations_per_second: float
    ) -> float:
        """Foretell what the model needs for a question about a video that it has not read."""
        tokens = request.max_new_tokens or self.crosslmm.generation_config.max_new_tokens or 128
        settings = PlanSettings(
            text_tokens=len(request.question) // 2 + 64,
            generated_tokens=tokens,
            dtype=self.info.dtype,
            weights_loaded=True,
            operations_per_second=operations_per_second,
        )
        planned = predict(self.crosslmm.config, frames, self.info.kv_precision, settings)
        return (planned.seconds or 0.0) + tokens * SECONDS_PER_TOKEN

    def ask(
        self,
        request: AskRequest,
        stop: StopCheck = lambda: False,
        decoded: Decoded | None = None,
    ) -> Iterator[Event]:
        """Answer one question; `decoded` are the video's frames where they were read before.

        Yields `Progress` and `Piece` events and ends with one `Answer`. After `stop()` turns true
        the answer so far ends the turn.

        Raises:
            InputError: the video or the question cannot be used.
            ModelFault: the model cannot go on; the next question can be asked.
            Stopped: stopped before the video was ready; nothing of it is kept.

        """
        history = request.history if self.crosslmm.config.multi_turn else ()
        prefix, suffix = self.processor.prompt_ids(request.question, history)
        max_frames = request.max_frames or self.processor.max_frames
        stat = Path(request.video).stat() if Path(request.video).exists() else None
        key = (str(request.video), stat and (stat.st_mtime_ns, stat.st_size), max_frames)
        what_if = check_tokens(request.what_if, self.crosslmm.config)
        turn = _Turn(request, prefix, suffix, key, min(max_frames, MOST_FRAMES), what_if, decoded)
        try:
            yield from self._try(turn, stop)
            return
        except ModelFault:
            self.forget(request.video)  # what is kept of it may be what went wrong
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Out here the error holds the tensors no longer.
        yield from self._try_with_less(turn, stop)

    def _try(self, turn: _Turn, stop: StopCheck) -> Iterator[Event]:
        key = (*turn.key, turn.what_if.of_video)
        entry = self._kept(turn, key)
        reused, rebuilt = entry is not None, False
        if entry is None:
            plain = self._kept(turn, (*turn.key, WhatIf()))
            tokens = turn.what_if.pooled_tokens
            if (
                plain is not None
                and plain.features is not None
                and self.preflight.carries(len(plain.times), tokens)
            ):
                entry, rebuilt = (yield from self._rebuild(turn, plain, stop)), True
            else:
                entry = yield from self._read(turn, stop)
            self.pool.put(key, entry)
        if reused or rebuilt:
            yield frames_read(0, entry.times, entry.thumbnails, len(entry.times))
        turn.planned = turn.planned or entry.memory.num_frames
        yield Progress("answering", 0, 0)
        yield from self._answer(turn, entry, reused, stop)

    def _kept(self, turn: _Turn, key: tuple[object, ...]) -> VideoEntry | None:
        """A video that was read before; not one cut short for want of memory that is there now."""
        entry = self.pool.get(key)
        if entry is None or not entry.plan_notices:
            return entry
        tokens = entry.memory.config.pooled_tokens_per_frame
        chosen = self.preflight.choose(entry.info.duration, turn.max_frames, tokens)
        if chosen.frames <= 1.25 * len(entry.times):
            return entry
        self.pool.drop(lambda other: other == key)
        return None

    def _try_with_less(self, turn: _Turn, stop: StopCheck) -> Iterator[Event]:
        """Once more with half the frames, alone in the memory, after it ran out."""
        self.pool.drop(lambda _: True)
        free_memory()
        if turn.said or turn.planned < 2:
            raise ModelFault(_NO_MEMORY)
        turn.max_frames = turn.planned // 2
        try:
            yield from self._try(turn, stop)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self.pool.drop(lambda _: True)
        free_memory()
        raise ModelFault(_NO_MEMORY)

    # Reading a video into a memory.

    def _rebuild(
        self, turn: _Turn, plain: VideoEntry, stop: StopCheck
    ) -> Generator[Event, None, VideoEntry]:
        """Make another memory of a video whose features are there: no decoding, no encoding."""
        what_if = turn.what_if.of_video
        entry = VideoEntry.begin(
            self.crosslmm,
            plain.info,
            turn.prefix,
            plain.times,
            what_if,
            precision=self.info.kv_precision,
        )
        entry.thumbnails, entry.failed_frames = plain.thumbnails, plain.failed_frames
        entry.frames_left_out, entry.clamped = plain.frames_left_out, plain.clamped
        entry.plan_notices = plain.plan_notices
        done, total = 0, len(plain.times)
        for features in plain.features or ():
            if stop():
                raise Stopped("stopped while the video was taken in again")
            times = torch.tensor(plain.times[done : done + len(features)])
            kept = entry.take(times)
            self._prefill(entry, features[kept], times[kept])
            done += len(features)
            yield Progress("encoding", done, total)
        entry.finish()
        return entry

    def _read(self, turn: _Turn, stop: StopCheck) -> Generator[Event, None, VideoEntry]:
        path, bounds = turn.request.video, turn.request.bounds
        yield Progress("reading", 0, 0)
        decoded = turn.decoded
        info = probe(path, stop=stop, bounds=bounds) if decoded is None else decoded.info
        chosen, clock = self._plan(turn, info), time.perf_counter()
        rate = self.processor.frame_rate
        times = sample_times(info.duration, max_frames=chosen.frames, frame_rate=rate)
        turn.planned = turn.planned or len(times)
        what_if = turn.what_if.of_video
        entry = VideoEntry.begin(
            self.crosslmm, info, turn.prefix, times, what_if, precision=chosen.kv_precision
        )
        entry.plan_notices = chosen.notices
        entry.frames_left_out = turn.planned - len(times)
        encoder = FrameEncoder(self.crosslmm.model, self.repeat_threshold)
        entry.clamped = turn.key[-1] > MOST_FRAMES and len(times) == MOST_FRAMES
        if decoded is not None and decoded.asked == len(times):
            source = decoded.read
        else:
            source = partial(read_chunks, self.processor, info, times, bounds)
        total = len(times)
        self._layer_stop.check = stop
        try:
            with closing(read_ahead(source, stop)) as chunks:
                for chunk in chunks:
                    entry.decode_seconds += chunk.seconds
                    entry.failed_frames = chunk.failed
                    entry.thumbnails += chunk.pictures
                    read = len(entry.times)
                    self._encode(entry, encoder, chunk.pixels, chunk.times)
                    if stop():
                        raise Stopped("stopped while encoding the video")
                    yield frames_read(read, chunk.times.tolist(), chunk.pictures, total)
                    yield Progress("encoding", len(entry.times), total)
            check_frames(what_if, self.crosslmm.config, np.asarray(entry.times))
            entry.finish()
            if decoded is None:
                compute, whole = entry.encode_seconds + entry.prefill_seconds, time.perf_counter()
                self.preflight.measured(info, chosen, compute, entry.decode_seconds, whole - clock)
        finally:
            self._layer_stop.check = None
        return entry

    def _plan(self, turn: _Turn, info: VideoInfo) -> Plan:
        """Frames and precision that fit; what is kept of other videos makes room for them."""
        tokens = turn.what_if.pooled_tokens or self.info.pooled_tokens_per_frame
        text = len(turn.prefix) + len(turn.suffix)
        chosen = self.preflight.choose(info.duration, turn.max_frames, tokens, text)
        self.pool.release(chosen.total_bytes - self.preflight.free())
        return chosen

    def _encode(
        self, entry: VideoEntry, encoder: FrameEncoder, pixels: torch.Tensor, times: torch.Tensor
    ) -> None:
        clock = time.perf_counter()
        kept = entry.take(times)
        if not kept.any():
            return
        features = encoder(pixels[kept])
        entry.repeated_frames = encoder.repeated
        entry.encode_seconds += time.perf_counter() - clock
        entry.keep_features(features, self.pool.budget_bytes // FEATURES_SHARE)
        self._prefill(entry, features, times[kept])

    def _prefill(self, entry: VideoEntry, features: torch.Tensor, times: torch.Tensor) -> None:
        clock = time.perf_counter()
        if len(features):
            entry.memory.append_features(features.to(self.crosslmm.device), times)
        entry.prefill_seconds += time.perf_counter() - clock

    # Answering on a memory.

    def _answer(
        self, turn: _Turn, entry: VideoEntry, reused: bool, stop: StopCheck
    ) -> Iterator[Event]:
        request, suffix, started = turn.request, turn.suffix, turn.started
        memory, capture = entry.memory, MapCapture()
        generation = Generation(
            self.crosslmm,
            self.processor.tokenizer,
            torch.tensor([suffix], device=self.crosslmm.device),
            memory.cache,
            request.max_new_tokens or self.crosslmm.generation_config.max_new_tokens or 128,
            stop,
        )
        watch = capture.self_attention(self.crosslmm) if request.map_bytes else nullcontext()
        with memory.turn(capture, t2v=turn.what_if.t2v), watch:
            self._layer_stop.check = generation.stopped_unheard
            try:
                with closing(generation.pieces()) as pieces:
                    for piece in pieces:
                        turn.said = True
                        yield piece
            finally:
                self._layer_stop.check = None
            attention = self._attention(entry, capture, generation.ids, request)
        generated = len(generation.ids)
        text_tokens = len(memory.prefix_ids) + len(suffix)
        first = (generation.first_token or time.perf_counter()) - started
        yield Answer(
            text=generation.text.strip(),
            stopped=stop(),
            model=self.info.name,
            tokens=TokenCounts(
                original=memory.num_frames * memory.config.original_tokens_per_frame,
                pooled=memory.num_frames * memory.config.pooled_tokens_per_frame,
                text=text_tokens,
                generated=generated,
            ),
            timings=Timings(
                decode=0.0 if reused else entry.decode_seconds,
                encode=0.0 if reused else entry.encode_seconds,
                prefill=0.0 if reused else entry.prefill_seconds,
                first_token=first,
                total=time.perf_counter() - started,
            ),
            frame_times=np.asarray(memory.times),
            attention=attention,
            savings=count_savings(memory, text_tokens, generated),
            repeated_frames=entry.repeated_frames,
            memory_reused=reused,
            video=entry.info,
            notices=_notices(entry, generation.repeated),
        )

    def _attention(
        self, entry: VideoEntry, capture: MapCapture, ids: list[int], request: AskRequest
    ) -> AttentionSummary | None:
        """Where the positions looked that predicted each answer token."""
        if not ids:
            return None
        tokenizer = self.processor.tokenizer
        special = tokenizer.all_special_ids
        keep = [i for i, token in enumerate(ids) if token not in special] or list(range(len(ids)))
        return summarize(
            self.crosslmm,
            entry.memory,
            capture,
            entry.sights(maps=request.map_bytes > 0),
            [tokenizer.decode([ids[i]]) for i in keep],
            keep,
            last=len(ids),
            trusted=self._t2v_trusted,
            strongest=request.strongest_frames,
            budget=request.map_bytes,
        )


def _notices(entry: VideoEntry, repeated: bool) -> tuple[str, ...]:
    used = entry.memory.num_frames
    notices = []
    if entry.failed_frames:
        notices.append(
            f"{entry.failed_frames} sampled frames could not be decoded and were left out; "
            f"{used} were used."
        )
    if entry.frames_left_out:
        notices.append(f"Memory ran short, so only {used} frames were used.")
    notices += entry.plan_notices
    if entry.clamped:
        notices.append(f"At most {MOST_FRAMES} frames of a video are ever used.")
    if repeated:
        notices.append("The answer only repeated itself and was ended.")
    return tuple(notices)
