"""The engine: one loaded model, many videos, one question at a time, answers as a stream of events.

Imports no Gradio. Runs in the background worker, in the command line and in evaluation alike.
"""

from __future__ import annotations

import io
import queue
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from model.attention_maps import MapCapture, TextMaps, text_to_visual
from model.guards import (
    EndlessRepetition,
    FiniteScores,
    LayerStop,
    free_memory,
    is_out_of_memory,
)
from model.key_value_store import PRECISIONS
from model.loading import Loaded, load
from model.savings import count_savings
from model.types import (
    Answer,
    AskRequest,
    AttentionSummary,
    Event,
    FrameView,
    InputError,
    ModelFault,
    ModelInfo,
    Piece,
    Progress,
    ReadBounds,
    StopCheck,
    Stopped,
    Timings,
    TokenCounts,
    VideoInfo,
)
from model.video import sample_times
from model.video_memory import MemoryPool, VideoMemory
from model.video_sandbox import decode_frames, probe

CHUNK_FRAMES = 16  # frames encoded and prefilled together
CHUNKS_AHEAD = 2  # decoded chunks that may wait for the model
THUMBNAIL_SIDE = 320  # pixels, longer side of the pictures kept for the page
MOST_FRAMES = 4096  # of one video, whatever is asked for

_NO_MEMORY = (
    "There is not enough memory for this video, not even with fewer frames; "
    "use a shorter video or try again later."
)


@dataclass
class _Entry:
    """A video that is ready for questions."""

    memory: VideoMemory
    info: VideoInfo
    thumbnails: list[bytes] = field(default_factory=list)
    decode_seconds: float = 0.0
    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    failed_frames: int = 0
    frames_left_out: int = 0  # because memory ran short
    clamped: bool = False  # more frames were asked for than are ever used

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes + sum(map(len, self.thumbnails))


@dataclass
class _Turn:
    """A question on its way, and what is known when it has to be tried again."""

    request: AskRequest
    prefix: list[int]
    suffix: list[int]
    key: tuple[object, ...]
    max_frames: int
    started: float = field(default_factory=time.perf_counter)
    planned: int = 0  # frames of the first try
    said: bool = False


class _Pieces(BaseStreamer):
    """Turns generated ids into pieces of text that never change once shown."""

    def __init__(self, tokenizer, events: queue.Queue) -> None:  # noqa: ANN001 (any tokenizer)
        self.tokenizer = tokenizer
        self.events = events
        self.ids: list[int] = []
        self.shown = ""
        self.first_token: float | None = None
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:  # generate hands over the prompt first
            self._prompt = False
            return
        if self.first_token is None:
            self.first_token = time.perf_counter()
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd") and len(text) > len(self.shown):
            self.events.put(Piece(text[len(self.shown) :]))
            self.shown = text

    def end(self) -> None:
        pass


class _StopOn(StoppingCriteria):
    def __init__(self, stop: StopCheck) -> None:
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.full((len(input_ids),), bool(self.stop()), device=input_ids.device)


