"""Measure how fast frames are read from videos, by every way there is.

    python -m tests.bench.decoding            # some six minutes on two free cores
    python -m tests.bench.decoding --quick    # some two minutes: five minutes of H.264 only

Makes its own files in a temporary folder. Columns: seconds on the clock, seconds of CPU, and how
many times longer than `ours` by the clock and by CPU. On a machine that does other work as well,
the CPU column is the one to compare. Every way ends with RGB pictures of at most 640 pixels.
Reading every frame of an hour is measured on its first five minutes and multiplied by 12.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from model.video import decode_frames, probe, sample_times
from tests.media import loop_video, make_video

Way = Callable[[Path, np.ndarray], int]


@dataclass(frozen=True)
class Case:
    name: str
    path: Path
    frames: int
    ways: dict[str, Way]


def ours(path: Path, times: np.ndarray) -> int:
    return sum(1 for _ in decode_frames(path, times))


def by_decord(path: Path, times: np.ndarray) -> int:
    return sum(1 for _ in decode_frames(path, times, decoder="decord"))


def decord_batch(path: Path, times: np.ndarray) -> int:
    """decord as most projects call it: everything by one get_batch."""
    import decord

    reader = decord.VideoReader(str(path), decord.cpu(0), width=640, height=360)
    indices = np.minimum((times * reader.get_avg_fps()).round().astype(int), len(reader) - 1)
    return len(reader.get_batch(indices.tolist()).asnumpy())


def every_frame(**settings: str | int) -> Way:
    """Decode from start to end in one pass; scale the wanted frames only."""

    def way(path: Path, times: np.ndarray) -> int:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            options = {k: str(v) for k, v in settings.items() if k == "skip_loop_filter"}
            stream.codec_context.options = options
            stream.codec_context.skip_frame = str(settings.get("skip_frame", "DEFAULT"))
            return sum(1 for _ in _wanted(container.decode(stream), times))

    return way


def _wanted(frames: Iterator[av.VideoFrame], times: np.ndarray) -> Iterator[np.ndarray]:
    waiting = list(times)
    for frame in frames:
        if not waiting:
            return
        if frame.time >= waiting[0]:
            while waiting and frame.time >= waiting[0]:
                waiting.pop(0)
            yield frame.reformat(640, 360, "rgb24", interpolation="BICUBIC").to_ndarray()


def measure(case: Case) -> None:
    times = sample_times(probe(case.path).duration, max_frames=case.frames)
    base: tuple[float, float] | None = None
    for name, way in case.ways.items():
        before, start = _cpu_seconds(), time.perf_counter()
        factor = 1
        if name.startswith("every") and times[-1] > 3000:
            factor = 12
        count = way(case.path, times[: len(times) // factor]) * factor
        clock = (time.perf_counter() - start) * factor
        cpu = (_cpu_seconds() - before) * factor
        base = base or (clock, cpu)
        ratios = f"{clock / base[0]:7.1f} x {cpu / base[1]:7.1f} x"
        print(f"{case.name:28} {name:34} {count:4} {clock:8.2f} {cpu:8.2f} {ratios}", flush=True)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def make_files(folder: Path, quick: bool) -> dict[str, Path]:
    """Encode some seconds of 720p at 25 fps per codec; the rest is copies of their packets."""
    common = {"size": (1280, 720), "pattern": "texture", "duration": 10.0}
    files = {}
    options = {"preset": "medium"}
    make_video(folder / "h264.mp4", options=options, **common)
    files["five"] = folder / "five.mp4"
    loop_video(folder / "h264.mp4", files["five"], 30)
    if quick:
        return files
    for kind in ("mp4", "mkv"):
        files[f"hour.{kind}"] = folder / f"hour.{kind}"
        loop_video(folder / "h264.mp4", files[f"hour.{kind}"], 360)
    options = {"preset": "veryfast", "sc_threshold": "0"}
    make_video(folder / "endless.mp4", gop=10_000, options=options, **(common | {"duration": 20.0}))
    common["duration"] = 5.0
    files["endless"] = folder / "endless.mp4"
    for codec, kind in (("libx265", "mp4"), ("libvpx-vp9", "webm"), ("libsvtav1", "webm")):
        make_video(folder / f"{codec}.{kind}", codec=codec, **common)
        files[codec] = folder / f"minute-{codec}.{kind}"
        loop_video(folder / f"{codec}.{kind}", files[codec], 12)
    return files


def cases(files: dict[str, Path]) -> Iterator[Case]:
    full = {
        "ours": ours,
        "decord, frame by frame": by_decord,
        "decord, one batch": decord_batch,
        "every frame": every_frame(),
    }
    cheap = {
        "every frame, no loop filter": every_frame(skip_loop_filter="all"),
        "every reference frame": every_frame(skip_frame="NONREF"),
        "every keyframe (fewer frames)": every_frame(skip_frame="NONKEY"),
    }
    yield Case("5 min H.264", files["five"], 300, full | cheap)
    yield Case("5 min H.264", files["five"], 128, full)
    if "hour.mp4" not in files:
        return
    yield Case("1 h H.264 mp4", files["hour.mp4"], 64, full)
    yield Case("1 h H.264 mp4", files["hour.mp4"], 256, {"ours": ours})
    yield Case("1 h H.264 mkv", files["hour.mkv"], 256, {"ours": ours})
    yield Case("20 s H.264, one keyframe", files["endless"], 20, full)
    yield Case("1 min HEVC", files["libx265"], 60, full)
    yield Case("1 min VP9", files["libvpx-vp9"], 60, full)
    no_decord = {name: way for name, way in full.items() if "decord" not in name}
    yield Case("1 min AV1", files["libsvtav1"], 60, no_decord)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="five minutes of H.264 only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        files = make_files(Path(folder), arguments.quick)
        for name, path in files.items():
            began = time.perf_counter()
            info = probe(path)
            took = time.perf_counter() - began
            rate = info.size_bytes * 8 / info.duration / 1e6
            print(f"{name}: {info.duration:.0f} s, {rate:.1f} Mbit/s, probed in {took:.2f} s")
        print(f"made in {time.perf_counter() - start:.0f} s\n")
        print(f"{'file':28} {'way':34} {'got':>4} {'clock s':>8} {'CPU s':>8} {'':>6}ratios")
        for case in cases(files):
            measure(case)


if __name__ == "__main__":
    main()
