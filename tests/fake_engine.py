"""An engine without weights: same interface and events as the real one, deterministic and quick.

Words in the question make it misbehave: `slow`, `crash`, `hang`, `freeze`, `broken`, `wrong`,
`illegal`, `faulty`. With `focused` its words all look at the same moment, 0:05.
With `gated` it halts in every stage until the test opens that gate, so that nothing hangs on time:
a gate is a file of that name in the folder FAKE_GATES.
It never stands in for the model outside of tests.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.types import (
    Answer,
    AskRequest,
    AttentionSummary,
    CurvePoint,
    Event,
    FramesRead,
    InputError,
    ModelFault,
    ModelInfo,
    Piece,
    PlanRequest,
    Progress,
    Savings,
    StopCheck,
    Stopped,
    SystemCost,
    Timings,
    TokenCounts,
    VideoInfo,
    VideoPlan,
)
from tests.fake_maps import picture, views, with_maps

LAYERS = (0, 2, 4)
GRID = 14
STEP_SECONDS = 0.01
SLOW_SECONDS = 0.4
GATES = ("reading", "encoding", "answering", "end")

INFO = ModelInfo(
    name="fake",
    device="cpu",
    dtype="float32",
    quantization="none",
    attention="none",
    parameters=1_000_000,
    pooled_tokens_per_frame=1,
    original_tokens_per_frame=GRID * GRID,
    dcal_layers=LAYERS,
    gates=((0.31, 0.52), (-0.12, 0.78), (0.44, 0.09)),
    trained=True,
    examples=("What number is on the red sign?", "When does the star appear?"),
    note="A stand-in without weights, for tests.",
)


@dataclass(frozen=True)
class FakeDecoded:
    file: Path
    frames: int


def _note(what: str) -> None:
    """Write down where something ran, for tests of turns on a lent GPU."""
    if "FAKE_LOG" in os.environ:
        lent = os.environ.get("ON_LENT_GPU", "no")
        with Path(os.environ["FAKE_LOG"]).open("a", encoding="utf-8") as log:
            log.write(f"{what} lent={lent}\n")


class FakeEngine:
    info = INFO

    def __init__(self) -> None:
        self.kept: set[str] = set()

    @classmethod
    def load(
        cls,
        source: str | None = None,
        *,
        quantization: str = "auto",
        device: str = "auto",
        memory_budget: int = 0,
        pooled_grid: int | None = None,
        kv_precision: str = "native",
        repeat_threshold: float = 0.0,
        compile_encoder: bool = False,
    ) -> FakeEngine:
        time.sleep(float(os.environ.get("FAKE_LOAD_SECONDS", "0")))
        if source == "missing":
            raise InputError("There is no model at 'missing'. Give a local folder or a hub id.")
        if source == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        return cls()

    def plan(self, request: PlanRequest) -> VideoPlan:
        """Of a video that gives at most 48 frames, and a machine that was not measured yet."""
        frames, tokens = min(request.max_frames or 48, 48), request.pooled_tokens or 1
        told = ("At most 48 frames.",) if (request.max_frames or 0) > 48 else ()
        return VideoPlan(
            frames=frames,
            most_frames=48,
            frame_rate=frames / request.video.duration,
            original_tokens=frames * GRID * GRID,
            pooled_tokens=frames * tokens,
            tokens_per_frame=tokens,
            token_choices=(1, 4, 9),
            kv_precision="native",
            kept_bytes=10_000_000,
            peak_bytes=20_000_000,
            free_bytes=10**9,
            seconds=12.0 if self.kept else None,
            notices=told,
        )

    def decode(self, request: AskRequest, folder: Path, stop: StopCheck) -> FakeDecoded:
        _note("decode")
        _Gates(stop if "gated" in request.question else None).wait_at("reading")
        if "undecodable" in request.question:
            raise InputError("This video cannot be decoded.")
        file = folder / f"{len(self.kept)}.pt"
        file.touch()
        return FakeDecoded(file, min(request.max_frames or 48, 48))

    def model_seconds(self, request: AskRequest, frames: int, speed: float) -> float:
        return frames * 1e14 / speed

    def ask(
        self, request: AskRequest, stop: StopCheck, decoded: FakeDecoded | None = None
    ) -> Iterator[Event]:
        if decoded is not None:
            assert decoded.file.exists()
            _note("ask")
        words = set(request.question.lower().replace("?", " ").split())
        slow = "slow" in words  # has to be stopped: it would take minutes
        gates = _Gates(stop if "gated" in words else None)
        pause, steps = (SLOW_SECONDS, 10) if slow else (STEP_SECONDS, 8)
        started = time.monotonic()
        reused = request.video in self.kept
        if "crash" in words:
            os.kill(os.getpid(), signal.SIGKILL)
        if "freeze" in words:
            os.kill(os.getpid(), signal.SIGSTOP)
        if "illegal" in words:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if "faulty" in words:
            raise ModelFault("The model's numbers broke down.")
        if "wrong" in words:
            raise InputError("This question cannot be asked.")
        if not reused:
            for stage in ("reading", "encoding"):
                for done in range(steps + 1):
                    yield Progress(stage, done, steps)
                    time.sleep(pause)
                    if done == 1:
                        gates.wait_at(stage)
                    if stop():
                        raise Stopped
            self.kept.add(request.video)
        if "broken" in words:
            raise RuntimeError(request.question)
        yield _frames(request)
        yield Progress("answering", 0, 0)
        while "hang" in words:
            time.sleep(1)
        text = f"You asked: {request.question} It is at 0:07, after {len(request.history)} turns."
        if slow:
            text += " word" * 2000
        first, said = time.monotonic() - started, ""
        for number, token in enumerate(text.replace(" ", "\0 ").split("\0")):
            if number == 3:
                gates.wait_at("answering")
            if stop():
                break
            said += token
            yield Piece(token)
            time.sleep(pause)
        gates.wait_at("end")
        yield _answer(request, said, stop(), reused, first, time.monotonic() - started)

    def forget(self, video: str) -> None:
        self.kept.discard(video)


class _Gates:
    def __init__(self, stop: StopCheck | None) -> None:
        self.stop = stop

    def wait_at(self, name: str) -> None:
        if self.stop is None:
            return
        gate = Path(os.environ["FAKE_GATES"]) / name
        while not (gate.exists() or self.stop()):
            time.sleep(0.02)


def _times(request: AskRequest) -> np.ndarray:
    frames = min(request.max_frames or 48, 48)
    return (np.arange(frames) + 0.5) * _probe(request.video).duration / frames


def _frames(request: AskRequest) -> FramesRead:
    info, times = _probe(request.video), _times(request).tolist()
    height = _picture_height(info)
    shown = [(t, picture(320, height, index)) for index, t in enumerate(times) if index % 4 == 1]
    return FramesRead(0, tuple(times), tuple(shown))


def _answer(
    request: AskRequest, said: str, stopped: bool, reused: bool, first: float, total: float
) -> Answer:
    info, times = _probe(request.video), _times(request)
    frames = len(times)
    spent = (0.0, 0.0, 0.0) if reused else (0.4 * first, 0.4 * first, 0.2 * first)
    tokens = tuple(said.replace(" ", "\0 ").split("\0"))
    return Answer(
        text=said,
        stopped=stopped,
        model=INFO.name,
        tokens=TokenCounts(frames * GRID * GRID, frames, 20, len(tokens)),
        timings=Timings(*spent, first, total),
        frame_times=times,
        attention=_attention(times, tokens, info, request) if said else None,
        savings=savings(frames, 20),
        memory_reused=reused,
        video=info,
    )


def savings(frames: int, text: int) -> Savings:
    def cost(system: str, per_frame: int) -> SystemCost:
        curve = tuple(
            CurvePoint(n, 1e7 * n * (per_frame + 5) + (n * per_frame) ** 2, 1e4 * n * per_frame)
            for n in (2**power for power in range(15))
        )
        tokens = frames * per_frame
        return SystemCost(
            system=system,
            tokens_per_frame=per_frame,
            visual_tokens=tokens,
            video_operations=1e7 * (tokens + 5 * frames) + tokens**2,
            question_operations=1e4 * (tokens + text),
            kv_bytes=10_000 * tokens,
            most_frames=4096 // per_frame,
            curve=curve,
        )

    return Savings(
        original_tokens=frames * GRID * GRID,
        text_tokens=text,
        crosslmm=cost("crosslmm", 1),
        unpooled=cost("unpooled", GRID * GRID),
        llava_onevision=cost("llava-onevision", GRID * GRID // 4),
    )


def _attention(
    times: np.ndarray, tokens: tuple[str, ...], info: VideoInfo, request: AskRequest
) -> AttentionSummary:
    strongest = request.strongest_frames
    near = np.abs(times[None, :] / max(info.duration, 1e-6) - np.array([0.3, 0.32, 0.7])[:, None])
    mass = np.exp(-((near * np.array([[6], [18], [40]])) ** 2)) + 0.02
    if "focused" in request.question:
        mass = np.repeat(np.exp(-((times - 5.25) ** 2))[None], len(LAYERS), 0)
    mass = (mass / mass.sum(1, keepdims=True)).astype(np.float32)
    t2v = np.repeat(mass[None], len(tokens), 0)
    mean = mass.mean(0)
    order = [int(index) for index in np.argsort(-mean)[:strongest]]
    height = _picture_height(info)
    pictures = tuple(picture(320, height, index) for index in range(len(times)))
    peak = float(times[order[0]]) if len(order) else 0.0
    bare = AttentionSummary(times, LAYERS, tokens, t2v, (), peak, pictures=pictures)
    full = dataclasses.replace(bare, frames=views(bare, order))
    return with_maps(full, request, pictures) if request.map_bytes else full


def _picture_height(info: VideoInfo) -> int:
    return max(2, round(320 * info.height / info.width))


def _probe(path: str) -> VideoInfo:
    size = Path(path).stat().st_size if Path(path).exists() else 0
    return VideoInfo(path, "mp4", "h264", 640, 360, 24.0, 10.0, 240, 0, size)