class Engine:
    """Answers questions about local video files."""

    def __init__(
        self, loaded: Loaded, *, memory_budget: int = 2 << 30, kv_precision: str = "native"
    ) -> None:
        self.crosslmm = loaded.crosslmm
        self.processor = loaded.processor
        self.info: ModelInfo = replace(loaded.info, kv_precision=kv_precision)
        self.folder: Path = loaded.folder
        self.pool = MemoryPool(memory_budget)
        self._layer_stop = LayerStop(self.crosslmm)

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
    ) -> Engine:
        """Load a model (see `model.loading.load`) keeping `memory_budget` bytes of videos.

        Their T2V keys and values are held at `kv_precision`: `native`, `int8` or `int4`.
        """
        if kv_precision not in PRECISIONS:
            raise InputError(
                f"kv_precision must be one of {sorted(PRECISIONS)}, got {kv_precision!r}."
            )
        loaded = load(source, quantization=quantization, device=device, pooled_grid=pooled_grid)
        return cls(loaded, memory_budget=memory_budget, kv_precision=kv_precision)

    def forget(self, video: str) -> None:
        """Drop everything that is kept of a file."""
        self.pool.drop(lambda key: key[0] == str(video))

    def ask(self, request: AskRequest, stop: StopCheck = lambda: False) -> Iterator[Event]:
        """Answer one question.

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
        turn = _Turn(request, prefix, suffix, key, min(max_frames, MOST_FRAMES))
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
        entry = self.pool.get(turn.key)
        reused = entry is not None
        if entry is None:
            entry = yield from self._read(turn, stop)
            self.pool.put(turn.key, entry)
        turn.planned = turn.planned or entry.memory.num_frames
        yield Progress("answering", 0, 0)
        yield from self._answer(turn, entry, reused, stop)

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

    def _read(self, turn: _Turn, stop: StopCheck) -> Generator[Event, None, _Entry]:
        path, bounds = turn.request.video, turn.request.bounds
        yield Progress("reading", 0, 0)
        info = probe(path, stop=stop, bounds=bounds)
        rate = self.processor.frame_rate
        times = sample_times(info.duration, max_frames=turn.max_frames, frame_rate=rate)
        turn.planned = turn.planned or len(times)
        memory = VideoMemory(
            self.crosslmm,
            precision=self.info.kv_precision,
            prefix_ids=turn.prefix,
            capture=MapCapture(v2v=False),
            expected_frames=len(times),
        )
        entry = _Entry(memory, info, frames_left_out=turn.planned - len(times))
        entry.clamped = turn.key[-1] > MOST_FRAMES and len(times) == MOST_FRAMES
        chunks: queue.Queue = queue.Queue(CHUNKS_AHEAD)
        quit_reading = threading.Event()
        reader = threading.Thread(
            target=self._decode,
            args=(info, times, bounds, chunks, lambda: quit_reading.is_set() or stop()),
            daemon=True,
        )
        reader.start()
        total = len(times)
        self._layer_stop.check = stop
        try:
            while True:
                try:
                    item = chunks.get(timeout=0.1)
                except queue.Empty:
                    if stop():
                        raise Stopped("stopped while reading the video") from None
                    continue
                if item is None:
                    break
                if isinstance(item, BaseException):
                    raise item
                pixels, frame_times, pictures, seconds, failed = item
                entry.decode_seconds += seconds
                entry.failed_frames = failed
                entry.thumbnails += pictures
                self._encode(entry, pixels, frame_times)
                if stop():
                    raise Stopped("stopped while encoding the video")
                yield Progress("encoding", entry.memory.num_frames, total)
            clock = time.perf_counter()
            entry.memory.finish()
            entry.prefill_seconds += time.perf_counter() - clock
        finally:
            self._layer_stop.check = None
            quit_reading.set()
            while reader.is_alive():  # unblock a reader that waits for room in the queue
                try:
                    chunks.get_nowait()
                except queue.Empty:
                    reader.join(0.05)
        return entry

    def _decode(
        self,
        info: VideoInfo,
        times: np.ndarray,
        bounds: ReadBounds,
        chunks: queue.Queue,
        stop: StopCheck,
    ) -> None:
        """Runs in a thread: decode and resize, a chunk at a time, while the model works."""
        try:
            done = False
            with decode_frames(info.path, times, info=info, stop=stop, bounds=bounds) as frames:
                while not done:
                    clock = time.perf_counter()
                    images, seconds = [], []
                    while len(images) < CHUNK_FRAMES:
                        frame = next(frames, None)
                        if frame is None:
                            done = True
                            break
                        images.append(frame.image)
                        seconds.append(frame.time)
                    if images:
                        pixels = self.processor.preprocess_frames(images)
                        pictures = [_jpeg(image) for image in images]
                        spent = time.perf_counter() - clock
                        chunks.put((pixels, torch.tensor(seconds), pictures, spent, frames.failed))
            chunks.put(None)
        except BaseException as error:  # handed to the thread that reads the queue
            chunks.put(error)

    def _encode(self, entry: _Entry, pixels: torch.Tensor, times: torch.Tensor) -> None:
        clock = time.perf_counter()
        model = self.crosslmm.model
        with torch.inference_mode():
            dtype = model.vision_tower.embeddings.patch_embedding.weight.dtype
            features = model.encode_frames(pixels.to(model.device, dtype))
        encoded = time.perf_counter()
        entry.memory.append_features(features, times)
        entry.encode_seconds += encoded - clock
        entry.prefill_seconds += time.perf_counter() - encoded

    # Answering on a memory.

    def _answer(self, turn: _Turn, entry: _Entry, reused: bool, stop: StopCheck) -> Iterator[Event]:
        request, suffix, started = turn.request, turn.suffix, turn.started
        memory, events = entry.memory, queue.Queue()
        capture = MapCapture()
        pieces = _Pieces(self.processor.tokenizer, events)
        failure: list[BaseException] = []
        limit = request.max_new_tokens or self.crosslmm.generation_config.max_new_tokens or 128

        left = threading.Event()  # the caller went away in the middle
        prompt = memory.input_ids(suffix)
        repetition = EndlessRepetition(prompt.shape[1])

        def stop_early() -> bool:  # later, the words said so far are the answer
            return pieces.first_token is None and (left.is_set() or stop())

        def generate() -> None:
            try:
                with torch.inference_mode():
                    self.crosslmm.generate(
                        prompt,
                        past_key_values=memory.cache,
                        streamer=pieces,
                        stopping_criteria=[
                            _StopOn(lambda: left.is_set() or stop()),
                            repetition,
                        ],
                        logits_processor=[FiniteScores()],
                        max_new_tokens=limit,
                        do_sample=False,
                    )
            except BaseException as error:  # raised again below, in the caller's thread
                failure.append(error)
            finally:
                events.put(None)

        with memory.turn(capture):
            self._layer_stop.check = stop_early
            thread = threading.Thread(target=generate, daemon=True)
            thread.start()
            try:
                while (event := events.get()) is not None:
                    turn.said = True
                    yield event
            finally:
                left.set()  # the cache is rolled back only after its last writer is gone
                thread.join()
                self._layer_stop.check = None
            if failure and not isinstance(failure[0], Stopped):
                raise failure[0]
            attention = self._attention(entry, capture, pieces.ids, request.strongest_frames)
        generated = len(pieces.ids)
        text_tokens = len(memory.prefix_ids) + len(suffix)
        first = (pieces.first_token or time.perf_counter()) - started
        yield Answer(
            text=pieces.shown.strip(),
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
            memory_reused=reused,
            video=entry.info,
            notices=_notices(entry, repetition.found),
        )

    def _attention(
        self, entry: _Entry, capture: MapCapture, ids: list[int], strongest: int
    ) -> AttentionSummary | None:
        """T2V of the positions that predicted each answer token."""
        if not ids:
            return None
        special = self.processor.tokenizer.all_special_ids
        keep = [i for i, token in enumerate(ids) if token not in special] or list(range(len(ids)))
        maps = text_to_visual(
            self.crosslmm, entry.memory, capture, last=len(ids), keep=keep, strongest=strongest
        )
        return None if maps is None else self._summary(entry, maps, [ids[i] for i in keep])

    def _summary(self, entry: _Entry, maps: TextMaps, ids: list[int]) -> AttentionSummary:
        tokenizer = self.processor.tokenizer
        t2v = maps.mass.float().cpu().numpy()
        overall = t2v.mean((0, 1))
        grid = entry.memory.config.original_grid
        patches = maps.patches.float().cpu().numpy()
        frames = tuple(
            FrameView(
                index=frame,
                time=entry.memory.times[frame],
                mass=float(overall[frame]),
                jpeg=entry.thumbnails[frame],
                patches=patches[:, rank].reshape(-1, grid, grid),
            )
            for rank, frame in enumerate(maps.frames)
        )
        return AttentionSummary(
            times=np.asarray(entry.memory.times),
            layers=tuple(maps.layers),
            tokens=tuple(tokenizer.decode([token]) for token in ids),
            t2v=t2v,
            frames=frames,
            peak=entry.memory.times[int(overall.argmax())],
        )


def _jpeg(image: np.ndarray) -> bytes:
    picture = Image.fromarray(image)
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _notices(entry: _Entry, repeated: bool) -> tuple[str, ...]:
    used = entry.memory.num_frames
    notices = []
    if entry.failed_frames:
        notices.append(
            f"{entry.failed_frames} sampled frames could not be decoded and were left out; "
            f"{used} were used."
        )
    if entry.frames_left_out:
        notices.append(f"Memory ran short, so only {used} frames were used.")
    if entry.clamped:
        notices.append(f"At most {MOST_FRAMES} frames of a video are ever used.")
    if repeated:
        notices.append("The answer only repeated itself and was ended.")
    return tuple(notices)
